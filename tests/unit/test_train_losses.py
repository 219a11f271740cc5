"""Losses against plain implementations: log-probabilities, SFT, DPO, and their gradients."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from support_families import tiny_family
from support_models import LLAMA, QWEN3_MOE
from support_training import adapted_model, pairs, samples

from mlx_optiq_ext.lora.batches import collate
from mlx_optiq_ext.lora.checkpoint import Store
from mlx_optiq_ext.lora.dpo import Judged, Preferring, adapter_off, judge_pairs, preference_loss
from mlx_optiq_ext.lora.logprobs import LogProbs
from mlx_optiq_ext.lora.loop import Trainer
from mlx_optiq_ext.models.arrays import named_arrays
from mlx_optiq_ext.models.intercept import constant_indices
from mlx_optiq_ext.models.load import cast_floats
from mlx_optiq_ext.models.tape import logits_of
from mlx_optiq_ext.types.training import TrainOptions

SMALL_CHUNK = 320 * 4  # four tokens of the tiny vocabulary


def _plain_logprobs(model: Any, tokens: tuple[int, ...], spans: Any) -> mx.array:
    """One sequence by itself, all logits at once."""
    logits = logits_of(model(mx.array([tokens[:-1]])))[0].astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    learnt = [index for begin, end in spans for index in range(max(begin, 1), end)]
    return mx.stack([logprobs[index - 1, tokens[index]] for index in learnt])


# Heads of their own and tied ones, soft caps, logit scales, wrappers around a text model, recurrent blocks.
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "qwen3_moe",
        "gemma2",
        "gemma3",
        "cohere",
        "granite",
        "qwen3_5",
        "mamba2",
        "gpt2",
        "deepseek_v3",
    ],
)
def test_chunked_logprobs_are_the_plain_ones(name) -> None:
    model, config = tiny_family(name)
    cast_floats(model, mx.float32)
    vocab = config.get("vocab_size") or config["text_config"]["vocab_size"]
    data = samples(3, vocab=vocab)
    batch = collate(data)
    chunked = LogProbs(model, chunk_floats=4 * vocab)(batch)
    assert LogProbs(model)._trunk is not None
    expected = mx.concatenate([_plain_logprobs(model, item.tokens, item.spans) for item in data])
    # Recurrent families scan padded rows in another order of sums.
    assert np.allclose(np.array(chunked), np.array(expected), atol=2e-4)


@pytest.mark.parametrize("config", [LLAMA, {**LLAMA, "tie_word_embeddings": False}, QWEN3_MOE])
def test_chunked_gradients_are_the_plain_ones(config) -> None:
    model = adapted_model(config, b_noise=0.2)
    head = model.lm_head if "lm_head" in model else model.model.embed_tokens
    head.unfreeze()  # a trained head must get its part too
    data = samples(3)
    batch = collate(data)
    logprobs = LogProbs(model, chunk_floats=SMALL_CHUNK)

    def plain() -> mx.array:
        return sum(mx.sum(_plain_logprobs(model, item.tokens, item.spans)) for item in data)

    with constant_indices():
        expected = dict(named_arrays(nn.value_and_grad(model, plain)()[1]))
        found = dict(named_arrays(nn.value_and_grad(model, lambda: mx.sum(logprobs(batch)))()[1]))
    assert found.keys() == expected.keys()
    assert any("embed_tokens" in name or "lm_head" in name for name in found)
    for name, array in expected.items():
        scale = float(mx.max(mx.abs(array)))
        assert np.allclose(np.array(found[name]), np.array(array), atol=1e-4 * max(scale, 1)), name


def test_adapter_off_is_the_base_exactly() -> None:
    base, adapted = adapted_model(), adapted_model(b_noise=0.5)
    tokens = mx.array([[5, 6, 7, 8]])
    with adapter_off(adapted):
        assert mx.array_equal(adapted(tokens), base(tokens))
    assert not mx.array_equal(adapted(tokens), base(tokens))


def test_reference_is_what_the_base_says_of_each_answer_alone() -> None:
    base, adapted = adapted_model(), adapted_model(b_noise=0.5)
    data = pairs(5)
    judged = judge_pairs(adapted, LogProbs(adapted), data, 2)
    for pair, row in zip(data, judged, strict=True):
        for side, value in zip((pair.chosen, pair.rejected), row, strict=True):
            expected = float(mx.sum(_plain_logprobs(base, side.tokens, side.spans)).item())
            assert value == pytest.approx(expected, rel=1e-5)


def _plain_dpo(model: Any, base: Any, data: Any, kind: str, beta: float, smoothing: float) -> mx.array:
    """The papers' formulas, written pair by pair."""
    total = mx.array(0.0)
    for pair in data:
        ratios = []
        for side in (pair.chosen, pair.rejected):
            policy = _plain_logprobs(model, side.tokens, side.spans)
            reference = mx.stop_gradient(_plain_logprobs(base, side.tokens, side.spans))
            difference = policy - reference
            ratios.append(mx.mean(difference) if kind == "ipo" else mx.sum(difference))
        h = ratios[0] - ratios[1]
        if kind == "ipo":
            total = total + (h - 1 / (2 * beta)) ** 2
        else:
            right, wrong = mx.sigmoid(beta * h), mx.sigmoid(-beta * h)
            total = total - (1 - smoothing) * mx.log(right) - smoothing * mx.log(wrong)
    return total


@pytest.mark.parametrize(("kind", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0)])
def test_preference_gradients_are_those_of_the_papers_formulas(kind, smoothing) -> None:
    model, base = adapted_model(b_noise=0.05), adapted_model()
    data = pairs(4)
    logprobs = LogProbs(model, chunk_floats=SMALL_CHUNK)
    judged = [
        Judged(pair=pair, reference=(float(row[0]), float(row[1])))
        for pair, row in zip(data, judge_pairs(model, logprobs, data, 3), strict=True)
    ]
    objective = Preferring(logprobs, kind=kind, beta=0.3, label_smoothing=smoothing)
    batch = objective.collate(judged)
    (loss, values), found = nn.value_and_grad(model, objective.sums)(batch)
    plain = lambda: _plain_dpo(model, base, data, kind, 0.3, smoothing)  # noqa: E731
    expected_loss, expected = nn.value_and_grad(model, plain)()
    assert batch.weight == 4
    assert float(loss.item()) == pytest.approx(float(expected_loss.item()), rel=1e-4)
    gradients = dict(named_arrays(found))
    for name, array in named_arrays(expected):
        scale = float(mx.max(mx.abs(array)))
        assert np.allclose(np.array(gradients[name]), np.array(array), atol=1e-4 * max(scale, 1)), name
    assert float(values["margin"].item()) == pytest.approx(
        float((values["chosen_reward"] - values["rejected_reward"]).item()), rel=1e-5
    )


def test_losses_at_known_ratios() -> None:
    ratio = mx.array([0.0, 2.0, -2.0])
    sigmoid = np.array(preference_loss(ratio, beta=0.5))
    assert np.allclose(sigmoid, -np.log(1 / (1 + np.exp(-0.5 * np.array([0.0, 2.0, -2.0])))), atol=1e-6)
    smoothed = np.array(preference_loss(ratio, beta=0.5, label_smoothing=0.1))
    assert np.allclose(smoothed, 0.9 * sigmoid + 0.1 * sigmoid[[0, 2, 1]], atol=1e-6)
    assert np.array(preference_loss(ratio, kind="ipo", beta=0.25)).tolist() == [4.0, 0.0, 16.0]


def test_training_raises_the_margin_on_held_out_pairs(tmp_path) -> None:
    model = adapted_model()
    logprobs = LogProbs(model)
    data, held_out = pairs(24), pairs(12, seed=5)
    options = TrainOptions(method="dpo", steps=24, batch_size=8, learning_rate=1e-2, validate_every=4)
    judged = [
        [
            Judged(pair=pair, reference=(float(row[0]), float(row[1])))
            for pair, row in zip(part, judge_pairs(model, logprobs, part, 8), strict=True)
        ]
        for part in (data, held_out)
    ]
    trainer = Trainer(
        model, Preferring(logprobs), (judged[0], judged[1]), options, Store(tmp_path, {"data": "pairs"})
    )
    before = trainer.sums(judged[1])
    trainer.run()
    after = trainer.sums(judged[1])
    # Before training the model is its own reference; float sums of other batches differ in the last places.
    assert before.loss / before.weight == pytest.approx(np.log(2), abs=1e-4)
    assert before.values["margin"] == pytest.approx(0, abs=1e-3)
    assert after.values["margin"] / after.weight > 0.5
    assert after.values["accuracy"] / after.weight > 0.8
    assert after.values["chosen_reward"] > after.values["rejected_reward"]
