"""Calibration windows: cutting, spreading, rendering and bad files."""

import json
from pathlib import Path

import numpy as np
import pytest

from mlx_optiq_ext.errors import MeasurementError, UsageError
from mlx_optiq_ext.measure.calibration import load_windows
from mlx_optiq_ext.measure.records import Record, hash_records, read_records
from mlx_optiq_ext.measure.rendering import render_record

BOS = 256


class ByteTokenizer:
    """One token per UTF-8 byte; puts a BOS before text, as many tokenizers do."""

    def encode(self, text, add_special_tokens=True):
        return [BOS] * add_special_tokens + list(text.encode())

    def decode(self, tokens):
        return bytes(token for token in tokens if token < BOS).decode(errors="replace")


class ChatTokenizer(ByteTokenizer):
    """A byte tokenizer with a template that behaves as told."""

    chat_template = "given"

    def __init__(self, *, refuses=(), drops_tools=False):
        self.refuses = refuses
        self.drops_tools = drops_tools

    def apply_chat_template(self, messages, tools=None, tokenize=True):
        assert not tokenize
        if set(self.refuses) & {message["role"] for message in messages}:
            raise ValueError("role not supported")
        shown = "" if self.drops_tools or not tools else json.dumps(tools)
        for message in messages:
            calls = "" if self.drops_tools else json.dumps(message.get("tool_calls", ""))
            shown += f"<{message['role']}>{message['content']}{calls}</>"
        return shown


CONVERSATION = Record(
    domain="tool_calls",
    messages=(
        {"role": "system", "content": "You know the weather."},
        {"role": "user", "content": "Rain in Oslo?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "a1",
                    "type": "function",
                    "function": {"name": "forecast", "arguments": '{"city": "Oslo"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "a1", "content": "drizzle until noon"},
        {"role": "assistant", "content": "Yes, until noon."},
    ),
    tools=(
        {"type": "function", "function": {"name": "forecast", "description": "Weather", "parameters": {}}},
    ),
)


def write_jsonl(path, *records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def three_domains(tmp_path):
    """Documents whose letters tell where a window came from."""
    texts = [("a", "A" * 95), ("a", "B" * 40), ("b", "C" * 64), ("c", "D" * 33), ("a", "E" * 10)]
    return write_jsonl(tmp_path / "own.jsonl", *({"domain": d, "text": t} for d, t in texts))


def letters(windows):
    return ["".join(sorted(set(ByteTokenizer().decode(row)))) for row in windows.tokens.tolist()]


def test_windows_take_turns_over_domains_and_documents(three_domains):
    windows = load_windows(ByteTokenizer(), source=three_domains, num_tokens=32 * 7, window=32)
    assert windows.tokens.shape == (7, 32)
    assert windows.tokens.dtype == np.int32
    assert letters(windows) == ["A", "C", "D", "B", "C", "A", "A"]
    assert windows.domain_index.tolist() == [0, 1, 2, 0, 1, 0, 0]
    assert windows.info.domains == ("a", "b", "c")
    assert windows.info.num_tokens == 7 * 32
    assert windows.info.num_windows == 7
    assert windows.info.source == "own.jsonl"


def test_only_the_first_window_of_a_text_has_the_bos_the_tokenizer_adds(three_domains):
    windows = load_windows(ByteTokenizer(), source=three_domains, num_tokens=32 * 7, window=32)
    starts = [row[0] == BOS for row in windows.tokens.tolist()]
    assert starts == [True, True, True, True, False, False, False]
    assert (windows.tokens[:, 1:] != BOS).all()


def test_more_tokens_begin_with_the_windows_of_fewer(three_domains):
    few = load_windows(ByteTokenizer(), source=three_domains, num_tokens=100, window=32)
    many = load_windows(ByteTokenizer(), source=three_domains, num_tokens=200, window=32)
    np.testing.assert_array_equal(many.tokens[:3], few.tokens)


def test_a_domain_of_short_documents_is_joined_and_says_so(tmp_path):
    path = write_jsonl(tmp_path / "s.jsonl", *({"domain": "x", "text": letter * 20} for letter in "ABC"))
    windows = load_windows(ByteTokenizer(), source=path, num_tokens=50, window=50)
    assert letters(windows) == ["ABC"]
    assert "x: no document has 50 tokens, so 3 were joined" in windows.info.notes


def test_a_domain_with_too_little_text_is_refused(tmp_path):
    path = write_jsonl(
        tmp_path / "s.jsonl", {"domain": "x", "text": "A" * 99}, {"domain": "tiny", "text": "BB"}
    )
    with pytest.raises(MeasurementError, match=r"'tiny' has 3 tokens, less than one window of 32"):
        load_windows(ByteTokenizer(), source=path, num_tokens=64, window=32)


def test_too_little_text_in_all_is_used_up_and_noted(three_domains):
    windows = load_windows(ByteTokenizer(), source=three_domains, num_tokens=6400, window=32)
    assert windows.info.num_windows == 7
    notes = " / ".join(windows.info.notes)
    assert "6400 tokens asked for, all 224 available are used" in notes
    assert "uneven: a 4, b 2, c 1 windows" in notes


def test_domains_without_a_window_are_named(three_domains):
    windows = load_windows(ByteTokenizer(), source=three_domains, num_tokens=64, window=32)
    assert windows.info.domains == ("a", "b")
    assert windows.info.notes == ("2 windows do not reach c; raise num_tokens to 96",)


def test_less_than_one_window_is_a_usage_error(three_domains):
    with pytest.raises(UsageError, match="31 tokens are less than one window of 32"):
        load_windows(ByteTokenizer(), source=three_domains, num_tokens=31, window=32)


def test_hash_depends_on_the_records_used_and_not_on_their_spelling(tmp_path, three_domains):
    def sha(path, num_tokens=96):
        return load_windows(ByteTokenizer(), source=path, num_tokens=num_tokens, window=32).info.sha256

    respelled = tmp_path / "respelled.jsonl"
    lines = [json.loads(line) for line in Path(three_domains).read_text(encoding="utf-8").splitlines()]
    respelled.write_text("\n\n".join(json.dumps(dict(reversed(line.items())), indent=None) for line in lines))
    assert sha(str(respelled)) == sha(three_domains)
    assert sha(three_domains, 128) != sha(three_domains, 96)
    assert len(sha(three_domains)) == 64


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"domain": "x", "text": ', "truncated"),
        ('["x"]', "Expected `object`, got `array`"),
        ('{"text": "no domain"}', "missing required field `domain`"),
        ('{"domain": "x"}', "neither text nor messages"),
        (
            '{"domain": "x", "text": "a", "messages": [{"role": "user", "content": "b"}]}',
            "both text and messages",
        ),
        ('{"domain": "x", "text": "  "}', "the text is empty"),
        ('{"domain": " ", "text": "a"}', "the domain is empty"),
        ('{"domain": "x", "text": 5}', "Expected `str | null`, got `int`"),
        ('{"domain": "x", "text": "a", "tools": []}', "tools without messages"),
        ('{"domain": "x", "messages": []}', "messages is empty"),
        ('{"domain": "x", "messages": [{"content": "b"}]}', "message 0 has no role"),
        ('{"domain": "x", "messages": [{"role": "user", "content": [1]}]}', "content of message 0 is list"),
        ('{"domain": "x", "text": "\udcff"}', "utf-8"),
    ],
)
def test_a_bad_line_is_named_with_what_was_found(tmp_path, line, found):
    path = tmp_path / "bad.jsonl"
    good = '{"domain": "x", "text": "fine", "id": 7}'
    path.write_bytes(f"{good}\n\n{line}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=r"bad\.jsonl, line 3: ") as caught:
        read_records(str(path), "calibration")
    assert found in str(caught.value)
    assert '{"domain": …, "text": …}' in str(caught.value)


def test_missing_and_empty_files_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_records(str(tmp_path / "none.jsonl"), "calibration")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UsageError, match="has no records"):
        read_records(str(tmp_path / "empty.jsonl"), "calibration")


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "w.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"domain": "x", "text": "a"}\r\n{"domain": "x", "text": "b"}\r\n')
    assert [record.text for record in read_records(str(path), "calibration")] == ["a", "b"]


def test_conversations_go_through_the_template_without_extra_bos():
    rendered = render_record(ChatTokenizer(), CONVERSATION)
    text = ByteTokenizer().decode(rendered.tokens)
    assert rendered.form == "template"
    assert BOS not in rendered.tokens
    assert "<system>You know the weather.</>" in text or "<system>You know the weather." in text
    assert '"arguments": {"city": "Oslo"}' in text  # JSON text was parsed, as templates expect


@pytest.mark.parametrize(
    ("tokenizer", "form"),
    [
        (ChatTokenizer(drops_tools=True), "tools_as_text"),
        (ChatTokenizer(refuses=("tool",)), "tools_as_text"),
        (ChatTokenizer(refuses=("tool", "system")), "system_in_user"),
        (ChatTokenizer(refuses=("user",)), "plain"),
        (ByteTokenizer(), "plain"),
    ],
)
def test_what_a_template_does_not_take_is_written_as_text_and_nothing_is_lost(tokenizer, form):
    rendered = render_record(tokenizer, CONVERSATION)
    text = ByteTokenizer().decode(rendered.tokens)
    assert rendered.form == form
    for part in (
        "You know the weather.",
        "Rain in Oslo?",
        "drizzle until noon",
        "Yes, until noon.",
        "forecast",
    ):
        assert part in text
    assert '"arguments":{"city":"Oslo"}' in text
    assert (rendered.tokens[0] == BOS) == (form == "plain")


def test_fallbacks_are_reported_per_domain(tmp_path):
    path = write_jsonl(
        tmp_path / "c.jsonl",
        {"domain": "talk", "messages": [{"role": "user", "content": "x" * 90}]},
        {"domain": "prose", "text": "y" * 90},
    )
    windows = load_windows(ByteTokenizer(), source=path, num_tokens=128, window=64)
    assert windows.info.notes == (
        "talk: 1 of 1 records: no usable chat template: written as plain 'Role: content' paragraphs",
    )


def test_record_hash_is_stable_over_versions():
    assert hash_records([Record(domain="d", text="t")]) == hash_records([Record(text="t", domain="d")])
    assert hash_records([Record(domain="d", text="t")]) == (
        "efba7bcfae65a2bc73e5a458ad786e3296171beb433a85887b66ff40e0d4bf5e"
    )
