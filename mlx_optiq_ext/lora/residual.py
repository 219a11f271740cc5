"""The error that quantization made, seen by an adapter: its spectrum, and the factors that undo most of it.

The error W − Q of every column is weighted with the root of its input's second moment, so that the largest
singular values are those of the outputs. Needs the original weights. Called by ``train``; evaluates.
Source: Zhang et al. 2025 (QERA), the approximation with independent inputs; Eckart and Young 1936.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_optiq_ext.errors import AdapterError
from mlx_optiq_ext.lora.factors import Factors
from mlx_optiq_ext.lora.layers import set_factors
from mlx_optiq_ext.lora.spectrum import Spectrum
from mlx_optiq_ext.lora.targets import choice_of
from mlx_optiq_ext.models.intercept import intercepted
from mlx_optiq_ext.models.walk import get_module
from mlx_optiq_ext.quant.exact import run_exactly
from mlx_optiq_ext.quant.pack import Packed, unpack
from mlx_optiq_ext.types.adapter import LoraTarget, RankMap
from mlx_optiq_ext.types.progress import Progress, ProgressSink, ignore_progress

__all__ = ["QuantizationErrors", "input_moments_of"]

Floats = npt.NDArray[np.float32]
_LEAST_SHARE = 1e-4
"""Second moments below this share of their mean are raised to it: a column that no text used is not free."""


class QuantizationErrors:
    """Weighted errors of the targets of one base; made before adapters are put on it.

    Args:
        model: The quantized base.
        original: The same model, unquantized; weights may be lazy.
        tokens: Calibration text (W, T), for the second moments of inputs.
        targets: Modules to look at; those that are not quantized have no error.
    Raises:
        AdapterError: The original has another tree or other shapes.
    Cost: one forward pass over ``tokens``, window by window.
    """

    def __init__(
        self, model: nn.Module, original: nn.Module, tokens: mx.array, targets: Sequence[LoraTarget]
    ) -> None:
        self._targets = {target.path: target for target in targets if target.choice is not None}
        self._base = {path: get_module(model, path) for path in self._targets}
        self._original = original
        for path, target in self._targets.items():
            _check_same(path, target, original)
        self._moments = input_moments_of(model, tokens, self._base)

    def spectra(self, progress: ProgressSink = ignore_progress) -> dict[str, Spectrum]:
        """Spectrum of every weighted error by path.

        Cost: one eigenvalue decomposition per tensor (and expert), of its smaller side.
        """
        found: dict[str, Spectrum] = {}
        for done, path in enumerate(self._targets):
            progress(Progress(stage="spectra", done=done, total=len(self._targets), detail=path))
            parts = [_energies(piece.weighted()) for piece in self._pieces(path)]
            found[path] = np.asarray(np.sum(parts, axis=0), dtype=np.float64)
            mx.clear_cache()
        return found

    def start(
        self, layers: Mapping[str, Any], ranks: RankMap, progress: ProgressSink = ignore_progress
    ) -> None:
        """Give adapter layers the factors that undo most of the error at their rank.

        Args:
            layers: What ``apply_lora`` returned; those of modules without error are left as they are.
            ranks: Their ranks.
            progress: Stage ``start``.
        """
        todo = [path for path in layers if path in self._targets]
        for done, path in enumerate(todo):
            progress(Progress(stage="start", done=done, total=len(todo), detail=path))
            rank = ranks.ranks[path]
            pairs = [_best_pair(piece, rank) for piece in self._pieces(path)]
            left, right = (np.stack([pair[k] for pair in pairs]) / layers[path].scale ** 0.5 for k in (0, 1))
            kind = self._targets[path].kind
            a, b = (left, right) if kind == "embedding" else (right.swapaxes(1, 2), left.swapaxes(1, 2))
            a, b = (a, b) if kind == "experts" else (a[0], b[0])
            set_factors(layers[path], Factors(mx.array(a), mx.array(b)))
            mx.clear_cache()

    def _pieces(self, path: str) -> list["_Piece"]:
        """The error of a tensor, per expert."""
        target, module = self._targets[path], self._base[path]
        assert target.choice is not None
        packed = Packed(weight=module.weight, scales=module.scales, biases=module.get("biases"))
        exact = get_module(self._original, path).weight.astype(mx.float32)
        error = np.array(exact - unpack(packed, target.choice))
        moments = self._moments[path]
        if target.kind != "experts":
            return [_Piece(error, moments)]
        return [_Piece(error[e], moments[e]) for e in range(target.experts)]


class _Piece(NamedTuple):
    """One matrix of errors (rows, columns), and how much each column is felt."""

    error: Floats
    moments: Floats

    def weighted(self) -> Floats:
        return self.error * np.sqrt(self.moments)


def _check_same(path: str, target: LoraTarget, original: nn.Module) -> None:
    try:
        weight = get_module(original, path).weight
        quantized = choice_of(get_module(original, path)) is not None
    except (AttributeError, IndexError, KeyError, ValueError) as error:
        raise AdapterError(f"--original has no {path}; give the model that the base was made of") from error
    columns, rows = target.inputs, target.outputs
    if target.kind == "embedding":
        columns, rows = rows, columns
    if quantized or tuple(weight.shape[-2:]) != (rows, columns):
        found = "is quantized too" if quantized else f"has the shape {tuple(weight.shape)}"
        raise AdapterError(
            f"--original: {path} {found}; give the unquantized model that the base was made of"
        )


def input_moments_of(
    model: nn.Module, tokens: mx.array, modules: Mapping[str, nn.Module]
) -> dict[str, Floats]:
    """Mean square of every input: (I,); of experts (E, I), times the share of tokens that each gets."""
    paths: dict[int, str] = {}
    sums: dict[str, mx.array] = {}

    def note(module: nn.Module, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        as_linear = kwargs.pop("_as_linear", False)
        path, x = paths[id(module)], args[0]
        is_lookup = mx.issubdtype(x.dtype, mx.integer)
        if not is_lookup:
            second = kwargs.get("indices", args[1] if len(args) > 1 and not as_linear else None)
            squares = _sum_of_squares(x, second, int(module.weight.shape[0]))
            sums[path] = sums[path] + squares if path in sums else squares
        return original(*args, **kwargs)

    run: Any = model
    # An adapter layer may stand around a module, which is then deeper in the tree than its path says.
    places = {id(module): place for place, module in model.named_modules()}
    with run_exactly(model, "the base", remedy="use a larger machine"):
        running = {path: get_module(model, places[id(module)]) for path, module in modules.items()}
        paths |= {id(module): path for path, module in running.items()}
        with intercepted(running.values(), note):
            for window in range(tokens.shape[0]):
                mx.eval(run(tokens[window : window + 1]), sums)
    found = {path: np.array(total / tokens.size) for path, total in sums.items()}
    return {path: _raised(found.get(path), module) for path, module in modules.items()}


def _sum_of_squares(x: mx.array, experts: mx.array | None, num_experts: int) -> mx.array:
    if experts is None:
        return mx.square(x.astype(mx.float32)).reshape(-1, x.shape[-1]).sum(axis=0)
    width = x.shape[-1]
    routed = mx.broadcast_to(x.squeeze(-2), (*experts.shape, width)).reshape(-1, width)
    sums = mx.zeros((num_experts, width))
    return sums.at[experts.reshape(-1)].add(mx.square(routed.astype(mx.float32)))


def _raised(moments: Floats | None, module: nn.Module) -> Floats:
    """None stands for a table that is only looked up: every column is felt alike."""
    if moments is None:
        choice = choice_of(module)
        assert choice is not None
        return np.ones(int(module.weight.shape[-1]) * 32 // choice.bits, dtype=np.float32)
    return np.asarray(np.maximum(moments, _LEAST_SHARE * moments.mean() + 1e-30), dtype=np.float32)


def _gram(matrix: Floats) -> npt.NDArray[np.float64]:
    """Of the smaller side."""
    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return np.asarray(small @ small.T, dtype=np.float64)


def _energies(matrix: Floats) -> Spectrum:
    """Squared singular values, largest first."""
    return np.asarray(np.maximum(np.linalg.eigvalsh(_gram(matrix))[::-1], 0.0), dtype=np.float64)


def _best_pair(piece: _Piece, rank: int) -> tuple[Floats, Floats]:
    """left (rows, r) and right (r, columns), balanced, whose product is the best of its rank."""
    matrix = piece.weighted()
    vectors = np.linalg.eigh(_gram(matrix))[1][:, ::-1][:, :rank].astype(np.float32)
    if matrix.shape[0] <= matrix.shape[1]:
        left, right = vectors, vectors.T @ piece.error
    else:
        left, right = matrix @ vectors, vectors.T / np.sqrt(piece.moments)
    balance = np.sqrt(np.linalg.norm(right, axis=1) / np.maximum(np.linalg.norm(left, axis=0), 1e-30))
    balance = np.where(balance > 0, balance, 1.0)
    return np.asarray(left * balance, np.float32), np.asarray(right / balance[:, None], np.float32)
