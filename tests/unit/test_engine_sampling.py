"""How tokens are drawn: filters, penalties, seeds, log-probabilities, and one row's failure."""

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator
from support_models import byte_tokenizer, tiny_model
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from mlx_optiq_ext.engine.guard import RowGuard
from mlx_optiq_ext.engine.sampling import make_processors, make_sampler, token_logprobs
from mlx_optiq_ext.engine.token_bytes import token_bytes
from mlx_optiq_ext.errors import EngineError, RequestError
from mlx_optiq_ext.types.chat import Sampling

_PROBABILITIES = [0.4, 0.3, 0.15, 0.1, 0.05]


def _logprobs(probabilities: list[float] = _PROBABILITIES) -> mx.array:
    return mx.log(mx.array([probabilities]))


def _drawn(sampling: Sampling, count: int = 400) -> list[int]:
    draw = make_sampler(sampling)
    assert draw is not None
    return [int(draw(_logprobs()).item()) for _ in range(count)]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0.0), Sampling(temperature=1e-9), Sampling(top_k=1), Sampling(top_p=0.0)],
)
def test_what_leaves_one_token_is_greedy_and_shared(sampling: Sampling) -> None:
    assert make_sampler(sampling) is None


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (Sampling(seed=1), {0, 1, 2, 3, 4}),
        (Sampling(seed=1, top_k=2), {0, 1}),
        (Sampling(seed=1, top_k=50), {0, 1, 2, 3, 4}),
        (Sampling(seed=1, top_p=0.69), {0, 1}),
        (Sampling(seed=1, top_p=0.71), {0, 1, 2}),
        (Sampling(seed=1, min_p=0.3), {0, 1, 2}),
        (Sampling(seed=1, top_k=3, top_p=0.5), {0, 1}),
        # At temperature 0.5 the squares are what counts: 0.16 and 0.09 of 0.285 are 0.88 of the mass.
        (Sampling(seed=1, temperature=0.5, top_p=0.85), {0, 1}),
        (Sampling(seed=1, temperature=0.5, min_p=0.5), {0, 1}),
    ],
)
def test_filters_leave_the_tokens_that_they_should(sampling: Sampling, possible: set[int]) -> None:
    assert set(_drawn(sampling)) == possible


def test_tokens_come_as_often_as_their_probabilities_say() -> None:
    counts = np.bincount(_drawn(Sampling(seed=3), 4000), minlength=5) / 4000
    # Four standard errors of a share of 0.4 in 4,000 draws.
    np.testing.assert_allclose(counts, _PROBABILITIES, atol=4 * math.sqrt(0.4 * 0.6 / 4000))


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    assert _drawn(Sampling(seed=7), 50) == _drawn(Sampling(seed=7), 50)
    assert _drawn(Sampling(seed=7), 50) != _drawn(Sampling(seed=8), 50)
    assert _drawn(Sampling(), 50) != _drawn(Sampling(), 50)
    assert _drawn(Sampling(seed=-1), 10) == _drawn(Sampling(seed=2**64 - 1), 10)


def test_penalties_and_bias_change_the_logits_that_they_name() -> None:
    sampling = Sampling(
        presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0, logit_bias={4: -3.0, 0: 1.0}
    )
    logits = mx.array([[1.0, -1.0, 2.0, 0.5, 0.0]])
    tokens = mx.array([0, 1, 1, 2, 2, 3], dtype=mx.int32)  # 0 and the first 1 are the prompt
    for processor in make_processors(sampling, 2, 5):
        logits = processor(tokens, logits)
    expected = [1 / 2 + 1.0, -1 * 2 - 0.75, 2 / 2 - 1.0, 0.5 / 2 - 0.75, -3.0]
    np.testing.assert_allclose(np.array(logits)[0], expected, rtol=1e-6)


def test_penalties_of_generated_tokens_leave_the_prompt_alone() -> None:
    (processor,) = make_processors(Sampling(presence_penalty=2.0), 3, 5)
    logits = mx.array([[1.0, 2.0, 3.0, 4.0, 5.0]])
    assert processor(mx.array([0, 1, 2]), logits).tolist() == logits.tolist()


def test_options_without_effect_cost_no_processor() -> None:
    assert make_processors(Sampling(temperature=0.3, top_p=0.5), 10, 5) == []


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        (Sampling(logit_bias={5: 1.0}), "logit_bias"),
        (Sampling(logit_bias={-1: 1.0}), "logit_bias"),
        (Sampling(logit_bias={1: math.nan}), "logit_bias"),
        (Sampling(repetition_penalty=0.0), "repetition_penalty"),
        (Sampling(repetition_penalty=math.inf), "repetition_penalty"),
    ],
)
def test_values_that_would_break_a_step_are_refused(sampling: Sampling, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        make_processors(sampling, 0, 5)
    assert caught.value.param == param


def _sentencepiece() -> PreTrainedTokenizerFast:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 3, "<0xC3>": 4, "▁a": 5, "ä": 6, "▁▁": 7}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.add_tokens(["<x▁>"])
    return wrapped


def test_bytes_of_tokens_are_exact_even_in_the_middle_of_a_character() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("ä\n ~", add_special_tokens=False)
    assert token_bytes(tokenizer, ids) == [b"\xc3", b"\xa4", b"\n", b" ", b"~"]
    every = token_bytes(tokenizer, range(256))
    assert sorted(every) == [bytes([value]) for value in range(256)]
    assert token_bytes(tokenizer, [tokenizer.eos_token_id, 10_000]) == [b"</s>", b""]


def test_bytes_of_sentencepiece_tokens_are_exact() -> None:
    expected = [b"</s>", b"\n", b"\xc3", b" a", "ä".encode(), b"  ", "<x▁>".encode(), b""]
    assert token_bytes(_sentencepiece(), range(2, 10)) == expected


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_logprobs_name_the_drawn_token_and_the_likely_ones(dtype: mx.Dtype) -> None:
    tokenizer = byte_tokenizer()
    logits = np.full(320, -np.inf, dtype=np.float32)
    a, b, c3 = tokenizer.encode("ab", add_special_tokens=False) + tokenizer.encode("ä")[:1]
    logits[[a, b, c3]] = [1.0, 3.0, 2.0]
    logprobs = (mx.array(logits) - mx.logsumexp(mx.array(logits))).astype(dtype)
    mx.eval(logprobs)
    found = token_logprobs(logprobs, a, 5, tokenizer)
    assert (found.token, found.token_bytes) == ("a", b"a")
    assert found.logprob == pytest.approx(-2.4076, abs=0.01)  # bfloat16 has eight bits
    assert [each.token_bytes for each in found.top] == [b"b", b"\xc3", b"a"]
    assert found.top[1].token == "�"
    assert token_logprobs(logprobs, a, 0, tokenizer).top == ()


def _run(rows: list[dict[str, Any]], max_tokens: int = 12) -> list[list[int]]:
    model = tiny_model(dtype=mx.float32)
    generator = BatchGenerator(model, completion_batch_size=8)
    uids = generator.insert(
        [row["prompt"] for row in rows],
        max_tokens=[max_tokens] * len(rows),
        samplers=[row.get("sampler") for row in rows],
        logits_processors=[row.get("processors", []) for row in rows],
    )
    found: dict[int, list[int]] = {uid: [] for uid in uids}
    guards = dict(zip(uids, [row.get("guard") for row in rows], strict=True))
    while any(len(tokens) < max_tokens for tokens in found.values()):
        for answer in generator.next_generated():
            found[answer.uid].append(answer.token)
            if guards[answer.uid] is not None:
                guards[answer.uid].check(answer.token, answer.logprobs)
    generator.close()
    return [found[uid] for uid in uids]


def _row(prompt: list[int], sampling: Sampling) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "sampler": make_sampler(sampling),
        "processors": make_processors(sampling, len(prompt), 320),
    }


def test_rows_draw_the_same_together_as_alone() -> None:
    wanted = [
        ([1, 2, 3], Sampling(seed=5)),
        ([4, 5, 6, 7, 8], Sampling(temperature=0.0, frequency_penalty=0.5)),
        ([9], Sampling(seed=5, top_p=0.9, logit_bias={3: 5.0}, repetition_penalty=1.3)),
        ([10, 11], Sampling(temperature=0.0)),
    ]
    alone = [_run([_row(*each)])[0] for each in wanted]
    assert _run([_row(*each) for each in wanted]) == alone
    assert _run([_row(*each) for each in reversed(wanted)]) == alone[::-1]


def test_one_row_s_failure_leaves_the_others_as_they_are() -> None:
    def broken(tokens: mx.array, logits: mx.array) -> mx.array:
        raise ValueError("no such thing")

    guard, well = RowGuard(), RowGuard()
    rows = [
        {"prompt": [1, 2], "processors": [guard.processor(broken)], "guard": guard},
        {"prompt": [3, 4], "guard": well},
    ]
    alone = _run([{"prompt": [3, 4]}])[0]
    assert _run(rows)[1] == alone
    assert isinstance(guard.error, ValueError)
    assert well.error is None


def test_a_failing_sampler_is_noticed_and_draws_greedily() -> None:
    def broken(logprobs: mx.array) -> mx.array:
        raise RuntimeError("lost")

    guard = RowGuard()
    assert guard.sampler(broken)(_logprobs()).tolist() == [0]
    assert str(guard.error) == "lost"
    assert guard.processor(lambda tokens, logits: logits * 0)(mx.array([1]), _logprobs())[0, 0].item() < 0


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_logits_that_are_no_numbers_end_their_row_alone(value: float | None) -> None:
    def spoil(tokens: mx.array, logits: mx.array) -> mx.array:
        spot = mx.arange(logits.shape[-1]) == 7 if value is not None else mx.array(True)
        return mx.where(spot, -math.inf if value is None else value, logits)

    bad, well = RowGuard(), RowGuard()
    rows = [
        {"prompt": [1, 2], "processors": [bad.processor(spoil)], "guard": bad},
        {"prompt": [3, 4], "guard": well},
    ]
    assert _run(rows, 3)[1] == _run([{"prompt": [3, 4]}], 3)[0]
    assert isinstance(bad.error, EngineError)
    assert well.error is None
