"""Facts about mlx-lm's module trees: where the blocks are, which linears are routers, how many experts run.

Written as rules over paths and config keys rather than a table of families, so that a new family of the
same make needs no change here.
"""

import re
from typing import Any

import mlx.nn as nn

from mlx_optiq_ext.errors import UnsupportedModel

__all__ = ["Blocks", "experts_per_token", "find_blocks", "is_router", "is_selector", "is_state_projection"]

_ROUTER = re.compile(r"(^|\.)(gate|router|router\.(layer|proj|gate|classifier|weight)|gate\.wg|wg)$")
_SELECTOR = re.compile(r"\.(indexer\.|index_[a-z]+_proj$)")
_STATE_PROJECTION = re.compile(r"\.(dt_proj|in_proj_ba|in_proj_a|in_proj_b)$")
_EXPERT_KEYS = (
    "num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k_experts", "moe_topk", "top_k",
    "experts_per_token", "num_selected_experts", "moe_num_active_experts",
)  # fmt: skip


class Blocks:
    """The list of transformer blocks and where it stands in the tree.

    Args:
        prefix: Dotted path of the list, such as ``model.layers``.
        modules: The blocks, in order of the list.
    """

    def __init__(self, prefix: str, modules: list[nn.Module]) -> None:
        self.prefix = prefix
        self.modules = modules

    def __len__(self) -> int:
        return len(self.modules)

    def index_of(self, path: str) -> int | None:
        """Block that a path belongs to, None outside of blocks."""
        if not path.startswith(self.prefix + "."):
            return None
        head = path[len(self.prefix) + 1 :].split(".", 1)[0]
        return int(head) if head.isdigit() else None

    def role_of(self, path: str) -> str:
        """Path within its block; the path's last two parts outside of blocks."""
        if self.index_of(path) is None:
            return ".".join(path.split(".")[-2:]) if path.count(".") > 1 else path
        return path[len(self.prefix) + 1 :].split(".", 1)[1]


def find_blocks(model: nn.Module) -> Blocks:
    """Locate the blocks: the list that ``model.layers`` returns, else the longest list of modules.

    Raises:
        UnsupportedModel: The tree has no list of modules.
    """
    lists: list[tuple[str, list[nn.Module]]] = []
    _collect(model, "", lists)
    wanted = getattr(model, "layers", None)
    if wanted:
        first = wanted[0]
        lists = [(p, items) for p, items in lists if any(item is first for item in items)] or lists
    if not lists:
        raise UnsupportedModel(
            f"{type(model).__module__}: no list of blocks in the module tree; use stock `mlx_lm.convert -q`"
        )
    prefix, modules = max(lists, key=lambda item: len(item[1]))
    return Blocks(prefix, modules)


def is_router(path: str) -> bool:
    """Whether a linear at this path chooses experts."""
    return bool(_ROUTER.search(path))


def is_selector(path: str) -> bool:
    """Whether a linear at this path only chooses which positions attention looks at."""
    return bool(_SELECTOR.search(path))


def is_state_projection(path: str) -> bool:
    """Whether a linear at this path yields decay or step size of a state-space layer."""
    return bool(_STATE_PROJECTION.search(path))


def experts_per_token(config: dict[str, Any]) -> int | None:
    """How many routed experts a token runs through, None where the config does not say."""
    for part in (config, config.get("text_config") or {}):
        for key in _EXPERT_KEYS:
            if isinstance(part.get(key), int) and part[key] > 0:
                return int(part[key])
    return None


def _collect(node: Any, path: str, found: list[tuple[str, list[nn.Module]]]) -> None:
    """Every list of modules below a node, with its path."""
    children = node.items() if isinstance(node, dict) else []
    for name, child in children:
        where = f"{path}.{name}" if path else str(name)
        if isinstance(child, list) and child and all(isinstance(item, nn.Module) for item in child):
            found.append((where, child))
            for index, item in enumerate(child):
                _collect(item, f"{where}.{index}", found)
        elif isinstance(child, dict):
            _collect(child, where, found)
