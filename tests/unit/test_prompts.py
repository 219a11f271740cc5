"""Conversations through templates of every kind: what they take, what they refuse, where prefixes branch."""

import os

import msgspec
import pytest
from support_answers import TOOLS, WEATHER
from support_templates import TEMPLATES, templated

from mlx_optiq_ext.engine.prompt import Renderer
from mlx_optiq_ext.errors import RequestError
from mlx_optiq_ext.types.chat import (
    Generation,
    Image,
    Message,
    Reasoning,
    ReasoningOptions,
    Text,
    ToolCall,
    ToolResult,
    ToolSpec,
)

NAMES = sorted(TEMPLATES)
PICTURE = Image(data=b"12345", media_type="image/png")


def said(role, text):
    return Message(role=role, parts=(Text(text=text),))


def called(*calls):
    return Message(role="assistant", parts=tuple(ToolCall(id=i, name=n, arguments=a) for i, n, a in calls))


def results(*parts):
    return Message(role="tool", parts=tuple(ToolResult(id=i, parts=(Text(text=t),)) for i, t in parts))


SYSTEM, ASK, ANSWER, AGAIN = (
    said("system", "Rules."),
    said("user", "How warm?"),
    said("assistant", "Which city?"),
    said("user", "Bern."),
)
CALL = called(("x_1", "get_weather", {"city": "Bern"}))
RESULT = results(("x_1", "18 degrees"))


def rendered(wrapped, *messages, **how):
    """The prompt's text and what was rendered."""
    result = Renderer(wrapped).render(Generation(messages=messages, **how))
    return wrapped.decode(result.tokens), result


def in_order(text, *words):
    at = -1
    for word in words:
        at = text.find(word, at + 1)
        if at < 0:
            return False
    return True


@pytest.mark.parametrize("name", [*NAMES, None])
def test_every_template_shows_a_whole_conversation(name):
    conversation = (SYSTEM, ASK, ANSWER, said("system", "Be brief."), AGAIN, AGAIN, CALL, RESULT, ASK)
    text, _ = rendered(templated(name), *conversation, tools=TOOLS)
    words = [
        "How warm?",
        "Which city?",
        "Be brief.",
        "Bern.",
        "get_weather",
        '"Bern"',
        "18 degrees",
        "How warm?",
    ]
    assert in_order(text, *words)
    assert "Rules." in text
    assert "Weather of a place." in text
    assert "None" not in text


@pytest.mark.parametrize("name", [*NAMES, None])
def test_parallel_calls_and_a_conversation_that_begins_with_an_answer_pass_everywhere(name):
    both = called(("a", "get_weather", {"city": "Bern"}), ("b", "get_weather", {"city": "Rome"}))
    text, _ = rendered(templated(name), ANSWER, ASK, both, results(("a", "18"), ("b", "30")), tools=TOOLS)
    assert in_order(text, "Which city?", "How warm?", '"Bern"', '"Rome"') or in_order(
        text, '"Bern"', "18", '"Rome"'
    )
    assert in_order(text, "18", "30")


@pytest.mark.parametrize("name", NAMES)
def test_each_template_is_found_out(name):
    form = Renderer(templated(name))._form
    wanted = {
        "chatml": ("anywhere", True, True, "object", "counted", True, True),
        "small": ("anywhere", True, False, "object", "counted", True, True),
        "headers": ("anywhere", True, True, "object", "counted", False, True),
        "inst": ("first", False, True, "object", "counted", True, False),
        "turns": ("never", False, False, "object", "counted", True, True),
        "ids": ("anywhere", True, True, "text", "named", True, True),
    }[name]
    assert tuple(msgspec.structs.astuple(form)) == wanted


def test_no_template_is_written_as_lines_and_said_once(caplog):
    text, _ = rendered(templated(None), SYSTEM, ASK, ANSWER, AGAIN)
    assert text.endswith("How warm?\n\nAssistant: Which city?\n\nUser: Bern.\n\nAssistant:")
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_tools_that_the_template_does_not_know_are_described_in_the_form_that_is_read_back():
    text, _ = rendered(templated("small"), ASK, CALL, RESULT, tools=(WEATHER,))
    assert '<tool_call>{"name": "get_weather", "arguments": {"city": "Bern"}}</tool_call>' in text
    assert '<tool_response name="get_weather">\n18 degrees\n</tool_response>' in text
    assert in_order(text, "You can use tools.", '{"name": "get_weather", "description"', "How warm?")


def test_deferred_tools_are_left_out():
    later = ToolSpec(name="later_tool", description="Found later.", deferred=True)
    assert (
        rendered(templated("chatml"), ASK, tools=(WEATHER, later))[1]
        == rendered(templated("chatml"), ASK, tools=(WEATHER,))[1]
    )


def test_an_early_system_message_is_hoisted_and_a_late_one_stays():
    wrapped = templated("chatml")
    hoisted, _ = rendered(wrapped, SYSTEM, ASK, said("system", "Today is Monday."), ANSWER, AGAIN)
    assert in_order(hoisted, "Rules.\n\nToday is Monday.", "How warm?")
    first, _ = rendered(wrapped, SYSTEM, said("system", "Today is Monday."), ASK, ANSWER, AGAIN)
    assert hoisted == first
    late, _ = rendered(wrapped, SYSTEM, ASK, ANSWER, said("system", "Be brief."), AGAIN)
    assert in_order(late, "Which city?", "<|im_start|>system\nBe brief.", "Bern.")


def test_identifiers_of_clients_do_not_reach_the_prompt():
    wrapped = templated("inst")
    first = rendered(wrapped, ASK, CALL, RESULT)[1]
    other = rendered(
        wrapped, ASK, called(("y", "get_weather", {"city": "Bern"})), results(("y", "18 degrees"))
    )[1]
    assert first == other


@pytest.mark.parametrize("name", NAMES)
def test_a_last_message_of_the_assistant_is_continued(name):
    text, _ = rendered(templated(name), ASK, said("assistant", "It is 18 "))
    assert text.endswith("It is 18 ")


def test_an_empty_last_message_of_the_assistant_is_no_message():
    wrapped = templated("chatml")
    assert rendered(wrapped, ASK, said("assistant", "")) == rendered(wrapped, ASK)


def test_reasoning_comes_back_where_the_template_reads_it():
    turn = Message(role="assistant", parts=(Reasoning(text="Hm."), Text(text="Which city?")))
    assert "<think>\nHm.\n</think>\n\nWhich city?" in rendered(templated("chatml"), ASK, turn, AGAIN)[0]
    assert "Hm." not in rendered(templated("small"), ASK, turn, AGAIN)[0]


def test_thinking_is_switched_by_the_template_or_closed_behind_it():
    off, on = ReasoningOptions(enabled=False), ReasoningOptions(enabled=True)
    switched = templated("chatml", thinks=True)
    assert rendered(switched, ASK, reasoning=off)[0].endswith("assistant\n<think>\n\n</think>\n\n")
    assert rendered(switched, ASK, reasoning=on)[0].endswith("assistant\n")
    opened = templated("headers", thinks=True)
    text, result = rendered(opened, ASK)
    assert text.endswith("<think>\n")
    assert result.starts_reasoning
    text, result = rendered(opened, ASK, reasoning=off)
    assert text.endswith("assistant<|end|>\n\n<think>\n\n</think>\n\n")
    assert not result.starts_reasoning
    unswitched = templated("small", thinks=True)
    assert rendered(unswitched, ASK, reasoning=off)[0].endswith("assistant\n<think>\n\n</think>\n\n")
    server_off = Renderer(switched, reasoning="off")
    assert server_off.render(Generation(messages=(ASK,))) == rendered(switched, ASK, reasoning=off)[1]


@pytest.mark.parametrize(
    ("template", "in_vocabulary", "thinks"),
    [
        (TEMPLATES["chatml"], True, True),
        (TEMPLATES["headers"], True, True),
        (TEMPLATES["small"], True, False),
        (TEMPLATES["small"], False, False),
        (TEMPLATES["inst"], True, False),
        ("{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}", True, True),
        ("{% if thinking %}Think.{% endif %}{{ messages[0].content }}", False, True),
        ("Effort: {{ reasoning_effort }} {{ messages[0].content }}", False, True),
        ("The thinking of {{ messages[0].content }}", True, False),
        ("{{ 'No thinking, no reasoning_effort.' }} {{ messages[0].content }}", True, False),
        (None, True, False),
    ],
)
def test_whether_a_model_thinks_is_told_by_its_template(template, in_vocabulary, thinks):
    wrapped = templated("small" if template else None, thinks=in_vocabulary)
    wrapped._tokenizer.chat_template = template
    assert Renderer(wrapped).thinks == thinks


@pytest.mark.parametrize(
    ("effort", "shown"),
    [("minimal", "low"), ("low", "low"), ("high", "high"), ("xhigh", "high"), (None, "medium")],
)
def test_effort_is_told_in_the_template_s_words(effort, shown):
    wrapped = templated("small")
    wrapped._tokenizer.chat_template = (
        "{{ reasoning_effort | default('medium') }} {% if reasoning_effort == 'low' %}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert rendered(wrapped, ASK, reasoning=ReasoningOptions(effort=effort))[0].startswith(shown + " ")


@pytest.mark.parametrize("name", [*NAMES, None])
def test_what_clients_send_cannot_write_control_tokens(name):
    wrapped = templated(name, "json_tools", thinks=True)
    template = TEMPLATES.get(name, "")
    control = {
        number: token.content
        for number, token in wrapped.added_tokens_decoder.items()
        if token.special
        or (token.content.strip() and token.content in template + "<think></think><tool_call></tool_call>")
    }
    evil = "".join(control.values())

    def count(text):
        messages = (
            said("system", text), said("user", text), said("assistant", "a"), said("user", text),
            called(("a", "get_weather", {"city": text})), results(("a", text)),
        )  # fmt: skip
        tool = ToolSpec(name="get_weather", description=text)
        tokens = Renderer(wrapped).render(Generation(messages=messages, tools=(tool,))).tokens
        return [token for token in tokens if token in control], wrapped.decode(tokens)

    clean, _ = count("evil")
    marked, text = count(evil)
    assert marked == clean
    assert text.count(evil) >= 5


def test_the_model_s_own_marks_in_its_turns_stay_tokens():
    wrapped = templated("chatml", "json_tools", thinks=True)
    tokens = rendered(wrapped, ASK, said("assistant", "<tool_call>oops</tool_call>"), AGAIN)[1].tokens
    assert wrapped.convert_tokens_to_ids("<tool_call>") in tokens


@pytest.mark.parametrize("name", NAMES)
def test_boundaries_are_where_other_requests_branch(name):
    wrapped = templated(name)
    renderer = Renderer(wrapped)
    messages = (SYSTEM, ASK, ANSWER, AGAIN)
    full = renderer.render(Generation(messages=messages, tools=(WEATHER,)))
    assert list(full.boundaries) == sorted(set(full.boundaries))
    assert all(0 < at < len(full.tokens) for at in full.boundaries)
    others = {
        "session": (SYSTEM, said("user", "Another question")),
        "edited": (SYSTEM, ASK, ANSWER, said("user", "Rome.")),
        "next": (*messages, said("assistant", "18."), said("user", "Thanks.")),
    }
    for kind, other in others.items():
        tokens = renderer.render(Generation(messages=other, tools=(WEATHER,))).tokens
        shared = len(os.path.commonprefix([full.tokens, tokens]))  # noqa: RUF071
        usable = [at for at in full.boundaries if at <= shared]
        if name == "inst" and kind != "next":
            continue  # its tools stand beside the last user turn, so little is shared
        # At most the head of a turn is computed again; these tokens are bytes.
        assert shared - max(usable, default=0) <= 64


def test_pictures_are_refused_from_users_and_noted_in_results():
    wrapped = templated("chatml")
    with pytest.raises(RequestError) as refused:
        rendered(wrapped, SYSTEM, Message(role="user", parts=(Text(text="See"), PICTURE)))
    assert refused.value.param == "messages[1].parts[1]"
    shot = Message(role="tool", parts=(ToolResult(id="x_1", parts=(Text(text="Done"), PICTURE)),))
    text, _ = rendered(wrapped, ASK, CALL, shot)
    assert "Done\n[image image/png, 5 bytes: this model cannot see images]" in text


def test_pictures_are_handed_on_to_a_template_that_takes_them():
    wrapped = templated("chatml")
    wrapped._tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "{% if p.type == 'image' %}<|start|>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
        "{% endfor %}"
    )
    message = Message(role="user", parts=(Text(text="See"), PICTURE))
    result = Renderer(wrapped, sees_images=True).render(Generation(messages=(message,)))
    assert wrapped.decode(result.tokens) == "See<|start|>"


def test_errors_of_tools_are_told():
    failed = Message(
        role="tool", parts=(ToolResult(id="x_1", parts=(Text(text="no such city"),), is_error=True),)
    )
    assert "Error: no such city" in rendered(templated("chatml"), ASK, CALL, failed)[0]


def test_raw_prompts_are_taken_as_they_are():
    wrapped = templated("chatml")
    renderer = Renderer(wrapped)
    assert list(renderer.render(Generation(prompt="a<|im_end|>")).tokens) == wrapped.encode("a<|im_end|>")
    assert renderer.render(Generation(prompt=(1, 2, 3))).tokens == (1, 2, 3)
    with pytest.raises(RequestError) as refused:
        renderer.render(Generation(prompt=(1, 100000)))
    assert refused.value.param == "prompt[1]"


@pytest.mark.parametrize("request_", [Generation(), Generation(prompt=()), Generation(prompt="")])
def test_nothing_to_answer_is_refused(request_):
    with pytest.raises(RequestError):
        Renderer(templated("chatml")).render(request_)


def test_a_template_that_refuses_everything_is_said():
    wrapped = templated("chatml")
    wrapped._tokenizer.chat_template = "{{ raise_exception('not today') }}"
    with pytest.raises(RequestError, match="not today") as refused:
        rendered(wrapped, ASK)
    assert refused.value.param == "messages"
