"""What the original weights tell about an adapter: spectra of errors, and a start that undoes them."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from support_lora import ALL_TARGETS, TOKENS, quantized_model
from support_models import LLAMA, QWEN3_MOE

from mlx_optiq_ext.errors import AdapterError
from mlx_optiq_ext.lora.layers import apply_lora, get_factors
from mlx_optiq_ext.lora.ranks import plan_ranks
from mlx_optiq_ext.lora.residual import QuantizationErrors
from mlx_optiq_ext.lora.spectrum import noise_spectrum, shares
from mlx_optiq_ext.lora.targets import list_targets
from mlx_optiq_ext.measure.divergence import kl_divergence
from mlx_optiq_ext.models.walk import get_module
from mlx_optiq_ext.types.adapter import AdapterOptions

CALIBRATION = mx.array(np.random.default_rng(1).integers(0, 320, (4, 32)).astype(np.int32))
HELD_OUT = mx.array(np.random.default_rng(2).integers(0, 320, (4, 32)).astype(np.int32))
OPTIONS = AdapterOptions(rank=8, rank_scaling="constant", targets=ALL_TARGETS)


def kl(original: nn.Module, model: nn.Module) -> float:
    return float(kl_divergence(original(HELD_OUT), model(HELD_OUT)).mean())


@pytest.mark.parametrize("config", [LLAMA, QWEN3_MOE], ids=["llama", "qwen3_moe"])
@pytest.mark.parametrize("label", ["3g64", "4g64", "mxfp4"])
def test_starting_from_the_error_lowers_held_out_divergence(label: str, config: dict[str, Any]) -> None:
    original, model = quantized_model("keep", config), quantized_model(label, config)
    errors = QuantizationErrors(model, original, CALIBRATION, list_targets(model))
    before = kl(original, model)
    ranks = plan_ranks(model, OPTIONS)
    layers = apply_lora(model, ranks, scale=2.0)
    assert kl(original, model) == before
    errors.start(layers, ranks)
    assert kl(original, model) < 0.95 * before  # of random weights, whose errors have flat spectra


def test_the_start_is_the_best_product_of_its_rank() -> None:
    original, model = quantized_model("keep"), quantized_model("3g64")
    path = "model.layers.0.mlp.down_proj"
    errors = QuantizationErrors(model, original, CALIBRATION, list_targets(model))
    ranks = plan_ranks(model, OPTIONS)
    base = get_module(model, path)
    quantized = mx.dequantize(base.weight, base.scales, base.biases, group_size=64, bits=3)
    error = np.array(get_module(original, path).weight - quantized)
    moments = errors._moments[path]
    singular = np.linalg.svd(error * np.sqrt(moments), compute_uv=False)
    np.testing.assert_allclose(errors.spectra()[path], singular**2, rtol=1e-3)
    layers = apply_lora(model, ranks, scale=2.0)
    errors.start(layers, ranks)
    factors = get_factors(layers[path])
    left = error - 2.0 * np.array((factors.a @ factors.b).T)
    assert np.square(left * np.sqrt(moments)).sum() == pytest.approx((singular[8:] ** 2).sum(), rel=1e-3)
    a, b = np.array(factors.a), np.array(factors.b)
    # Balanced, so that neither learns faster.
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-3)


def test_moments_of_experts_count_the_tokens_they_get() -> None:
    model = quantized_model("4g64", QWEN3_MOE)
    errors = QuantizationErrors(model, quantized_model("keep", QWEN3_MOE), TOKENS, list_targets(model))
    experts = errors._moments["model.layers.0.mlp.switch_mlp.up_proj"]
    router = errors._moments["model.layers.0.mlp.gate"]
    # Two of four experts see every token: their shares sum to two. Floors add next to nothing.
    np.testing.assert_allclose(experts.sum(axis=0), 2 * router, rtol=1e-2)


def test_another_original_is_refused() -> None:
    model = quantized_model("4g64")
    targets = list_targets(model)
    with pytest.raises(AdapterError, match="is quantized too"):
        QuantizationErrors(model, quantized_model("8g64"), TOKENS, targets)
    with pytest.raises(AdapterError, match="has the shape"):
        QuantizationErrors(
            model, quantized_model("keep", {**LLAMA, "intermediate_size": 512}), TOKENS, targets
        )
    with pytest.raises(AdapterError, match=r"has no model\.layers\.1"):
        QuantizationErrors(model, quantized_model("keep", {**LLAMA, "num_hidden_layers": 1}), TOKENS, targets)


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (48, 192), (512, 64)])
def test_the_spectrum_of_noise_is_that_of_random_matrices(rows: int, columns: int) -> None:
    noise = np.random.default_rng(0).standard_normal((rows, columns))
    drawn = shares(np.linalg.svd(noise, compute_uv=False) ** 2)
    expected = shares(noise_spectrum(rows, columns))
    assert expected.shape == drawn.shape
    assert np.abs(np.cumsum(expected) - np.cumsum(drawn)).max() < 0.02
    assert (np.diff(expected) <= 0).all()
