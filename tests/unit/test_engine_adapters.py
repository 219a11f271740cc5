"""Adapters in the engine: mixed in one batch, swapped under load, never mixed up in the prefix cache."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support_serving import Asked, ask, engine_on, greedy, spec_of, text_of, tiny_folder

import mlx_optiq_ext
from mlx_optiq_ext import _hook
from mlx_optiq_ext.engine.engine import LocalEngine
from mlx_optiq_ext.errors import AdapterError, RequestError, UnknownName, UsageError
from mlx_optiq_ext.hub.fingerprint import fingerprint
from mlx_optiq_ext.lora.factors import Adapter, Factors
from mlx_optiq_ext.lora.files import write_adapter
from mlx_optiq_ext.types.adapter import AdapterConfig
from mlx_optiq_ext.types.events import Event, Failed, Finished, Started, TextDelta
from mlx_optiq_ext.types.model import ModelRef

SHAPES = {
    "model.layers.0.self_attn.q_proj": (128, 128),
    "model.layers.0.mlp.up_proj": (128, 256),
    "model.layers.1.mlp.down_proj": (256, 128),
}
PROMPT = tuple(range(40, 240))


@pytest.fixture(scope="module", autouse=True)
def patched() -> Iterator[None]:
    mlx_optiq_ext.install()
    yield
    _hook.uninstall()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """Three adapters of different ranks, made for the model in ``folder``."""
    shelf = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("a", "b", "c"), start=1):
        _write(shelf / name, seed, fingerprint(ModelRef(path=str(folder), source="tiny")))
    return shelf


def _write(folder: Path, seed: int, base: Any = None, *, wide: int = 0, value: float | None = None) -> None:
    rng = np.random.default_rng(seed)
    factors = {}
    for k, (path, (inputs, outputs)) in enumerate(SHAPES.items()):
        rank = 2 + seed + k
        a = rng.standard_normal((inputs + wide, rank)) / np.sqrt(inputs)
        b = rng.standard_normal((rank, outputs))
        factors[path] = Factors(mx.array(a.astype(np.float32)), mx.array(b.astype(np.float32)))
    ranks = {path: each.rank for path, each in factors.items()}
    write_adapter(folder, Adapter(AdapterConfig(base=base, ranks=ranks, scale=1.5), factors))
    if value is not None:
        arrays = dict(mx.load(str(folder / "adapters.safetensors")))  # type: ignore[arg-type]
        mx.save_safetensors(
            str(folder / "adapters.safetensors"), {name: array * value for name, array in arrays.items()}
        )
        for file in (folder / "optiq").glob("*.safetensors"):
            mx.save_safetensors(
                str(file),
                {n: each * value for n, each in dict(mx.load(str(file))).items()},  # type: ignore[arg-type]
            )


@pytest.fixture
def engine(folder: Path, shelf: Path) -> Iterator[LocalEngine]:
    running = engine_on(
        spec_of(folder),
        adapter=(f"a={shelf / 'a'}", f"tiny:b={shelf / 'b'}"),
        adapters_dir=(str(shelf),),
    )
    yield running
    running.close()


def test_a_folder_is_shown_by_its_name_alone_however_it_was_given(
    folder: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shelf.parent)
    running = engine_on(spec_of(folder), adapter=(f"a={shelf.name}/a", f"b={shelf}/../{shelf.name}/b"))
    try:
        assert [each.source for each in running.status().adapters] == ["a", "b"]
    finally:
        running.close()


def _started(events: list[Event]) -> Started:
    return next(event for event in events if isinstance(event, Started))


def test_one_batch_of_base_and_adapters_gives_each_row_its_own_tokens(engine: LocalEngine) -> None:
    engine.mount("c", "c").result(30)
    names = (None, "a", "b", "c", "a+b")
    alone = {}
    for name in names:
        engine.clear_prefix_cache().result(10)
        alone[name] = text_of(ask(engine, greedy(PROMPT, 30, adapter=name)))
    assert len(set(alone.values())) == len(names)
    engine.clear_prefix_cache().result(10)
    together = [Asked(engine, greedy(PROMPT, 30, adapter=name)) for name in names]
    assert {name: text_of(each.end()) for name, each in zip(names, together, strict=True)} == alone


def test_prefixes_are_shared_within_an_adapter_only(engine: LocalEngine) -> None:
    first = ask(engine, greedy(PROMPT, 10, adapter="a"))
    base = ask(engine, greedy(PROMPT, 10))
    assert _started(base).cached_tokens == 0
    assert _started(ask(engine, greedy(PROMPT, 10, adapter="a"))).cached_tokens == len(PROMPT) - 1
    assert _started(ask(engine, greedy(PROMPT, 10))).cached_tokens == len(PROMPT) - 1
    assert text_of(first) != text_of(base)


def test_the_same_numbers_under_another_name_share_prefixes(engine: LocalEngine) -> None:
    ask(engine, greedy(PROMPT, 4, adapter="a"))
    engine.mount("again", "a").result(30)
    assert _started(ask(engine, greedy(PROMPT, 4, adapter="again"))).cached_tokens == len(PROMPT) - 1


def test_a_model_after_its_adapter_is_the_model(folder: Path, engine: LocalEngine) -> None:
    plain = engine_on(spec_of(folder))
    try:
        expected = text_of(ask(plain, greedy(PROMPT, 20)))
    finally:
        plain.close()
    ask(engine, greedy(PROMPT, 20, adapter="a"))
    assert text_of(ask(engine, greedy(PROMPT, 20))) == expected
    for name in ("a", "b"):
        engine.unmount(name).result(10)
    assert text_of(ask(engine, greedy(PROMPT, 20))) == expected


def test_mounting_and_unmounting_under_load_loses_nothing(engine: LocalEngine) -> None:
    running = [
        Asked(engine, greedy((*PROMPT, k), 300, adapter=name)) for k, name in enumerate(("a", None, "b"))
    ]
    for each in running:
        each.until(TextDelta)
    engine.mount("c", "c").result(30)
    engine.unmount("a").result(30)
    with pytest.raises(UnknownName, match="no adapter 'a' is mounted; there are: b, c"):
        raise _error(ask(engine, greedy(PROMPT, 4, adapter="a")))
    assert text_of(ask(engine, greedy(PROMPT, 4, adapter="c")))
    assert {each.name for each in engine.status().adapters} == {"b", "c"}
    for each in running:
        assert isinstance(each.end()[-1], Finished)
    alone = text_of(ask(engine, greedy((*PROMPT, 2), 300, adapter="b")))
    assert text_of(running[2].events) == alone


def test_a_default_answers_where_none_is_named(engine: LocalEngine) -> None:
    base, adapted = (text_of(ask(engine, greedy(PROMPT, 12, adapter=name))) for name in ("base", "b"))
    engine.use("b").result(10)
    assert [each.name for each in engine.status().adapters if each.is_default] == ["b"]
    counted = engine.status().adapter_requests["b"]
    assert text_of(ask(engine, greedy(PROMPT, 12))) == adapted
    assert engine.status().adapter_requests["b"] == counted + 1
    assert text_of(ask(engine, greedy(PROMPT, 12, adapter="base"))) == base
    engine.use(None).result(10)
    assert text_of(ask(engine, greedy(PROMPT, 12))) == base
    with pytest.raises(UnknownName):
        engine.use("nobody").result(10)


def test_what_is_mounted_is_shown(engine: LocalEngine) -> None:
    ask(engine, greedy(PROMPT, 2, adapter="a"))
    ask(engine, greedy(PROMPT, 2))
    shown = {each.name: each for each in engine.status().adapters}
    assert set(shown) == {"a", "b"}
    assert shown["a"].fits_base is True
    assert (shown["a"].rank, shown["a"].requests, shown["a"].source) == (5, 1, "a")
    assert shown["a"].ranks == dict(zip(SHAPES, (3, 4, 5), strict=True))
    assert engine.status().models[0].adapters == ("a", "b")


def test_adapters_come_back_with_their_model(engine: LocalEngine) -> None:
    engine.mount("c", "c").result(30)
    before = text_of(ask(engine, greedy(PROMPT, 12, adapter="c")))
    engine.unload("tiny").result(30)
    assert text_of(ask(engine, greedy(PROMPT, 12, adapter="c"))) == before


def test_what_cannot_be_mounted_is_refused_with_the_reason(engine: LocalEngine, shelf: Path) -> None:
    _write(shelf / "wide", 1, wide=8)
    _write(shelf / "broken", 1, value=float("inf"))
    (shelf / "empty").mkdir()
    for name, source, kind, message in (
        ("wide", "wide", AdapterError, "q_proj has shape"),
        ("broken", "broken", AdapterError, "not finite"),
        ("empty", "empty", AdapterError, r"^empty"),
        ("a", "a", RequestError, "mounted already"),
        ("x", "../tiny", RequestError, "no adapter folder in one of --adapters-dir"),
        ("x", str(shelf.parent), RequestError, "no adapter folder"),
        ("x", "nothing-here", RequestError, "no adapter folder"),
    ):
        with pytest.raises(kind, match=message) as refused:
            engine.mount(name, source).result(30)
        assert source == str(shelf.parent) or str(shelf) not in str(refused.value)
    for name in ("", "a b", "../x", "base", "x" * 80):
        with pytest.raises(RequestError, match="no name for an adapter"):
            engine.mount(name, "a")
    assert {each.name for each in engine.status().adapters} == {"a", "b"}


@pytest.mark.parametrize(
    ("word", "message"),
    [("a", "write NAME=DIR"), ("other:a=x", "one of tiny"), ("a b=x", "no name for an adapter")],
)
def test_a_wrong_option_is_refused_at_once(folder: Path, word: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        engine_on(spec_of(folder), adapter=(word,))


def _error(events: list[Event]) -> Exception:
    [failed] = events
    assert isinstance(failed, Failed)
    assert (failed.kind, failed.status, failed.param) == ("UnknownName", 404, "adapter")
    return UnknownName(failed.message)
