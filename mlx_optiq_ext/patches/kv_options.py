"""``--kv-config`` and ``--kv-recent`` of mlx-lm's own commands, and what they refuse.

Stays light until one of them is given. Called by ``kv_commands``.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from mlx_optiq_ext.errors import ModelError, PatchUnsupported, UsageError
from mlx_optiq_ext.patches import kv_cache
from mlx_optiq_ext.patches.kv_command import running

if TYPE_CHECKING:
    from mlx_optiq_ext.types.kv import KVConfig

__all__ = ["model_folder", "with_kv_options"]


def with_kv_options(parser: argparse.ArgumentParser, *, opens_caches: bool) -> argparse.ArgumentParser:
    """Add the options to a parser; what it parses while its command runs takes effect.

    Args:
        parser: Of an mlx-lm command; changed.
        opens_caches: Its ``--prompt-cache-file`` is read, not written.
    """
    group = parser.add_argument_group("KV cache in mixed precision (mlx-optiq-ext)")
    group.add_argument(
        "--kv-config",
        metavar="FILE",
        help="Store keys and values of every layer as this kv_config.json says (`optiq kv-cache` makes one). "
        "Takes effect from the first token on, and batches.",
    )
    group.add_argument(
        "--kv-recent",
        metavar="N",
        type=int,
        help="Keep the last N tokens in full precision besides; overrides the file.",
    )
    stock: Any = parser.parse_args

    def parse_args(*args: Any, **kwargs: Any) -> argparse.Namespace:
        given: argparse.Namespace = stock(*args, **kwargs)
        asked = running()
        if asked is not None:
            config = _config(given, opens_caches=opens_caches)
            asked.config = None if config is None else _fitted(given, config)
        return given

    parser.parse_args = parse_args  # type: ignore[assignment,method-assign]
    return parser


def _config(given: argparse.Namespace, *, opens_caches: bool) -> "KVConfig | None":
    """The configuration that was asked for.

    Raises:
        UsageError: The file cannot be used, or options contradict each other.
        PatchUnsupported: This mlx-lm cannot be given our caches.
    """
    if given.kv_config is None:
        if given.kv_recent is not None:
            raise UsageError("--kv-recent needs --kv-config, which says how all other tokens are stored")
        return None
    if getattr(given, "kv_bits", None) is not None:
        raise UsageError("--kv-config and --kv-bits both say how the KV cache is stored; give one of them")
    cache_file = getattr(given, "prompt_cache_file", None)
    if opens_caches and cache_file is not None:
        raise UsageError(
            f"--kv-config cannot change how {cache_file} is stored: leave it out, the file says it; or make "
            "the file with `mlx_lm.cache_prompt --kv-config`"
        )
    home = sys.modules.get(kv_cache.PATCH.target)
    if home is None or not kv_cache.PATCH.is_applied(home):
        raise PatchUnsupported(
            f"--kv-config needs the patch of {kv_cache.PATCH.target}, which is not active: see `optiq doctor`"
        )
    from mlx_optiq_ext.formats.kv_config import read_kv_config  # deferred: only for who asks

    config = read_kv_config(given.kv_config)
    if given.kv_recent is None:
        return config
    if given.kv_recent < 0:
        raise UsageError(f"--kv-recent is {given.kv_recent}; use 0 or more tokens")
    return msgspec.structs.replace(config, recent=given.kv_recent)


def _fitted(given: argparse.Namespace, config: "KVConfig") -> "KVConfig":
    """The configuration for the model's weights; refused before they are read where it does not fit.

    Where it was made for other weights of the same shape, that is said on stderr.

    A model that cannot be had, or that is chosen later, is left to the command.

    Raises:
        OptiqError: As :func:`mlx_optiq_ext.kv.build.build_caches`.
    """
    folder = model_folder(given.model) if given.model else None
    if folder is None:
        return config
    from mlx_optiq_ext.hub.fingerprint import other_weights  # deferred: only for who asks
    from mlx_optiq_ext.kv.build import build_caches, follow_weights  # deferred: needs mlx
    from mlx_optiq_ext.kv.fold import rotated_blocks
    from mlx_optiq_ext.kv.observe import observe
    from mlx_optiq_ext.models.load import load_model
    from mlx_optiq_ext.types.model import ModelRef

    trust = bool(getattr(given, "trust_remote_code", False))
    ref = ModelRef(path=str(folder), source=given.model)
    try:
        model, model_config = load_model(ref, trust_remote_code=trust)
    except ModelError:  # the command says this in its own words
        return config
    max_kv_size = getattr(given, "max_kv_size", None)
    config = follow_weights(config, observe(model, max_kv_size), rotated_blocks(model_config))
    build_caches(model, config, max_kv_size)
    other = other_weights(config.model, ref) if config.model is not None else ""
    asked = running()
    if other and asked is not None:
        asked.say(f"--kv-config {other}")
    return config


def model_folder(model: str) -> Path | None:
    """Where the command will find its model, downloaded as it would do it; None where it will not."""
    if Path(model).is_dir():
        return Path(model)
    from mlx_lm import utils  # deferred: loaded by then

    from mlx_optiq_ext.hub.explain import HUB_ERRORS

    download = getattr(utils, "_download", None)
    if download is None:
        return None
    try:
        return Path(download(model))
    except HUB_ERRORS:
        return None
