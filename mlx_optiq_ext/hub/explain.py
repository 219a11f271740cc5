"""Turn what huggingface-hub raises into errors that say what would work.

Knows the error classes of huggingface-hub 1.x and 2.x, which sit on different HTTP clients. Called by the
other modules of this package.
"""

import errno
from typing import Final

from huggingface_hub import errors

from mlx_optiq_ext.errors import ModelNotFound, OptiqError, ResourceError

__all__ = ["HUB_ERRORS", "TRANSFER_ERRORS", "explain_hub_error", "is_unreachable"]

# The HTTP client's own base error, whichever client this huggingface-hub is built on.
_CLIENT_ERROR: Final[type[Exception]] = errors.HfHubHTTPError.__mro__[1]
_XET_ERROR: Final[type[Exception]] = getattr(errors, "XetDownloadError", errors.HfHubHTTPError)

HUB_ERRORS: Final[tuple[type[Exception], ...]] = (
    _CLIENT_ERROR,
    _XET_ERROR,
    OSError,
    errors.EntryNotFoundError,
    errors.HFValidationError,
)
"""Everything a question to the Hub raises on purpose."""

TRANSFER_ERRORS: Final[tuple[type[Exception], ...]] = (*HUB_ERRORS, RuntimeError, ValueError)
"""What a transfer of files raises besides; the native transfer library knows RuntimeError only."""

_LOGIN = "log in with `hf auth login` or set HF_TOKEN"


def is_unreachable(error: Exception) -> bool:
    """Whether the Hub gave no answer (offline, timeout, server error), so that a cached copy may serve."""
    if isinstance(error, errors.HfHubHTTPError):
        status = _status(error)
        return status == 429 or status >= 500
    no_answer = (_CLIENT_ERROR, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
    return isinstance(error, no_answer)


def explain_hub_error(
    error: Exception, repo_id: str, revision: str | None, *, kind: str = "a model"
) -> OptiqError:
    """The error of ours that tells what happened and what would work.

    Args:
        error: One of :data:`HUB_ERRORS`.
        repo_id: Repository that was asked for.
        revision: Revision that was asked for, if any.
        kind: What was looked for, with its article.
    """
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return ResourceError(
            f"the disk became full while {repo_id} was downloading; free some space, or set HF_HOME"
            " to another disk"
        )
    if isinstance(error, errors.GatedRepoError):
        return ModelNotFound(
            f"{repo_id} is gated: ask for access at https://huggingface.co/{repo_id}, then {_LOGIN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFound(
            f"{repo_id} has no revision {revision!r}; give a branch, a tag or a commit of it"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or _status(error) == 401:
        return ModelNotFound(
            f"{repo_id} is not on the Hub, or is private; check the spelling (ORGANISATION/NAME), or, if it"
            f" is yours, {_LOGIN}"
        )
    if _status(error) == 403:
        return ModelNotFound(f"the Hub refuses access to {repo_id}; {_LOGIN} with a token that may read it")
    if isinstance(error, errors.HFValidationError):
        return ModelNotFound(f"{repo_id!r} is neither a folder here nor a Hub id (ORGANISATION/NAME)")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return ModelNotFound(
            f"{repo_id} is not in the cache and HF_HUB_OFFLINE is set; unset it, or give the folder of {kind}"
        )
    if is_unreachable(error):
        status = f" (status {_status(error)})" if _status(error) else f" ({type(error).__name__})"
        return ModelNotFound(
            f"the Hub did not answer for {repo_id}{status}, and no copy is in the cache; check the"
            f" connection and run again, or give the folder of {kind}"
        )
    return ModelNotFound(f"{repo_id} could not be read from the Hub: {type(error).__name__}: {error}")


def _status(error: Exception) -> int:
    """The HTTP status an error carries; 0 where there is none."""
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)
