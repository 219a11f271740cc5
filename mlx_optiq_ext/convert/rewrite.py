"""Write a checkpoint after a bit map, block by block, with the rounding corrected on what each block sees.

The model runs forward once over the calibration text. Each block is quantized when its inputs are known,
then runs quantized, so that later blocks see what they will see in use. One block is in memory at a time.
Knows nothing of how the bit map was found.
"""

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_optiq_ext.measure.moments import ExpertGrams, Moments, input_moments
from mlx_optiq_ext.models.arrays import named_arrays, split_arrays
from mlx_optiq_ext.models.intercept import intercepted
from mlx_optiq_ext.models.tape import Tape
from mlx_optiq_ext.models.taps import Call, UnitTap
from mlx_optiq_ext.models.walk import get_module
from mlx_optiq_ext.quant.correct import Level, Packed, pack, unpack
from mlx_optiq_ext.quant.reference import Reference
from mlx_optiq_ext.quant.write import CheckpointWriter
from mlx_optiq_ext.types.progress import Progress, ProgressSink
from mlx_optiq_ext.types.quant import BitMap, Choice

__all__ = ["Rewriter"]

_HEAD_TOKENS = 8192
_GROUP_TOKENS = 1024
"""Tokens that a block sees at a time while the inputs of its tensors are noted."""
_CHUNK_WEIGHTS = 1 << 25
"""Weights that are rounded at a time, and numbers in the Grams for them; rows are independent."""


class Rewriter:
    """Quantizes a reference into a checkpoint writer.

    Args:
        reference: Opened model; its weights are replaced as it goes, so it cannot be used after.
        bit_map: Choice of every quantizable path.
        level: Correction; blocks that the text does not reach, and tensors without inputs to weigh by,
            fall back to a lower one.
        dtype: Stored type of scales, biases and unquantized tensors.
        columns: Per embedding and transposed head the importance of its columns
            (:attr:`SensitivityTable.column_importance`).
        writer: Where tensors go; None only replaces the weights in memory (resident models).
    """

    def __init__(
        self,
        reference: Reference,
        bit_map: BitMap,
        *,
        level: Level,
        dtype: mx.Dtype,
        columns: Mapping[str, tuple[float, ...]],
        writer: CheckpointWriter | None,
    ) -> None:
        self._reference = reference
        self._choices = dict(bit_map.choices)
        self._level = level
        self._dtype = dtype
        self._columns = columns
        self._writer = writer
        self._written: set[str] = set()
        self._same: dict[int, list[str]] = {}
        """Paths of each module, by its id: shared ones have several."""
        for path in self._choices:
            self._same.setdefault(id(get_module(reference.model, path)), []).append(path)
        self.fallbacks: list[str] = []

    def run(self, tokens: mx.array | None, progress: ProgressSink) -> None:
        """Quantize and write every parameter.

        Args:
            tokens: Calibration windows (W, T); None quantizes without running the model (level none).
            progress: Stage ``write``, one step per block and one for the rest.
        """
        if tokens is None or self._level == "none":
            self._plain(progress)
            return
        tape = Tape(self._reference.model, tokens, self._reference.memory())
        group = max(1, _GROUP_TOKENS // int(tokens.shape[1]))
        head_calls: list[Call] = []
        self._blocks(tape, group, head_calls, progress)
        self._outside(tape, head_calls)
        self._rest(self._reference.model, "")
        progress(Progress(stage="write", done=len(tape.blocks) + 1, total=len(tape.blocks) + 1))

    def _blocks(self, tape: Tape, group: int, head_calls: list[Call], progress: ProgressSink) -> None:
        total = len(tape.blocks) + 1
        index_of = {id(module): i for i, module in enumerate(tape.blocks.modules)}
        call = -1
        tape.find_windows()
        done: set[int] = set()

        def answer(block: nn.Module, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal call
            call += 1
            index = index_of[id(block)]
            if not done:
                mx.eval(split_arrays((args, kwargs))[0])
                tape.memory.release_outside()
            with tape.memory.present(index):
                if index not in done:
                    done.add(index)
                    tap = UnitTap(tape.paths)
                    with intercepted(tape.members(index), tap):
                        _run_in_groups(original, tape.window_groups(call, (args, kwargs), group), tap)
                    self._quantize_block(f"{tape.blocks.prefix}.{index}.", block, tap.calls)
                    progress(Progress(stage="write", done=len(done), total=total))
                    tap.calls.clear()
                output = tape.run_in_groups(call, original, (args, kwargs), group)
            mx.clear_cache()
            return output

        def note(module: nn.Module, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            path = tape.paths[id(module)]
            as_head = bool(kwargs.pop("_as_linear", False)) or path in tape.heads
            if as_head or not isinstance(module, nn.Embedding):
                head_calls.append(Call(path, copy(args[0]), None, False, as_head))
            return original(args[0][:1, :1]) if as_head else original(*args, **kwargs)

        with intercepted(tape.blocks.modules, answer), intercepted(tape.outside, note):
            self._reference.model(tape.tokens)
        for index in (i for i in range(len(tape.blocks)) if i not in done):
            with tape.memory.present(index):
                self._quantize_block(f"{tape.blocks.prefix}.{index}.", tape.blocks.modules[index], [])

    def _quantize_block(self, prefix: str, block: nn.Module, calls: list[Call]) -> None:
        """Quantize every unit of a block from what its calls saw, and write all the block's parameters."""
        by_path: dict[str, list[Call]] = {}
        for call in calls:
            by_path.setdefault(call.path, []).append(call)
        for path in [p for p in self._choices if p.startswith(prefix) and p not in self._written]:
            module = get_module(self._reference.model, path)
            moments = None
            if path in by_path and self._choices[path].mode != "keep":
                moments = input_moments(
                    by_path[path], module.weight.shape, want_gram=self._wants_gram(path)
                ) or self._known_moments(path)
            self._quantize(path, moments)
        self._rest(block, prefix)

    def _outside(self, tape: Tape, head_calls: list[Call]) -> None:
        """Embeddings, head and projections outside of blocks."""
        for module in tape.outside:
            path = tape.paths[id(module)]
            moments: Moments | None = None
            own = [call for call in head_calls if call.path == path]
            if own and self._choices[path].mode != "keep":
                flat = own[0].x.reshape(-1, own[0].x.shape[-1])[:_HEAD_TOKENS]
                moments = input_moments(
                    [own[0]._replace(x=flat)], module.weight.shape, want_gram=self._wants_gram(path)
                )
            self._quantize(path, moments or self._known_moments(path))
            self._drop(path)

    def _wants_gram(self, path: str) -> bool:
        """Only affine choices can be corrected fully; the float modes take the importance."""
        return self._level == "full" and self._choices[path].mode == "affine"

    def _known_moments(self, path: str) -> Moments | None:
        """What the measurement noted for tensors whose last axis no input runs along."""
        if path not in self._columns:
            return None
        return Moments(mx.array(self._columns[path], dtype=mx.float32), None)

    def _plain(self, progress: ProgressSink) -> None:
        """Quantize without correction, one unit at a time."""
        for done, path in enumerate(self._choices):
            if path not in self._written:
                self._quantize(path, None)
            self._drop(path)
            progress(Progress(stage="write", done=done + 1, total=len(self._choices) + 1))
        self._rest(self._reference.model, "")
        progress(Progress(stage="write", done=len(self._choices) + 1, total=len(self._choices) + 1))

    def _quantize(self, path: str, moments: Moments | None) -> None:
        """Quantize one tensor, write its parts, leave the weight in memory as it will be used."""
        module, choice = get_module(self._reference.model, path), self._choices[path]
        same = self._same[id(module)]
        self._written.update(same)
        if choice.mode == "keep":
            for p in same:
                self._add(f"{p}.weight", module.weight)
            return
        level: Level = self._level
        if moments is None and level != "none":
            level = "none"
            self.fallbacks.append(path)
        elif level == "full" and moments is not None and moments.gram is None:
            level = "fast"
        packed = _pack_rows(module.weight, choice, level, self._dtype, moments)
        for p in same:
            self._write_packed(p, packed)
        module.weight = unpack(packed, choice).astype(module.weight.dtype)
        if self._writer is None or level != "none":
            mx.eval(module.weight)

    def _drop(self, path: str) -> None:
        """Free a weight that is written and will not be run."""
        module = get_module(self._reference.model, path)
        if self._writer is not None:
            module.weight = mx.zeros((1,) * module.weight.ndim)

    def _write_packed(self, path: str, packed: Packed) -> None:
        self._write(f"{path}.weight", packed.weight)
        self._write(f"{path}.scales", packed.scales)
        if packed.biases is not None:
            self._write(f"{path}.biases", packed.biases)

    def _rest(self, module: nn.Module, prefix: str) -> None:
        """Write every parameter below ``module`` that no unit wrote."""
        for name, array in named_arrays(module.parameters()):
            full = prefix + name
            if full.rpartition(".")[0] in self._written and full.endswith(".weight"):
                continue
            self._add(full, array)

    def _add(self, name: str, array: mx.array) -> None:
        """Write one unquantized parameter in the type it is stored in."""
        self._write(name, array.astype(self._reference.written_dtype(name, self._dtype)))

    def _write(self, name: str, array: mx.array) -> None:
        if self._writer is not None and name not in self._writer.names:
            self._writer.add(name, array)


def _run_in_groups(
    run: Callable[..., Any], groups: Iterable[tuple[tuple[Any, ...], dict[str, Any]]], tap: UnitTap
) -> None:
    """Run a block on a few windows at a time and keep, evaluated, only what ``tap`` notes."""
    for args, kwargs in groups:
        before = len(tap.calls)
        output = run(*args, **kwargs)
        mx.eval([[call.x, call.experts] for call in tap.calls[before:]])
        del output


def _pack_rows(
    weight: mx.array, choice: Choice, level: Level, dtype: mx.Dtype, moments: Moments | None
) -> Packed:
    """Quantize a tensor, a large one in chunks of rows (experts)."""
    step = max(1, _CHUNK_WEIGHTS * weight.shape[0] // weight.size)
    if moments is not None and isinstance(moments.gram, ExpertGrams):
        step = min(step, max(1, _CHUNK_WEIGHTS // weight.shape[-1] ** 2))
    parts = []
    for start in range(0, weight.shape[0], step):
        stop = min(start + step, weight.shape[0])
        importance, gram = moments.of_rows(start, stop) if moments is not None else (None, None)
        rows = weight[start:stop]
        parts.append(pack(rows, choice, level=level, float_dtype=dtype, importance=importance, gram=gram))
        mx.eval(parts[-1].weight, parts[-1].scales, parts[-1].biases)
    if len(parts) == 1:
        return parts[0]
    joined = [mx.concatenate([getattr(p, name) for p in parts]) for name in ("weight", "scales")]
    biases = [p.biases for p in parts if p.biases is not None]
    return Packed(weight=joined[0], scales=joined[1], biases=mx.concatenate(biases) if biases else None)
