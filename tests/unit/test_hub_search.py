"""Searching for models on a Hub in memory, and what is said where there is none."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support_hub import FakeHub, serve, use_endpoint, use_hub

from mlx_optiq_ext.errors import ModelNotFound
from mlx_optiq_ext.hub.resolve import resolve_model
from mlx_optiq_ext.hub.search import FoundModel, cached_models, fetch_config, search_models


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve(FakeHub()) as state:
        use_hub(state, tmp_path / "cache", monkeypatch)
        yield state


def test_a_search_tells_size_downloads_and_gates(hub: FakeHub) -> None:
    hub.found = {
        "acme/big": {
            "downloads": 90,
            "gated": "manual",
            "safetensors": {"parameters": {"BF16": 7_000}, "total": 7_000},
        },
        "acme/unknown": {"downloads": 3, "gated": False},
    }
    assert search_models("acme") == (
        FoundModel(repo_id="acme/big", numel=7_000, downloads=90, is_gated=True),
        FoundModel(repo_id="acme/unknown", downloads=3),
    )


def test_no_answer_is_said_with_what_works_without(monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(ModelNotFound, match=r"does not answer .*; models in the cache and in folders"):
        search_models("acme")


def test_a_refusal_of_the_hub_is_an_error_of_ours(hub: FakeHub) -> None:
    hub.status = 400
    with pytest.raises(ModelNotFound, match="cannot be searched for 'acme'"):
        search_models("acme")


def test_models_with_weights_in_the_cache_are_listed(hub: FakeHub, tmp_path: Path) -> None:
    assert cached_models() == ()
    hub.repositories["acme/tiny"] = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x" * 9}
    hub.repositories["acme/bare"] = {"config.json": b'{"model_type": "llama"}'}
    resolve_model("acme/tiny")
    assert fetch_config("acme/bare") == {"model_type": "llama"}
    assert cached_models() == (FoundModel(repo_id="acme/tiny", is_cached=True),)


@pytest.mark.parametrize(("content", "said"), [(b"[1]", "no object"), (b"{", "not JSON")])
def test_a_config_that_is_none_is_refused(hub: FakeHub, content: bytes, said: str) -> None:
    hub.repositories["acme/odd"] = {"config.json": content}
    with pytest.raises(ModelNotFound, match=said):
        fetch_config("acme/odd")
