"""The KV cache of a real model: measured, accepted, compared with plain uniform storage, and its bytes."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

from mlx_optiq_ext.formats.kv_config import read_kv_config
from mlx_optiq_ext.kv.build import build_caches
from mlx_optiq_ext.kv.observe import observe

pytestmark = pytest.mark.model

CONTEXT = 256


def _optiq(*words: str | Path) -> str:
    command = [sys.executable, "-m", "mlx_optiq_ext", *map(str, words), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def planned(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration at 4.5 bits, from far less text and fewer choices than the defaults take."""
    out = tmp_path_factory.mktemp("kv")
    settings = ("--target-bits", "4.5", "--context", str(CONTEXT), "--num-tokens", "512")
    _optiq(
        "kv-cache", smollm2, "-o", out, *settings, "--candidate-bits", "2,3,4,6", "--candidate-groups", "64"
    )
    return out


def test_mixed_at_four_and_a_half_bits_is_far_nearer_than_plain_uniform(smollm2: Path, planned: Path) -> None:
    flags = ("--kv-config", planned, "--kv-uniform", "4", "--lengths", str(CONTEXT), "--num-tokens", "512")
    rows = {row["cache"]: row for row in json.loads(_optiq("score", smollm2, *flags, "--json"))["rows"]}
    mixed, uniform = rows["configured"], rows["uniform 4"]
    assert mixed["bits_per_number"] <= uniform["bits_per_number"] == 4.5
    # About a third with the defaults; 0.6 leaves room for the little text used here.
    assert 0 < mixed["divergence"] < 0.6 * uniform["divergence"]


def test_caches_hold_the_bytes_that_were_predicted(smollm2: Path, planned: Path) -> None:
    model, _ = load_model(smollm2, lazy=True)
    config = read_kv_config(planned)
    caches = build_caches(model, config)
    for site, cache in zip(observe(model).sites, caches, strict=True):
        shape = (1, site.heads, CONTEXT)
        cache.update_and_fetch(
            mx.zeros((*shape, site.key_dim), mx.bfloat16), mx.zeros((*shape, site.value_dim), mx.bfloat16)
        )
    assert sum(cache.nbytes for cache in caches) == config.bytes_per_token * CONTEXT
