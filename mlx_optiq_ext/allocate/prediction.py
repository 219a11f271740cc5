"""Predicted divergences in words: what they assume, and how far to trust them.

Knows the sensitivity table and nothing of how it is shown. Called by reports, ``optiq allocate`` and the
dashboard.
"""

from mlx_optiq_ext.types.figures import number_text
from mlx_optiq_ext.types.quant import SensitivityTable

__all__ = ["predicted_as", "prediction_text"]


def predicted_as(correction: str) -> str:
    """Which rounding a prediction assumes: that of the table's errors, for uniform choices too."""
    return f"predicted with {'plain' if correction == 'none' else correction} rounding"


def prediction_text(divergence: float, table: SensitivityTable | None) -> str:
    """Show a predicted divergence as what it is: a raw estimate without an interval.

    Its spread over calibration windows makes no interval: the error of the second-order estimate is the
    larger part. Where exact probes were run, their ratio is told and what it would make of the prediction.

    Args:
        divergence: The prediction, nats per token.
        table: What it was summed from, where that is known.
    """
    is_exact = table is not None and table.method in {"kl", "published"}
    kind = "sum of single-tensor probes" if is_exact else "raw estimate"
    text = f"{number_text(divergence)} nats/token, {kind} on calibration text"
    check = table.probe_check if table else None
    if check is None:
        return text
    about = f"{check.ratio * divergence:#.2g}".rstrip(".")
    return f"{text}; {check.num_probes} exact single-tensor probes say ×{check.ratio:.2f}: about {about}"
