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
     ├ ResourceError               6    not enough memory or disk
     └ PatchError                  7    an extension of mlx-lm cannot be applied
        ├ PatchUnsupported         7    mlx-lm differs from what the patch needs
        └ PatchConflict            7    somebody else changed the same name

A message says what was found, where, and what would work.
"""

from typing import ClassVar

__all__ = [
    "BudgetInfeasible",
    "FingerprintMismatch",
    "MeasurementError",
    "ModelError",
    "ModelNotFound",
    "OptiqError",
    "OutputExists",
    "PatchConflict",
    "PatchError",
    "PatchUnsupported",
    "ResourceError",
    "UnsupportedModel",
    "UsageError",
    "VerificationError",
]


class OptiqError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the command line returns."""

    exit_code: ClassVar[int] = 1


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
