"""Rows of a data set while it is written: templates, what is wrong with each, how one is edited.

The rules are those of training (``formats.examples``). Knows no file and no widget.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.dataset import content_hash
from mlx_optiq_ext.formats.examples import Example, parse_preference, parse_sft
from mlx_optiq_tui.finetune.turns import is_plain, text_of_turns, turns_of_text

__all__ = [
    "FORMS_OF",
    "Checks",
    "Form",
    "Method",
    "Row",
    "example_of",
    "fields_of",
    "form_of",
    "row_of_fields",
    "row_words",
    "template",
]

Method: TypeAlias = Literal["sft", "dpo"]
Form: TypeAlias = Literal["chat", "completion", "text", "preference", "json"]
Row: TypeAlias = dict[str, Any]

FORMS_OF: dict[Method, tuple[Form, ...]] = {"sft": ("chat", "completion", "text"), "dpo": ("preference",)}
"""Forms that are offered for a new row."""

_FIELDS: dict[Form, tuple[str, ...]] = {
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
    "preference": ("prompt", "chosen", "rejected"),
    "json": ("row",),
}
_TEMPLATES: dict[Form, Row] = {
    "chat": {
        "messages": [
            {"role": "system", "content": "You answer in one sentence."},
            {"role": "user", "content": "Where is the Eiffel Tower?"},
            {"role": "assistant", "content": "The Eiffel Tower stands in Paris."},
        ]
    },
    "completion": {"prompt": "Where is the Eiffel Tower?", "completion": "It stands in Paris."},
    "text": {"text": "The Eiffel Tower stands in Paris, on the Champ de Mars."},
    "preference": {
        "prompt": "Where is the Eiffel Tower?",
        "chosen": "It stands in Paris.",
        "rejected": "Towers stand in many places.",
    },
}


def template(form: Form) -> Row:
    """A row to begin with."""
    copy: Row = msgspec.json.decode(msgspec.json.encode(_TEMPLATES[form]))
    return copy


def form_of(row: Row) -> Form:
    """How a row is edited: by fields where they say all of it, else as JSON."""
    for form, wanted in _FIELDS.items():
        if row.keys() == set(wanted):
            if form == "chat":
                return "chat" if is_plain(row["messages"]) else "json"
            if all(isinstance(row[name], str) for name in wanted):
                return form
    return "json"


def fields_of(row: Row) -> dict[str, str]:
    """The texts that are edited, by name."""
    form = form_of(row)
    if form == "chat":
        return {"messages": text_of_turns(row["messages"])}
    if form == "json":
        return {"row": msgspec.json.format(msgspec.json.encode(row), indent=2).decode()}
    return {name: row[name] for name in _FIELDS[form]}


def row_of_fields(form: Form, fields: dict[str, str]) -> Row:
    """The row that edited texts make.

    Raises:
        UsageError: The JSON is none, or no heading names a role.
    """
    if form == "chat":
        turns = turns_of_text(fields["messages"])
        if not turns:
            raise UsageError("no heading names a role; write ## user and ## assistant above what they say")
        return {"messages": turns}
    if form == "json":
        try:
            return msgspec.json.decode(fields["row"], type=Row)
        except msgspec.MsgspecError as error:
            raise UsageError(f"not a JSON object ({error})") from error
    return dict(fields)


def example_of(row: Row, method: Method, where: str) -> Example | str:
    """The example that training reads, or what is wrong with the row."""
    return parse_sft(row, where) if method == "sft" else parse_preference(row, where)


class Checks:
    """What is wrong with rows; each row is looked at once, however often the list is drawn."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, Method], tuple[Row, str, bool]] = {}
        """By identity: the row, held so that it stays its own, and its hash or what is wrong with it."""

    def problems(self, rows: Sequence[Row], method: Method) -> dict[int, str]:
        """What is wrong, by index: rows that cannot be used, and rows that repeat an earlier one.

        Args:
            rows: Changed by being replaced, never within.
            method: By whose rules.
        """
        problems: dict[int, str] = {}
        first: dict[str, int] = {}
        for index, row in enumerate(rows):
            found, is_usable = self._look(row, method)
            if not is_usable:
                problems[index] = found
                continue
            before = first.setdefault(found, index)
            if before != index:
                problems[index] = f"repeats row {before + 1}"
        return problems

    def _look(self, row: Row, method: Method) -> tuple[str, bool]:
        known = self._known.get((id(row), method))
        if known is None:
            example = example_of(row, method, "")
            is_usable = not isinstance(example, str)
            found = example if isinstance(example, str) else content_hash(example)
            known = self._known[id(row), method] = (row, found, is_usable)
        return known[1], known[2]


def row_words(row: Row, width: int = 60) -> str:
    """The beginning of a row, for a list."""
    form = form_of(row)
    if form == "chat":
        said = [turn["content"] for turn in row["messages"] if turn["role"] != "system"]
    elif form == "json":
        said = [msgspec.json.encode(row).decode()]
    else:
        said = [row[name] for name in _FIELDS[form]]
    words = " → ".join(" ".join(text.split()) for text in said)
    return words if len(words) <= width else words[: width - 1] + "…"
