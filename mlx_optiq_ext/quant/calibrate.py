"""Correct second-order estimates by a few exact probes.

On dense networks the estimate is right within a few per cent and nothing changes. Where an error also acts
through a discrete choice (routed experts change hands) it is too low, by a factor that differs between
tensors and shrinks with the error slower than the square. A small model of log(exact / estimate) learns
that from the probes: a common line over bits, plus an offset per tensor, shrunk by its noise; tensors that
were not probed take the offset of their role. Plain numbers; knows nothing of models.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from mlx_optiq_ext.types.quant import Probe, Unit

__all__ = ["Calibration", "Ratio", "fit_calibration"]

Floats = npt.NDArray[np.float64]
_MIDDLE_BITS = 4.0
_FLOOR = 1e-9


class Ratio(NamedTuple):
    """One exact probe against its estimate on the same windows."""

    path: str
    role: str
    bits: float
    log_ratio: float
    """log(exact / estimate)."""
    noise: float
    """Standard error of ``log_ratio`` over windows."""


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """What the probes say about the estimates."""

    level: float
    """log(exact / estimate) of a typical tensor at four bits."""
    slope: float
    """Its change per bit."""
    by_path: dict[str, float]
    """Offset of every probed tensor, shrunk."""
    by_role: dict[str, float]
    """Mean offset of the probed tensors of a role."""
    spread: float
    """Standard deviation of the offsets beyond their noise."""

    def factor(self, path: str, role: str, bits: float) -> float:
        """What an estimate is to be multiplied by."""
        offset = self.by_path.get(path, self.by_role.get(role, 0.0))
        return float(np.exp(self.level + self.slope * (bits - _MIDDLE_BITS) + offset))

    def apply(self, probes: Sequence[Probe], units: Mapping[str, Unit]) -> tuple[Probe, ...]:
        """Estimates multiplied by their factors; kept tensors cost nothing either way."""
        result = []
        for probe in probes:
            role = units[probe.path].module
            factor = self.factor(probe.path, role, probe.choice.bits)
            result.append(
                replace(
                    probe,
                    divergence=probe.divergence * factor,
                    stderr=probe.stderr * factor,
                    by_domain=tuple(value * factor for value in probe.by_domain),
                )
            )
        return tuple(result)


def fit_calibration(ratios: Sequence[Ratio]) -> Calibration:
    """Fit level, slope and offsets.

    Args:
        ratios: At least one.
    """
    x = np.array([r.bits for r in ratios]) - _MIDDLE_BITS
    y = np.array([r.log_ratio for r in ratios])
    weight = 1.0 / (np.array([r.noise for r in ratios]) ** 2 + 0.05**2)
    level, slope = _line(x, y, weight)
    residual = y - level - slope * x
    by_path: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for ratio, value in zip(ratios, residual, strict=True):
        by_path[ratio.path].append((value, ratio.noise))
    means = {path: float(np.mean([v for v, _ in found])) for path, found in by_path.items()}
    noises = {path: float(np.mean([n**2 for _, n in found]) / len(found)) for path, found in by_path.items()}
    between = max(float(np.var(list(means.values()))) - float(np.mean(list(noises.values()))), 0.0)
    shrunk = {path: mean * between / (between + noises[path] + _FLOOR) for path, mean in means.items()}
    roles: dict[str, list[float]] = defaultdict(list)
    role_of = {ratio.path: ratio.role for ratio in ratios}
    for path, offset in shrunk.items():
        roles[role_of[path]].append(offset)
    return Calibration(
        level=level,
        slope=slope,
        by_path=shrunk,
        by_role={role: float(np.mean(offsets)) for role, offsets in roles.items()},
        spread=float(np.sqrt(between)),
    )


def _line(x: Floats, y: Floats, weight: Floats) -> tuple[float, float]:
    """Weighted straight line; level alone where all points share one abscissa."""
    level = float(np.average(y, weights=weight))
    centre = float(np.average(x, weights=weight))
    spread = float(np.sum(weight * (x - centre) ** 2))
    if spread < _FLOOR:
        return level, 0.0
    slope = float(np.sum(weight * (x - centre) * (y - level)) / spread)
    return level - slope * centre, slope
