"""A uniform quantization of the reference, as stock mlx-lm would make it."""

from collections.abc import Callable
from typing import Any

import mlx.nn as nn

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.models.load import cast_floats, float_dtype, load_model
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.quant import Choice

__all__ = ["load_uniform", "stock_predicate"]


def load_uniform(
    reference: ModelRef, choice: Choice, *, trust_remote_code: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """The reference quantized as ``mlx_lm.convert -q`` would: one choice, the family's own exceptions.

    Returns:
        The model with lazy packed weights, and the reference's config.
    Raises:
        UsageError: ``choice`` is keep, or fits no module.
    """
    model, config = load_model(reference, trust_remote_code=trust_remote_code)
    cast_floats(model, float_dtype(model, config))
    if choice.mode == "keep":
        return model, config
    predicate = stock_predicate(model, choice)
    nn.quantize(model, choice.group_size, choice.bits, mode=choice.mode, class_predicate=predicate)
    if not any("scales" in module for _, module in model.named_modules()):
        raise UsageError(
            f"no module of {reference.source} can be stored as {choice.label}; "
            f"give a smaller group, such as {choice.bits}g32"
        )
    return model, config


def stock_predicate(model: nn.Module, choice: Choice) -> Callable[[str, nn.Module], bool | dict[str, Any]]:
    """What stock mlx-lm would answer per module for one uniform choice.

    Source: mlx_lm.utils ``quantize_model``: modules whose last axis the group does not divide are left
        alone, and the family's ``quant_predicate`` decides the rest.
    """
    own = getattr(model, "quant_predicate", None)

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % choice.group_size != 0:
            return False
        answer: bool | dict[str, Any] = own(path, module) if own is not None else True
        return answer

    return predicate
