"""Row ranges run in order-preserving threads, with BLAS held to one thread meanwhile."""

import pytest

from mlx_optiq_ext.quant import threads


def test_results_keep_the_order_of_the_ranges() -> None:
    spans = [(start, start + 1) for start in range(20)]
    assert threads.in_threads(lambda span: span[0] * 10, spans) == [10 * start for start in range(20)]


def test_an_error_in_a_thread_reaches_the_caller() -> None:
    def fail(span: tuple[int, int]) -> int:
        raise ValueError(f"range {span}")

    with pytest.raises(ValueError, match=r"range \(0, 1\)"):
        threads.in_threads(fail, [(0, 1), (1, 2)])


def test_blas_threads_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [8]
    monkeypatch.setattr(threads, "_openblas", lambda: (lambda: counts[-1], counts.append))

    def interrupted() -> None:
        with threads.single_blas_thread():
            assert counts[-1] == 1
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert counts == [8, 1, 8]


def test_another_blas_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_openblas", lambda: None)
    assert threads.in_threads(lambda span: span[1] - span[0], [(0, 2), (2, 5)]) == [2, 3]
