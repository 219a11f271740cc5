"""From tokens to events: text, reasoning and tool calls told apart while they are generated.

Owns one row's detokenizer and state; knows neither batches nor protocols. Used on the owner thread.
"""

from collections import deque
from typing import Any, Literal

from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, SPMStreamingDetokenizer

from mlx_optiq_ext.engine.tools.bare import BareCalls
from mlx_optiq_ext.engine.tools.block import CallBlock, CallSyntax
from mlx_optiq_ext.engine.tools.sink import CallSink
from mlx_optiq_ext.engine.visible import VisibleText
from mlx_optiq_ext.types.chat import Generation
from mlx_optiq_ext.types.events import Event, ReasoningDelta, TextDelta, TokenLogprob

__all__ = ["AnswerDecoder", "call_syntax"]


def call_syntax(tokenizer: Any) -> CallSyntax:
    """How the model of a tokenizer writes calls: as mlx-lm says, else as our description of tools asks.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
    """
    if not tokenizer.has_tool_calling:
        return CallSyntax()
    return CallSyntax(
        start=tokenizer.tool_call_start, end=tokenizer.tool_call_end, parser=tokenizer.tool_parser
    )


class _Markers:
    """What ``make_text_state_machine`` asks of a tokenizer, with calls as this request needs them."""

    def __init__(self, tokenizer: Any, syntax: CallSyntax, *, calls: bool) -> None:
        self.has_thinking = tokenizer.has_thinking
        self.think_start, self.think_end = tokenizer.think_start, tokenizer.think_end
        self.has_tool_calling = calls
        self.tool_call_start, self.tool_call_end = syntax.start, syntax.end
        self.structural_markers = tuple(tokenizer.structural_markers)
        if calls and self.has_thinking:
            # A call may interrupt the reasoning; what ends that then comes in visible text.
            self.structural_markers += (self.think_end,)
        self.response_transitions = {
            state: [edge for edge in edges if calls or edge[1] != "tool"]
            for state, edges in tokenizer.response_transitions.items()
        }


def _detokenizer(tokenizer: Any, *, continues: bool) -> Any:
    """A detokenizer for one answer; where that continues a text, a space at its beginning is kept."""
    made = tokenizer.detokenizer
    if continues and isinstance(made, BPEStreamingDetokenizer | SPMStreamingDetokenizer):
        # They drop the first space of a text, so this one has begun already.
        made.text, made.offset = " ", 1
    return made


class AnswerDecoder:
    """One row's answer.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        request: What was asked; a raw prompt is answered by text alone.
        starts_reasoning: Whether the prompt ends inside an open thinking tag.
    """

    def __init__(self, tokenizer: Any, request: Generation, *, starts_reasoning: bool) -> None:
        self.reasoning_tokens = 0
        """Tokens of the reasoning, its markers included."""
        self._tools = request.tools if request.tool_choice.mode != "none" else ()
        is_raw = request.prompt is not None
        calls = bool(self._tools) and not is_raw
        self._syntax = call_syntax(tokenizer)
        self._sink = CallSink(self._tools)
        self._visible = VisibleText(request.stop, calls=calls)
        self._bare = BareCalls(self._sink) if calls and request.constraint is None else None
        self._block: CallBlock | None = None
        self._reasoned = False
        self._has_shown = False
        self._unshown: list[str] = []
        self._events: list[Event] = []
        self._logprobs: deque[tuple[TokenLogprob, int]] = deque()
        self._states = (
            TextStateMachine(None)
            if is_raw
            else make_text_state_machine(_Markers(tokenizer, self._syntax, calls=calls))
        )
        continues = is_raw or (bool(request.messages) and request.messages[-1].role == "assistant")
        self._detokenizer = _detokenizer(tokenizer, continues=continues)
        initial = "normal" if continues else tokenizer.response_initial_state or "normal"
        self._where = "reasoning" if starts_reasoning and not is_raw else initial
        self._before_block = ""
        self._machine = self._states.make_state(self._where)

    @property
    def stop_sequence(self) -> str | None:
        """The stop string that was met; nothing after it is told, the row can end."""
        return self._visible.stop

    @property
    def num_calls(self) -> int:
        """Tool calls that were begun."""
        return self._sink.num_calls

    def feed(self, token: int, logprob: TokenLogprob | None = None) -> list[Event]:
        """Read one generated token; not the one that ends the turn.

        Args:
            token: Its id.
            logprob: Its log-probability, where the request asks for them: told with the token's text.
        Returns:
            What became certain, in order.
        """
        if self.stop_sequence is not None:
            return []
        before = self._where
        self._detokenizer.add_token(token)
        text = self._detokenizer.last_segment
        if logprob is not None:
            self._logprobs.append((logprob, len(text)))
        self._read(text)
        self.reasoning_tokens += "reasoning" in (before, self._where)
        return self._take(self._held())

    def finish(self, reason: Literal["stop", "length", "cancelled"]) -> list[Event]:
        """The row ended: tell what was held back, end an open call where the model ended by itself.

        Args:
            reason: How it ended; after ``stop`` a forgotten end marker does not keep a call from being one,
                otherwise the call that is open was cut and gets no end.
        """
        if self.stop_sequence is None:
            self._detokenizer.finalize()
            self._read(self._detokenizer.last_segment)
            self._machine, held, _ = TextStateMachine.flush(self._machine)
            # Behind a call that has ended, what is held can only be the beginning of the end marker.
            if self._where != "tool" or self._block is None or not self._block.has_ended_calls:
                self._route(held)
            self._close_block("", is_whole=reason == "stop")
            if self._bare is not None:
                self._show(self._bare.close(is_whole=reason == "stop"))
                self._tell_calls()
            if not self._has_shown and not self.num_calls:
                self._show("".join(self._unshown))
            self._add(TextDelta, self._visible.flush())
        return self._take(None)

    def _read(self, text: str) -> None:
        """Through the model's markers."""
        self._machine, segments = TextStateMachine.split(self._machine, text)
        for at, (where, piece) in enumerate(segments):
            if where != self._where and not self._move(where):
                rest = "".join(text for _, text in segments[at:]) + self._machine[3]
                self._machine = self._states.make_state(self._where)
                self._read(rest)
                return
            self._route(piece)

    def _move(self, where: str) -> bool:
        """The text goes on in another state, unless the reasoning only spoke of calls and goes on itself."""
        if self._where == "tool" and not self._close_block(self._syntax.end, is_whole=True):
            self._where = "reasoning"
            return False
        if self._where == "reasoning":
            self._visible.after_reasoning()
        self._before_block, self._where = self._where, where
        if where == "tool":
            if self._bare is not None:
                self._show(self._bare.close())
                self._tell_calls()
            self._block = CallBlock(self._syntax, self._sink, self._tools)
        return True

    def _route(self, piece: str) -> None:
        if not piece or self.stop_sequence is not None:
            return
        if self._where == "tool" and self._block is not None:
            self._block.feed(piece)
            self._tell_calls()
        elif self._where == "reasoning":
            piece = piece if self._reasoned else piece.lstrip()
            self._reasoned = self._reasoned or bool(piece)
            self._add(ReasoningDelta, piece)
        elif self._where == "normal":
            shown = self._bare.feed(piece) if self._bare is not None else piece
            self._tell_calls()
            self._show(shown)
        else:
            self._unshown.append(piece)

    def _close_block(self, ending: str, *, is_whole: bool) -> bool:
        """End the block, if one is open; False where it was no call but part of the reasoning."""
        if self._block is None:
            return True
        rest = self._block.close(ending, is_whole=is_whole)
        was_call = self._block.has_calls
        self._block = None
        self._tell_calls()
        if was_call or self._before_block != "reasoning":
            self._show(rest)
            return True
        self._add(ReasoningDelta, rest)
        return False

    def _show(self, text: str) -> None:
        self._add(TextDelta, self._visible.feed(text) if text else "")

    def _tell_calls(self) -> None:
        events = self._sink.take()
        if events:
            self._add(TextDelta, self._visible.before_call())
        self._events.extend(events)

    def _add(self, kind: type[TextDelta] | type[ReasoningDelta], text: str) -> None:
        if not text:
            return
        self._has_shown = True
        last = self._events[-1] if self._events else None
        if isinstance(last, kind):
            self._events[-1] = kind(text=last.text + text)
        else:
            self._events.append(kind(text=text))

    def _held(self) -> int:
        """Characters of the text that were read and wait to be shown."""
        return len(self._machine[3]) + self._visible.held + (self._bare.held if self._bare is not None else 0)

    def _take(self, held: int | None) -> list[Event]:
        """Events so far, the last text among them with the log-probabilities that are due.

        Args:
            held: Characters that wait, and with them what is known of their tokens; None: the answer is over.
        """
        events, self._events = self._events, []
        waiting: deque[tuple[TokenLogprob, int]] = deque()
        reach = 0
        while held is not None and self._logprobs and (reach < held or self._logprobs[-1][1] == 0):
            waiting.appendleft(self._logprobs.pop())
            reach += waiting[0][1]
        told = tuple(logprob for logprob, _ in self._logprobs)
        self._logprobs = waiting
        for at in range(len(events) - 1, -1, -1):
            event = events[at]
            if told and isinstance(event, TextDelta | ReasoningDelta):
                events[at] = type(event)(text=event.text, logprobs=told)
                break
        return events
