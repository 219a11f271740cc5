"""Whole-model gradients to judge the block-by-block ones by."""

import unittest.mock
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_optiq_ext.models.intercept import constant_indices
from mlx_optiq_ext.models.reverse import Reverse
from mlx_optiq_ext.models.tape import Tape, logits_of
from mlx_optiq_ext.models.taps import Capture
from mlx_optiq_ext.models.walk import quantizable_modules

__all__ = ["gradients_by_block", "gradients_of_whole_model"]


def gradients_of_whole_model(model: nn.Module, tokens: mx.array, cotangent: mx.array) -> dict[str, Any]:
    """d Σ logits · cotangent / d weight of every quantizable path, by one call of mx.grad.

    A tied table is differentiated as a table only: its use as head is measured on the logits themselves.
    """
    modules = quantizable_modules(model)
    weights = {path: module.weight for path, module in modules.items()}

    def total(changed: dict[str, mx.array]) -> mx.array:
        for path, module in modules.items():
            module.weight = changed[path]
        return mx.sum(logits_of(model(tokens)).astype(mx.float32) * cotangent)

    try:
        tied = unittest.mock.patch.object(
            nn.Embedding, "as_linear", lambda e, x: x @ mx.stop_gradient(e.weight).T
        )
        with tied, constant_indices():
            gradients = mx.grad(total)(weights)
    finally:
        for path, module in modules.items():
            module.weight = weights[path]
    return {path: np.array(gradient) for path, gradient in gradients.items()}


def gradients_by_block(model: nn.Module, tokens: mx.array, cotangent: mx.array) -> dict[str, Any]:
    """The same from the inputs and output gradients that :class:`Reverse` yields, for the paths it yields."""
    tape = Tape(model, tokens)
    tape.forward()
    modules = quantizable_modules(model)
    found: dict[str, Any] = {}

    def of_window(item: int, _: mx.array) -> mx.array:
        return cotangent[item : item + 1]

    for captured in Reverse(tape, of_window).run():
        for captures in captured.items:
            for capture in captures:
                path = capture.call.path
                found[path] = found.get(path, 0) + _weight_gradient(capture, modules[path].weight.shape)
    return found


def _weight_gradient(capture: Capture, shape: tuple[int, ...]) -> Any:
    call, g = capture.call, np.array(capture.g).astype(np.float64)
    result = np.zeros(shape)
    x = np.array(call.x)
    if np.issubdtype(x.dtype, np.integer):
        np.add.at(result, x.reshape(-1), g.reshape(-1, shape[-1]))
        return result
    if len(shape) == 2:
        return g.reshape(-1, shape[0]).T @ x.reshape(-1, shape[1])
    if call.experts is not None:
        experts = np.array(call.experts)
        x = np.broadcast_to(x[..., 0, :], (*experts.shape, x.shape[-1])).reshape(-1, shape[2])
        np.add.at(result, experts.reshape(-1), g.reshape(-1, shape[1], 1) * x[:, None, :])
        return result
    x = np.broadcast_to(x, (*g.shape[:-1], x.shape[-1]))
    for head in range(shape[0]):
        own_x, own_g = x[:, head].reshape(-1, x.shape[-1]), g[:, head].reshape(-1, g.shape[-1])
        result[head] = own_x.T @ own_g if call.transposed else own_g.T @ own_x
    return result
