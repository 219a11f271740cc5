"""Exact probes: change one tensor, run the network from its block on, compare the logits.

The network in front of the block is answered from the record. Used where the second-order estimate is
uncertain, and for the published per-layer sweep (``--method kl``). Needs the model resident.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import numpy as np

from mlx_optiq_ext.measure.calibration import Windows
from mlx_optiq_ext.measure.divergence import kl_divergence
from mlx_optiq_ext.models.tape import Tape
from mlx_optiq_ext.models.walk import get_module
from mlx_optiq_ext.quant.correct import pack, unpack
from mlx_optiq_ext.quant.errors_of import Floats
from mlx_optiq_ext.quant.journal import Journal
from mlx_optiq_ext.types.options import MeasureOptions
from mlx_optiq_ext.types.progress import Progress, ProgressSink
from mlx_optiq_ext.types.quant import Choice, Probe, Unit

__all__ = ["Prober", "probe_every_choice", "probe_uncertain", "replaced"]

_UNCERTAIN_BITS = 3
_RATIO_RANGE = (0.5, 2.0)


@contextmanager
def replaced(tape: Tape, path: str, weight: mx.array) -> Iterator[None]:
    """Put another weight in place of a module's; the identical array comes back at the end."""
    module = get_module(tape.model, path)
    original = module.weight
    module.weight = weight
    try:
        yield
    finally:
        module.weight = original


class Prober:
    """Runs exact probes on some windows.

    Args:
        tape: After :meth:`Tape.forward`, resident.
        windows: Which windows to use.
    """

    def __init__(self, tape: Tape, windows: Sequence[int]) -> None:
        self._tape = tape
        self.windows = list(windows)
        self._reference = tape.run_from(len(tape.nodes), self.windows).astype(mx.float32)
        mx.eval(self._reference)
        self._first_call = {}
        for n, node in enumerate(tape.nodes):
            self._first_call.setdefault(node.block, n)

    def start_of(self, unit: Unit) -> int:
        """First call that the unit takes part in; 0 outside of blocks."""
        return self._first_call.get(unit.block, 0) if unit.block is not None else 0

    def cost(self, unit: Unit) -> float:
        """Forward-equivalents of one probe over all calibration windows' worth of tokens."""
        share = len(self.windows) / self._tape.num_windows
        return share * (1.0 - self.start_of(unit) / max(len(self._tape.nodes), 1))

    def divergence(self, unit: Unit, weights: dict[str, mx.array]) -> Floats:
        """Mean KL per window (len(windows),) with the unit's paths replaced by ``weights``."""
        paths = list(weights)

        def run(rest: list[str]) -> mx.array:
            if not rest:
                return self._tape.run_from(self.start_of(unit), self.windows)
            with replaced(self._tape, rest[0], weights[rest[0]]):
                return run(rest[1:])

        changed = run(paths)
        values = mx.mean(kl_divergence(self._reference, changed), axis=-1)
        return np.array(values, dtype=np.float64)


def probe_uncertain(
    tape: Tape,
    units: Sequence[Unit],
    estimates: Sequence[Probe],
    windows: Windows,
    options: MeasureOptions,
    float_dtype: mx.Dtype,
    progress: ProgressSink,
) -> tuple[list[Probe], float, tuple[str, ...]]:
    """Probe where the quadratic estimate may be off: the costliest units at 2 and 3 bits.

    Returns:
        Exact probes, their cost in forward-equivalents, notes on how the estimate fared.
    """
    prober = Prober(tape, _one_window_per_domain(windows))
    by_path = {unit.path: unit for unit in units}
    wanted = [p for p in estimates if p.choice.bits <= _UNCERTAIN_BITS and p.choice.mode == "affine"]
    wanted.sort(key=lambda p: (-p.divergence, p.path))
    exact: list[Probe] = []
    spent, ratios = 0.0, []
    for estimate in wanted:
        unit = by_path[estimate.path]
        if spent + prober.cost(unit) > options.probes:
            break
        values = prober.divergence(unit, _quantized(tape, unit, estimate.choice, float_dtype))
        spent += prober.cost(unit)
        on_same = np.array([estimate.by_domain[d] for d in windows.domain_index[prober.windows]])
        ratio = float(values.mean() / max(on_same.mean(), 1e-12))
        ratios.append(ratio)
        exact.append(_probe(estimate, values, windows, prober.windows))
        progress(
            Progress(
                stage="probe", done=min(round(spent), options.probes), total=options.probes, detail=unit.path
            )
        )
    if not ratios:
        return [], 0.0, ()
    middle = float(np.median(ratios))
    note = f"{len(ratios)} exact probes: exact / estimate has median {middle:.2f}"
    if not _RATIO_RANGE[0] <= middle <= _RATIO_RANGE[1]:
        note += " (outside the quadratic regime: trust allocations above 4 bits more)"
    return exact, spent, (note,)


def probe_every_choice(
    tape: Tape,
    units: Sequence[Unit],
    windows: Windows,
    options: MeasureOptions,
    float_dtype: mx.Dtype,
    journal: Journal,
    progress: ProgressSink,
) -> tuple[tuple[Probe, ...], float]:
    """The published sweep: one exact probe of every unit × choice, plain rounding, cached prefixes."""
    prober = Prober(tape, range(tape.num_windows))
    probes: list[Probe] = []
    spent = 0.0
    for done, unit in enumerate(units):
        if unit.path not in journal.costs:
            costs = np.zeros((len(unit.choices), tape.num_windows))
            for c, choice in enumerate(unit.choices):
                if choice.mode != "keep":
                    costs[c] = prober.divergence(unit, _quantized(tape, unit, choice, float_dtype))
                    spent += prober.cost(unit)
            journal.add(unit.path, costs)
        for choice, values in zip(unit.choices, journal.costs[unit.path], strict=True):
            empty = Probe(path=unit.path, choice=choice, divergence=0.0)
            probes.append(_probe(empty, values, windows, prober.windows))
        progress(Progress(stage="probe", done=done + 1, total=len(units), detail=unit.path))
    return tuple(probes), spent


def _quantized(tape: Tape, unit: Unit, choice: Choice, float_dtype: mx.Dtype) -> dict[str, mx.array]:
    result = {}
    for path in unit.paths:
        weight = get_module(tape.model, path).weight
        packed = pack(weight, choice, level="none", float_dtype=float_dtype)
        result[path] = unpack(packed, choice).astype(weight.dtype)
    return result


def _probe(like: Probe, values: Floats, windows: Windows, used: Sequence[int]) -> Probe:
    domains = windows.domain_index[list(used)]
    by_domain = tuple(float(values[domains == d].mean()) for d in range(len(windows.info.domains)))
    stderr = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
    return Probe(
        path=like.path, choice=like.choice, divergence=float(np.mean(by_domain)), stderr=stderr,
        by_domain=by_domain, exact=True,
    )  # fmt: skip


def _one_window_per_domain(windows: Windows) -> list[int]:
    return [int(np.flatnonzero(windows.domain_index == d)[0]) for d in range(len(windows.info.domains))]
