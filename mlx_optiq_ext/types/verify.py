"""What the verification of a written checkpoint found; stored in optiq/metadata.json."""

import msgspec

__all__ = ["VerifyReport"]


class VerifyReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Plan, config.json, bytes on disk and a fresh stock mlx-lm, compared."""

    num_paths: int
    """Quantizable paths of the plan that were compared."""
    num_tensors: int
    nbytes: int
    """Bytes of all tensors on disk."""
    mlx: str
    """Version in the fresh process."""
    mlx_lm: str
    forward: str
    """``finite logits``, or ``skipped: REASON``."""
    seconds: float
    problems: tuple[str, ...] = ()
    """Every mismatch, naming its path; empty for a good checkpoint."""
