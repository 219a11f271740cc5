"""The prefix cache that the options ask for. Called by ``engine``."""

from pathlib import Path

from mlx_optiq_ext.allocate.size import parse_nbytes
from mlx_optiq_ext.engine.disk_tier import DiskTier
from mlx_optiq_ext.engine.prefix_cache import PrefixCache
from mlx_optiq_ext.types.serve import ServeOptions

__all__ = ["build_prefix_cache"]

_SHARE = 0.25


def build_prefix_cache(options: ServeOptions, limit_nbytes: int) -> PrefixCache:
    """Memory, and below it a folder where one is named.

    Args:
        limit_nbytes: Of the whole server.
    Raises:
        UsageError: A size that cannot be read, or a folder that cannot be written.
    """
    if options.prompt_cache is None:
        in_memory = int(limit_nbytes * _SHARE)
    elif options.prompt_cache == "0":
        in_memory = 0
    else:
        in_memory = parse_nbytes(options.prompt_cache, flag="--prompt-cache")
    if options.prompt_cache_dir is None:
        return PrefixCache(in_memory)
    on_disk = parse_nbytes(options.prompt_cache_disk, flag="--prompt-cache-disk")
    return PrefixCache(in_memory, DiskTier(Path(options.prompt_cache_dir).expanduser(), on_disk))
