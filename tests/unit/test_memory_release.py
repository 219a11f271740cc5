"""What is done with is freed at once, without waiting for Python's collector of reference cycles."""

import gc
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from support_measure import save_tiny
from support_models import LLAMA, byte_tokenizer, tiny_model

from mlx_optiq_ext.measure.records import Record
from mlx_optiq_ext.measure.rendering import render_record
from mlx_optiq_ext.models.arrays import split_arrays
from mlx_optiq_ext.models.intercept import intercepted
from mlx_optiq_ext.models.tape import Tape
from mlx_optiq_ext.quant import reference as reference_module
from mlx_optiq_ext.quant.reference import Reference

LARGE = 1 << 22


@pytest.fixture(autouse=True)
def _without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _large() -> mx.array:
    array = mx.zeros(LARGE) + 1
    mx.eval(array)
    return array


def test_arrays_of_a_nest_go_with_the_last_name_for_them() -> None:
    before = mx.get_active_memory()
    leaves, rebuild = split_arrays({"a": [_large(), (_large(), None)]})
    assert mx.get_active_memory() - before >= 2 * 4 * LARGE
    del leaves
    assert mx.get_active_memory() - before < LARGE
    small = mx.zeros(1)
    assert rebuild([small, small])["a"][0] is small


def test_a_handlers_arrays_go_with_the_context() -> None:
    model = tiny_model()
    before = mx.get_active_memory()

    def watch() -> None:
        kept: list[mx.array] = []

        def handler(_: object, original: object, args: tuple, kwargs: dict) -> mx.array:
            kept.append(_large())
            return original(*args, **kwargs)  # type: ignore[operator]

        with intercepted(model.layers, handler):
            model(mx.array([[1, 2]]))

    watch()
    assert mx.get_active_memory() - before < LARGE


def test_a_tapes_activations_do_not_pile_up_with_runs() -> None:
    model = tiny_model(dtype=mx.float32)
    tape = Tape(model, mx.array(np.random.default_rng(0).integers(0, 256, (4, 64))))
    tape.forward()
    tape.find_windows()
    held = []
    for _ in range(3):
        mx.eval(tape.run_from(0, range(4)))
        held.append(mx.get_active_memory())
    assert held[2] - held[0] < 100_000


def test_running_in_groups_gives_what_running_at_once_gives() -> None:
    model = tiny_model(dtype=mx.float32)
    tape = Tape(model, mx.array(np.random.default_rng(0).integers(0, 256, (5, 16))))
    tape.find_windows()
    seen: list[tuple[mx.array, mx.array]] = []

    def handler(_: object, original: object, args: tuple, kwargs: dict) -> mx.array:
        whole = original(*args, **kwargs)  # type: ignore[operator]
        grouped = tape.run_in_groups(len(seen), original, (args, kwargs), 2)  # type: ignore[arg-type]
        seen.append((whole, grouped))
        return whole

    with intercepted(tape.blocks.modules, handler):
        mx.eval(model(tape.tokens))
    assert len(seen) == 2
    for whole, grouped in seen:
        np.testing.assert_allclose(np.array(grouped), np.array(whole), rtol=1e-5, atol=1e-5)


def test_a_streamed_model_holds_one_block_and_reads_the_same_again(tmp_path: Path) -> None:
    config = {**LLAMA, "num_hidden_layers": 6, "vocab_size": 4096}
    reference = Reference(save_tiny(tmp_path / "m", config), how="stream")
    before = mx.get_active_memory()
    memory = reference.memory()
    block = reference.model.layers[3]
    values = []
    for _ in range(2):
        with memory.present(3):
            values.append(np.array(block.mlp.up_proj.weight))
        assert mx.get_active_memory() - before < 100_000
    np.testing.assert_array_equal(values[0], values[1])
    mx.eval(reference.model.model.embed_tokens.weight)
    assert mx.get_active_memory() - before >= 4 * 4096 * 128
    memory.release_outside()
    assert mx.get_active_memory() - before < 100_000


def test_a_long_text_is_tokenized_without_a_warning() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 16
    assert len(render_record(tokenizer, Record(domain="prose", text="x" * 100)).tokens) >= 100
    assert not tokenizer.deprecation_warnings


@pytest.mark.parametrize(
    ("limit", "expected"), [("1000000\n", 1000000 - 400000 + 100000), ("max\n", 1 << 62), (None, 1 << 62)]
)
def test_a_containers_limit_counts(tmp_path: Path, limit: str | None, expected: int) -> None:
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("400000\n")
        (tmp_path / "memory.stat").write_text("anon 300000\ninactive_file 100000\n")
    assert reference_module._left_in_container(tmp_path) == expected
