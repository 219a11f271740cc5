"""Every error this package raises on purpose.

::

    OptiqError                     exit code
     ├ UsageError                  2    bad option or input file
     │  ├ BudgetInfeasible         2    no allocation fits the budget
     │  └ OutputExists             2    the output folder is already there
     ├ ModelError                  3    the model cannot be used
     │  ├ ModelNotFound            3    no such repository, revision or folder, or no access to it
     │  ├ UnsupportedModel         3    mlx-lm has no such family, or a part of it cannot be handled
     │  └ FingerprintMismatch      3    two artefacts belong to different models
     ├ MeasurementError            4    non-finite values, too few tokens, nothing to measure
     ├ VerificationError           4    what was written is not what was planned
     ├ AdapterError                5    an adapter does not fit the model (HTTP 400)
     ├ RequestError                –    what a client sent cannot be served (HTTP 400)
     │  ├ PromptTooLong            –    more tokens than the context has (400)
     │  ├ UnknownName              –    no such model, adapter or stored response (404)
     │  ├ Unauthorized             –    no key, or a wrong one (401)
     │  └ Forbidden                –    another origin, or an address that is not served (403)
     ├ EngineError                 6    the server cannot run requests (HTTP 503)
     │  ├ QueueFull                6    too many requests wait (429)
     │  ├ Overloaded               6    no memory for this request now (529 or 503)
     │  └ EngineStopped            6    draining or failed (503)
     ├ ResourceError               6    not enough memory or disk
     └ PatchError                  7    an extension of mlx-lm cannot be applied
        ├ PatchUnsupported         7    mlx-lm differs from what the patch needs
        └ PatchConflict            7    somebody else changed the same name

A message says what was found, where, and what would work.
"""

from typing import ClassVar

__all__ = [
    "AdapterError",
    "BudgetInfeasible",
    "EngineError",
    "EngineStopped",
    "FingerprintMismatch",
    "Forbidden",
    "MeasurementError",
    "ModelError",
    "ModelNotFound",
    "OptiqError",
    "OutputExists",
    "Overloaded",
    "PatchConflict",
    "PatchError",
    "PatchUnsupported",
    "PromptTooLong",
    "QueueFull",
    "RequestError",
    "ResourceError",
    "Unauthorized",
    "UnknownName",
    "UnsupportedModel",
    "UsageError",
    "VerificationError",
]


class OptiqError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the command line returns."""

    exit_code: ClassVar[int] = 1
    status: ClassVar[int] = 500
    """HTTP status where a server answers with it."""


class UsageError(OptiqError):
    """An option or an input file is not usable."""

    exit_code = 2


class BudgetInfeasible(UsageError):
    """No allocation fits the budget."""


class OutputExists(UsageError):
    """The output folder exists already."""


class ModelError(OptiqError):
    """The model cannot be used."""

    exit_code = 3


class ModelNotFound(ModelError):
    """No such repository, revision or folder, or no access to it."""


class UnsupportedModel(ModelError):
    """The family, or a part of this model, cannot be handled."""


class FingerprintMismatch(ModelError):
    """Two artefacts belong to different models."""


class MeasurementError(OptiqError):
    """A measurement gave no usable number."""

    exit_code = 4


class VerificationError(OptiqError):
    """A written checkpoint is not what was planned."""

    exit_code = 4


class AdapterError(OptiqError):
    """An adapter cannot be used on this model."""

    exit_code = 5
    status = 400


class RequestError(OptiqError):
    """What a client sent cannot be served; ``param`` is the path of the field, where one is to blame."""

    status = 400

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLong(RequestError):
    """A prompt has more tokens than the context; clients read both numbers out of the words.

    Args:
        num_tokens: Of the prompt.
        limit: Of the context.
        is_least: The prompt was not tokenized; it has this many tokens or more.
    """

    def __init__(self, num_tokens: int, limit: int, *, is_least: bool = False) -> None:
        more = " (at least: a text of this length is not tokenized)" if is_least else ""
        super().__init__(f"prompt is too long: {num_tokens} tokens > {limit} maximum{more}")
        self.num_tokens = num_tokens
        self.limit = limit


class UnknownName(RequestError):
    """No such model, adapter or stored response."""

    status = 404


class Unauthorized(RequestError):
    """No API key, or a wrong one."""

    status = 401


class Forbidden(RequestError):
    """A request from another origin, or to a host name that is not served."""

    status = 403


class EngineError(OptiqError):
    """The server cannot run requests now; ``retry_after_s`` says when to ask again, where that helps."""

    exit_code = 6
    status = 503

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(EngineError):
    """Too many requests wait already."""

    status = 429


class Overloaded(EngineError):
    """There is no memory for this request now."""

    status = 529


class EngineStopped(EngineError):
    """The server is draining, or its engine failed."""


class ResourceError(OptiqError):
    """Not enough memory or disk."""

    exit_code = 6


class PatchError(OptiqError):
    """An extension of mlx-lm cannot be applied."""

    exit_code = 7


class PatchUnsupported(PatchError):
    """mlx-lm differs from what the patch needs."""


class PatchConflict(PatchError):
    """Somebody else changed the same name."""
