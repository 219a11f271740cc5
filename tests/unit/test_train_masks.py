"""Masks and batches: exactly the answers are learnt, whatever the template does."""

import numpy as np
import pytest
from support_training import CHAT_TEMPLATE, chat_tokenizer, samples

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.examples import Completion, Conversation, PlainText, Preference
from mlx_optiq_ext.lora.batches import Order, collate, fit_length
from mlx_optiq_ext.lora.masks import Sample, pair_of, samples_of

TURNS = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Second."},
)
CHAT = Conversation(where="line 1", messages=TURNS)
# Old answers lose what they thought, and an answer is opened by a thought that is not written before one.
THINKING = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('|')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{{ opening }}{% endif %}"
)


def _learnt(tokenizer, sample: Sample) -> list[str]:
    return [tokenizer.decode(list(sample.tokens[begin:end])) for begin, end in sample.spans]


def test_every_answer_of_a_conversation_is_learnt_with_its_end() -> None:
    tokenizer = chat_tokenizer()
    [sample] = samples_of(tokenizer, CHAT)
    assert _learnt(tokenizer, sample) == ["First.</s>", "Second.</s>"]
    whole = tokenizer.apply_chat_template(list(TURNS), tokenize=False)
    assert list(sample.tokens) == tokenizer.encode(whole, add_special_tokens=False)


def test_only_the_last_answer_or_everything_on_demand() -> None:
    tokenizer = chat_tokenizer()
    assert _learnt(tokenizer, samples_of(tokenizer, CHAT, "last")[0]) == ["Second.</s>"]
    [everything] = samples_of(tokenizer, CHAT, "all")
    assert everything.spans == ((0, len(everything.tokens)),)
    assert everything.num_learnt == len(everything.tokens) - 1


def test_calls_are_learnt_and_results_are_not() -> None:
    tokenizer = chat_tokenizer()
    call = {"function": {"name": "weather", "arguments": "{}"}}
    chat = Conversation(
        where="line 1",
        messages=(
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "dry"},
            {"role": "assistant", "content": "No."},
        ),
        tools=({"type": "function", "function": {"name": "weather"}},),
    )
    [sample] = samples_of(tokenizer, chat)
    assert _learnt(tokenizer, sample) == ["[weather]</s>", "No.</s>"]


@pytest.mark.parametrize("opening", ["", "<think>"])
def test_template_that_rewrites_old_turns_gives_a_sample_per_answer(opening) -> None:
    tokenizer = chat_tokenizer(THINKING.replace("{{ opening }}", opening))
    turns = tuple(
        {**turn, "content": f"<think>hm|{turn['content']}"} if turn["role"] == "assistant" else turn
        for turn in TURNS
    )
    found = samples_of(tokenizer, Conversation(where="line 1", messages=turns))
    think = "" if opening else "<think>"
    assert [_learnt(tokenizer, sample) for sample in found] == [
        [f"{think}hm|First.</s>"],
        [f"{think}hm|Second.</s>"],
    ]
    assert "First." in tokenizer.decode(list(found[1].tokens))
    assert "hm|First." not in tokenizer.decode(list(found[1].tokens))


def test_opening_that_is_not_written_in_front_of_an_answer_is_left_out() -> None:
    tokenizer = chat_tokenizer(THINKING.replace("{{ opening }}", "<think>"))
    [sample] = samples_of(tokenizer, CHAT, "last")
    assert _learnt(tokenizer, sample) == ["Second.</s>"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            CHAT_TEMPLATE.replace("{% for m in messages %}", "{% for m in messages[1:] %}"),
            "leaves out a part",
        ),
        ("{{ raise_exception('roles') }}", "does not take this conversation"),
    ],
)
def test_template_that_drops_or_refuses_is_reported_with_the_line(template, said) -> None:
    with pytest.raises(UsageError, match=f"line 1: .*{said}"):
        samples_of(chat_tokenizer(template), CHAT)


def test_messages_without_a_template_are_refused() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="line 1: messages, and the model's tokenizer has no chat template"):
        samples_of(tokenizer, CHAT)


def test_completion_is_a_turn_or_plain() -> None:
    tokenizer = chat_tokenizer()
    example = Completion(where="line 2", prompt="2 + 2 =", completion=" 4")
    [turn] = samples_of(tokenizer, example)
    assert tokenizer.decode(list(turn.tokens)) == "<user>2 + 2 =</s>\n<assistant> 4</s>\n"
    assert _learnt(tokenizer, turn) == [" 4</s>"]
    tokenizer.chat_template = None
    [plain] = samples_of(tokenizer, example)
    assert tokenizer.decode(list(plain.tokens)) == "2 + 2 = 4</s>"
    assert _learnt(tokenizer, plain) == [" 4</s>"]


def test_text_is_learnt_whole_with_its_end() -> None:
    tokenizer = chat_tokenizer()
    [sample] = samples_of(tokenizer, PlainText(where="line 3", text="Rain."))
    assert _learnt(tokenizer, sample) == ["Rain.</s>"]
    assert sample.num_learnt == len("Rain.")  # five letters and the end, of which the first has no context


def test_pair_learns_the_last_turns() -> None:
    tokenizer = chat_tokenizer()
    other = Conversation(where="line 1", messages=(*TURNS[:-1], {"role": "assistant", "content": "Hm"}))
    pair = pair_of(tokenizer, Preference(where="line 1", chosen=CHAT, rejected=other))
    assert _learnt(tokenizer, pair.chosen) == ["Second.</s>"]
    assert _learnt(tokenizer, pair.rejected) == ["Hm</s>"]


def test_batch_predicts_each_learnt_token_from_the_one_before() -> None:
    first = Sample(where="", tokens=(1, 2, 3, 4, 5), spans=((0, 2), (4, 5)))
    second = Sample(where="", tokens=(6, 7, 8), spans=((2, 3),))
    batch = collate([first, second])
    assert batch.inputs.tolist() == [[1, 2, 3, 4], [6, 7, 0, 0]]
    assert batch.inputs.reshape(-1)[batch.positions].tolist() == [1, 4, 7]
    assert batch.targets.tolist() == [2, 5, 8]
    assert batch.rows.tolist() == [0, 0, 1]
    assert batch.num_tokens == 8
    assert batch.weight == first.num_learnt + second.num_learnt == 3


def test_what_is_cut_and_dropped_is_said() -> None:
    long = Sample(where="line 1", tokens=tuple(range(10)), spans=((2, 4), (6, 10)))
    lost = Sample(where="line 2", tokens=tuple(range(10)), spans=((8, 10),))
    short = Sample(where="line 3", tokens=(1, 2, 3), spans=((1, 3),))
    kept, notes = fit_length([long, lost, short], 8)
    assert kept == [Sample(where="line 1", tokens=tuple(range(8)), spans=((2, 4), (6, 8))), short]
    assert notes == [
        "2 of 3 examples are cut to 8 tokens (line 1, …)",
        "1 of 3 have nothing to learn within them (line 2, …), left out",
    ]
    with pytest.raises(UsageError, match="raise --max-length"):
        fit_length([lost], 8)


def test_every_example_comes_once_per_epoch_and_the_order_depends_on_the_seed() -> None:
    lengths = [len(sample.tokens) for sample in samples(50)]
    orders = [Order(lengths, 8, seed) for seed in (1, 1, 2)]
    epochs = [[order.update(number) for number in range(14)] for order in orders]
    assert epochs[0] == epochs[1] != epochs[2]
    assert orders[0].updates_per_epoch == 7
    for epoch in (epochs[0][:7], epochs[0][7:]):
        assert sorted(index for members in epoch for index in members) == list(range(50))
    assert epochs[0][:7] != epochs[0][7:]
    # An update asked for out of turn is the same one.
    assert Order(lengths, 8, 1).update(9) == epochs[0][9]


def test_examples_of_like_length_stand_together() -> None:
    rng = np.random.default_rng(0)
    lengths = [int(length) for length in rng.integers(5, 500, 400)]
    order = Order(lengths, 8, 0)
    assert order.padded_share(8) < 0.05
    spans = [np.ptp([lengths[index] for index in order.update(number)]) for number in range(50)]
    assert np.mean(spans) < 25
