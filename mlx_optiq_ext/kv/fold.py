"""Put the rotation of cached values into the weights: W_v makes rotated values, W_o turns them back.

Between the two stands nothing but a weighted sum over positions, which an orthonormal rotation of every head
passes through. Whether that is so is decided by running each attention module both ways, not by its family.
Knows nothing of quantization or files. Called by ``convert.opening``.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache

from mlx_optiq_ext.errors import UnsupportedModel
from mlx_optiq_ext.kv.codec import rotation_order
from mlx_optiq_ext.kv.observe import observe
from mlx_optiq_ext.models.families import find_blocks
from mlx_optiq_ext.models.intercept import intercepted
from mlx_optiq_ext.models.walk import get_module
from mlx_optiq_ext.types.kv import KVSite

__all__ = ["CONFIG_KEY", "FoldPlan", "ValueFold", "find_folds", "fold_values", "rotated_blocks"]

CONFIG_KEY = "optiq_kv"
"""Key of config.json that says which blocks make rotated values; mlx-lm ignores it."""

_VALUE = re.compile(r"^(v_proj|wv|c_v|value|attn_value)$")
_FUSED = re.compile(r"^(qkv_proj|q_k_v_proj|wqkv|Wqkv|query_key_value|c_attn)$")
_OUTPUT = re.compile(r"^(o_proj|wo|out_proj|c_proj|dense|attn_out)$")
_BETWEEN = re.compile(r"^(v|value)_?(layer)?norm$|_gate$|^gate|^g_proj$|sub_norm$")
_TOKENS = 8
_TOLERANCE = 1e-4


class ValueFold(NamedTuple):
    """One attention module whose values can be rotated in the weights."""

    block: int
    attention: str
    """Path of the module."""
    value: str
    """Path of the linear that makes values, alone or behind queries and keys."""
    output: str
    heads: int
    """Key-value heads."""
    dim: int
    """Numbers per head."""


class FoldPlan(NamedTuple):
    """Which blocks can be folded."""

    folds: tuple[ValueFold, ...]
    refused: tuple[tuple[int, str], ...]
    """(block, reason) of blocks with cached values that are left as they are."""

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks that will make rotated values."""
        return tuple(fold.block for fold in self.folds)

    @property
    def reasons(self) -> tuple[str, ...]:
        """One sentence per reason, with the blocks it holds for."""
        by_reason: dict[str, list[int]] = {}
        for block, reason in self.refused:
            by_reason.setdefault(reason, []).append(block)
        return tuple(
            f"{'block' if len(blocks) == 1 else 'blocks'} {', '.join(map(str, blocks))}: {reason}"
            for reason, blocks in by_reason.items()
        )


def rotated_blocks(config: dict[str, Any]) -> tuple[int, ...]:
    """Blocks whose weights make rotated values, as config.json says; none where it says nothing."""
    entry = config.get(CONFIG_KEY)
    found = entry.get("values_rotated") if isinstance(entry, dict) else None
    return tuple(block for block in found if isinstance(block, int)) if isinstance(found, list) else ()


def find_folds(model: nn.Module) -> FoldPlan:
    """Find the blocks that can be folded, by their modules and by running each attention both ways.

    Args:
        model: Dense, float32, weights lazy; for this alone, since the weights of blocks are let go.
    Raises:
        UnsupportedModel: See :func:`~mlx_optiq_ext.kv.observe.observe`; or it does not run on the CPU.
    Cost: two passes of 8 tokens through every attention module, on the CPU; one module in memory.
    """
    sites: dict[int, list[KVSite]] = {}
    for site in observe(model).sites:
        if site.layer is not None:
            sites.setdefault(site.layer, []).append(site)
    modules = find_blocks(model)
    refused: list[tuple[int, str]] = []
    found: list[ValueFold] = []
    owners = _owners(modules.modules)
    foreign = _has_borrowed_values(modules.modules)
    for block, own in sorted(sites.items()):
        prefix = f"{modules.prefix}.{block}"
        fold = _by_structure(prefix, block, modules.modules[block], own, owners)
        if foreign:
            refused.append((block, "some blocks read the values of others"))
        elif isinstance(fold, str):
            refused.append((block, fold))
        else:
            found.append(fold)
    kept = []
    wrong = _differing(model, found) if found else {}
    for fold in found:
        if fold.block in wrong:
            refused.append((fold.block, wrong[fold.block]))
        else:
            kept.append(fold)
    return FoldPlan(tuple(kept), tuple(sorted(refused)))


def fold_values(model: nn.Module, folds: Sequence[ValueFold]) -> None:
    """Rotate values in the weights of every fold; lazy, in place, in the type of the weights."""
    for fold in folds:
        _fold(get_module(model, fold.value), get_module(model, fold.output), fold)


def _fold(value: Any, output: Any, fold: ValueFold) -> None:
    start = value.weight.shape[0] - fold.heads * fold.dim
    value.weight = _rows_rotated(value.weight, start, fold)
    if "bias" in value:
        value.bias = _rows_rotated(value.bias, start, fold)
    output.weight = _rotated(output.weight, fold.dim)


def _rows_rotated(array: mx.array, start: int, fold: ValueFold) -> mx.array:
    """Rows from ``start`` on become Rᵀ · rows, head by head: (K·D, …) or (K·D,)."""
    rows = array[start:].reshape(fold.heads, fold.dim, -1)
    turned = _rotated(rows.swapaxes(1, 2), fold.dim).swapaxes(1, 2)
    turned = turned.reshape(array[start:].shape)
    return turned if not start else mx.concatenate([array[:start], turned])


def _rotated(array: mx.array, dim: int) -> mx.array:
    """x·R along heads of ``dim`` numbers in the last axis; summed in float32.

    R is ``kv.codec.hadamard_matrix`` made orthonormal. The transform adds and subtracts, so it is as exact
    on devices whose matrix product is not.
    """
    order = rotation_order(dim)
    heads = array.astype(mx.float32).reshape(*array.shape[:-1], array.shape[-1] // order, order)
    return mx.hadamard_transform(heads, scale=order**-0.5).reshape(array.shape).astype(array.dtype)


def _by_structure(
    prefix: str, block: int, module: nn.Module, sites: Sequence[KVSite], owners: dict[int, int]
) -> ValueFold | str:
    """The fold that names and shapes suggest, or why there is none."""
    if len(sites) > 1:
        return "the block fills several caches"
    site = sites[0]
    rows, found = site.heads * site.value_dim, []
    for path, attention in module.named_modules():
        values = [name for name in attention if _VALUE.match(name)] or [
            n for n in attention if _FUSED.match(n)
        ]
        outputs = [name for name in attention if _OUTPUT.match(name)]
        if values and outputs:
            found.append((path, attention, values[0], outputs[0]))
    if len(found) != 1:
        return "no attention with a value and an output projection of its own"
    path, attention, value, output = found[0]
    if not all(_is_dense(attention[name]) for name in (value, output)):
        return "value or output projection is not a plain linear"
    if owners[id(attention[value])] > 1:
        return "its projections serve several blocks"
    between = [name for name in attention if _BETWEEN.search(name)]
    if between:
        return f"{between[0]} stands between value and output projection"
    has, wide = attention[value].weight.shape[0], attention[output].weight.shape[1]
    expected = rows if _VALUE.match(value) else wide + site.heads * (site.key_dim + site.value_dim)
    if has != expected or wide % rows or rotation_order(site.value_dim) < 2:
        return f"projections of {has} and {wide} numbers do not fit {site.heads} heads of {site.value_dim}"
    where = f"{prefix}.{path}" if path else prefix
    return ValueFold(block, where, f"{where}.{value}", f"{where}.{output}", site.heads, site.value_dim)


def _is_dense(module: Any) -> bool:
    return type(module) is nn.Linear and module.weight.ndim == 2 and "scales" not in module


def _owners(blocks: Sequence[nn.Module]) -> dict[int, int]:
    """In how many places each module stands, by its id."""
    counts: dict[int, int] = {}
    for block in blocks:
        for _, module in block.named_modules():
            counts[id(module)] = counts.get(id(module), 0) + 1
    return counts


def _has_borrowed_values(blocks: Sequence[nn.Module]) -> bool:
    """Whether an attention makes queries and output but neither keys nor values."""
    for block in blocks:
        for _, module in block.named_modules():
            names = set(module)
            if {"q_proj", "o_proj"} <= names and not any(re.search("v|k_proj|c_attn", n) for n in names):
                return True
    return False


def _differing(model: nn.Module, folds: Sequence[ValueFold]) -> dict[int, str]:
    """Run every attention module on random numbers before and after folding; block → what is wrong."""
    by_id = {id(get_module(model, fold.attention)): fold for fold in folds}
    seen: dict[int, str] = {}

    def compare(module: nn.Module, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        fold = by_id[id(module)]
        if fold.block not in seen:
            runs = [copy.deepcopy(_with_noise(args, kwargs, mx.random.key(fold.block))) for _ in range(2)]
            before = list(_arrays(original(*runs[0][0], **runs[0][1])))
            mx.eval(before)
            fold_values(model, [fold])
            after = list(_arrays(original(*runs[1][0], **runs[1][1])))
            mx.eval(after)
            seen[fold.block] = _difference(before, after)
            # From here on only shapes matter: the weights are let go before anything refers to them.
            module.update(tree_map(mx.zeros_like, module.parameters()))
            mx.clear_cache()
        return original(*args, **kwargs)

    modules = [get_module(model, fold.attention) for fold in folds]
    run: Any = model
    try:
        with mx.stream(mx.cpu), intercepted(modules, compare):
            run(mx.zeros((1, _TOKENS), dtype=mx.int32), cache=make_prompt_cache(model))
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UnsupportedModel(
            f"{type(model).__module__}: its attention cannot be compared with and without rotated values "
            f"({error}); leave the values as they are"
        ) from error
    wrong = {fold.block: seen.get(fold.block, "the attention was not run") for fold in folds}
    return {block: reason for block, reason in wrong.items() if reason}


def _with_noise(
    args: tuple[Any, ...], kwargs: dict[str, Any], key: mx.array
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call on random activations; masks, caches and positions stay."""

    def noise(x: Any) -> Any:
        wanted = isinstance(x, mx.array) and x.ndim == 3 and mx.issubdtype(x.dtype, mx.floating)
        return mx.random.normal(x.shape, key=key).astype(x.dtype) if wanted else x

    return tuple(noise(x) for x in args), {name: noise(x) for name, x in kwargs.items()}


def _arrays(output: Any) -> Iterator[mx.array]:
    """Every array of what a module returned, float32."""
    if isinstance(output, mx.array):
        yield output.astype(mx.float32)
    elif isinstance(output, tuple | list):
        for item in output:
            yield from _arrays(item)


def _difference(before: Sequence[mx.array], after: Sequence[mx.array]) -> str:
    """Why two outputs are not the same; empty where they are, up to float32 rounding."""
    for first, second in zip(before, after, strict=True):
        size = float(mx.max(mx.abs(first)))
        if not size or not float(mx.max(mx.abs(first - second))) <= _TOLERANCE * size:
            return "rotated values change what its attention returns"
    return ""
