"""From an example to token ids, and which of them are learnt.

The model's own chat template writes the conversation, and what it does not take is refused: an adapter that
was taught another form would be of no use. An answer's tokens are those that differ when the text in front of
it and the text up to its end are tokenized by themselves. Knows nothing of batches. Called by ``train``.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.examples import Completion, Conversation, Message, PlainText, Preference
from mlx_optiq_ext.measure.rendering import (
    apply_template,
    encode_text,
    has_template,
    holds_everything,
    with_parsed_arguments,
)

__all__ = ["Pair", "Sample", "TrainOn", "pair_of", "samples_of"]

TrainOn: TypeAlias = Literal["answers", "last", "all"]


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of an example."""

    where: str
    tokens: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    """Learnt tokens: begin and end (exclusive) of each answer, ascending."""

    @property
    def num_learnt(self) -> int:
        """How many tokens are learnt; the first of a sequence never is, since nothing predicts it."""
        return sum(end - max(begin, 1) for begin, end in self.spans if end > 1)

    def cut(self, max_length: int) -> "Sample":
        """The first ``max_length`` tokens."""
        if len(self.tokens) <= max_length:
            return self
        spans = tuple((begin, min(end, max_length)) for begin, end in self.spans if begin < max_length)
        return Sample(where=self.where, tokens=self.tokens[:max_length], spans=spans)


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """Two answers to one prompt."""

    where: str
    chosen: Sample
    rejected: Sample

    def cut(self, max_length: int) -> "Pair":
        """The first ``max_length`` tokens of both."""
        chosen, rejected = self.chosen.cut(max_length), self.rejected.cut(max_length)
        return Pair(where=self.where, chosen=chosen, rejected=rejected)


def samples_of(
    tokenizer: Any, example: Conversation | Completion | PlainText, train_on: TrainOn = "answers"
) -> list[Sample]:
    """Tokenize one example.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper or a transformers tokenizer.
        example: What is to be imitated. A prompt with a completion becomes a user's and an assistant's turn
            where the tokenizer has a chat template, as in mlx-lm.
        train_on: Which tokens of a conversation or completion are learnt; a text is learnt whole.
    Returns:
        One sample; one per learnt answer, each with what was said before it, where the template writes
        earlier turns another way once a later one follows (reasoning models drop the reasoning of old turns).
    Raises:
        UsageError: The template does not take the conversation, or not all of it; names the line.
    """
    if isinstance(example, PlainText):
        tokens = _ended(tokenizer, encode_text(tokenizer, example.text, add_special_tokens=True))
        return [Sample(where=example.where, tokens=tuple(tokens), spans=((0, len(tokens)),))]
    if isinstance(example, Completion):
        if not has_template(tokenizer):
            return [_plain_completion(tokenizer, example, train_on)]
        asked = {"role": "user", "content": example.prompt}
        said = {"role": "assistant", "content": example.completion}
        example = Conversation(where=example.where, messages=(asked, said))
    return _conversation(tokenizer, example, train_on)


def pair_of(tokenizer: Any, example: Preference) -> Pair:
    """Tokenize both answers of a pair; only the last turn of each counts.

    Raises:
        UsageError: See :func:`samples_of`.
    """
    chosen, rejected = (
        samples_of(tokenizer, answer, "last")[-1] for answer in (example.chosen, example.rejected)
    )
    return Pair(where=example.where, chosen=chosen, rejected=rejected)


def _plain_completion(tokenizer: Any, example: Completion, train_on: TrainOn) -> Sample:
    prompt = encode_text(tokenizer, example.prompt, add_special_tokens=True)
    whole = encode_text(tokenizer, example.prompt + example.completion, add_special_tokens=True)
    # A tokenizer that closes a text by itself closes the prompt as well.
    begin = 0 if train_on == "all" else _shared(whole, prompt)
    tokens = _ended(tokenizer, whole)
    return Sample(where=example.where, tokens=tuple(tokens), spans=((begin, len(tokens)),))


def _conversation(tokenizer: Any, example: Conversation, train_on: TrainOn) -> list[Sample]:
    if not has_template(tokenizer):
        raise UsageError(
            f"{example.where}: messages, and the model's tokenizer has no chat template; give prompt and "
            "completion, or text"
        )
    writer = _Writer(tokenizer, example)
    whole = writer.text(len(example.messages))
    tokens = encode_text(tokenizer, whole, add_special_tokens=False)
    if train_on == "all":
        return [Sample(where=example.where, tokens=tuple(tokens), spans=((0, len(tokens)),))]
    answers = [index for index, message in enumerate(example.messages) if message["role"] == "assistant"]
    answers = answers[-1:] if train_on == "last" else answers
    written = [writer.answer(index) for index in answers]
    if all(whole.startswith(text) for _, text in written):
        return [_sample(tokenizer, example.where, whole, written)]
    return [_sample(tokenizer, example.where, text, [(begin, text)]) for begin, text in written]


class _Writer:
    """The chat template at work on one conversation.

    Args:
        tokenizer: Has a chat template.
        example: The conversation.
    """

    def __init__(self, tokenizer: Any, example: Conversation) -> None:
        self._tokenizer = tokenizer
        self._where = example.where
        self._messages: list[Message] = [with_parsed_arguments(message) for message in example.messages]
        self._tools = list(example.tools) or None

    def text(self, count: int, *, add_generation_prompt: bool = False) -> str:
        """The first ``count`` messages."""
        messages = self._messages[:count]
        text = apply_template(
            self._tokenizer, messages, self._tools, add_generation_prompt=add_generation_prompt
        )
        if text is None:
            raise UsageError(
                f"{self._where}: the model's chat template does not take this conversation (its roles and "
                "their order); write it as the model expects, or leave it out"
            )
        # What an answer holds is checked by its span; templates may drop reasoning of earlier ones.
        given = [message for message in messages if message["role"] != "assistant"]
        if not holds_everything(text, given, self._tools):
            raise UsageError(
                f"{self._where}: the model's chat template leaves out a part of this conversation (a system "
                "message, tools or a result); write it as the model expects, or leave it out"
            )
        return text

    def answer(self, index: int) -> tuple[int, str]:
        """Where answer ``index`` begins in the conversation up to its end, and that conversation."""
        text = self.text(index + 1)
        end_mark = getattr(self._tokenizer, "eos_token", None)
        # Line ends behind the end mark are the template's: a model stops before them.
        if end_mark and text.rstrip().endswith(end_mark):
            text = text.rstrip()
        begin = _shared(text, self.text(index, add_generation_prompt=True))
        # A template may open an answer by more than it writes in front of one that is there already.
        if begin < _shared(text, self.text(index)) or begin >= len(text):
            raise UsageError(
                f"{self._where}: message {index}, an answer, cannot be found in what the model's chat "
                "template writes; use --train-on all"
            )
        return begin, text


def _sample(tokenizer: Any, where: str, whole: str, written: Iterable[tuple[int, str]]) -> Sample:
    """Spans of characters become spans of tokens; a token across a border is learnt with what follows."""
    tokens = encode_text(tokenizer, whole, add_special_tokens=False)
    spans = []
    for begin, text in written:
        first = _shared(tokens, encode_text(tokenizer, text[:begin], add_special_tokens=False))
        is_last = len(text) == len(whole)
        last = (
            len(tokens)
            if is_last
            else _shared(tokens, encode_text(tokenizer, text, add_special_tokens=False))
        )
        spans.append((first, last))
    return Sample(where=where, tokens=tuple(tokens), spans=tuple(spans))


def _ended(tokenizer: Any, tokens: list[int]) -> list[int]:
    """Tokens with the end mark behind them, so that stopping is learnt."""
    end = getattr(tokenizer, "eos_token_id", None)
    return tokens if end is None or (tokens and tokens[-1] == end) else [*tokens, end]


def _shared(first: Sequence[object], second: Sequence[object]) -> int:
    """Length of the common beginning."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
