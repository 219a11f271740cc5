"""Data sets: forms, splits, and what is said of broken rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.examples import Completion, Conversation, PlainText, parse_preference, parse_sft
from mlx_optiq_ext.hub.dataset import split_files
from mlx_optiq_ext.lora import dataset as dataset_module
from mlx_optiq_ext.lora.dataset import load_dataset

USER = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "Good day"}
OTHER = {"role": "assistant", "content": "What?"}


def _write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return file


def test_every_form_of_imitation_is_read(tmp_path) -> None:
    rows = [
        {"messages": [USER, ANSWER], "id": 7},
        {"messages": [USER, ANSWER], "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"prompt": "2 + 2 =", "completion": " 4"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"text": "A document.", "messages": None},
    ]
    file = _write(tmp_path / "data.jsonl", rows)
    found = load_dataset(str(file), "sft", validation_share=0.0)
    kinds = [type(example) for example in found.train]
    assert kinds == [Conversation, Conversation, Completion, Conversation, PlainText]
    assert found.train[1].tools[0]["function"]["name"] == "f"
    assert found.train[3].messages == (USER, ANSWER)
    assert found.train[4].where == "data.jsonl, line 5"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hello", "chosen": "Good day", "rejected": "What?"},
        {"prompt": "Hello", "chosen": [ANSWER], "rejected": [OTHER]},
        {"prompt": [USER], "chosen": "Good day", "rejected": "What?"},
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": "Hello", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    ],
)
def test_every_form_of_a_pair_is_read(row) -> None:
    pair = parse_preference(row, "x")
    if isinstance(row.get("prompt"), str) and isinstance(row["chosen"], str):
        assert pair.chosen == Completion(where="x", prompt="Hello", completion="Good day")
        assert pair.rejected.completion == "What?"
    else:
        assert pair.chosen.messages == (USER, ANSWER)
        assert pair.rejected.messages == (USER, OTHER)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ([], "a JSON list, not an object"),
        ({}, "none of the known forms (it has no columns)"),
        ({"question": "?"}, "none of the known forms (it has question)"),
        ({"text": " "}, "text is empty"),
        ({"messages": []}, "messages is empty, not a list of messages"),
        ({"messages": [USER]}, "no message is the assistant's: there is nothing to learn"),
        ({"messages": [ANSWER]}, "there is nothing that it answers"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0] has role 'bot'"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "neither content nor tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "only text can be learnt"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{}]}]}, "a call of messages[1] has no function name"),
        ({"messages": [USER, ANSWER], "tools": [{"type": "function"}]}, "tools is not a list of"),
        ({"prompt": "x", "completion": 3}, "completion is a int, not a list of messages"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(row, problem) -> None:
    found = parse_sft(row, "x")
    assert isinstance(found, str)
    assert problem in found


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "x", "chosen": "y"}, "no rejected"),
        ({"chosen": "y", "rejected": "z"}, "no prompt"),
        ({"prompt": "x", "chosen": "y", "rejected": "y"}, "chosen and rejected are the same"),
        (
            {"chosen": [USER, ANSWER], "rejected": [{**USER, "content": "Hi"}, OTHER]},
            "differ before their last message",
        ),
    ],
)
def test_what_is_wrong_with_a_pair_is_said(row, problem) -> None:
    found = parse_preference(row, "x")
    assert isinstance(found, str)
    assert problem in found


def test_all_broken_lines_are_said_at_once_with_their_numbers(tmp_path) -> None:
    good = {"messages": [USER, ANSWER]}
    file = _write(tmp_path / "data.jsonl", [good, "{broken", good, {"text": 3}, *([{}] * 12)])
    with pytest.raises(UsageError) as caught:
        load_dataset(str(file), "sft")
    lines = str(caught.value).splitlines()
    assert "14 unusable rows" in lines[0]
    assert '{"messages": […]' in lines[0]
    assert lines[1].strip().startswith("data.jsonl, line 2: not JSON")
    assert lines[2].strip() == "data.jsonl, line 4: text is a int, not text"
    assert len(lines) == 12
    assert lines[-1].strip() == "… and 4 more"


def test_folder_gives_its_splits(tmp_path) -> None:
    _write(tmp_path / "train.jsonl", [{"text": "a"}, {"text": "b"}])
    _write(tmp_path / "validation.jsonl", [{"text": "b"}])
    _write(tmp_path / "test.jsonl", [{"text": "c"}])
    found = load_dataset(str(tmp_path), "sft")
    assert [len(found.train), len(found.valid), len(found.test)] == [2, 1, 1]
    assert found.notes == ("1 of 1 validation examples are in the training data too",)


def test_split_by_seed_keeps_equal_examples_together(tmp_path) -> None:
    file = _write(tmp_path / "data.jsonl", [{"text": f"text {index // 2}"} for index in range(40)])
    splits = [load_dataset(str(file), "sft", validation_share=0.2, seed=seed) for seed in (1, 1, 2)]
    held = [{example.text for example in split.valid} for split in splits]
    assert held[0] == held[1] != held[2]
    assert splits[0].sha256 == splits[1].sha256 != splits[2].sha256
    for split, texts in zip(splits, held, strict=True):
        assert len(split.valid) == 8
        assert not texts & {example.text for example in split.train}


def test_missing_sources_say_what_would_work(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"has no train\.jsonl"):
        load_dataset(str(tmp_path), "sft")
    with pytest.raises(UsageError, match="no such file or folder"):
        load_dataset(str(tmp_path / "gone.jsonl"), "sft")
    empty = _write(tmp_path / "empty.jsonl", [])
    with pytest.raises(UsageError, match="no training examples"):
        load_dataset(str(empty), "sft")


def test_hub_data_set_brings_files_or_rows(tmp_path, monkeypatch) -> None:
    file = _write(tmp_path / "train.jsonl", [{"text": "a"}])
    parts = {"train": [file, [("organisation/name, train row 1", {"text": "b"})]]}
    monkeypatch.setattr(dataset_module, "fetch_dataset", lambda repo_id, names: parts)
    found = load_dataset("organisation/name", "sft", validation_share=0.0)
    assert [example.text for example in found.train] == ["a", "b"]
    assert found.train[1].where == "organisation/name, train row 1"


def test_files_of_a_repository_are_known_by_name() -> None:
    names = {"train": ("train",), "valid": ("valid", "validation"), "test": ("test",)}
    files = ["README.md", "data/train-00001.jsonl", "data/train-00000.jsonl", "validation/part.jsonl"]
    found = split_files([*files, "retrained.jsonl", "test.parquet"], names)
    assert found == {
        "train": ["data/train-00000.jsonl", "data/train-00001.jsonl"],
        "valid": ["validation/part.jsonl"],
    }
