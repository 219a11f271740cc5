"""What the fine-tune screen knows without a screen: rows, imports, splits, the course of a training."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_integrations.command import CommandProgress
from mlx_optiq_tui.finetune.course import Course
from mlx_optiq_tui.finetune.imports import import_rows
from mlx_optiq_tui.finetune.plan import plan_text, samples_text, train_words
from mlx_optiq_tui.finetune.recorded import recorded_training
from mlx_optiq_tui.finetune.rows import (
    FORMS_OF,
    Checks,
    Form,
    Method,
    fields_of,
    form_of,
    row_of_fields,
    row_words,
    template,
)
from mlx_optiq_tui.finetune.splits import save_split, split_rows
from mlx_optiq_tui.finetune.turns import text_of_turns, turns_of_text

CALLING = {
    "messages": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": "{}"}}]},
    ]
}


def rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {index}?", "completion": f"It is {index}."} for index in range(count)]


@pytest.mark.parametrize(("method", "form"), [(m, form) for m, forms in FORMS_OF.items() for form in forms])
def test_every_template_is_usable_and_survives_editing(method: Method, form: Form) -> None:
    row = template(form)
    assert Checks().problems([row], method) == {}
    assert form_of(row) == form
    assert row_of_fields(form, fields_of(row)) == row
    assert "Eiffel" in row_words(row)


def test_a_row_that_fields_cannot_say_is_edited_as_json() -> None:
    assert form_of(CALLING) == "json"
    assert row_of_fields("json", fields_of(CALLING)) == CALLING
    heading = {"messages": [{"role": "user", "content": "## user\nis a heading"}]}
    assert form_of(heading) == "json"
    with pytest.raises(UsageError, match="not a JSON object"):
        row_of_fields("json", {"row": "[1]"})


def test_a_conversation_is_text_with_headings_and_back() -> None:
    turns = template("chat")["messages"]
    assert turns_of_text(text_of_turns(turns)) == turns
    assert turns_of_text("# User:\nHi\n\n### ASSISTANT\nHello\n\nthere") == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello\n\nthere"},
    ]
    assert turns_of_text("no heading at all") == []
    with pytest.raises(UsageError, match="no heading names a role"):
        row_of_fields("chat", {"messages": "Hi"})


def test_what_is_wrong_is_said_by_line() -> None:
    good = rows(1)[0]
    bad = {"messages": [{"role": "user", "content": "Hi"}]}
    assert Checks().problems([good, bad, {}, good], "sft") == {
        1: "no message is the assistant's: there is nothing to learn",
        2: "none of the known forms (it has no columns)",
        3: "repeats row 1",
    }
    assert Checks().problems([good], "dpo") == {0: "no chosen and no rejected"}


def test_files_are_imported_with_the_lines_that_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n[1]\nnot json\n')
    found = import_rows(tmp_path / "a.jsonl")
    assert found.rows == ({"text": "one"},)
    assert found.problems[0] == "a.jsonl, line 3: not an object"
    assert found.problems[1].startswith("a.jsonl, line 4: not JSON")


def test_columns_of_tables_are_taken_by_what_they_are_often_called(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('Question,Answer,id\n"Where, then?","Here\nand there",7\n,,\n')
    found = import_rows(tmp_path / "a.csv").rows
    assert found[0] == {"prompt": "Where, then?", "completion": "Here\nand there", "id": "7"}
    (tmp_path / "b.tsv").write_text("instruction\tinput\toutput\nAdd\t1 2\t3\n")
    assert import_rows(tmp_path / "b.tsv").rows == ({"prompt": "Add", "input": "1 2", "completion": "3"},)
    (tmp_path / "c.csv").write_text('messages\n"[{""role"": ""user"", ""content"": ""Hi""}]"\n[broken\n')
    found_chat = import_rows(tmp_path / "c.csv")
    assert found_chat.rows == ({"messages": [{"role": "user", "content": "Hi"}]},)
    assert found_chat.problems[0].startswith("c.csv, line 3: messages and tools must be JSON")


def test_markdown_holds_conversations_and_texts_between_dashes(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("## user\nHi\n## assistant\nHello\n\n---\n\n# Towers\nThey stand.\n---\n")
    chat, text = import_rows(tmp_path / "a.md").rows
    assert [turn["role"] for turn in chat["messages"]] == ["user", "assistant"]
    assert text == {"text": "# Towers\nThey stand."}


@pytest.mark.parametrize(
    ("name", "said"), [("a.xlsx", "only JSONL"), ("a.csv", "cannot be read"), ("none", "only JSONL")]
)
def test_files_that_cannot_be_imported_are_refused(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        import_rows(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no train\.jsonl"):
        import_rows(tmp_path / "empty")


def test_rows_are_split_by_seed_and_saved_and_read_again(tmp_path: Path) -> None:
    many = [*rows(20), *rows(2)]
    split = split_rows(many, "sft", valid_share=0.2, test_share=0.1, seed=3)
    assert split == split_rows(many, "sft", valid_share=0.2, test_share=0.1, seed=3)
    assert split != split_rows(many, "sft", valid_share=0.2, test_share=0.1, seed=4)
    assert len(split.train) + len(split.valid) + len(split.test) == 22
    assert (len(split.valid), len(split.test)) in {(4, 2), (5, 2), (4, 3), (5, 3)}
    encoded = [{msgspec.json.encode(row) for row in part} for part in (split.train, split.valid, split.test)]
    assert not encoded[0] & encoded[1]
    assert not (encoded[0] | encoded[1]) & encoded[2]
    save_split(tmp_path / "new" / "data", split)
    assert import_rows(tmp_path / "new" / "data").rows == (*split.train, *split.valid, *split.test)
    whole = split_rows(many, "sft", valid_share=0, test_share=0, seed=3)
    save_split(tmp_path / "new" / "data", whole)
    assert [file.name for file in (tmp_path / "new" / "data").iterdir()] == ["train.jsonl"]


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(UsageError, match="row 2: none of the known forms"):
        split_rows([*rows(1), {}], "sft", valid_share=0.1, test_share=0, seed=0)
    with pytest.raises(UsageError, match="no rows"):
        split_rows([], "sft", valid_share=0.1, test_share=0, seed=0)
    with pytest.raises(UsageError, match="something to train on"):
        split_rows(rows(4), "sft", valid_share=0.6, test_share=0.5, seed=0)


def test_the_course_takes_losses_from_progress() -> None:
    course = Course()
    assert course.words() == "no update yet"
    course.add(CommandProgress(stage="tokenize", done=1, total=2))
    start = {"validation_loss": 3.0, "validation_step": 0}
    course.add(CommandProgress(stage="train", done=0, total=4, values=start))
    course.add(
        CommandProgress(stage="train", done=1, total=4, seconds_left=65, values={**start, "loss": 2.0})
    )
    later = {"loss": 1.0, "validation_loss": 2.5, "validation_step": 2}
    course.add(CommandProgress(stage="train", done=2, total=4, seconds_left=40, values=later))
    assert course.train == {1: 2.0, 2: 1.0}
    assert course.valid == {0: 3.0, 2: 2.5}
    assert course.smooth() == {1: 2.0, 2: 1.5}
    assert course.words().splitlines() == ["update 2 of 4, 40 s left", "loss 1.0000 · validation 2.5000"]


def test_the_recorded_training_is_told_in_words() -> None:
    recorded = recorded_training()
    text = plan_text(recorded.planned, 76).plain
    assert "updates 120" in text
    assert "mlp.down_proj" in text
    shown = samples_text(recorded.planned.preview.samples)
    assert "<|im_start|>user" in shown.plain
    assert any("underline" in str(span.style) for span in shown.spans)


def test_the_command_says_what_was_planned() -> None:
    words = train_words("base", "data", "out", ("--rank", "4"), dry_run=True)
    assert words == ("lora", "train", "base", "--data", "data", "-o", "out", "--rank", "4", "--dry-run")
