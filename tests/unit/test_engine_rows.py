"""Rows that run together: the same tokens as alone, whatever joins, leaves or fails beside them."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support_serving import Asked, ask, engine_on, greedy, raising, spec_of, text_of, tiny_folder

import mlx_optiq_ext
from mlx_optiq_ext import _hook
from mlx_optiq_ext.engine.decode import AnswerDecoder
from mlx_optiq_ext.engine.engine import LocalEngine
from mlx_optiq_ext.errors import PromptTooLong, QueueFull, RequestError
from mlx_optiq_ext.types.chat import Sampling
from mlx_optiq_ext.types.events import Accepted, Failed, Finished, Prefilled, Started, TextDelta
from mlx_optiq_ext.types.kv import KVConfig, KVLayer
from mlx_optiq_ext.types.quant import Choice
from mlx_optiq_ext.types.serve import ServeOptions

LENGTHS = (5, 90, 300, 17, 700, 41, 2, 130)


@pytest.fixture(scope="module", autouse=True)
def patched() -> Iterator[None]:
    mlx_optiq_ext.install()
    yield
    _hook.uninstall()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def engine(folder: Path) -> Iterator[LocalEngine]:
    running = engine_on(spec_of(folder))
    yield running
    running.close()


def _prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(int(token) for token in np.random.default_rng(seed).integers(0, 250, size=length))


def _mixed() -> KVConfig:
    pair = (Choice(bits=8, group_size=32), Choice(bits=6, group_size=32))
    return KVConfig(layers=tuple(KVLayer(index=k, k=pair[k], v=pair[1 - k]) for k in range(2)), rotate=True)


@pytest.mark.parametrize("kv_config", [None, _mixed()], ids=["full", "mixed"])
def test_rows_together_give_the_tokens_they_give_alone(folder: Path, kv_config: KVConfig | None) -> None:
    requests = [greedy(_prompt(length, seed), 40) for seed, length in enumerate(LENGTHS)]
    engine = engine_on(spec_of(folder, kv_config), prompt_cache="0", max_rows=5)
    try:
        alone = [text_of(ask(engine, request)) for request in requests]
        together = [Asked(engine, request) for request in requests]
        assert [text_of(each.end()) for each in together] == alone
        assert sum(engine.status().requests_finished.values()) == 2 * len(requests)
    finally:
        engine.close()


def test_events_come_in_order_and_usage_is_true(engine: LocalEngine) -> None:
    events = ask(engine, greedy(_prompt(600), 5))
    kinds = [type(event) for event in events]
    assert kinds[:2] == [Accepted, Started]
    assert Prefilled in kinds
    assert kinds[-1] is Finished
    assert kinds.index(TextDelta) > max(k for k, kind in enumerate(kinds) if kind is Prefilled)
    assert events[0] == Accepted(prompt_tokens=600, model="tiny")
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.usage.prompt_tokens, finished.usage.completion_tokens) == (
        "length",
        600,
        5,
    )


def test_a_shared_prefix_is_computed_once_and_changes_nothing(engine: LocalEngine) -> None:
    shared = _prompt(500, 1)
    for tail in ((1, 2, 3), (9, 8), (7,)):
        first = ask(engine, greedy((*shared, *tail), 20))
        engine.clear_prefix_cache().result(30)
        again = ask(engine, greedy((*shared, *tail), 20))
        assert text_of(first) == text_of(again)
    cached = [event for event in ask(engine, greedy((*shared, 4, 4), 1)) if isinstance(event, Started)]
    assert cached == [Started(cached_tokens=500)]
    status = engine.status().prefix_cache
    assert status.hits >= 1
    assert status.nbytes > 0


def test_a_prefix_of_a_row_that_still_runs_is_shared(engine: LocalEngine) -> None:
    shared = _prompt(500, 2)
    first = Asked(engine, greedy((*shared, 1), 400))
    first.until(TextDelta)
    second = ask(engine, greedy((*shared, 2), 4))
    assert Started(cached_tokens=500) in second
    first.cancel()
    assert first.end()[-1].reason == "cancelled"  # type: ignore[union-attr]


def test_a_cancelled_prompt_leaves_and_what_it_computed_is_kept(folder: Path) -> None:
    engine = engine_on(spec_of(folder), prefill_step=64)
    try:
        asked = Asked(engine, greedy(_prompt(1800, 3), 400))
        asked.until(Prefilled)
        asked.cancel()
        finished = asked.end()[-1]
        assert isinstance(finished, Finished)
        assert finished.reason == "cancelled"
        started = next(e for e in ask(engine, greedy(_prompt(1800, 3), 1)) if isinstance(e, Started))
        assert started.cached_tokens >= 64
    finally:
        engine.close()


def test_a_queued_request_can_be_cancelled(folder: Path) -> None:
    engine = engine_on(spec_of(folder), max_rows=1)
    try:
        running, waiting = Asked(engine, greedy(_prompt(50), 300)), Asked(engine, greedy(_prompt(60), 300))
        running.until(TextDelta)
        waiting.cancel()
        assert waiting.end()[-1].reason == "cancelled"  # type: ignore[union-attr]
        assert not any(isinstance(event, Started) for event in waiting.events)
        running.cancel()
        running.end()
    finally:
        engine.close()


def test_too_many_waiting_requests_are_refused_with_a_time(folder: Path) -> None:
    engine = engine_on(spec_of(folder), max_rows=1, max_queue=1)
    asked = [Asked(engine, greedy(_prompt(50), 300)) for _ in range(2)]
    try:
        with pytest.raises(QueueFull, match="requests wait already") as full:
            asked.append(Asked(engine, greedy(_prompt(50), 300)))
        assert full.value.retry_after_s is not None
        for each in asked:
            each.cancel()
            each.end()
        assert text_of(ask(engine, greedy(_prompt(50), 2)))
    finally:
        engine.close()


def test_a_stop_string_over_several_tokens_ends_the_row(engine: LocalEngine) -> None:
    whole = text_of(ask(engine, greedy(_prompt(30, 4), 60)))
    stop = whole[20:24]
    at = whole.index(stop)
    events = ask(engine, greedy(_prompt(30, 4), 60, stop=(stop,)))
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.stop_sequence) == ("stop_sequence", stop)
    assert text_of(events) == whole[:at]
    assert finished.usage.completion_tokens < 60


def test_a_seed_gives_the_same_tokens_whatever_runs_beside_it(engine: LocalEngine) -> None:
    request = greedy(_prompt(30, 5), 30, sampling=Sampling(temperature=1.0, top_p=0.9, seed=7))
    alone = text_of(ask(engine, request))
    beside = Asked(engine, greedy(_prompt(200, 6), 200))
    beside.until(TextDelta)
    assert text_of(ask(engine, request)) == alone
    other = greedy(_prompt(30, 5), 30, sampling=Sampling(temperature=1.0, top_p=0.9, seed=8))
    assert text_of(ask(engine, other)) != alone
    beside.cancel()


def test_the_answer_is_clamped_to_the_context(engine: LocalEngine) -> None:
    finished = ask(engine, greedy(_prompt(2040), 100_000))[-1]
    assert isinstance(finished, Finished)
    assert finished.usage.completion_tokens == 8
    refused = ask(engine, greedy(_prompt(2048), 1))
    assert len(refused) == 1
    assert isinstance(refused[0], Failed)
    assert (refused[0].kind, refused[0].status) == ("PromptTooLong", 400)
    assert "2048 tokens > 2048 maximum" in refused[0].message


def test_far_too_much_text_is_refused_before_it_is_tokenized(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = engine._owner.models.get("tiny")
    assert loaded is not None
    monkeypatch.setattr(loaded, "renderer", SimpleNamespace(thinks=False))  # cannot render
    [refused] = ask(engine, greedy("word " * 1_000_000, 1))
    assert isinstance(refused, Failed)
    assert (refused.kind, refused.status, refused.limit) == ("PromptTooLong", 400, 2048)
    with pytest.raises(PromptTooLong):
        engine.count_tokens(greedy("word " * 1_000_000, 1)).result(10)


def test_a_long_prompt_that_is_known_joins_one_that_is_not(folder: Path) -> None:
    engine = engine_on(spec_of(folder), prefill_step=32)
    try:
        known = _prompt(900, 11)
        ask(engine, greedy(known, 1))
        slow = Asked(engine, greedy(_prompt(1900, 12), 40))
        slow.until(Prefilled)
        second = ask(engine, greedy((*known, 1, 2), 2))
        assert Started(cached_tokens=900) in second
        assert not any(isinstance(event, TextDelta) for event in slow.events)
        assert isinstance(slow.end()[-1], Finished)
    finally:
        engine.close()


def test_a_failing_step_fails_its_rows_and_not_the_engine(engine: LocalEngine) -> None:
    before = text_of(ask(engine, greedy(_prompt(30), 10)))
    model: Any = engine._owner.models.get("tiny").model  # type: ignore[union-attr]
    engine._on_owner(lambda: raising(model, RuntimeError("out of something"), calls=1)).result(10)
    [failed] = [event for event in ask(engine, greedy(_prompt(40), 10)) if isinstance(event, Failed)]
    assert (failed.kind, failed.status) == ("RuntimeError", 500)
    assert "out of something" not in failed.message, "what MLX says may tell of the machine: it is in the log"
    assert text_of(ask(engine, greedy(_prompt(30), 10))) == before
    assert engine.status().restarts == 1
    assert engine.status().state == "ready"


def test_a_model_that_stays_broken_ends_the_engine_visibly(folder: Path) -> None:
    fatal: list[Exception] = []
    engine = LocalEngine([spec_of(folder)], ServeOptions(memory="2GB"), on_fatal=fatal.append)
    engine.start()
    model: Any = engine._owner.models.get("tiny").model  # type: ignore[union-attr]
    engine._on_owner(lambda: raising(model, RuntimeError("broken"), calls=100)).result(10)
    asked = Asked(engine, greedy(_prompt(40), 10))
    assert isinstance(asked.end()[-1], Failed)
    engine._owner._thread.join(10)
    assert [str(error) for error in fatal] == ["broken"]
    assert engine.status().state == "failed"
    engine.close()


def test_one_row_s_error_is_its_own(engine: LocalEngine) -> None:
    beside = Asked(engine, greedy(_prompt(30, 8), 60))
    beside.until(TextDelta)
    failing = Asked(
        engine, greedy(_prompt(30, 9), 60, sampling=Sampling(temperature=0.0, logit_bias={5: 1.0}))
    )
    failing.until(Started)

    def spoil() -> None:
        [batch] = engine._owner.batches.values()
        job = next(job for job in batch.rows.values() if job.name == failing.job)
        job.guard.error = ValueError("a processor failed")

    engine._on_owner(spoil).result(10)
    assert isinstance(failing.end()[-1], Failed)
    assert isinstance(beside.end()[-1], Finished)
    engine.clear_prefix_cache().result(10)
    assert text_of(ask(engine, greedy(_prompt(30, 8), 60))) == text_of(beside.events)


def test_draining_lets_running_answers_end(folder: Path) -> None:
    engine = engine_on(spec_of(folder))
    asked = Asked(engine, greedy(_prompt(30), 50))
    asked.until(Accepted)
    assert engine.drain(30)
    assert isinstance(asked.end()[-1], Finished)
    with pytest.raises(Exception, match="stopping"):
        ask(engine, greedy(_prompt(5), 1))
    engine.close()


def test_closing_tells_those_who_wait(folder: Path) -> None:
    engine = engine_on(spec_of(folder), max_rows=1)
    asked = [Asked(engine, greedy(_prompt(30, seed), 2000)) for seed in range(3)]
    asked[0].until(TextDelta)
    engine.close()
    for each in asked:
        last = each.end()[-1]
        assert isinstance(last, Failed)
        assert last.status == 503
    mx.synchronize()


def test_closing_tells_those_whose_prompt_is_not_rendered(folder: Path) -> None:
    engine = engine_on(spec_of(folder))
    asked = [Asked(engine, greedy("word " * 3000, 2)) for _ in range(20)]
    engine.close()
    assert all(isinstance(each.end()[-1], Failed) for each in asked)


def test_what_was_cancelled_while_it_waited_stops_nothing(engine: LocalEngine) -> None:
    running = Asked(engine, greedy(_prompt(30), 300))
    counted = engine.count_tokens(greedy("some words"))
    embedded = engine.embed("tiny", ("some words",))
    assert counted.cancel()
    assert embedded.cancel()
    running.cancel()
    running.end()
    assert engine.count_tokens(greedy(_prompt(7))).result(20) == 7
    assert isinstance(ask(engine, greedy(_prompt(20), 2))[-1], Finished)


def test_an_end_that_cannot_be_read_is_one_row_s_error(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = AnswerDecoder.finish

    def finish(self: AnswerDecoder, reason: Any) -> list[Any]:
        if reason == "length":
            raise ValueError("unreadable")
        return read(self, reason)

    monkeypatch.setattr(AnswerDecoder, "finish", finish)
    beside = Asked(engine, greedy(_prompt(30, 8), 1500))
    beside.until(TextDelta)
    last = ask(engine, greedy(_prompt(30, 9), 3))[-1]
    assert isinstance(last, Failed)
    assert (last.kind, last.status) == ("ValueError", 500)
    beside.cancel()
    end = beside.end()[-1]
    assert isinstance(end, Finished)
    assert engine.status().restarts == 0


def test_long_inputs_are_embedded_while_rows_go_on(engine: LocalEngine) -> None:
    alone = engine.embed("tiny", (_prompt(1500),)).result(60).vectors
    running = Asked(engine, greedy(_prompt(30), 1500))
    running.until(TextDelta)
    found = engine.embed("tiny", tuple(_prompt(1500) for _ in range(6)))
    told = 0
    while not found.done():
        told += isinstance(running.until(TextDelta), TextDelta)
    running.cancel()
    running.end()
    assert told > 6
    np.testing.assert_allclose(found.result(0).vectors, alone * 6, atol=1e-5)  # float32


@pytest.mark.parametrize("token", [-1, 320, 1_000_000, 1 << 40])
def test_tokens_that_are_none_of_the_model_s_are_refused(engine: LocalEngine, token: int) -> None:
    with pytest.raises(RequestError, match=f"token {token} is not one of the model's 320") as caught:
        engine.embed("tiny", ((1, 2), (3, token))).result(20)
    assert caught.value.param == "input[1][1]"
    [failed] = ask(engine, greedy((1, 2, token), 2))
    assert isinstance(failed, Failed)
    assert (failed.status, failed.param) == (400, "prompt[2]")


def test_inputs_longer_than_the_context_are_not_embedded(engine: LocalEngine) -> None:
    with pytest.raises(PromptTooLong, match="2049 tokens > 2048"):
        engine.embed("tiny", (tuple([1] * 2049),)).result(20)


@pytest.mark.parametrize("kv_config", [None, _mixed()], ids=["full", "mixed"])
def test_layers_and_their_bits_are_known_while_nothing_runs(folder: Path, kv_config: KVConfig | None) -> None:
    engine = engine_on(spec_of(folder, kv_config))
    try:
        idle = engine.status().kv_layers
        assert [(layer.name, layer.nbytes) for layer in idle] == [("0", 0), ("1", 0)]
        if kv_config is not None:
            assert [(layer.k_bits, layer.v_bits) for layer in idle] == [
                (layer.k.bpw(), layer.v.bpw()) for layer in kv_config.layers
            ]
        ask(engine, greedy(_prompt(40, 1)))
        assert [layer.name for layer in engine.status().kv_layers] == ["0", "1"]
    finally:
        engine.close()


def test_text_that_is_not_tokenized_is_counted_at_least(engine: LocalEngine) -> None:
    (failed,) = ask(engine, greedy("word " * 200_000))
    assert isinstance(failed, Failed)
    assert failed.kind == "PromptTooLong"
    assert re.fullmatch(r"prompt is too long: \d+ tokens > 2048 maximum \(at least: .*\)", failed.message)
