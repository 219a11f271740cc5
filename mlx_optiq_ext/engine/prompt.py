"""From a request to token ids, through the model's own template, with the places where a prefix may branch.

Pure Python: no arrays. Used on the prompt thread, one renderer per loaded model.
"""

import logging
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from mlx_optiq_ext.engine.decode import call_syntax
from mlx_optiq_ext.engine.render_form import REFUSALS, find_form
from mlx_optiq_ext.engine.render_thinking import Thinking
from mlx_optiq_ext.engine.render_tokens import ControlTokens, encode_marked, encode_prompt, encode_text
from mlx_optiq_ext.engine.render_turns import LAST_RESORT, Form, Turn, TurnWriter, hoist_system, tools_as_text
from mlx_optiq_ext.engine.tools.parsed import definitions
from mlx_optiq_ext.errors import RequestError
from mlx_optiq_ext.types.chat import Generation, Image, Message, Text

__all__ = ["Rendered", "Renderer"]

_CUT = "\ufdd1"
"""Stands where a text ends that is to be continued, or where another conversation would differ."""
_log = logging.getLogger(__name__)


class Rendered(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt."""

    tokens: tuple[int, ...]
    boundaries: tuple[int, ...] = ()
    """Ascending numbers of tokens, less than all, after which a later request is likely to differ: the end of
    system message and tools, the start of the last user turn, the end of the conversation itself."""
    starts_reasoning: bool = False
    """The prompt ends inside an open thinking tag."""


class Renderer:
    """Renders requests for one model.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        reasoning: Thinking where a request says nothing of it; ``auto``: as mlx-lm does.
        sees_images: Whether the template gets pictures as content parts.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        reasoning: Literal["auto", "on", "off"] = "auto",
        sees_images: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._sees_images = sees_images
        self._syntax = call_syntax(tokenizer)
        template = _template_text(tokenizer)
        self._control = ControlTokens(tokenizer, template)
        self._thinking = Thinking(tokenizer, template, default=reasoning)
        if not tokenizer.has_chat_template:
            self._form: Form | None = None
            _log.warning(
                "the model has no chat template: conversations are written as plain 'Role: text' lines"
            )
            return
        self._form = find_form(self._applied, self._control, self._syntax)
        _log.debug("the chat template takes %s", self._form)

    @property
    def thinks(self) -> bool:
        """Whether the template has thinking."""
        return self._thinking.is_offered

    def render(self, request: Generation) -> Rendered:
        """The prompt of a request.

        Raises:
            RequestError: Nothing to answer, a token id that the model does not have, a picture for a model
                that sees none, or a conversation that its template refuses; ``param`` says where.
        """
        if request.prompt is not None:
            return self._raw(request.prompt)
        if not self._sees_images:
            _refuse_images(request.messages)
        messages = _answerable(hoist_system(request.messages))
        if not messages:
            raise RequestError("there is nothing to answer; send a message with text", param="messages")
        tools = self._control.mark(definitions(tool for tool in request.tools if not tool.deferred))
        if self._form is None:
            return self._plain(messages, tools)
        keywords = self._thinking.keywords(request.reasoning)
        try:
            return self._templated(self._form, request, messages, tools, keywords)
        except REFUSALS as refusal:
            _log.debug(
                "the template refuses a conversation (%s); it is written in its simplest form", refusal
            )
        try:
            return self._templated(LAST_RESORT, request, messages, tools, keywords)
        except REFUSALS as refusal:
            raise RequestError(
                f"the model's chat template refuses this conversation: {refusal}", param="messages"
            ) from None

    def _raw(self, prompt: str | tuple[int, ...]) -> Rendered:
        if isinstance(prompt, str):
            tokens = tuple(encode_text(self._tokenizer, prompt, add_special_tokens=True))
        else:
            tokens = prompt
            known = len(self._tokenizer)
            wrong = next((at for at, token in enumerate(tokens) if not 0 <= token < known), None)
            if wrong is not None:
                raise RequestError(
                    f"token {tokens[wrong]} is not one of the model's {known}", param=f"prompt[{wrong}]"
                )
        if not tokens:
            raise RequestError("the prompt is empty; send at least one token", param="prompt")
        return Rendered(tokens=tokens)

    def _plain(self, messages: Sequence[Message], tools: list[dict[str, Any]]) -> Rendered:
        turns = self._turns(LAST_RESORT, messages, tools)
        lines = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns]
        text = "\n\n".join(lines if turns[-1]["role"] == "assistant" else [*lines, "Assistant:"])
        tokens = encode_marked(self._tokenizer, text, add_special_tokens=True)
        return Rendered(tokens=tuple(tokens))

    def _templated(
        self,
        form: Form,
        request: Generation,
        messages: Sequence[Message],
        tools: list[dict[str, Any]],
        keywords: dict[str, Any],
    ) -> Rendered:
        turns = self._turns(form, messages, tools)
        offered = tools if form.tools else None
        if continues := turns[-1]["role"] == "assistant" and "tool_calls" not in turns[-1]:
            turns[-1] = {**turns[-1], "content": turns[-1]["content"] + _CUT}
        text = self._applied(turns, offered, **keywords, add_generation_prompt=not continues)
        marks = []
        if continues:
            text = _before_cut(text)
        else:
            marks.append(self._shared(text, turns, offered, keywords))
            text = self._thinking.closed(text, request.reasoning)
        for at in _branches(messages):
            other = [*messages[:at], Message(role="user", parts=(Text(text=_CUT),))]
            marks.append(self._shared(text, self._turns(form, other, tools), offered, keywords))
        tokens, boundaries = encode_prompt(self._tokenizer, text, self._control.starts(text), marks)
        return Rendered(
            tokens=tuple(tokens),
            boundaries=tuple(boundaries),
            starts_reasoning=self._thinking.is_open(tokens),
        )

    def _turns(self, form: Form, messages: Sequence[Message], tools: list[dict[str, Any]]) -> list[Turn]:
        writer = TurnWriter(form, self._control, self._syntax)
        as_text = tools_as_text(tools, self._syntax) if tools and not form.tools else ""
        return writer.write(messages, as_text)

    def _shared(
        self, text: str, turns: list[Turn], tools: list[dict[str, Any]] | None, keywords: dict[str, Any]
    ) -> int:
        """How much of a prompt other turns have too, without what invites the answer."""
        try:
            other = self._applied(turns, tools, **keywords)
        except REFUSALS:
            return 0
        return bisect_left(range(len(text)), True, key=lambda at: not other.startswith(text[: at + 1]))

    def _applied(self, turns: list[Turn], tools: list[dict[str, Any]] | None, **keywords: Any) -> str:
        """Through the template; raises one of ``REFUSALS``."""
        keywords = {"add_generation_prompt": False, **keywords}
        text = self._tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, **keywords)
        if not isinstance(text, str):
            raise TypeError(f"the template gives {type(text).__name__}, not text")
        return text


def _template_text(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        return "\n".join(map(str, template.values()))
    return template if isinstance(template, str) else ""


def _refuse_images(messages: Sequence[Message]) -> None:
    """Raise for a picture outside a tool's result; there a note takes its place."""
    for number, message in enumerate(messages):
        for at, part in enumerate(message.parts):
            if isinstance(part, Image):
                raise RequestError(
                    "this model cannot see images; send text, or serve a model with vision",
                    param=part.param or f"messages[{number}].parts[{at}]",
                )


def _answerable(messages: Sequence[Message]) -> list[Message]:
    """The messages without an empty last one of the assistant, which some clients send to be continued."""
    last = messages[-1] if messages else None
    if last is None or last.role != "assistant":
        return list(messages)
    says_nothing = all(isinstance(part, Text) and not part.text for part in last.parts)
    return list(messages[:-1] if says_nothing else messages)


def _branches(messages: Sequence[Message]) -> list[int]:
    """Numbers of messages after which another conversation may say something else."""
    head = 1 if messages[0].role == "system" else 0
    last = max((at for at, message in enumerate(messages) if message.role == "user"), default=head)
    return sorted({head, last})


def _before_cut(text: str) -> str:
    before, found, _ = text.rpartition(_CUT)
    if not found:
        raise ValueError("it does not show the last message, which is to be continued")
    return before
