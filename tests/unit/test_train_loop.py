"""The loop: exact accumulation, exact resumption, and clean ends."""

import signal
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from msgspec.structs import replace
from support_models import LLAMA, QWEN3_MOE
from support_training import adapted_model, adapter_arrays, samples, sft_trainer

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.lora.batches import collate
from mlx_optiq_ext.lora.checkpoint import CHECKPOINT_FILE, Store, TrainState, read_metrics
from mlx_optiq_ext.lora.logprobs import LogProbs
from mlx_optiq_ext.lora.objective import NotFinite
from mlx_optiq_ext.lora.recompute import recomputed
from mlx_optiq_ext.lora.schedule import build_optimizer, cosine_rate
from mlx_optiq_ext.models.arrays import named_arrays
from mlx_optiq_ext.models.families import find_blocks
from mlx_optiq_ext.stop import Stopped
from mlx_optiq_ext.types.training import METRICS_FILE, TrainOptions, TrainRecord, ValidationRecord

QUICK = TrainOptions(
    steps=6, batch_size=2, learning_rate=1e-2, validate_every=3, save_every=2, report_every=1
)


def _losses(folder) -> list[tuple[Any, ...]]:
    """Everything in the metrics that does not depend on the clock or on the process."""
    found = []
    for metric in read_metrics(folder / METRICS_FILE):
        if isinstance(metric, TrainRecord):
            found.append((metric.step, metric.loss, metric.gradient_norm, metric.learning_rate))
        else:
            found.append((metric.step, metric.loss, metric.is_best))
    return found


@pytest.mark.parametrize("config", [LLAMA, QWEN3_MOE], ids=["dense", "moe"])
def test_training_lowers_the_loss_of_train_and_keeps_the_base(tmp_path, config) -> None:
    model = adapted_model(config)
    frozen = {
        name: np.array(array) for name, array in named_arrays(model.parameters()) if "lora_" not in name
    }
    data = samples(8)
    trainer = sft_trainer(tmp_path, replace(QUICK, steps=20), data, model=model)
    before = trainer.sums(data)
    trainer.run()
    after = trainer.sums(data)
    assert after.loss / after.weight < 0.8 * before.loss / before.weight
    for name, array in named_arrays(model.parameters()):
        if "lora_" not in name:
            assert np.array_equal(np.array(array), frozen[name])


def test_accumulated_parts_are_one_large_batch(tmp_path) -> None:
    data = samples(16)  # of unequal numbers of learnt tokens: means of means would differ
    found = []
    for batch_size, accumulate in ((8, 1), (2, 4)):
        folder = tmp_path / str(batch_size)
        sft_trainer(folder, replace(QUICK, batch_size=batch_size, accumulate=accumulate, steps=4), data).run()
        found.append(read_metrics(folder / METRICS_FILE))
    for large, parts in zip(*found, strict=True):
        # Sums of floats in another order.
        assert parts.loss == pytest.approx(large.loss, rel=1e-5)
        assert parts.gradient_norm == pytest.approx(large.gradient_norm, rel=1e-3)


def test_accumulated_gradient_is_that_of_the_mean_over_all_learnt_tokens(tmp_path) -> None:
    data = samples(6)
    trainer = sft_trainer(tmp_path, replace(QUICK, batch_size=2, accumulate=3, steps=1, clip=0.0), data)
    reference = adapted_model()
    logprobs = LogProbs(reference)

    def mean_loss() -> mx.array:
        return -mx.mean(logprobs(collate(data)))

    loss, gradient = nn.value_and_grad(reference, mean_loss)()
    trainer.run()
    record = read_metrics(tmp_path / METRICS_FILE)[0]
    assert isinstance(record, TrainRecord)
    norm = np.sqrt(sum(float(mx.sum(array * array)) for _, array in named_arrays(gradient)))
    assert record.loss == pytest.approx(loss.item(), rel=1e-5)
    assert record.gradient_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path, dropout) -> None:
    options = replace(QUICK, steps=9, dropout=dropout, report_every=2, accumulate=2)
    train, valid = samples(14), samples(4, seed=9)
    straight = sft_trainer(tmp_path / "straight", options, train, valid)
    straight.run()
    stopped = sft_trainer(tmp_path / "stopped", options, train, valid)
    stopped._progress = _stop_at(5)
    with pytest.raises(Stopped) as caught:
        stopped.run()
    assert "checkpoint of update 4" in caught.value.__notes__[0]  # the fifth was not whole yet
    resumed = sft_trainer(tmp_path / "stopped", options, train, valid, adapted_model(seed=3, dropout=dropout))
    # Frozen weights come from the base; only the adapter and the optimizer are in the checkpoint.
    resumed._model.load_weights(
        [(n, a) for n, a in named_arrays(straight._model.parameters()) if "lora_" not in n], strict=False
    )
    found = resumed._store.load()
    assert found is not None
    assert found[0].step == 4
    resumed.restore(*found)
    resumed.run()
    assert _losses(tmp_path / "stopped") == _losses(tmp_path / "straight")
    expected, actual = adapter_arrays(straight._model), adapter_arrays(resumed._model)
    assert expected.keys() == actual.keys()
    assert all(np.array_equal(expected[name], actual[name]) for name in expected)
    assert resumed.kept_step == straight.kept_step


def test_checkpoint_of_other_settings_names_them(tmp_path) -> None:
    Store(tmp_path, {"data": "x", "seed": "1"}).save(TrainState(step=2), {"adapter": {"a": mx.zeros(2)}})
    with pytest.raises(UsageError, match=r"other settings \(seed\).*--no-resume"):
        Store(tmp_path, {"data": "x", "seed": "2"}).load()


def test_damaged_checkpoint_says_so(tmp_path) -> None:
    (tmp_path / CHECKPOINT_FILE).write_bytes(b"no tensors")
    with pytest.raises(UsageError, match="no readable checkpoint"):
        Store(tmp_path, {}).load()


def test_loss_that_is_no_number_names_update_and_example(tmp_path) -> None:
    data = samples(6)
    trainer = sft_trainer(tmp_path, replace(QUICK, steps=3, batch_size=6), data)
    trainer.run()
    good = adapter_arrays(trainer._model)
    poisoned = sft_trainer(tmp_path, replace(QUICK, steps=8, batch_size=6), data, model=trainer._model)
    embedding = trainer._model.model.embed_tokens
    weight = np.array(embedding.weight)
    weight[299] = np.nan
    only_there = (*data[3].tokens[:2], 299, *data[3].tokens[3:])
    data[3] = type(data[3])(where=data[3].where, tokens=only_there, spans=data[3].spans)
    # The table is the head as well: poison what is read only.
    trainer._model.model.embed_tokens = _Table(embedding, mx.array(weight))
    poisoned._train = data
    with pytest.raises(NotFinite, match=r"loss at update 1 is nan: data, line 4$"):
        poisoned.run()
    assert all(np.array_equal(good[name], array) for name, array in adapter_arrays(trainer._model).items())


class _Table(nn.Module):
    """An embedding that reads one table and writes with another."""

    def __init__(self, embedding: nn.Module, read: mx.array) -> None:
        super().__init__()
        self.inner = embedding
        self.read = read
        self.freeze()

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.read[tokens]

    def as_linear(self, h: mx.array) -> mx.array:
        return self.inner.as_linear(h)


def test_early_stop_keeps_the_best_adapter(tmp_path) -> None:
    options = replace(QUICK, steps=40, learning_rate=0.1, validate_every=2, patience=2, warmup=0.0)
    trainer = sft_trainer(tmp_path, options, samples(4), samples(4, seed=5))
    trainer.run()
    validations = [m for m in read_metrics(tmp_path / METRICS_FILE) if isinstance(m, ValidationRecord)]
    best = min(validations, key=lambda record: record.loss)
    assert trainer.stopped_early
    assert trainer.state.step < 40
    assert trainer.kept_step == best.step
    kept = trainer.sums(trainer._valid)
    assert kept.loss / kept.weight == best.loss


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("config", [LLAMA, QWEN3_MOE], ids=["dense", "moe"])
def test_recomputed_blocks_have_the_same_gradients(config, dropout) -> None:
    model = adapted_model(config, dropout=dropout, b_noise=0.1)
    model.train()
    logprobs = LogProbs(model)
    batch = collate(samples(3))
    classes = [type(block) for block in find_blocks(model).modules]

    def gradient() -> dict[str, Any]:
        mx.random.seed(7)
        _, found = nn.value_and_grad(model, lambda: -mx.sum(logprobs(batch)))()
        mx.eval(found)
        return dict(named_arrays(found))

    with recomputed(find_blocks(model).modules):
        again = gradient()
        total = sum(float(mx.sum(mx.abs(array))) for array in again.values())
    assert [type(block) for block in find_blocks(model).modules] == classes
    if dropout == 0.0:
        plain = gradient()
        for name, array in plain.items():
            assert np.allclose(np.array(array), np.array(again[name]), atol=1e-4, rtol=1e-4), name
    else:
        _assert_is_gradient(model, logprobs, batch, again)
    assert total > 0


def _assert_is_gradient(model: nn.Module, logprobs: LogProbs, batch: Any, gradient: dict[str, Any]) -> None:
    """Compare with a difference quotient under the same dropped units."""
    name = next(name for name in gradient if name.endswith("v_proj.lora_b"))
    module = model
    for part in name.rpartition(".")[0].split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    original = module.lora_b

    def loss(shift: float) -> float:
        module.lora_b = original + shift * gradient[name]
        with recomputed(find_blocks(model).modules):
            mx.random.seed(7)
            return float(-mx.sum(logprobs(batch)).item())

    slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
    module.lora_b = original
    # A float32 difference of losses around 100: three digits are left.
    assert slope == pytest.approx(float(mx.sum(gradient[name] ** 2)), rel=2e-2)


def test_learning_rate_rises_and_falls() -> None:
    rate = cosine_rate(1.0, 101, warmup=10, final_share=0.1)
    values = [float(rate(mx.array(step)).item()) for step in range(101)]
    assert values[0] == pytest.approx(1 / 11)
    assert values[10] == pytest.approx(1.0)
    assert values[-1] == pytest.approx(0.1)
    assert values[:11] == sorted(values[:11])
    assert values[10:] == sorted(values[10:], reverse=True)
    assert values[55] == pytest.approx(0.1 + 0.9 * 0.5, abs=1e-3)


def test_optimizer_is_adamw_with_corrected_moments() -> None:
    optimizer = build_optimizer(TrainOptions(weight_decay=0.1, warmup=0.0, learning_rate=0.5), 10)
    assert isinstance(optimizer, optim.AdamW)
    updated = optimizer.apply_gradients({"w": mx.array([2.0])}, {"w": mx.array([1.0])})
    # The first corrected step has length 1: 1 − 0.5·(0.1·1) − 0.5·1.
    assert updated["w"].item() == pytest.approx(1 - 0.05 - 0.5, abs=1e-5)


def _stop_at(step: int) -> Any:
    def sink(event: Any) -> None:
        if event.done == step:
            raise Stopped(signal.SIGTERM)

    return sink
