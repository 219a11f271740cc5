"""What a job needs before it may start. Called by ``owner``."""

from mlx_optiq_ext.allocate.size import format_nbytes
from mlx_optiq_ext.engine.batch import Batch
from mlx_optiq_ext.engine.job import Job
from mlx_optiq_ext.engine.prefix_cache import PrefixCache
from mlx_optiq_ext.engine.served import Loaded
from mlx_optiq_ext.errors import Overloaded

__all__ = ["may_join", "no_room", "reserved_tokens"]

_SHORT_PROMPT = 256
_TOGETHER = 8
"""Short prompts that are prefilled together."""
_AHEAD = 512
"""Answer tokens that a row must have room for before it starts, and as it goes on."""


def may_join(batch: Batch, job: Job, prefixes: PrefixCache) -> bool:
    """Whether a prompt may be computed now: what has little left to compute beside others, else alone."""
    prefilling = batch.prefilling
    if not prefilling:
        return True
    if len(prefilling) >= _TOGETHER:
        return False
    if len(job.prompt) <= _SHORT_PROMPT:
        return True
    if job.looked_up != prefixes.version:
        job.looked_up, job.known_tokens = prefixes.version, prefixes.longest(batch.cache_key(job), job.prompt)
    return len(job.prompt) - job.known_tokens <= _SHORT_PROMPT


def reserved_tokens(job: Job) -> int:
    """Tokens of answer to count with."""
    return min(job.max_tokens, job.completion_tokens + _AHEAD)


def no_room(loaded: Loaded, job: Job) -> Overloaded:
    """Why a job cannot run although nothing else does."""
    needed = loaded.sizes.nbytes(len(job.prompt) + reserved_tokens(job))
    return Overloaded(
        f"the KV cache of this request takes {format_nbytes(needed)}, more than the server has left; shorten "
        "it, or start the server with more --memory or with --kv-config"
    )
