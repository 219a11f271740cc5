"""From requests to processors: what they demand, in batches, behind reasoning, and what is refused."""

import json
import sys
import threading
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, StopSequences
from support_grammars import FAMILIES, VOCAB, calls_in, family_tokenizer, run_alone
from support_models import LLAMA, tiny_model

from mlx_optiq_ext.engine.constrain import Constrainer
from mlx_optiq_ext.engine.prompt import Rendered
from mlx_optiq_ext.engine.reasoning import ReasoningTrack
from mlx_optiq_ext.engine.sampling import make_sampler
from mlx_optiq_ext.engine.steer import Steering
from mlx_optiq_ext.errors import RequestError, UsageError
from mlx_optiq_ext.types.chat import (
    Constraint,
    Generation,
    Message,
    ReasoningOptions,
    Sampling,
    Text,
    ToolChoice,
    ToolSpec,
)

_ASK = (Message(role="user", parts=(Text(text="?"),)),)
_PROMPT = [1, 2, 3]
_TOOLS = (
    ToolSpec(
        name="add",
        parameters={
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "big": {"type": "boolean"}},
            "required": ["a"],
        },
    ),
    ToolSpec(name="stop", parameters={"type": "object", "properties": {}}, deferred=True),
)
_SCHEMA = Constraint(
    kind="json_schema",
    value={
        "type": "object",
        "properties": {"answer": {"enum": ["yes", "no"]}, "sure": {"type": "boolean"}},
        "required": ["answer", "sure"],
        "additionalProperties": False,
    },
)


def _request(**fields: Any) -> Generation:
    return Generation(messages=_ASK, **fields)


def _rendered(*, open_: bool = False) -> Rendered:
    return Rendered(tokens=tuple(_PROMPT), starts_reasoning=open_)


def _answers(tokenizer: Any, request: Generation, *, open_: bool = False, count: int = 8) -> list[list[int]]:
    """Answers of a random model."""
    constrainer = Constrainer(tokenizer, VOCAB)
    found = []
    for seed in range(count):
        processor = constrainer.processor(request, _rendered(open_=open_))
        assert processor is not None
        rng = np.random.default_rng(seed)
        found.append(run_alone(processor, _PROMPT, tokenizer.eos_token_ids, rng, limit=600))
    return found


@pytest.mark.parametrize("family", [None, *FAMILIES])
def test_required_calls_come_in_the_family_s_own_syntax(family: str | None) -> None:
    tokenizer = family_tokenizer(family)
    request = _request(
        tools=_TOOLS,
        tool_choice=ToolChoice(mode="required", parallel=False),
        reasoning=ReasoningOptions(enabled=False),
    )
    for tokens in _answers(tokenizer, request, count=3):
        text = tokenizer.decode(tokens)
        if family is None:
            inner = text.strip().removeprefix("<tool_call>").split("</tool_call>")[0]
            calls = [json.loads(inner)]
        else:
            calls = calls_in(tokenizer, text, _TOOLS)
        assert {call["name"] for call in calls} <= {"add", "stop"}
        assert all(0 <= call["arguments"].get("a", 0) <= 99 for call in calls)


def test_a_named_tool_is_called_once() -> None:
    tokenizer = family_tokenizer("json_tools")
    request = _request(tools=_TOOLS, tool_choice=ToolChoice(mode="named", name="stop"))
    for tokens in _answers(tokenizer, request, count=4):
        assert calls_in(tokenizer, tokenizer.decode(tokens), _TOOLS) == [{"name": "stop", "arguments": {}}]


def test_an_answer_by_schema_may_follow_reasoning_that_the_model_opens() -> None:
    tokenizer = family_tokenizer("json_tools")
    thought = 0
    for tokens in _answers(
        tokenizer, _request(constraint=_SCHEMA, reasoning=ReasoningOptions(budget=5)), count=40
    ):
        text = tokenizer.decode(tokens)
        if text.startswith("<think>"):
            thought += 1
            assert text.count("</think>") == 1
            text = text.split("</think>")[1]
        assert json.loads(text)["answer"] in ("yes", "no")
    assert thought > 0


def test_switched_off_reasoning_is_not_opened() -> None:
    tokenizer = family_tokenizer("json_tools")
    request = _request(constraint=_SCHEMA, reasoning=ReasoningOptions(enabled=False))
    assert all("<think>" not in tokenizer.decode(tokens) for tokens in _answers(tokenizer, request, count=20))


@pytest.mark.parametrize(
    ("family", "budget"), [("json_tools", 0), ("json_tools", 7), ("kimi_k3", 4), ("gemma4", 3)]
)
def test_a_budget_closes_reasoning_and_the_answer_goes_on(family: str, budget: int) -> None:
    tokenizer = family_tokenizer(family)
    end = list(tokenizer.think_end_tokens)
    request = _request(reasoning=ReasoningOptions(budget=budget))
    for tokens in _answers(tokenizer, request, open_=True, count=5):
        ends = [n for n in range(len(tokens)) if tokens[n : n + len(end)] == end]
        assert ends or len(tokens) <= budget  # a free row may end its turn before
        assert not ends or ends[0] <= budget


def test_a_schema_holds_behind_forced_reasoning() -> None:
    tokenizer = family_tokenizer("kimi_k3")
    end = tokenizer.think_end
    request = _request(constraint=_SCHEMA, reasoning=ReasoningOptions(budget=6))
    for tokens in _answers(tokenizer, request, open_=True, count=10):
        assert tokens.count(tokenizer.eos_token_id) == 0
        before, _, after = tokenizer.decode(tokens).partition(end)
        assert len(tokenizer.encode(before, add_special_tokens=False)) <= 6 + len(before)
        said = after.replace("<|open|>response<|sep|>", "").replace("<|close|>response<|sep|>", "")
        assert json.loads(said)["answer"] in ("yes", "no")


@pytest.mark.parametrize("family", [None, "json_tools", "kimi_k3", "minicpm5"])
def test_a_call_that_is_not_wanted_is_not_begun(family: str | None) -> None:
    tokenizer = family_tokenizer(family)
    marker = tokenizer.tool_call_start or "<tool_call>"
    request = _request(tools=_TOOLS, tool_choice=ToolChoice(mode="none"))
    processor = Constrainer(tokenizer, VOCAB).processor(request, _rendered())
    assert processor is not None
    # A model that wants nothing but the marker.
    wanted = tokenizer.encode(marker, add_special_tokens=False)
    tokens: list[int] = []
    for step in range(len(wanted) * 2):
        logits = np.random.default_rng(step).normal(size=(1, VOCAB)).astype(np.float32)
        logits[0, wanted[step % len(wanted)]] = 50.0
        out = processor(mx.array(_PROMPT + tokens, dtype=mx.int32), mx.array(logits))
        tokens.append(int(mx.argmax(out[0]).item()))
    assert marker not in tokenizer.decode(tokens)
    assert [token for token in tokens if token in wanted] or len(wanted) == 1


def test_what_demands_nothing_has_no_processor() -> None:
    constrainer = Constrainer(family_tokenizer("json_tools"), VOCAB)
    assert constrainer.processor(_request(), _rendered()) is None
    assert constrainer.processor(_request(tools=_TOOLS), _rendered()) is None
    assert constrainer.processor(_request(tool_choice=ToolChoice(mode="none")), _rendered()) is None
    no_thinking = Constrainer(family_tokenizer("mistral"), VOCAB)
    assert no_thinking.processor(_request(reasoning=ReasoningOptions(budget=1)), _rendered()) is None


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"constraint": Constraint(kind="json_schema", value={"not": {}})}, "response_format", "not"),
        (
            {"constraint": Constraint(kind="json_schema", value={"type": "string", "pattern": "(?=a)"})},
            "response_format",
            "look-around",
        ),
        (
            {"constraint": Constraint(kind="json_schema", value={"$ref": "#/$defs/Gone"})},
            "response_format",
            "Gone",
        ),
        ({"constraint": Constraint(kind="json_schema", value=False)}, "response_format", "nsatisfiable"),
        ({"constraint": Constraint(kind="regex", value="a(")}, "response_format", "unclosed group"),
        ({"constraint": Constraint(kind="lark", value="begin: x")}, "response_format", "start"),
        (
            {
                "tools": (*_TOOLS, ToolSpec(name="odd", parameters={"properties": {"a": {"type": "text"}}})),
                "tool_choice": ToolChoice(mode="required"),
            },
            "tools[2]",
            "odd",
        ),
        (
            {
                "tools": (*_TOOLS, ToolSpec(name="odd", parameters={"properties": {"a": {"type": "text"}}})),
                "tool_choice": ToolChoice(mode="named", name="odd"),
            },
            "tools[2]",
            "odd",
        ),
        ({"tool_choice": ToolChoice(mode="required")}, "tool_choice", "no tools"),
        ({"tools": _TOOLS, "tool_choice": ToolChoice(mode="named", name="sub")}, "tool_choice", '"add"'),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(fields: dict[str, Any], param: str, says: str) -> None:
    constrainer = Constrainer(family_tokenizer("json_tools"), VOCAB)
    with pytest.raises(RequestError) as caught:
        constrainer.processor(_request(**fields), _rendered())
    assert caught.value.param == param
    assert says in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "schema",
    [
        {"properties": 5},
        {"properties": {"a": {"type": 5}}},
        {"properties": {"a": 7}, "required": ["a"]},
        {"properties": {"a": {"enum": "x"}}, "required": 3},
        {"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"properties": {"a": {"type": "string", "pattern": "("}}},
        {"properties": {"a": {"type": "array", "items": {"$ref": 3}}}},
    ],
)
def test_a_malformed_schema_of_a_tool_is_refused_in_every_family(family: str, schema: dict[str, Any]) -> None:
    constrainer = Constrainer(family_tokenizer(family), VOCAB)
    request = _request(
        tools=(ToolSpec(name="f", parameters=schema),), tool_choice=ToolChoice(mode="required")
    )
    try:
        constrainer.processor(request, _rendered())
    except RequestError as error:
        assert str(error.param).startswith("tools")  # noqa: PT017


def test_keywords_that_no_grammar_has_are_left_to_the_model_in_tools() -> None:
    tool = ToolSpec(
        name="f", parameters={"type": "object", "properties": {"a": {"not": {}}}, "minProperties": 0}
    )
    request = _request(tools=(tool,), tool_choice=ToolChoice(mode="required"))
    assert Constrainer(family_tokenizer("json_tools"), VOCAB).processor(request, _rendered()) is not None


class _Exhausted:
    """A matcher that runs out of its limits while it computes: then it allows the end of the turn alone."""

    error = ""

    def get_error(self) -> str:
        return self.error

    def compute_bitmask(self) -> bytes:
        self.error = "lexer error: too many expressions constructed\n<state>\nTokens: of the answer"
        return np.array([1] + [0] * (VOCAB // 32), dtype=np.uint32).tobytes()


def test_a_grammar_that_runs_out_of_limits_ends_with_an_error_and_not_as_if_it_were_done() -> None:
    steering = Steering(ReasoningTrack((), (), is_open=False, budget=None), _Exhausted(), ends=[0])
    with pytest.raises(RequestError, match="too many expressions constructed") as caught:
        steering(mx.array(_PROMPT), mx.zeros((1, VOCAB)))
    assert "<state>" not in str(caught.value)


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    constrainer = Constrainer(family_tokenizer("json_tools"), VOCAB)
    with pytest.raises(UsageError, match=r"mlx-optiq-ext\[serve\]"):
        constrainer.processor(_request(constraint=_SCHEMA), _rendered())
    # What needs no grammar goes on without it.
    assert constrainer.processor(_request(reasoning=ReasoningOptions(budget=3)), _rendered(open_=True))


def _batch(
    rows: list[tuple[list[int], Generation]], tokenizer: Any, constrainer: Constrainer
) -> list[list[int]]:
    model = tiny_model({**LLAMA, "vocab_size": VOCAB}, dtype=mx.float32)
    generator = BatchGenerator(model, completion_batch_size=8)
    processors: list[list[Any]] = []
    for prompt, request in rows:
        made: list[Any] = []
        rendered = Rendered(tokens=tuple(prompt))
        # As in the engine: compiled on another thread than that of the model.
        thread = threading.Thread(target=lambda: made.append(constrainer.processor(request, rendered)))  # noqa: B023
        thread.start()
        thread.join()
        processors.append([each for each in made if each is not None])
    stops = StopSequences([(token,) for token in tokenizer.eos_token_ids])
    uids = generator.insert(
        [prompt for prompt, _ in rows],
        max_tokens=[150] * len(rows),
        samplers=[make_sampler(request.sampling) for _, request in rows],
        logits_processors=processors,
        stop_sequences=[stops] * len(rows),
    )
    found: dict[int, list[int]] = {uid: [] for uid in uids}
    running = set(uids)
    while running:
        for answer in generator.next_generated():
            if answer.finish_reason != "stop":
                found[answer.uid].append(answer.token)
            if answer.finish_reason is not None:
                running.discard(answer.uid)
    generator.close()
    return [found[uid] for uid in uids]


def test_rows_of_different_grammars_answer_together_as_alone() -> None:
    tokenizer = family_tokenizer("json_tools")
    constrainer = Constrainer(tokenizer, VOCAB)
    bias = dict.fromkeys(tokenizer.encode('"}', add_special_tokens=False), 6.0)
    seeded, greedy = Sampling(seed=11, logit_bias=bias), Sampling(temperature=0.0)
    rows = [
        ([5, 6], _request(constraint=_SCHEMA, sampling=seeded)),
        ([7, 8, 9], _request(sampling=Sampling(seed=3))),
        (
            [4],
            _request(tools=_TOOLS, tool_choice=ToolChoice(mode="required", parallel=False), sampling=greedy),
        ),
        ([5, 6], _request(constraint=_SCHEMA, sampling=greedy)),
        ([3, 2, 1], _request(sampling=greedy)),
    ]
    alone = [_batch([row], tokenizer, constrainer)[0] for row in rows]
    together = _batch(rows, tokenizer, constrainer)
    assert together == alone
    for at in (0, 3):
        said = tokenizer.decode(together[at]).rpartition("</think>")[2]
        assert json.loads(said)["answer"] in ("yes", "no")
    assert calls_in(tokenizer, tokenizer.decode(together[2]).rpartition("</think>")[2], _TOOLS)
