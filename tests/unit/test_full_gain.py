"""What the estimate expects of the full correction, and what it holds in memory to know it."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

from mlx_optiq_ext.measure.moments import ExpertGrams, windows_of
from mlx_optiq_ext.measure.statistics import (
    EmbeddingStatistics,
    ExpertStatistics,
    LinearStatistics,
    UnitStatistics,
)
from mlx_optiq_ext.quant.correct import Level
from mlx_optiq_ext.quant.errors_of import Costs, divergence_of_choices
from mlx_optiq_ext.quant.journal import Journal
from mlx_optiq_ext.quant.probe import unit_gains
from mlx_optiq_ext.types.quant import KEEP, Choice, Unit

CHOICES = (Choice.parse("2g32"), Choice.parse("4g32"), Choice.parse("mxfp4"), KEEP)
WIDTH, TOKENS, WINDOWS, EXPERTS = 64, 200, 4, 3


def _inputs(rng: np.random.Generator, rank: int = 16) -> list[mx.array]:
    """Strongly correlated inputs, alike in every window."""
    basis = rng.standard_normal((rank, WIDTH))
    return [
        mx.array((rng.standard_normal((TOKENS, rank)) @ basis).astype(np.float32)) for _ in range(WINDOWS)
    ]


def _gradients(rng: np.random.Generator, width: int = 24) -> list[mx.array]:
    return [mx.array(rng.standard_normal((TOKENS, width)).astype(np.float32)) for _ in range(WINDOWS)]


def _linear() -> LinearStatistics:
    rng = np.random.default_rng(0)
    return LinearStatistics(
        _inputs(rng), _gradients(rng), list(range(WINDOWS)), TOKENS * WINDOWS, num_windows=WINDOWS
    )


def _experts(*, by_gradient: bool = False) -> ExpertStatistics:
    rng = np.random.default_rng(0)
    owners = [rng.integers(0, EXPERTS - 1, TOKENS) for _ in range(WINDOWS)]  # the last one is never used
    return ExpertStatistics(
        _inputs(rng), _gradients(rng), owners, list(range(WINDOWS)), TOKENS * WINDOWS, WINDOWS, EXPERTS,
        by_gradient=by_gradient,
    )  # fmt: skip


def _embedding() -> EmbeddingStatistics:
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 24, TOKENS) for _ in range(WINDOWS)]
    return EmbeddingStatistics(
        ids, _gradients(rng, WIDTH), list(range(WINDOWS)), TOKENS * WINDOWS, num_windows=WINDOWS
    )


def _weight(*shape: int) -> mx.array:
    return mx.array(np.random.default_rng(5).standard_normal(shape).astype(np.float32))


def _costs(weight: mx.array, statistics: UnitStatistics, level: Level) -> Costs:
    return divergence_of_choices(weight, statistics, CHOICES, level=level, float_dtype=mx.bfloat16)


@pytest.mark.parametrize(
    ("weight", "statistics"),
    [(_weight(24, WIDTH), _linear()), (_weight(EXPERTS, 24, WIDTH), _experts())],
    ids=["linear", "experts"],
)
def test_the_gain_is_of_affine_choices_only(weight: mx.array, statistics: UnitStatistics) -> None:
    full, fast = _costs(weight, statistics, "full"), _costs(weight, statistics, "fast")
    assert full.gain[0] == full.gain[1] < 0.9
    assert full.gain[2] == full.gain[3] == 1
    np.testing.assert_allclose(full.divergence, fast.divergence * full.gain[:, None])
    assert (fast.gain == 1).all()


@pytest.mark.parametrize(
    ("weight", "statistics"),
    [(_weight(24, WIDTH), _embedding()), (_weight(EXPERTS, 24, WIDTH), _experts(by_gradient=True))],
    ids=["embedding", "transposed heads"],
)
def test_what_the_writer_cannot_correct_fully_gains_nothing(
    weight: mx.array, statistics: UnitStatistics
) -> None:
    full, fast = _costs(weight, statistics, "full"), _costs(weight, statistics, "fast")
    assert (full.gain == 1).all()
    np.testing.assert_array_equal(full.divergence, fast.divergence)


def test_inputs_that_do_not_repeat_promise_no_gain() -> None:
    """Rounded and judged on the same few inputs the full correction would look far better than it is."""
    rng = np.random.default_rng(3)
    x = [mx.array(rng.standard_normal((6, WIDTH)).astype(np.float32)) for _ in range(2)]
    g = [mx.ones((6, 24)), mx.ones((6, 24))]
    held_back = _costs(_weight(24, WIDTH), LinearStatistics(x, g, [0, 1], 12, 2), "full").gain[1]
    in_sample = _costs(_weight(24, WIDTH), LinearStatistics(x, g, [0, 0], 12, 1), "full").gain[1]
    assert in_sample < 0.8 < held_back <= 1


def test_halves_of_the_windows_are_apart_and_make_the_whole() -> None:
    assert [*windows_of(5, 0), *windows_of(5, 1)] == list(windows_of(5, None)) == list(range(5))
    assert windows_of(1, 0) == windows_of(1, 1) == range(1)


@pytest.mark.parametrize("half", [None, 0, 1])
def test_grams_of_some_experts_are_those_of_all(half: int | None) -> None:
    statistics = _experts()
    whole, some = statistics.gram(half=half), statistics.gram([2, 0], half=half)
    assert whole is not None
    assert some is not None
    assert whole.shape == (EXPERTS, WIDTH, WIDTH)
    assert mx.array_equal(some, whole[mx.array([2, 0])])


def test_halves_of_a_gram_are_of_their_windows() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([np.array(a) for a in _inputs(rng)[2:]])
    np.testing.assert_allclose(np.array(_linear().gram(half=1)), x.T @ x / len(x), rtol=1e-3, atol=1e-3)


def test_the_estimate_builds_the_sampled_experts_grams_only(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    original = ExpertGrams.of

    def count(self: ExpertGrams, experts: Sequence[int]) -> mx.array:
        built.append(len(experts))
        return original(self, experts)

    monkeypatch.setattr(ExpertGrams, "of", count)
    _costs(_weight(EXPERTS, 128, WIDTH), _wide_experts(), "full")
    assert built == [1, 1]


def _wide_experts() -> ExpertStatistics:
    rng = np.random.default_rng(0)
    owners = [rng.integers(0, EXPERTS, TOKENS) for _ in range(WINDOWS)]
    return ExpertStatistics(
        _inputs(rng), _gradients(rng, 128), owners, list(range(WINDOWS)), TOKENS * WINDOWS, WINDOWS, EXPERTS
    )


def test_gains_outlive_a_restart_and_are_joined_over_the_paths_of_a_unit(tmp_path) -> None:  # type: ignore[no-untyped-def]
    unit = Unit(
        paths=("a", "b"), shape=(8, 64), numel=1024, kind="linear", block=0, module="a", choices=CHOICES[:2]
    )
    first = Journal.open(tmp_path / "journal", "key", resume=True)
    first.add("a", np.array([[2.0, 4.0], [1.0, 1.0]]), np.array([0.5, 1.0]))
    first.add("b", np.array([[1.0, 1.0], [1.0, 1.0]]), np.array([1.0, 1.0]))
    again = Journal.open(tmp_path / "journal", "key", resume=True)
    for journal in (first, again):
        gains = unit_gains([unit], journal)
        assert gains["a", CHOICES[0]] == pytest.approx((3 + 1) / (6 + 1))
        assert gains["a", CHOICES[1]] == 1
