"""The text in the wheel: every domain, enough of it, splits that share nothing, a licence on every record."""

import re
from collections import Counter

import pytest

from mlx_optiq_ext.measure.records import read_records

DOMAINS = ("prose", "technical", "code", "math", "multilingual", "chat", "tool_calls", "long_document")


def parts_of(record):
    parts = [record.text or ""]
    for message in record.messages or ():
        parts.append(message.get("content") or "")
        parts.extend(str(call["function"]) for call in message.get("tool_calls", ()))
    parts.extend(str(tool) for tool in record.tools or ())
    return parts


def words_of(record):
    # Scripts without spaces are split into characters, so that an overlap is seen there too.
    return re.findall(r"[぀-ヿ一-鿿]|\w+", "\n".join(parts_of(record)).lower())


def grams(record, length=8):
    words = words_of(record)
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


@pytest.fixture(scope="module")
def splits():
    return {split: read_records(None, split) for split in ("calibration", "held_out")}


@pytest.mark.parametrize("split", ["calibration", "held_out"])
def test_every_domain_is_there_in_order_with_source_and_licence(splits, split):
    records = splits[split]
    assert tuple(dict.fromkeys(record.domain for record in records)) == DOMAINS
    assert all(record.source and record.licence for record in records)


@pytest.mark.parametrize(("split", "least"), [("calibration", 7000), ("held_out", 5000)])
def test_every_domain_has_enough_text(splits, split, least):
    # About 3.5 to 4.5 bytes of English are one token of a 50k vocabulary, fewer of code and other scripts.
    nbytes = Counter()
    for record in splits[split]:
        nbytes[record.domain] += len(" ".join(parts_of(record)).encode())
    assert {domain: n for domain, n in nbytes.items() if n < least} == {}


def test_the_splits_share_no_eight_words(splits):
    seen = set().union(*(grams(record) for record in splits["calibration"]))
    shared = set().union(*(grams(record) & seen for record in splits["held_out"]))
    assert shared == set()


@pytest.mark.parametrize("split", ["calibration", "held_out"])
def test_the_text_does_not_repeat_itself(splits, split):
    counts = Counter(gram for record in splits[split] for gram in grams(record))
    repeated = sum(1 for count in counts.values() if count > 1)
    assert repeated / len(counts) < 0.002


def test_tool_conversations_are_well_formed(splits):
    for record in [r for records in splits.values() for r in records if r.domain == "tool_calls"]:
        offered = {tool["function"]["name"] for tool in record.tools}
        open_calls = []
        for message in record.messages:
            if message["role"] == "tool":
                assert open_calls.pop(0) == message["tool_call_id"]
                continue
            assert not open_calls
            for call in message.get("tool_calls", ()):
                assert call["function"]["name"] in offered
                assert re.fullmatch(r"[A-Za-z0-9]{9}", call["id"])  # the strictest templates' form
                open_calls.append(call["id"])
        assert record.messages[-1]["role"] == "assistant"
