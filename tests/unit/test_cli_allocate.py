"""optiq allocate: what it prints, writes and refuses."""

import json

import pytest
from msgspec.structs import replace
from support_tables import MOE, make_score, make_table

from mlx_optiq_ext.cli.main import main
from mlx_optiq_ext.formats.allocation import read_allocation
from mlx_optiq_ext.formats.score import encode_score
from mlx_optiq_ext.formats.sensitivity import write_sensitivity

LLAMA = {"num_hidden_layers": 4, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}


@pytest.fixture
def table_file(tmp_path):
    file = tmp_path / "table.json"
    write_sensitivity(file, make_table(blocks=4, modules=MOE))
    return str(file)


def test_text_shows_choices_prediction_comparison_and_pins(table_file, capsys) -> None:
    assert main(["allocate", table_file, "--target-bpw", "5", "--pin", "*.0.*.q_proj=8"]) == 0
    out = capsys.readouterr().out
    assert "choice" in out.splitlines()[0]
    assert "8g64" in out
    assert "bits per weight of at most 5.000" in out
    assert "nats per token" in out
    assert "worst domain math" in out
    assert "all predicted with fast rounding (stock mlx-lm rounds plainly" in out
    assert "× this, predicted" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("uniform ")]
    assert rows[0][:4] == ["uniform", "2g64,", "fast", "rounding"]
    assert [float(row[4]) for row in rows] == sorted(float(row[4]) for row in rows)
    assert "±" not in out
    assert "--pin *.0.*.q_proj=8g64" in out
    assert "router" in out


def test_json_is_one_document_and_equals_the_file(table_file, tmp_path, capsys) -> None:
    file = tmp_path / "map.json"
    assert main(["allocate", table_file, "--target-bpw", "4.5", "--json", "-o", str(file)]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads(file.read_text())
    assert str(file) in captured.err
    assert read_allocation(file).achieved_bpw <= 4.5


def test_fit_reads_the_named_config(table_file, tmp_path, capsys) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA))
    words = ["allocate", table_file, "--fit", "330MB", "--config", str(config), "--json"]
    assert main(words) == 0
    # 330 MB less 256 MB head room and 4 · 768 bytes · 8192 tokens of KV cache.
    left = 330e6 - 256e6 - 4 * 768 * 8192
    nbytes = json.loads(capsys.readouterr().out)["nbytes"]
    assert 0.99 * left < nbytes < left


def test_fit_is_broken_down_and_one_pin_is_one_tensor(table_file, tmp_path, capsys) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA))
    words = ["--fit", "330MB", "--config", str(config), "--pin", "model.embed_tokens=8"]
    assert main(["allocate", table_file, *words[:4]]) == 0
    out = capsys.readouterr().out
    assert "--fit 330MB: " in out
    assert "for weights after 25.2 MB KV cache at 8192 tokens and 256.0 MB head room" in out
    write_sensitivity(tmp_path / "dense.json", make_table(blocks=4))
    assert main(["allocate", str(tmp_path / "dense.json"), "--target-bpw", "8", *words[4:]]) == 0
    assert "pinned: 1 tensor, " in capsys.readouterr().out


def test_measured_scores_of_the_folder_are_shown_apart(tmp_path, capsys) -> None:
    file = tmp_path / "optiq" / "sensitivity.json"
    file.parent.mkdir()
    write_sensitivity(file, make_table(blocks=4))
    (tmp_path / "optiq" / "score.json").write_bytes(encode_score(make_score()))
    for source in (tmp_path, file):
        assert main(["allocate", str(source), "--target-bpw", "5"]) == 0
        measured = capsys.readouterr().out.split("measured on held-out text")[1]
        assert "uniform 4g64, plain rounding" in measured
        assert "0.720 ± 0.056" in measured


def test_a_table_by_shape_predicts_nothing(tmp_path, capsys) -> None:
    write_sensitivity(tmp_path / "t.json", replace(make_table(blocks=4), method="static"))
    assert main(["allocate", str(tmp_path / "t.json"), "--target-bpw", "5"]) == 0
    out = capsys.readouterr().out
    assert "no prediction: the static method" in out
    assert "predicted KL" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give exactly one of --target-bpw"),
        (["--target-bpw", "2.0"], "below the cheapest allocation"),
        (["--target-bpw", "5", "--pin", "nothing=4"], "matches no path"),
        (["--fit", "8GB"], "name it with --config"),
        (["--target-size", "much"], "is not a size"),
    ],
)
def test_what_cannot_be_done_is_said_with_exit_code_2(table_file, capsys, words, message) -> None:
    assert main(["allocate", table_file, *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_missing_table_is_said(tmp_path, capsys) -> None:
    assert main(["allocate", str(tmp_path / "none.json"), "--target-bpw", "5"]) == 2
    assert "cannot read sensitivity file" in capsys.readouterr().err
