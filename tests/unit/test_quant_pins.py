"""Pins: what is read, what matches, what is refused."""

import pytest
from support_allocation import choices, linear

from mlx_optiq_ext.allocate.pins import PinRule, edge_pins, match_pins, parse_pin
from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.types.quant import KEEP, Choice

OFFERED = choices("4", "8")
UNITS = [
    linear("model.embed_tokens", OFFERED, kind="embedding"),
    *(
        linear(f"model.layers.{i}.self_attn.{p}", OFFERED, block=i)
        for i in range(3)
        for p in ("q_proj", "k_proj")
    ),
    linear(
        "model.layers.1.mlp.gate",
        OFFERED,
        block=1,
        paths=("model.layers.1.mlp.gate", "model.layers.2.mlp.up"),
    ),
    linear("lm_head", OFFERED, columns=96, kind="head"),
]


@pytest.mark.parametrize(
    ("text", "pattern", "choice"),
    [
        ("lm_head=8", "lm_head", Choice(bits=8, group_size=64)),
        (" *.q_proj = 4g32", "*.q_proj", Choice(bits=4, group_size=32)),
        ("model.layers.[01].*=keep", "model.layers.[01].*", KEEP),
        ("a=b=mxfp4", "a=b", Choice.parse("mxfp4")),
    ],
)
def test_pin_is_read(text, pattern, choice) -> None:
    assert parse_pin(text) == PinRule(pattern=pattern, choice=choice)


@pytest.mark.parametrize(
    ("text", "message"),
    [("lm_head", "not PATTERN=CHOICE"), ("=8", "not PATTERN=CHOICE"), ("lm_head=7", "'7' is not a choice")],
)
def test_malformed_pin_is_refused_with_its_text(text, message) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_pin(text)
    assert repr(text) in str(caught.value)


def test_glob_covers_whole_paths_and_crosses_dots() -> None:
    forced = match_pins([parse_pin("*.q_proj=8")], UNITS)
    assert sorted(forced) == [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    assert forced["model.layers.0.self_attn.q_proj"].reason == "--pin *.q_proj=8g64"


def test_any_path_of_a_fused_unit_moves_the_unit() -> None:
    assert list(match_pins([parse_pin("*.mlp.up=8")], UNITS)) == ["model.layers.1.mlp.gate"]


def test_later_pin_wins() -> None:
    forced = match_pins([parse_pin("model.layers.*=4"), parse_pin("*.0.*=8")], UNITS)
    assert forced["model.layers.0.self_attn.k_proj"].choice.bits == 8
    assert forced["model.layers.2.self_attn.k_proj"].choice.bits == 4


def test_pattern_without_match_names_near_paths() -> None:
    with pytest.raises(UsageError, match="matches no path") as caught:
        match_pins([parse_pin("layers.0.q_prj=8")], UNITS)
    assert "model.layers.0.self_attn.q_proj" in str(caught.value)
    assert "'*q_proj'" in str(caught.value)


def test_choice_that_does_not_fit_the_shape_is_refused() -> None:
    with pytest.raises(UsageError, match="lm_head has 96 weights per row, not a multiple of 64"):
        match_pins([parse_pin("lm_head=8")], UNITS)
    assert match_pins([parse_pin("lm_head=8g32")], UNITS)["lm_head"].choice.group_size == 32


def test_edges_are_embedding_head_first_and_last_block() -> None:
    widest = [Choice.parse("8")] * len(UNITS)
    forced = edge_pins(UNITS, widest)
    assert {pin.reason for pin in forced.values()} == {
        *("--protect edges: embedding", "--protect edges: head"),
        *("--protect edges: first block", "--protect edges: last block"),
    }
    assert "model.layers.1.self_attn.q_proj" not in forced
