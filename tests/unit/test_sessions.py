"""Long windows: cut from all domains in turn, spread over the text, and named where the text is too short."""

import json
from pathlib import Path

import numpy as np
import pytest
from support_models import byte_tokenizer

from mlx_optiq_ext.measure.sessions import load_sessions


@pytest.fixture
def text(tmp_path: Path) -> str:
    """Two domains, one behind the other in the file: 3 documents of 40 letters each."""
    lines = [json.dumps({"domain": domain, "text": domain * 40}) for domain in "aaabbb"]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


def test_domains_take_turns(text: str) -> None:
    sessions = load_sessions(byte_tokenizer(), (240,), num_tokens=1, source=text, split="held_out")
    (window,) = sessions.windows[240]
    documents = window.reshape(6, 40)
    assert [byte_tokenizer().decode(row[:1]) for row in documents] == list("ababab")
    assert sessions.info.domains == ("a", "b")


def test_windows_are_as_many_as_the_tokens_ask_for_and_the_text_has(text: str) -> None:
    for num_tokens, least, count in ((120, 1, 2), (10, 1, 1), (10, 3, 3), (10_000, 1, 4), (10, 9, 7)):
        sessions = load_sessions(
            byte_tokenizer(), (60,), num_tokens=num_tokens, source=text, split="held_out", least=least
        )
        assert sessions.windows[60].shape == (count, 60)
        assert sessions.info.num_tokens == 60 * count


def test_the_least_number_of_windows_overlaps_in_first_halves_only(text: str) -> None:
    sessions = load_sessions(byte_tokenizer(), (100,), num_tokens=1, source=text, split="held_out", least=9)
    # 240 tokens: ends of 50 tokens apart leave room for starts at 0, 70 and 140.
    assert sessions.windows[100].shape == (3, 100)
    many = load_sessions(byte_tokenizer(), (100,), num_tokens=900, source=text, split="held_out")
    assert many.windows[100].shape == (2, 100)


def test_few_windows_reach_from_the_first_token_to_the_last(text: str) -> None:
    whole = load_sessions(byte_tokenizer(), (240,), num_tokens=1, source=text, split="held_out").windows[240][
        0
    ]
    first, last = load_sessions(
        byte_tokenizer(), (50,), num_tokens=100, source=text, split="held_out"
    ).windows[50]
    np.testing.assert_array_equal(first, whole[:50])
    np.testing.assert_array_equal(last, whole[-50:])


@pytest.mark.parametrize(("split", "flag"), [("calibration", "--calibration"), ("held_out", "--held-out")])
def test_lengths_that_the_text_does_not_reach_are_named(text: str, split: str, flag: str) -> None:
    sessions = load_sessions(byte_tokenizer(), (60, 241, 999), num_tokens=60, source=text, split=split)  # type: ignore[arg-type]
    assert list(sessions.windows) == [60]
    (note,) = sessions.info.notes
    assert "has 240 tokens: no prefix of 241, 999" in note
    assert note.endswith(flag)
