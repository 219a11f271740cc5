"""Rows with different adapters in one batch: each as alone, and as mlx-lm's own LoRA layers compute it."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from support_models import LLAMA, QWEN3_MOE, tiny_model

from mlx_optiq_ext.adapters.layers import RoutedLayer
from mlx_optiq_ext.adapters.mount import AdapterMount
from mlx_optiq_ext.adapters.rows import BASE, AdapterRow, RoutedModel
from mlx_optiq_ext.errors import AdapterError
from mlx_optiq_ext.lora.factors import Factors

PATHS = {
    "llama": ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.embed_tokens"),
    "qwen3_moe": (
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.mlp.switch_mlp.down_proj",
        "model.layers.1.mlp.switch_mlp.gate_proj",
    ),
}
CONFIGS = {"llama": LLAMA, "qwen3_moe": QWEN3_MOE}


def _model(name: str, bits: int | None = None) -> nn.Module:
    model = tiny_model(CONFIGS[name], dtype=mx.float32)
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits)
    return model


def _shapes(module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if isinstance(module, SwitchLinear | QuantizedSwitchLinear):
        experts = module.num_experts
        return (experts, module.input_dims, rank), (experts, rank, module.output_dims)
    rows, columns = module.weight.shape
    width = columns * 32 // module.bits if hasattr(module, "bits") else columns
    return ((rows, rank), (rank, width)) if hasattr(module, "as_linear") else ((width, rank), (rank, rows))


def _adapter(
    model: nn.Module, name: str, seed: int, paths: tuple[str, ...] | None = None
) -> dict[str, Factors]:
    """Random residuals, large enough to change tokens; ranks differ by path and seed."""
    rng = np.random.default_rng(seed)
    modules = dict(model.named_modules())
    residuals = {}
    for k, path in enumerate(paths or PATHS[name]):
        base = modules[path].base if isinstance(modules[path], RoutedLayer) else modules[path]
        a, b = _shapes(base, 2 + seed + k)
        residuals[path] = Factors(
            mx.array(rng.standard_normal(a).astype(np.float32) / np.sqrt(a[-2])),
            mx.array(rng.standard_normal(b).astype(np.float32)),
        )
    return residuals


def _stock(model: nn.Module, residuals: dict[str, Factors]) -> None:
    """The same adapter through mlx-lm's own layers."""
    modules = dict(model.named_modules())
    for path, residual in residuals.items():
        base, rank = modules[path], residual.rank
        if isinstance(base, SwitchLinear | QuantizedSwitchLinear):
            layer: Any = LoRASwitchLinear.from_base(base, r=rank, scale=1.0)
            layer.lora_a, layer.lora_b = residual.a.swapaxes(-1, -2), residual.b.swapaxes(-1, -2)
        else:
            kind = LoRAEmbedding if hasattr(base, "as_linear") else LoRALinear
            layer = kind.from_base(base, r=rank, scale=1.0)
            layer.lora_a, layer.lora_b = residual.a, residual.b
        model.update_modules(tree_unflatten([(path, layer)]))


def _logits(model: Any, tokens: mx.array, slots: tuple[int, ...]) -> mx.array:
    caches = [*make_prompt_cache(model.model), AdapterRow(slots)]
    return model(tokens, cache=caches)


@pytest.mark.parametrize("tokens_each", [1, 30], ids=["step", "prompt"])
@pytest.mark.parametrize("bits", [None, 3, 4, 8])
@pytest.mark.parametrize("name", list(PATHS))
def test_a_mixed_batch_computes_what_stock_layers_do_row_by_row(
    name: str, bits: int | None, tokens_each: int
) -> None:
    model = _model(name, bits)
    mount = AdapterMount(model)
    adapters = {seed: _adapter(model, name, seed) for seed in (1, 2)}
    slots = (mount.mount(adapters[1]), BASE, mount.mount(adapters[2]), BASE + 1)
    tokens = mx.array(np.random.default_rng(3).integers(0, 300, size=(4, tokens_each)))
    together = _logits(RoutedModel(model), tokens, slots)
    for row, seed in enumerate((1, None, 2, 1)):
        alone = _model(name, bits)
        if seed is not None:
            _stock(alone, adapters[seed])
        expected: Any = alone(tokens[row : row + 1])  # type: ignore[operator]
        np.testing.assert_allclose(np.array(together[row]), np.array(expected[0]), atol=2e-4, rtol=1e-4)


def test_a_batch_of_one_adapter_computes_the_same_without_gathering() -> None:
    model = _model("llama")
    mount = AdapterMount(model)
    slot = mount.mount(_adapter(model, "llama", 1))
    other = mount.mount(_adapter(model, "llama", 2))
    tokens = mx.array([[5, 6, 7], [8, 9, 10]])
    same = _logits(RoutedModel(model), tokens, (slot, slot))
    mixed = _logits(RoutedModel(model), tokens, (slot, other))
    np.testing.assert_allclose(np.array(same[0]), np.array(mixed[0]), atol=1e-4)


def test_an_adapter_that_leaves_a_layer_alone_changes_nothing_there() -> None:
    model = _model("llama")
    mount = AdapterMount(model)
    first = mount.mount(_adapter(model, "llama", 1, PATHS["llama"][:1]))
    second = mount.mount(_adapter(model, "llama", 2, PATHS["llama"][1:]))
    tokens = mx.array([[5, 6, 7]] * 3)
    together = _logits(RoutedModel(model), tokens, (first, second, BASE))
    for row, slot in enumerate((first, second, BASE)):
        alone = _logits(RoutedModel(model), tokens[:1], (slot,))
        np.testing.assert_allclose(np.array(together[row]), np.array(alone[0]), atol=1e-4)
    assert len({np.array(row).tobytes() for row in together}) == 3


def test_rows_keep_their_adapter_through_a_running_batch() -> None:
    model = _model("llama", 4)
    mount = AdapterMount(model)
    slots = [BASE, *(mount.mount(_adapter(model, "llama", seed)) for seed in (1, 2, 3))]
    routed = RoutedModel(model)
    prompts = [[7, 8, 9, 10, 11][: 2 + k] * (k + 1) for k in range(4)]

    def tokens_of(rows: list[tuple[list[int], int]], limit: int) -> list[list[int]]:
        generator = BatchGenerator(routed, prefill_batch_size=2, completion_batch_size=4)
        found: dict[int, list[int]] = {}

        def step() -> None:
            for answer in generator.next()[1]:
                found[answer.uid].append(answer.token)

        for at, (prompt, slot) in enumerate(rows):
            caches = [*make_prompt_cache(model), AdapterRow([slot])]
            # The later rows end sooner: rows leave from the middle of the batch.
            [uid] = generator.insert([prompt], max_tokens=[limit - 3 * at], caches=[caches])
            found[uid] = []
            step()
        for _ in range(4 * limit):
            step()
        return list(found.values())

    together = tokens_of(list(zip(prompts, slots, strict=True)), 20)
    for at, (prompt, slot) in enumerate(zip(prompts, slots, strict=True)):
        [alone] = tokens_of([(prompt, slot)], 20)
        assert together[at] == alone[: 20 - 3 * at]
    assert len({tuple(tokens[:8]) for tokens in together}) == 4


def test_unmounting_gives_the_base_its_own_layers_and_numbers_back() -> None:
    model = _model("llama", 4)
    tokens = mx.array([[5, 6, 7]])
    before = np.array(model(tokens))  # type: ignore[operator]
    kinds = {path: type(module) for path, module in model.named_modules()}
    mount = AdapterMount(model)
    first, second = (mount.mount(_adapter(model, "llama", seed)) for seed in (1, 2))
    assert mount.nbytes > 0
    mount.unmount(first)
    assert mount.mount(_adapter(model, "llama", 5)) == first, "a free slot is used again"
    np.testing.assert_array_equal(np.array(_logits(RoutedModel(model), tokens, (BASE,))), before)
    mount.unmount(first)
    mount.unmount(second)
    assert mount.nbytes == 0
    assert {path: type(module) for path, module in model.named_modules()} == kinds
    np.testing.assert_array_equal(np.array(model(tokens)), before)  # type: ignore[operator]


def test_what_does_not_fit_is_refused_and_nothing_is_mounted() -> None:
    model = _model("llama", 4)
    mount = AdapterMount(model)
    good = _adapter(model, "llama", 1)
    path = PATHS["llama"][0]
    nowhere = {**good, "model.layers.9.self_attn.q_proj": good[path]}
    with pytest.raises(AdapterError, match=r"model\.layers\.9\.self_attn\.q_proj, which is no layer"):
        mount.mount(nowhere)
    wide = Factors(mx.zeros((256, 4)), good[path].b[:4])
    with pytest.raises(AdapterError, match=r"q_proj has shape \(128, 128\).*the adapter \(256, 128\)"):
        mount.mount({**good, path: wide})
    broken = Factors(good[path].a * float("nan"), good[path].b)
    with pytest.raises(AdapterError, match="not finite"):
        mount.mount({**good, path: broken})
    assert mount.nbytes == 0
    assert not any(isinstance(module, RoutedLayer) for _, module in model.named_modules())
