"""A short training on the real small model: the loss falls; stock mlx-lm and the server take the adapter."""

from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import stream_generate
from mlx_lm.utils import load_adapters
from support_serving import ask, engine_on, greedy, spec_of, text_of

from mlx_optiq_ext.hub.resolve import resolve_model
from mlx_optiq_ext.lora.prepare import TrainJob
from mlx_optiq_ext.lora.train import train_adapter
from mlx_optiq_ext.types.adapter import AdapterOptions
from mlx_optiq_ext.types.training import TrainOptions, TrainSummary

pytestmark = pytest.mark.model

DATA = Path(__file__).parents[2] / "benchmarks" / "data" / "lora_task.jsonl"
QUESTION = "Please send two blue baskets to Noor in Leeds by Thursday."


class Trained(NamedTuple):
    folder: Path
    summary: TrainSummary


@pytest.fixture(scope="module")
def trained(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("lora")
    with DATA.open(encoding="utf-8") as lines:
        (folder / "orders.jsonl").write_text("".join(islice(lines, 32)))
    options = TrainOptions(
        steps=6, batch_size=4, learning_rate=4e-3, validation_share=0.125, validate_every=6, max_length=128
    )
    job = TrainJob(
        base=resolve_model(str(smollm2)),
        data=str(folder / "orders.jsonl"),
        out=folder / "orders",
        options=options,
        adapter=AdapterOptions(rank=8, num_blocks=4),
    )
    return Trained(job.out, train_adapter(job))


def test_validation_loss_falls(trained: Trained) -> None:
    first, kept = trained.summary.first_validation, trained.summary.validation
    assert first is not None
    assert kept is not None
    assert kept.step == 6
    assert kept.loss < 0.8 * first.loss


def test_stock_and_the_server_answer_alike_with_the_adapter(smollm2: Path, trained: Trained) -> None:
    model, tokenizer = mlx_lm.load(str(smollm2), lazy=True)[:2]
    tokens = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True
    )
    said = {"": _stock_answer(model, tokenizer, tokens)}
    said["orders"] = _stock_answer(load_adapters(model, str(trained.folder)), tokenizer, tokens)
    assert said[""] != said["orders"]
    engine = engine_on(spec_of(smollm2), adapter=(f"orders={trained.folder}",), memory="6GB")
    try:
        for name, text in said.items():
            request = greedy(tuple(tokens), 12, adapter=name or None)
            assert text_of(ask(engine, request)).strip() == text.strip()
    finally:
        engine.close()


def _stock_answer(model: Any, tokenizer: Any, tokens: list[int]) -> str:
    # Half precision is inexact and slow on a CPU; the server computes in float32 there.
    model.set_dtype(mx.float32)
    return "".join(part.text for part in stream_generate(model, tokenizer, tokens, max_tokens=12))
