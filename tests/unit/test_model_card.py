"""The model card: front matter that YAML reads, licence from the base, text that Markdown keeps."""

from pathlib import Path

import pytest
import yaml
from msgspec.structs import replace
from support_tables import make_metadata, make_score, make_table

from mlx_optiq_ext.convert.card import card_facts, has_chat_template
from mlx_optiq_ext.convert.describe import command_line
from mlx_optiq_ext.hub.card import CardFacts, License, license_of_card, render_card
from mlx_optiq_ext.types.metadata import MeasuredDivergence
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.options import AllocateOptions, ConvertOptions
from mlx_optiq_ext.types.report import TextTable


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize(
    "license_",
    [
        License(),
        License(id="mit"),
        License(id="other", name="gemma: terms", link="https://example.org/x#y"),
        License(id="no", name="yes", link="1.0"),
        License(id="llama3.2", name='it\'s "quoted"', link="LICENSE.md"),
    ],
)
@pytest.mark.parametrize("base", ["owner/name", "1234/5.6", "folder-name"])
def test_front_matter_is_yaml_of_the_same_values(license_: License, base: str) -> None:
    found = front_matter(render_card(CardFacts(name="n", base_model=base, license=license_)))
    expected = {
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "quantized", "mixed-precision"],
    }
    if "/" in base:
        expected |= {"base_model": base, "base_model_relation": "quantized"}
    for key, value in (
        ("license", license_.id),
        ("license_name", license_.name),
        ("license_link", license_.link),
    ):
        if value:
            expected[key] = value
    assert found == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\nhello", License(id="apache-2.0")),
        ("---\r\nlicense: 'mit'  # why\r\n---\r\n", License(id="mit")),
        (
            "---\ntags:\n- a\nlicense: other\nlicense_name: x y\nlicense_link: https://a.b/c\n---\n",
            License(id="other", name="x y", link="https://a.b/c"),
        ),
        ("---\nlicense:\n- mit\n- bsd\n---\n", License()),
        ("---\nlicense: [mit, bsd]\n---\n", License()),
        ("license: mit\n", License()),
        ("text\n---\nlicense: mit\n---\n", License()),
        ("", License()),
    ],
)
def test_licence_is_read_from_the_front_matter_only(text: str, expected: License) -> None:
    assert license_of_card(text) == expected


def test_tables_escape_pipes_and_mark_the_row() -> None:
    table = TextTable(title="T", columns=("a|b", "n"), rows=(("x_y", "1"), ("z", "")), highlight=0)
    card = render_card(CardFacts(name="n", base_model="b", comparison=table))
    assert "| a\\|b | n |\n| :--- | ---: |\n| **x\\_y** | **1** |\n| z |  |" in card


def test_facts_come_from_the_conversion(tmp_path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    table, score = make_table(blocks=2), make_score()
    metadata = make_metadata(
        table,
        measured=MeasuredDivergence(
            divergence=0.135, stderr=0.005, half_width=0.0098, held_out=score.held_out
        ),
        command="optiq convert example/base-135m --target-bpw 5.0 -o out",
    )
    license_ = license_of_card((tmp_path / "README.md").read_text())
    card = render_card(card_facts("me/out", metadata, license=license_, table=table, score=score))
    assert front_matter(card)["license"] == "apache-2.0"
    assert front_matter(card)["base_model"] == "example/base-135m"
    for text in (
        "https://huggingface.co/example/base-135m",
        "measured KL: 0.135 ± 0.011 nats/token on 2048 held-out tokens",
        metadata.command,
        "ab" * 32,
        "cd" * 32,
        "mlx_lm.server --model me/out",
        "| **this model** | **4.997** |",
    ):
        assert text in card
    metadata = replace(metadata, base_model=str(tmp_path), base_revision="")
    local = render_card(card_facts("out", metadata))
    assert str(tmp_path) not in local
    assert "base_model" not in front_matter(local)
    assert "measured KL: 0.1350 ± 0.0098 nats/token on 2048 held-out tokens" in local


def test_chat_templates_are_found_in_either_place(tmp_path) -> None:
    assert not has_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    assert has_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_text("x")
    assert has_chat_template(tmp_path)


def test_the_command_names_folders_as_they_were_given_and_is_quoted() -> None:
    ref = ModelRef(path="/somewhere/my models/base", source="../my models/base")
    options = ConvertOptions(allocate=AllocateOptions(target_bpw=5.0, pin=("*.q_proj=8",)))
    assert command_line(ref, options, Path("made here/out")) == (
        "optiq convert '../my models/base' --target-bpw 5.0 --pin '*.q_proj=8' -o 'made here/out'"
    )


def test_the_card_says_where_imported_weights_come_from() -> None:
    table = make_table(blocks=2)
    origin = "imported from a Q4_1 GGUF file: its weights lie on a 4-bit grid already"
    table = replace(table, model=replace(table.model, origin=origin))
    metadata = make_metadata(table, base_model="base", base_revision="")
    score = replace(make_score(), notes=(f"reference {origin}",))
    card = render_card(card_facts("out", metadata, table=table, score=score)).replace("\\", "")
    assert card.count(origin) == 1
    assert f"- reference weights: {origin}" in card
