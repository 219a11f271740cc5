"""Exact probes: change one tensor, run the network from its block on, compare the logits.

The network in front of the block is answered from the record. Used where the second-order estimate is
uncertain, and for the published per-layer sweep (``--method kl``). Needs the model resident.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_optiq_ext.errors import MeasurementError
from mlx_optiq_ext.measure.calibration import Windows
from mlx_optiq_ext.measure.divergence import kl_divergence
from mlx_optiq_ext.models.tape import Tape
from mlx_optiq_ext.models.walk import get_module
from mlx_optiq_ext.quant.correct import Level, pack, unpack
from mlx_optiq_ext.quant.errors_of import Floats
from mlx_optiq_ext.quant.journal import Journal
from mlx_optiq_ext.types.progress import Progress, ProgressSink
from mlx_optiq_ext.types.quant import Choice, Probe, ProbeCheck, Unit

__all__ = [
    "Prober",
    "Rounding",
    "check_estimates",
    "check_note",
    "measured_probe",
    "probe_every_choice",
    "replaced",
    "unit_gains",
]

_FIRST_LOOK = 24
_CLOSE = 0.25
_RATIO_RANGE = (0.5, 2.0)
_GOLDEN = 7919
_TINY = 1e-30


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


class Rounding(NamedTuple):
    """How probed tensors are rounded: as the table's errors were."""

    units: tuple[Unit, ...]
    level: Level
    float_dtype: mx.Dtype
    importance: Mapping[str, mx.array]
    """E[x_j²] by path, of an embedding E[g_j²]; a path without it is rounded plainly."""
    gains: Mapping[tuple[str, Choice], float] = {}
    """Part of the estimate by unit and choice that the full correction leaves (:func:`unit_gains`)."""

    def apply(self, tape: Tape, unit: Unit, choice: Choice) -> dict[str, mx.array]:
        """The unit's weights as they would be stored, by path; full is rounded fast: no Gram is kept."""
        result = {}
        for path in unit.paths:
            weight = get_module(tape.model, path).weight
            importance = self.importance.get(path)
            level: Level = "none" if importance is None or self.level == "none" else "fast"
            packed = pack(weight, choice, level=level, float_dtype=self.float_dtype, importance=importance)
            result[path] = unpack(packed, choice).astype(weight.dtype)
        return result


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
        self._first_call: dict[int, int] = {}
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
        with ExitStack() as stack:
            for path, weight in weights.items():
                stack.enter_context(replaced(self._tape, path, weight))
            changed = self._tape.run_from(self.start_of(unit), self.windows)
        values = mx.mean(kl_divergence(self._reference, changed), axis=-1)
        return np.array(values, dtype=np.float64)


def check_estimates(
    tape: Tape,
    rounding: Rounding,
    estimates: Sequence[Probe],
    windows: Windows,
    limit: int,
    progress: ProgressSink,
) -> tuple[float, ProbeCheck | None]:
    """Run exact probes on a sample of tensors and say how far the estimates are from them.

    Half of the sample are the costliest tensors, half are spread over the rest; each is probed at two
    widths. Stops early where the first dozen agree. The estimates are not changed: where they are low
    (routed experts that change hands), they are so for all tensors, and allocations from rescaled
    estimates measured no better (docs/method.md).

    With the full correction the probes are rounded fast, and compared with the estimate before its gain.

    Args:
        limit: Most forward-equivalents to spend.
    Returns:
        Forward-equivalents spent, and what was found; None where nothing could be compared.
    """
    prober = Prober(tape, _one_window_per_domain(windows))
    table = {(p.path, p.choice): p for p in estimates}
    ratios: list[float] = []
    spent = 0.0
    for unit in _sample(rounding.units, estimates):
        pair = _two_choices(unit)
        if spent + len(pair) * prober.cost(unit) > limit:
            break
        for choice in pair:
            exact = prober.divergence(unit, rounding.apply(tape, unit, choice))
            spent += prober.cost(unit)
            fast = exact * rounding.gains.get((unit.path, choice), 1.0)
            ratios += _log_ratio(fast, table[unit.path, choice], windows, prober.windows)
        progress(Progress(stage="probe", done=min(round(spent), limit), total=limit, detail=unit.path))
        if len(ratios) >= _FIRST_LOOK and abs(np.median(ratios)) < _CLOSE and np.std(ratios) < _CLOSE:
            break
    progress(Progress(stage="probe", done=limit, total=limit))
    if not ratios:
        return spent, None
    middle, low, high = (float(np.exp(np.quantile(ratios, q))) for q in (0.5, 0.1, 0.9))
    return spent, ProbeCheck(num_probes=len(ratios), ratio=middle, low=low, high=high)


def check_note(check: ProbeCheck) -> str:
    """What :func:`check_estimates` found, for people."""
    note = (
        f"{check.num_probes} exact probes: exact / estimate is {check.ratio:.2f} "
        f"(80 % of them {check.low:.2f} to {check.high:.2f})"
    )
    if not _RATIO_RANGE[0] <= check.ratio <= _RATIO_RANGE[1]:
        note += "; predicted divergences are off by about that, the order of tensors less so"
    return note


def probe_every_choice(
    tape: Tape, rounding: Rounding, windows: Windows, journal: Journal, progress: ProgressSink
) -> tuple[tuple[Probe, ...], float]:
    """The published sweep: one exact probe of every unit × choice, plain rounding, cached prefixes."""
    prober = Prober(tape, range(tape.num_windows))
    probes: list[Probe] = []
    spent, replayed, total = 0.0, 0, len(rounding.units)
    for done, unit in enumerate(rounding.units, start=1):
        replayed += unit.path in journal.resumed
        if unit.path not in journal.costs:
            costs = np.zeros((len(unit.choices), tape.num_windows))
            for c, choice in enumerate(unit.choices):
                if choice.mode != "keep":
                    costs[c] = prober.divergence(unit, rounding.apply(tape, unit, choice))
                    spent += prober.cost(unit)
            journal.add(unit.path, costs)
        for choice, values in zip(unit.choices, journal.costs[unit.path], strict=True):
            probes.append(measured_probe(unit.path, choice, values, windows, exact=True))
        progress(Progress(stage="probe", done=done, total=total, detail=unit.path, replayed=replayed))
    return tuple(probes), spent


def measured_probe(path: str, choice: Choice, values: Floats, windows: Windows, *, exact: bool) -> Probe:
    """Mean over domains, and spread over windows, of one divergence per calibration window.

    Args:
        values: (W,) nats per token.
        exact: Whether they were probed or estimated.
    Raises:
        MeasurementError: One of them is not finite.
    """
    if not np.all(np.isfinite(values)):
        raise MeasurementError(f"{path} at {choice.label}: the measured divergence is not finite")
    num_domains = len(windows.info.domains)
    by_domain = tuple(float(values[windows.domain_index == d].mean()) for d in range(num_domains))
    stderr = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
    return Probe(
        path=path, choice=choice, divergence=float(np.mean(by_domain)), stderr=stderr, by_domain=by_domain,
        exact=exact,
    )  # fmt: skip


def unit_gains(units: Sequence[Unit], journal: Journal) -> dict[tuple[str, Choice], float]:
    """By unit and choice: estimated divergence over what it was for the fast rounding."""
    result = {}
    for unit in units:
        paths = [path for path in unit.paths if path in journal.gains]
        for c, choice in enumerate(unit.choices):
            costs = [float(journal.costs[path][c].mean()) for path in paths]
            fast = sum(
                cost / max(float(journal.gains[path][c]), _TINY)
                for path, cost in zip(paths, costs, strict=True)
            )
            result[unit.path, choice] = sum(costs) / fast if fast > 0 else 1.0
    return result


def _sample(units: Sequence[Unit], estimates: Sequence[Probe]) -> list[Unit]:
    """Tensors in the order to probe them: the costliest and a spread over the rest, in turns."""
    cost: dict[str, float] = {}
    for probe in estimates:
        cost[probe.path] = max(cost.get(probe.path, 0.0), probe.divergence)
    ranked = sorted(
        (u for u in units if len(_two_choices(u)) == 2 and cost.get(u.path, 0.0) > 0),
        key=lambda u: -cost[u.path],
    )
    spread = [ranked[(k * _GOLDEN) % len(ranked)] for k in range(len(ranked))] if ranked else []
    order = [unit for pair in zip(ranked, spread, strict=True) for unit in pair]
    return list({unit.path: unit for unit in order}.values())


def _two_choices(unit: Unit) -> list[Choice]:
    """Widths to probe at: the affine choices nearest to 3 and 5 bits."""
    affine = [c for c in unit.choices if c.mode == "affine"]
    if not affine:
        return []
    picked = {min(affine, key=lambda c: (abs(c.bits - wanted), c)) for wanted in (3, 5)}
    return sorted(picked)


def _log_ratio(exact: Floats, estimate: Probe, windows: Windows, used: Sequence[int]) -> list[float]:
    """log(exact / estimate) over the probed windows; nothing where one of them is not positive."""
    expected = np.mean([estimate.by_domain[d] for d in windows.domain_index[list(used)]])
    if exact.mean() <= 0 or expected <= 0:
        return []
    return [float(np.log(exact.mean() / expected))]


def _one_window_per_domain(windows: Windows) -> list[int]:
    return [int(np.flatnonzero(windows.domain_index == d)[0]) for d in range(len(windows.info.domains))]
