"""Models in memory: opened when named, within a budget; prefixes that survive; families that forget."""

import json
import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import get_total_parameters
from support_families import save_family
from support_models import read_json, save_model_folder, tiny_model
from support_serving import Asked, ask, engine_on, greedy, spec_of, text_of, tiny_folder

import mlx_optiq_ext
from mlx_optiq_ext import _hook
from mlx_optiq_ext.engine import residents, served
from mlx_optiq_ext.engine.engine import LocalEngine
from mlx_optiq_ext.engine.served import Loaded, ModelSpec, load
from mlx_optiq_ext.errors import FingerprintMismatch, Overloaded, ResourceError, UnknownName, UsageError
from mlx_optiq_ext.hub.fingerprint import fingerprint
from mlx_optiq_ext.types.chat import Generation
from mlx_optiq_ext.types.events import Event, Failed, Finished, Started, TextDelta
from mlx_optiq_ext.types.kv import KVConfig, KVLayer
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.quant import Choice, ModelFingerprint
from mlx_optiq_ext.types.serve import ServeOptions

WIDE: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
"""About 100 MB of weights."""


@pytest.fixture(scope="module", autouse=True)
def patched() -> Iterator[None]:
    mlx_optiq_ext.install()
    yield
    _hook.uninstall()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


def _prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(int(token) for token in np.random.default_rng(seed).integers(5, 60, size=length))


def _loaded(engine: LocalEngine) -> list[str]:
    return [model.id for model in engine.status().models if model.loaded]


def test_models_are_opened_by_name_and_make_room_for_each_other(tmp_path: Path) -> None:
    folders = [
        tiny_folder(tmp_path / name, seed, **WIDE) for seed, name in enumerate(("one", "two", "three"))
    ]
    weights = sum(file.stat().st_size for file in folders[0].glob("*.safetensors"))
    limit = int(2.5 * weights + 128e6)
    engine = engine_on(*map(spec_of, folders), memory=f"{limit // 1_000_000}MB")
    try:
        assert _loaded(engine) == ["one"]
        answers = [
            text_of(ask(engine, greedy(_prompt(20), 8, model=name))) for name in ("one", "two", "three")
        ]
        assert len(set(answers)) == 3
        assert _loaded(engine) == ["two", "three"]
        assert engine.status().weights_nbytes < limit
        assert text_of(ask(engine, greedy(_prompt(20), 8, model="one"))) == answers[0]
    finally:
        engine.close()


def test_a_model_that_answers_is_not_unloaded_for_another(tmp_path: Path) -> None:
    folders = [tiny_folder(tmp_path / name, seed, **WIDE) for seed, name in enumerate(("one", "two"))]
    weights = sum(file.stat().st_size for file in folders[0].glob("*.safetensors"))
    engine = engine_on(*map(spec_of, folders), memory=f"{int(1.7 * weights + 128e6) // 1_000_000}MB")
    try:
        running = Asked(engine, greedy(_prompt(20), 1500))
        running.until(TextDelta)
        with pytest.raises(Overloaded, match="answering requests"):
            engine.load("two").result(10)
        with pytest.raises(Overloaded, match="answering requests"):
            engine.unload("one").result(10)
        running.cancel()
        running.end()
        assert text_of(ask(engine, greedy(_prompt(20), 2, model="two")))
    finally:
        engine.close()


def test_a_request_waits_for_the_memory_of_a_model_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tiny_folder(tmp_path / name, seed, **WIDE) for seed, name in enumerate(("one", "two"))]
    weights = sum(file.stat().st_size for file in folders[0].glob("*.safetensors"))
    engine = engine_on(*map(spec_of, folders), memory=f"{int(1.7 * weights + 128e6) // 1_000_000}MB")
    ends: queue.SimpleQueue[tuple[str, Finished]] = queue.SimpleQueue()
    read = _note_reads(monkeypatch)

    def submit(name: str, request: Generation) -> str:
        def take(event: Event) -> None:
            if isinstance(event, Finished | Failed):
                assert isinstance(event, Finished)
                ends.put((name, event))

        return engine.submit(request, take)

    try:
        running = Asked(engine, greedy(_prompt(20), 300))
        running.until(TextDelta)
        submit("other", greedy(_prompt(20), 4, model="two"))
        left = submit("left", greedy(_prompt(20), 4, model="two"))
        # A request for the model that is there does not overtake the one that waits.
        submit("later", greedy(_prompt(20, 3), 4))
        engine.cancel(left)
        name, finished = ends.get(timeout=60)
        assert (name, finished.reason) == ("left", "cancelled")
        assert isinstance(running.end()[-1], Finished)
        assert [ends.get(timeout=60)[0] for _ in range(2)] == ["other", "later"]
        assert _loaded(engine) == ["one"], "it came back for the one that came later"
        assert read.count("two") == 2, "once to learn that it has to wait, not at every step of the others"
    finally:
        engine.close()


def _note_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of models whose files are read from now on."""
    read: list[str] = []

    def noting(spec: ModelSpec, *rest: Any) -> Loaded:
        read.append(spec.name)
        return load(spec, *rest)

    monkeypatch.setattr(residents, "load", noting)
    return read


def test_the_weights_are_identified_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def noting(ref: ModelRef) -> ModelFingerprint:
        asked.append(ref.path)
        return fingerprint(ref)

    monkeypatch.setattr(served, "fingerprint", noting)
    keep = Choice(bits=8, group_size=32)
    weights = fingerprint(ModelRef(path=str(folder), source="tiny"))
    config = KVConfig(layers=(KVLayer(index=0, k=keep, v=keep),), model=weights)
    engine_on(spec_of(folder, config)).close()
    assert len(asked) == 1


def test_a_model_that_can_never_fit_unloads_no_other(tmp_path: Path) -> None:
    small = tiny_folder(tmp_path / "small", 0, **WIDE)
    large = tiny_folder(tmp_path / "large", 1, **{**WIDE, "num_hidden_layers": 18})
    weights = sum(file.stat().st_size for file in small.glob("*.safetensors"))
    engine = engine_on(spec_of(small), spec_of(large), memory=f"{int(1.7 * weights + 128e6) // 1_000_000}MB")
    try:
        [failed] = ask(engine, greedy(_prompt(20), 2, model="large"))
        assert isinstance(failed, Failed)
        assert "large" in failed.message
        assert failed.kind == "NoRoom"
        assert _loaded(engine) == ["small"]
    finally:
        engine.close()


@pytest.mark.parametrize("damage", ["truncated", "no header", "gone", "unknown type"])
def test_a_damaged_model_is_named_without_its_folder_and_others_go_on(
    folder: Path, tmp_path: Path, damage: str
) -> None:
    broken = tiny_folder(tmp_path / "broken", 1)
    (weights,) = broken.glob("*.safetensors")
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif damage == "no header":
        weights.write_bytes(b"\xff" * 64)
    elif damage == "gone":
        weights.unlink()
    else:
        (broken / "config.json").write_text('{"model_type": "nonsense"}')
    engine = engine_on(spec_of(folder), spec_of(broken))
    try:
        [failed] = ask(engine, greedy(_prompt(20), 2, model="broken"))
        assert isinstance(failed, Failed)
        assert failed.message.startswith("broken")
        assert str(tmp_path) not in failed.message
        assert isinstance(ask(engine, greedy(_prompt(20), 2))[-1], Finished)
    finally:
        engine.close()


def test_contexts_follow_the_memory_that_neighbours_leave(tmp_path: Path) -> None:
    # Keys and values of a token take 64 KB here, so that memory and not the model decides.
    heavy = {**WIDE, "max_position_embeddings": 65_536}
    folders = [tiny_folder(tmp_path / name, seed, **heavy) for seed, name in enumerate(("one", "two"))]
    weights = sum(file.stat().st_size for file in folders[0].glob("*.safetensors"))
    engine = engine_on(*map(spec_of, folders), memory=f"{int(2.5 * weights + 128e6) // 1_000_000}MB")
    try:
        alone = engine.status().models[0].context
        engine.load("two").result(60)
        beside = [model.context for model in engine.status().models]
        assert beside[0] == beside[1] < alone < 65_536
        engine.unload("two").result(60)
        assert engine.status().models[0].context == alone
    finally:
        engine.close()


def test_models_can_be_loaded_and_unloaded_by_name(folder: Path) -> None:
    engine = engine_on(spec_of(folder))
    try:
        engine.unload("tiny").result(10)
        assert _loaded(engine) == []
        engine.load("tiny").result(10)
        assert _loaded(engine) == ["tiny"]
        with pytest.raises(UnknownName, match="no model 'other'; there are tiny"):
            engine.load("other")
        with pytest.raises(UnknownName, match="no model"):
            engine.unload("../tiny")
    finally:
        engine.close()


def test_stored_bits_are_those_of_the_files_whatever_is_computed_in(tmp_path: Path) -> None:
    model = tiny_model()  # bf16: computed in float32 on a CPU, with scales twice as wide
    nn.quantize(model, group_size=64, bits=4)
    folder = save_model_folder(tmp_path / "q", model)
    config = {**read_json(folder / "config.json"), "quantization": {"group_size": 64, "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    engine = engine_on(spec_of(folder))
    try:
        stored = 8 * sum(array.nbytes for _, array in tree_flatten(model.parameters()))
        [served] = engine.status().models
        assert served.bpw == pytest.approx(stored / get_total_parameters(model))
    finally:
        engine.close()


def test_an_idle_model_is_unloaded_and_comes_back(folder: Path) -> None:
    engine = engine_on(spec_of(folder), idle_unload_s=0.2)
    try:
        answer = text_of(ask(engine, greedy(_prompt(20), 8)))
        until = time.monotonic() + 10
        while _loaded(engine) and time.monotonic() < until:
            time.sleep(0.05)
        assert _loaded(engine) == []
        assert engine.status().state == "ready"
        assert text_of(ask(engine, greedy(_prompt(20), 8))) == answer
    finally:
        engine.close()


def test_weights_that_do_not_fit_are_refused(folder: Path) -> None:
    memory, said = "129MB", []
    for _ in range(3):  # What is named is enough for the weights, and then for a short prompt besides.
        engine = LocalEngine([spec_of(folder)], _options(memory=memory))
        try:
            engine.start()
            break
        except ResourceError as error:
            said.append(str(error))
            memory = said[-1].partition("alone it needs --memory ")[2].split(",")[0]
        finally:
            engine.close()
    assert said[0].startswith("tiny: ")
    assert "are left for them" in said[0]
    assert 1 <= len(said) <= 2


def test_the_context_is_what_the_memory_holds(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "long", max_position_embeddings=1 << 20)
    engine = engine_on(spec_of(folder), memory="140MB")
    try:
        [model] = engine.status().models
        assert 256 <= model.context < 1 << 20
        per_token = 2 * 2 * 2 * 32 * 4  # layers, keys and values, heads, numbers, bytes
        left = 140e6 - 128e6 - model.weights_nbytes
        assert model.context * per_token <= left
        assert model.context * per_token > 0.9 * left
    finally:
        engine.close()


def test_embeddings_are_counted_in_the_memory(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "long", max_position_embeddings=1 << 20)
    engine = engine_on(spec_of(folder), memory="133MB")
    try:
        [model] = engine.status().models
        long = _prompt(model.context - 600)
        running = Asked(engine, greedy(_prompt(model.context // 2), 400))
        running.until(TextDelta)
        with pytest.raises(
            Overloaded, match=r"these inputs take .* MB while they are computed, and .* are left"
        ):
            engine.embed("tiny", (long,)).result(60)
        assert engine.embed("tiny", ((1, 2, 3),)).result(60).prompt_tokens == 3
        running.cancel()
        running.end()
        embedded = engine.embed("tiny", (long,))
        waited = Asked(engine, greedy(_prompt(model.context // 2), 2))
        assert embedded.result(60).prompt_tokens == len(long)
        assert not isinstance(waited.end()[-1], Failed), "it waits for the embeddings to end"
    finally:
        engine.close()


def test_rows_wait_until_there_is_memory(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "long", max_position_embeddings=1 << 20)
    engine = engine_on(spec_of(folder), memory="140MB")
    try:
        [model] = engine.status().models
        big = _prompt(model.context // 2 + 50)
        asked = [Asked(engine, greedy((*big[:-1], k), 4)) for k in range(3)]
        for each in asked:
            assert not isinstance(each.end()[-1], Failed)
    finally:
        engine.close()


def test_a_prefix_survives_a_restart_of_the_engine(folder: Path, tmp_path: Path) -> None:
    prompt, answers = _prompt(600), []
    for wanted in (0, 599):
        engine = engine_on(spec_of(folder), prompt_cache_dir=str(tmp_path / "kept"))
        try:
            events = ask(engine, greedy(prompt, 10))
            answers.append(text_of(events))
            assert Started(cached_tokens=wanted) in events
        finally:
            engine.close()
    assert answers[0] == answers[1]
    engine = engine_on(spec_of(folder), prompt_cache_dir=str(tmp_path / "kept"))
    try:
        assert engine.status().prefix_cache.disk_entries == 1
        assert engine.clear_prefix_cache().result(10) > 0
    finally:
        engine.close()
    assert not list((tmp_path / "kept").iterdir())


def test_other_weights_share_no_prefix(tmp_path: Path) -> None:
    for seed in (0, 1):
        folder = tiny_folder(tmp_path / f"{seed}" / "same-name", seed)
        engine = engine_on(spec_of(folder), prompt_cache_dir=str(tmp_path / "kept"))
        try:
            assert Started(cached_tokens=0) in ask(engine, greedy(_prompt(600), 4))
        finally:
            engine.close()


def test_other_types_of_numbers_share_no_prefix(folder: Path, tmp_path: Path) -> None:
    eight = Choice(bits=8, group_size=32)
    stored = KVConfig(layers=tuple(KVLayer(index=k, k=eight, v=eight) for k in range(2)))
    for dtype in ("float32", "bfloat16"):
        engine = engine_on(spec_of(folder, stored), prompt_cache_dir=str(tmp_path / "kept"), dtype=dtype)
        try:
            assert Started(cached_tokens=0) in ask(engine, greedy(_prompt(600), 4))
        finally:
            engine.close()


@pytest.mark.parametrize("family", ["gemma3", "qwen3_next"])
def test_models_that_forget_reuse_prefixes_from_checkpoints(tmp_path: Path, family: str) -> None:
    folder = save_family(tmp_path / family, family)
    engine = engine_on(spec_of(folder), dtype="float32")
    try:
        history = _prompt(160)
        first = ask(engine, greedy(history, 6))
        assert Started(cached_tokens=0) in first
        generated = _prompt(7, 5)
        follow_up = greedy((*history, *generated), 6)
        reused = ask(engine, follow_up)
        [started] = [event for event in reused if isinstance(event, Started)]
        engine.clear_prefix_cache().result(10)
        assert text_of(ask(engine, follow_up)) == text_of(reused)
        assert started.cached_tokens == 159
    finally:
        engine.close()


def test_a_kv_configuration_of_other_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tiny_folder(tmp_path / "other", 1)
    keep = Choice(bits=8, group_size=32)
    config = KVConfig(
        layers=(KVLayer(index=0, k=keep, v=keep),),
        rotate=True,
        model=fingerprint(ModelRef(path=str(other), source="other")),
    )
    engine = LocalEngine([spec_of(folder, config)], _options())
    with pytest.raises(FingerprintMismatch, match="measured on other"):
        engine.start()
    engine.close()


def test_unusable_options_are_refused_before_anything_is_loaded(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for changed, message in (
        ({"memory": "much"}, "--memory"),
        ({"prompt_cache": "none"}, "--prompt-cache"),
        ({"prompt_cache_dir": str(tmp_path / "file")}, "--prompt-cache-dir"),
        ({"alias": ("a=b",)}, "--alias a=b"),
    ):
        with pytest.raises(UsageError, match=message):
            LocalEngine([spec_of(folder)], _options(**changed))


def _options(**changed: Any) -> ServeOptions:
    return ServeOptions(**{"memory": "2GB", **changed})
