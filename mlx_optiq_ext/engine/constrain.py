"""From what a request demands of its answer to the processor of logits that enforces it.

Compiles grammars on the prompt thread; the processor then runs on the owner thread. Called once per request.

What is enforced: a constraint on the visible answer; calls of tools where they are required, in the family's
own syntax with arguments by their schemas (keywords that a grammar cannot express are left to the model); no
call where none is wanted; a budget of reasoning tokens. With a constraint, and tools that may be called, the
answer is either of them. Reasoning comes before and is free.
"""

import json
import re
from collections import OrderedDict
from functools import cached_property
from itertools import takewhile
from typing import Any

from mlx_optiq_ext.engine.decode import call_syntax
from mlx_optiq_ext.engine.grammars.answer import AnswerForm, Envelope, answer_grammar, form_grammar, without
from mlx_optiq_ext.engine.guard import Processor
from mlx_optiq_ext.engine.prompt import Rendered
from mlx_optiq_ext.engine.reasoning import ReasoningTrack, budget_of
from mlx_optiq_ext.engine.steer import Steering
from mlx_optiq_ext.engine.vocabulary import grammar_tokenizer, llguidance, markers_of
from mlx_optiq_ext.errors import RequestError
from mlx_optiq_ext.types.chat import Generation, ToolSpec

__all__ = ["Constrainer"]

_KEPT = 32
"""Compiled grammars that are kept: agents send the same tools again and again."""
_NO_SCHEMA = (AttributeError, KeyError, TypeError, ValueError, RecursionError)
"""What reading a schema raises that is none."""
_NOUNS = {
    "json_schema": "this JSON schema",
    "json_object": "a JSON object",
    "regex": "this regular expression",
    "lark": "this grammar, which is read as Lark,",
}
_AT = re.compile(r"(?:at )?(\d+)\((\d+)\): (.*?)(?: \(at \".*\))?")
_QUOTED = re.compile(r"\s*\d+ \|")


class Constrainer:
    """Makes processors for requests to one model.

    Args:
        tokenizer: mlx-lm's wrapper.
        vocab_size: Width of the logits.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def processor(self, request: Generation, rendered: Rendered) -> Processor | None:
        """What keeps this request's answer in its bounds; None where it has none.

        Args:
            request: As it came.
            rendered: Its prompt.
        Raises:
            RequestError: A schema, pattern, grammar or tool choice cannot be used; ``param`` says which.
            UsageError: llguidance is not installed, and is needed.
        """
        form = self._form(request)
        marker = self._forbidden(request)
        banned: tuple[int, ...] = ()
        grammar = None
        if form is not None:
            grammar = self._grammar(form, request)
        elif any(token in marker for token in self._markers):
            banned = tuple(self._tokenizer.encode(marker, add_special_tokens=False))
        elif marker:
            grammar = without(marker, set(self._markers.values()) - set(self._tokenizer.eos_token_ids))
        budget = budget_of(request.reasoning)
        track = self._track(request, rendered, budget)
        if grammar is None and not banned and (budget is None or track.state == "after"):
            return None
        matcher = self._matcher(grammar, request) if grammar is not None else None
        return Steering(track, matcher, ends=sorted(self._tokenizer.eos_token_ids), banned=banned)

    def _form(self, request: Generation) -> AnswerForm | None:
        """What the answer must be; None: nothing is demanded."""
        choice = request.tool_choice
        if choice.mode in ("required", "named"):
            tools = _chosen(request)
            return AnswerForm(tools=tools, parallel=choice.parallel and choice.mode == "required")
        if request.constraint is None:
            return None
        tools = request.tools if choice.mode == "auto" else ()
        return AnswerForm(constraint=request.constraint, tools=tools, parallel=choice.parallel)

    def _forbidden(self, request: Generation) -> str:
        """The marker that must not come where tools are there and none may be called."""
        if request.tool_choice.mode != "none" or not request.tools:
            return ""
        return call_syntax(self._tokenizer).start

    def _track(self, request: Generation, rendered: Rendered, budget: int | None) -> ReasoningTrack:
        begins = (
            request.prompt is None and bool(request.messages) and request.messages[-1].role != "assistant"
        )
        may_open = begins and request.reasoning.enabled is not False
        return ReasoningTrack(
            tuple(self._tokenizer.think_start_tokens or ()) if may_open else (),
            tuple(self._tokenizer.think_end_tokens or ()),
            is_open=rendered.starts_reasoning,
            budget=budget,
        )

    def _grammar(self, form: AnswerForm, request: Generation) -> str:
        try:
            return answer_grammar(form, self._family, self._markers, self._envelope)
        except _NO_SCHEMA as error:
            raise self._refusal(f"a schema is malformed ({error})", request) from error

    def _matcher(self, grammar: str, request: Generation) -> Any:
        """A matcher of its own, from a compiled one."""
        found = self._compiled.get(grammar)
        if found is None:
            found = llguidance().LLMatcher(self._lexicon, grammar, log_level=0)
            if found.is_error():
                raise self._refusal(found.get_error(), request)
            self._compiled[grammar] = found
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return found.deep_copy()

    def _refusal(self, error: str, request: Generation) -> RequestError:
        """Say which part of a request cannot be compiled."""
        constraint = request.constraint
        if constraint is not None:
            reason = self._reason(form_grammar(constraint))
            if reason:
                return RequestError(
                    f"{_NOUNS[constraint.kind]} cannot be enforced: {_placed(reason, constraint.kind)}",
                    param=constraint.param,
                )
        for index, tool in enumerate(request.tools):
            # As JSON in any family: what is wrong is said in the schema's own words.
            reason = self._reason(answer_grammar(AnswerForm(tools=(tool,)), "json_tools", {}))
            if reason:
                return RequestError(
                    f"the parameters of tool {tool.name!r} cannot be enforced: {_placed(reason)}",
                    param=f"tools[{index}]",
                )
        param = constraint.param if constraint is not None else "tools"
        return RequestError(f"the answer cannot be constrained: {_shortened(error)}", param=param)

    def _reason(self, grammar: str) -> str:
        """What is wrong with a grammar; empty where nothing is."""
        matcher = llguidance().LLMatcher(self._lexicon, grammar, log_level=0)
        return _shortened(matcher.get_error())

    @cached_property
    def _lexicon(self) -> Any:
        return grammar_tokenizer(self._tokenizer, self._vocab_size)

    @cached_property
    def _markers(self) -> dict[str, int]:
        return markers_of(self._tokenizer)

    @cached_property
    def _family(self) -> str:
        """Name of the syntax of calls."""
        family = call_syntax(self._tokenizer).family
        template = getattr(self._tokenizer, "chat_template", None)
        has_headers = "[ARGS]" in self._markers or "[ARGS]" in str(template)
        return "mistral_headers" if family == "mistral" and has_headers else family

    @cached_property
    def _envelope(self) -> Envelope:
        if self._tokenizer.response_transitions:
            return Envelope(is_addressed=True)
        markers = tuple(self._tokenizer.structural_markers)
        return Envelope(before=markers[0], after=markers[1]) if len(markers) > 1 else Envelope()


def _chosen(request: Generation) -> tuple[ToolSpec, ...]:
    """The tools of which one must be called."""
    choice = request.tool_choice
    if not request.tools:
        raise RequestError("tool_choice demands a call, and there are no tools", param="tool_choice")
    if choice.mode == "required":
        return request.tools
    chosen = tuple(tool for tool in request.tools if tool.name == choice.name)
    if not chosen:
        names = json.dumps([tool.name for tool in request.tools], ensure_ascii=False)
        raise RequestError(f"tool_choice names {choice.name!r}; the tools are {names}", param="tool_choice")
    return chosen


def _placed(reason: str, kind: str = "json_schema") -> str:
    """What is wrong, and where in a client's own grammar; schemas and patterns are put into one of ours."""
    found = _AT.fullmatch(reason)
    if found is None:
        return reason
    if kind == "lark":
        return f"line {found[1]}, column {found[2]}: {found[3]}"
    return found[3].removeprefix("failed to compile JSON schema: ").rpartition("error: ")[2]


def _shortened(error: str) -> str:
    """An error without the lines of the grammar that it quotes."""
    lines = takewhile(lambda line: not _QUOTED.match(line), error.strip().splitlines())
    return " ".join(line.strip() for line in lines)[:500]
