"""Prefixes: what a snapshot can give equals what computing it anew gives, on disk too."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from support_families import tiny_family
from support_models import tiny_model

import mlx_optiq_ext
from mlx_optiq_ext import _hook
from mlx_optiq_ext.engine import disk_tier
from mlx_optiq_ext.engine.disk_tier import DiskTier
from mlx_optiq_ext.engine.prefix_cache import PrefixCache, Reuse
from mlx_optiq_ext.engine.snapshot import Snapshot, checkpoint_of, forgets, shared_length
from mlx_optiq_ext.kv.build import build_caches
from mlx_optiq_ext.kv.observe import observe
from mlx_optiq_ext.types.kv import KVConfig, KVLayer
from mlx_optiq_ext.types.quant import Choice

TOKENS = tuple(int(token) for token in np.random.default_rng(0).integers(5, 60, size=600))
CUTS = (200, 420)
FORGETFUL = ("gemma3", "qwen3_next")
"""Sliding windows, and state-space layers."""


@pytest.fixture(scope="module", autouse=True)
def patched() -> Iterator[None]:
    mlx_optiq_ext.install()
    yield
    _hook.uninstall()


def _model(name: str) -> nn.Module:
    model = tiny_model(dtype=mx.float32) if name == "llama" else tiny_family(name)[0]
    model.set_dtype(mx.float32)
    return model


def _caches(model: nn.Module, *, stored: bool) -> list[Any]:
    if not stored:
        return make_prompt_cache(model)
    eight = Choice(bits=8, group_size=32)
    layers = tuple(
        KVLayer(index=site.index, member=site.member, k=eight, v=eight) for site in observe(model).sites
    )
    return build_caches(model, KVConfig(layers=layers, rotate=True))


def _run(model: Any, caches: list[Any], tokens: tuple[int, ...]) -> mx.array:
    out = model(mx.array([tokens]), cache=caches)
    logits = getattr(out, "logits", out)[0, -1]
    mx.eval(logits, [cache.state for cache in caches])
    return logits


def _snapshot(model: nn.Module, *, stored: bool = False) -> Snapshot:
    """Of all tokens, with checkpoints at the cuts."""
    caches, checkpoints, before = _caches(model, stored=stored), {}, 0
    for cut in (*CUTS, len(TOKENS)):
        _run(model, caches, TOKENS[before:cut])
        if cut in CUTS and any(forgets(cache) for cache in caches):
            checkpoints[cut] = checkpoint_of(caches)
        before = cut
    return Snapshot(TOKENS, caches, checkpoints)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("name", ["llama", *FORGETFUL])
def test_restored_caches_go_on_as_computed_ones(name: str, stored: bool) -> None:
    model = _model(name)
    snapshot = _snapshot(model, stored=stored)
    tail = (7, 8, 9)
    for wanted in (90, 200, 350, 600):
        length = snapshot.usable(wanted)
        assert length == wanted or name in FORGETFUL
        assert length in (0, *CUTS, len(TOKENS)) or name == "llama"
        if not length:
            continue
        again = _run(model, snapshot.restore(length), tail)
        fresh = _caches(model, stored=stored)
        _run(model, fresh, TOKENS[:length])
        # Other chunks sum in another order; a number at the edge of a step may be stored one step off.
        np.testing.assert_allclose(
            np.array(again), np.array(_run(model, fresh, tail)), atol=3e-3 if stored else 2e-4
        )
    assert len(snapshot) == len(TOKENS), "using a snapshot must not change it"


def test_a_snapshot_outlives_what_is_made_from_it() -> None:
    model = _model("llama")
    snapshot = _snapshot(model)
    before = [np.array(cache.keys[..., : cache.offset, :]) for cache in snapshot.caches]
    for length in (100, 600):
        _run(model, snapshot.restore(length), tuple(range(5, 300)))
    after = [np.array(cache.keys[..., : cache.offset, :]) for cache in snapshot.caches]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


def test_shared_length_counts_from_the_beginning() -> None:
    left = np.array([1, 2, 3, 4], dtype=np.int32)
    assert shared_length(left, np.array([1, 2, 9, 4], dtype=np.int32)) == 2
    assert shared_length(left, np.array([1, 2], dtype=np.int32)) == 2
    assert shared_length(left, np.array([], dtype=np.int32)) == 0


def _none(_: int) -> Reuse | None:
    return None


def test_the_longest_prefix_of_the_same_key_is_found() -> None:
    model = _model("llama")
    cache = PrefixCache(1 << 30)
    snapshot = _snapshot(model)
    cache.put("a", snapshot)
    found = cache.find("a", (*TOKENS[:300], 1, 2, 3), _none)
    assert found is not None
    assert found.length == 300
    assert cache.find("b", TOKENS, _none) is None, "another model, adapter or storage shares nothing"
    whole = cache.find("a", TOKENS, _none)
    assert whole is not None
    assert whole.length == len(TOKENS) - 1, "the last token is left to compute"
    status = cache.status()
    assert (status.lookups, status.hits, status.reused_tokens) == (3, 2, 300 + 599)


def test_a_longer_snapshot_takes_the_place_of_its_prefix() -> None:
    model = _model("llama")
    cache = PrefixCache(1 << 30)
    caches = _caches(model, stored=False)
    _run(model, caches, TOKENS[:200])
    cache.put("a", Snapshot(TOKENS[:200], caches))
    cache.put("a", _snapshot(model))
    assert cache.status().entries == 1
    cache.put("a", Snapshot(TOKENS[:200], caches))
    assert cache.status().entries == 1


def test_what_cannot_be_taken_back_keeps_its_shorter_snapshots() -> None:
    model = _model("qwen3_next")
    cache = PrefixCache(1 << 30)
    caches = _caches(model, stored=False)
    _run(model, caches, TOKENS[:100])
    cache.put("a", Snapshot(TOKENS[:100], caches))
    cache.put("a", _snapshot(model))
    assert cache.status().entries == 2
    found = cache.find("a", (*TOKENS[:150], 1, 2), _none)
    assert found is not None
    assert found.length == 100


def test_the_least_recently_used_goes_first() -> None:
    model = _model("llama")

    def row(first: int) -> Snapshot:
        tokens = (first, *TOKENS[1:300])
        caches = _caches(model, stored=False)
        _run(model, caches, tokens)
        return Snapshot(tokens, caches)

    cache = PrefixCache(2 * row(1).nbytes)
    for first in (1, 2):
        cache.put("a", row(first))
    assert cache.find("a", (1, *TOKENS[1:300]), _none) is not None
    cache.put("a", row(3))
    assert cache.find("a", (2, *TOKENS[1:300]), _none) is None
    assert cache.find("a", (1, *TOKENS[1:300]), _none) is not None
    assert cache.nbytes <= cache.limit_nbytes
    assert cache.status().evictions == 1


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("name", ["llama", *FORGETFUL])
def test_a_prefix_survives_a_restart(tmp_path: Path, name: str, stored: bool) -> None:
    model = _model(name)
    cache = PrefixCache(1 << 30, DiskTier(tmp_path / "kept", 1 << 30))
    snapshot = _snapshot(model, stored=stored)
    cache.put("a", snapshot)
    cache.flush()
    again = PrefixCache(1 << 30, DiskTier(tmp_path / "kept", 1 << 30))
    assert again.find("b", (*TOKENS, 1), _none) is None
    for wanted in (420, 600):
        found = again.find("a", (*TOKENS[:wanted], 1, 2), _none)
        assert found is not None
        assert found.length == wanted
        one = _run(model, found.snapshot.restore(wanted), (7, 8))
        two = _run(model, snapshot.restore(wanted), (7, 8))
        np.testing.assert_array_equal(np.array(one), np.array(two))


def test_a_damaged_file_is_removed_and_not_used(tmp_path: Path) -> None:
    model = _model("llama")
    tier = DiskTier(tmp_path / "kept", 1 << 30)
    tier.keep("a", _snapshot(model))
    [file] = (tmp_path / "kept").glob("*/caches.safetensors")
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(bytes(data))
    assert DiskTier(tmp_path / "kept", 1 << 30).best("a", np.array(TOKENS, dtype=np.int32), 0) is None
    assert not file.exists()


def test_an_index_of_other_tokens_is_removed_and_not_used(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "kept", 1 << 30)
    tier.keep("a", _snapshot(_model("llama")))
    [file] = (tmp_path / "kept").glob("*/index.json")
    index = json.loads(file.read_text())
    tokens = np.frombuffer(base64.b64decode(index["tokens"]), dtype="<i4").copy()
    tokens[-1] += 1
    file.write_text(json.dumps({**index, "tokens": base64.b64encode(tokens.tobytes()).decode()}))
    assert DiskTier(tmp_path / "kept", 1 << 30).held() == (0, 0)
    assert not file.exists()


def test_a_full_disk_keeps_nothing_and_breaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: str, caches: list[Any]) -> None:
        raise RuntimeError(f"[save_safetensors] Failed to write {len(caches)} arrays to {file}")

    monkeypatch.setattr(disk_tier, "save_prompt_cache", full)
    tier = DiskTier(tmp_path / "kept", 1 << 30)
    tier.keep("a", _snapshot(_model("llama")))
    assert tier.held() == (0, 0)
    assert not list((tmp_path / "kept").iterdir())


def test_the_folder_stays_within_its_limit_and_can_be_cleared(tmp_path: Path) -> None:
    model = _model("llama")

    def row(first: int) -> Snapshot:
        tokens = (first, *TOKENS[1:])
        caches = _caches(model, stored=False)
        _run(model, caches, tokens)
        return Snapshot(tokens, caches)

    tier = DiskTier(tmp_path / "kept", int(2.5 * row(1).nbytes))
    for first in (1, 2, 3):
        tier.keep("a", row(first))
    entries, nbytes = tier.held()
    assert entries == 2
    on_disk = sum(file.stat().st_size for file in (tmp_path / "kept").glob("*/*.safetensors"))
    assert nbytes == on_disk
    assert tier.clear() == nbytes
    assert not list((tmp_path / "kept").iterdir())
