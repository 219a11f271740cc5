"""Text of an answer: stop strings, characters of several bytes, reasoning, log-probabilities."""

import pytest
from support_answers import TOOLS, calls, decoded, reasoning, texts, wrapper
from support_calls import JSON_CALLS

from mlx_optiq_ext.engine.decode import AnswerDecoder
from mlx_optiq_ext.types.chat import Generation, Message, Text
from mlx_optiq_ext.types.events import ReasoningDelta, TextDelta, TokenLogprob

PLAIN = wrapper()
THINKING = wrapper("json_tools", thinks=True)


def fed(text, request, wrapped=PLAIN, **how):
    """The decoder and the events of every token."""
    decoder = AnswerDecoder(wrapped, request, starts_reasoning=how.pop("starts_reasoning", False))
    steps = []
    for token in wrapped.encode(text, add_special_tokens=False):
        name = wrapped.decode([token])
        logprob = TokenLogprob(token=name, token_bytes=name.encode(), logprob=-1.0) if how else None
        steps.append(decoder.feed(token, logprob))
    return decoder, steps


def test_characters_of_several_bytes_come_whole():
    _, steps = fed("aé😀", Generation())
    assert [texts(step) for step in steps] == ["a", "", "é", "", "", "", "😀"]


def test_half_a_character_at_the_end_is_told_as_a_replacement():
    decoder = AnswerDecoder(PLAIN, Generation(), starts_reasoning=False)
    tokens = PLAIN.encode("a😀", add_special_tokens=False)[:-1]
    events = [event for token in tokens for event in decoder.feed(token)]
    assert texts([*events, *decoder.finish("length")]) == "a\ufffd"


def test_a_stop_string_that_spans_tokens_ends_the_answer():
    decoder, steps = fed("one STOP two", Generation(stop=("STOP", "never")))
    assert decoder.stop_sequence == "STOP"
    assert [texts(step) for step in steps[8:]] == [""] * 4
    assert texts([event for step in steps for event in step]) == "one "
    assert decoder.finish("stop") == []


def test_what_might_have_become_a_stop_string_is_told_when_it_does_not():
    decoder, steps = fed("a STO", Generation(stop=("STOP",)))
    assert texts([event for step in steps for event in step]) == "a "
    assert texts(decoder.finish("stop")) == "STO"
    assert decoder.stop_sequence is None


def test_stop_strings_are_looked_for_in_visible_text_only():
    request = Generation(stop=("Bern",), tools=TOOLS)
    answer = (
        f"<think>Bern?</think>{'<tool_call>'}{JSON_CALLS[0].replace('Zürich', 'Bern')}</tool_call>It is Bern."
    )
    decoder, steps = fed(answer, request, THINKING)
    events = [event for step in steps for event in step]
    assert reasoning(events) == "Bern?"
    assert len(calls(events)) == 1
    assert texts(events) == "It is "
    assert decoder.stop_sequence == "Bern"


def test_reasoning_is_told_apart_and_counted():
    decoder, steps = fed("<think>\nHm.</think>\n\nYes.", Generation(), THINKING)
    events = [event for step in steps for event in step]
    assert reasoning(events) == "Hm."
    assert texts(events) == "Yes."
    # Both marks, the line break and three letters; tokens are bytes.
    assert decoder.reasoning_tokens == 6


def test_a_prompt_that_ends_inside_reasoning_goes_on_there():
    events = decoded("Hm.</think>Yes.", THINKING, Generation(), starts_reasoning=True)
    assert (reasoning(events), texts(events)) == ("Hm.", "Yes.")


def test_reasoning_that_never_ends_stays_reasoning():
    events = decoded("Hm", THINKING, Generation(), starts_reasoning=True, reason="length")
    assert (reasoning(events), texts(events)) == ("Hm", "")


def test_a_raw_prompt_is_answered_with_all_text():
    text = "<think>a</think><tool_call>{}</tool_call>"
    assert texts(decoded(text, THINKING, Generation(prompt="x"))) == text


@pytest.mark.parametrize(("answer", "shown"), [("\n a\n\nb\n", "\n a\n\nb\n"), ("  ", " ")])
def test_space_is_kept_where_no_mark_stands(answer, shown):
    # mlx-lm's detokenizer drops one space at the very beginning.
    assert texts(decoded(answer, THINKING)) == shown


def test_log_probabilities_come_with_the_text_of_their_tokens():
    request = Generation(stop=("cd!",))
    _, steps = fed("abcdé", request, logprobs=True)
    told = [[(e.text, [p.token for p in e.logprobs]) for e in step] for step in steps]
    assert told[0] == [("a", ["a"])]
    assert told[1] == [("b", ["b"])]
    assert told[2:4] == [[], []]
    # The first byte of the last letter decides that "cd" is no stop string; with the second it is a letter.
    assert [text for step in told[4:] for text, _ in step] == ["cdé"]
    assert len([token for step in told[4:] for _, tokens in step for token in tokens]) == 4


def test_every_log_probability_of_visible_text_is_told_once():
    text = "<think>Hm.</think>\n\nOne é.\n"
    decoder, steps = fed(text, Generation(), THINKING, logprobs=True)
    events = [event for step in steps for event in step] + decoder.finish("stop")
    shown = [e for e in events if isinstance(e, TextDelta | ReasoningDelta)]
    told = [p for e in shown for p in e.logprobs]
    assert "".join(e.text for e in shown) == "Hm.One é.\n"
    assert len(told) == len("Hm.One é.\n".encode())


def test_a_header_that_was_all_of_the_answer_is_shown():
    wrapped = wrapper("muse_spark")
    wrapped._response_format = {
        "initial_state": "header",
        "transitions": {
            "header": [("to=user<|message|>", "normal"), ("<atem:function_calls>", "tool")],
            "normal": [("<|eom|>", "header")],
        },
    }
    assert texts(decoded("to=user<|message|>Yes.<|eom|>", wrapped)) == "Yes."
    assert texts(decoded("Yes.", wrapped)) == "Yes."


def test_reasoning_that_speaks_of_calls_goes_on_as_reasoning():
    said = "I write <tool_call>name</tool_call> here."
    answer = f"<think>{said}</think>Yes."
    events = decoded(answer, THINKING)
    assert (reasoning(events), texts(events), calls(events)) == (said, "Yes.", [])
    cut = decoded("<think>I write <tool_call>na", THINKING, reason="length")
    assert (reasoning(cut), texts(cut)) == ("I write <tool_call>na", "")


def test_half_an_end_marker_behind_a_call_is_not_shown():
    events = decoded(f"<tool_call>{JSON_CALLS[0]}</tool_c", THINKING, reason="length")
    assert (len(calls(events)), texts(events)) == (1, "")


def test_an_answer_that_continues_a_text_keeps_its_first_space():
    begun = Message(role="assistant", parts=(Text(text="It is"),))
    for request in (Generation(prompt="It is"), Generation(messages=(begun,))):
        assert texts(decoded(" 18.", PLAIN, request)) == " 18."
    assert texts(decoded(" 18.", PLAIN, Generation())) == "18."
