"""Records of calibration text: the JSONL files shipped in the wheel, and the user's own in the same form.

Knows nothing of tokenizers or windows. Called by ``measure.calibration``.
"""

import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import msgspec

from mlx_optiq_ext.errors import UsageError

__all__ = ["Record", "Split", "hash_records", "read_records"]

Split = Literal["calibration", "held_out"]


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One document: plain ``text``, or a conversation of ``messages`` with the ``tools`` it may call."""

    domain: str
    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    """OpenAI form: role, content, tool_calls, tool_call_id; arguments as an object or as JSON text."""
    tools: tuple[dict[str, Any], ...] | None = None
    """OpenAI form: ``{"type": "function", "function": {"name", "description", "parameters"}}``."""
    source: str = ""
    licence: str = ""


def read_records(source: str | None, split: Split) -> tuple[Record, ...]:
    """Read a JSONL file of records.

    Args:
        source: Path of the user's file; None for the text shipped with this package.
        split: Which of the two shipped files; of the user's file what it is for, in messages.
    Returns:
        Records in file order, at least one.
    Raises:
        UsageError: The file cannot be read, is empty, or a line is no record (with its number).
    """
    if source is None:
        name = f"{split}.jsonl"
        content = (files("mlx_optiq_ext") / "data" / name).read_bytes()
    else:
        name = source
        try:
            content = Path(source).expanduser().read_bytes()
        except OSError as error:
            flag = f"--{split.replace('_', '-')}"
            raise UsageError(
                f"{flag} {source} cannot be read: {error.strerror}; give a JSONL file, or leave {flag} out"
            ) from error
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    records = tuple(_parse_line(line, name, number) for number, line in enumerate(lines, 1) if line.strip())
    if not records:
        raise UsageError(f"{name} has no records; write one JSON object a line: {_FORM}")
    return records


def hash_records(records: Sequence[Record]) -> str:
    """SHA-256 of the records' contents in their order, independent of spacing and key order in the file."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(msgspec.json.encode(record, order="deterministic"))
        digest.update(b"\n")
    return digest.hexdigest()


_FORM = '{"domain": …, "text": …} or {"domain": …, "messages": […], "tools": […]}'


def _parse_line(line: bytes, name: str, number: int) -> Record:
    """Read one line, or say which line is wrong and how."""
    try:
        record = msgspec.json.decode(line, type=Record)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{name}, line {number}: {error}; expected {_FORM}") from error
    problem = _problem(record)
    if problem:
        raise UsageError(f"{name}, line {number}: {problem}; expected {_FORM}")
    return record


def _problem(record: Record) -> str:
    """What makes a decoded record unusable; empty if nothing does."""
    if not record.domain.strip():
        return "the domain is empty"
    if (record.text is None) == (record.messages is None):
        return "both text and messages" if record.text is not None else "neither text nor messages"
    if record.text is not None:
        if record.tools is not None:
            return "tools without messages"
        return "" if record.text.strip() else "the text is empty"
    if not record.messages:
        return "messages is empty"
    for position, message in enumerate(record.messages):
        if not isinstance(message.get("role"), str):
            return f"message {position} has no role"
        if not isinstance(message.get("content", ""), str | None):
            return f"content of message {position} is {type(message['content']).__name__}, not text"
    return ""
