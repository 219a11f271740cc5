"""Open the model that a conversion starts from, as it is to be quantized: type of what stays, rotated values.

Called by ``convert.model`` before the long work.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_optiq_ext.errors import UnsupportedModel, VerificationError
from mlx_optiq_ext.kv.fold import CONFIG_KEY, find_folds, fold_values, rotated_blocks
from mlx_optiq_ext.measure.divergence import kl_divergence
from mlx_optiq_ext.models.tape import logits_of
from mlx_optiq_ext.quant.reference import Reference, open_reference
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.options import ConvertOptions

__all__ = ["open_source"]

_DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
_MOST_DIVERGENCE = 1e-4
_TEXT = (
    "A river that bends does not forget the sea: it carries stones, seeds and the names of 27 villages, "
    "and in winter, when nobody looks, it writes them down in ice."
)
_NUM_TOKENS = 64


def open_source(ref: ModelRef, options: ConvertOptions) -> Reference:
    """Open a model, in the types and the basis that the options ask for.

    Args:
        ref: The unquantized model.
        options: ``dtype`` and ``rotate_values`` act here.
    Raises:
        UnsupportedModel: Values are to be rotated, and no block allows it.
        VerificationError: The model with rotated values is not the same function.
        ResourceError: It does not fit into memory.
    """
    reference = open_reference(ref, options.measure)
    if options.dtype != "auto":
        reference.stored_dtype = _DTYPES[options.dtype]
    if options.rotate_values:
        _rotate_values(reference)
        if options.sensitivity:
            reference.edit_notes += (
                f"{Path(options.sensitivity).name} is used as it is; it may be of unrotated values",
            )
    return reference


def _rotate_values(reference: Reference) -> None:
    """Fold the rotation of cached values into the weights of every block that allows it."""
    before = rotated_blocks(reference.config)
    plan = find_folds(reference.fresh())
    folds = tuple(fold for fold in plan.folds if fold.block not in before)
    if not folds and not before:
        why = "; ".join(plan.reasons) or "no cache belongs to one block"
        raise UnsupportedModel(
            f"{reference.ref.source}: --rotate-values finds no block to rotate ({why}); "
            "leave it out: `optiq kv-cache` then rotates values while the model runs"
        )
    blocks = sorted({*before, *(fold.block for fold in folds)})
    logits = _logits(reference) if reference.how == "resident" and folds else None
    note = f"values of {len(blocks)} blocks are rotated in the weights"
    left = tuple(f"values are not rotated in the weights of {reason}" for reason in plan.reasons)
    reference.edit(lambda model: fold_values(model, folds), f"rotated {blocks}", (note, *left))
    reference.config = {**reference.config, CONFIG_KEY: {"values_rotated": blocks}}
    if logits is not None:
        _require_same(reference, logits)


def _logits(reference: Reference) -> mx.array:
    """Logits on a short text, float32; evaluates, all weights resident."""
    run: Any = reference.model
    tokens = reference.tokenizer().encode(_TEXT)[:_NUM_TOKENS] or [0, 1]
    logits = logits_of(run(mx.array([tokens]))).astype(mx.float32)
    mx.eval(logits)
    return logits


def _require_same(reference: Reference, logits: mx.array) -> None:
    divergence = float(mx.mean(kl_divergence(logits, _logits(reference))))
    mx.clear_cache()
    if divergence > _MOST_DIVERGENCE:
        raise VerificationError(
            f"{reference.ref.source}: with rotated values the model is {divergence:.2g} nats per token from "
            f"itself, where {_MOST_DIVERGENCE:g} would be rounding; convert without --rotate-values"
        )
