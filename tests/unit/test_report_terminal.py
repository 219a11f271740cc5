"""Pictures in the terminal: widths, colours, and what is shown where parts are absent."""

import re

import pytest
from msgspec.structs import replace
from support_tables import MOE, make_allocation, make_score, make_table

from mlx_optiq_ext.quant.report import build_report
from mlx_optiq_ext.types.report import Curve, CurvePoint, HeatMap, TextTable
from mlx_optiq_tui.ansi import Style, detect_colors, paint
from mlx_optiq_tui.curve import draw_curve
from mlx_optiq_tui.heat_map import draw_bits_map, draw_sensitivity_map
from mlx_optiq_tui.report import draw_report
from mlx_optiq_tui.table import draw_table

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def heat() -> HeatMap:
    table = make_table(blocks=80, modules=MOE)
    made = build_report("m", table=table, allocation=make_allocation(table)).heat_map
    assert made is not None
    return made


@pytest.mark.parametrize("blocks", [1, 2, 16, 30, 61, 126, 200])
@pytest.mark.parametrize("colors", ["none", "256", "truecolor"])
@pytest.mark.parametrize("width", [60, 80, 132])
def test_no_line_is_wider_than_the_terminal(blocks: int, colors: str, width: int) -> None:
    table = make_table(blocks=blocks)
    report = build_report("m", table=table, allocation=make_allocation(table), score=make_score())
    text = draw_report(report, Style(colors=colors, width=width))  # type: ignore[arg-type]
    assert max(len(ESCAPE.sub("", line)) for line in text.splitlines()) <= width


def test_every_module_of_every_block_is_drawn_once(heat: HeatMap) -> None:
    drawn = draw_bits_map(heat, Style())
    rows = [line for line in drawn.splitlines() if line.startswith("experts.down_proj ")]
    expected = [
        str(cell.bits) for cell in heat.cells if heat.modules[cell.row].endswith("switch_mlp.down_proj")
    ]
    assert "".join(row.removeprefix("experts.down_proj").strip() for row in rows) == "".join(expected)
    assert len(expected) == 80


def test_block_numbers_stand_over_their_columns() -> None:
    table = make_table(blocks=30)
    made = build_report("m", table=table, allocation=make_allocation(table)).heat_map
    assert made is not None
    header, first = draw_bits_map(made, Style()).splitlines()[1:3]
    columns = [header.index(str(block)) + len(str(block)) - 1 for block in (0, 10, 15, 25)]
    digits = [str(next(c.bits for c in made.cells if c.row == 0 and c.block == b)) for b in (0, 10, 15, 25)]
    assert [first[column] for column in columns] == digits


def test_without_colours_there_are_no_escapes_and_shades_carry_the_values(heat: HeatMap) -> None:
    drawn = draw_sensitivity_map(heat, Style())
    assert "\x1b" not in drawn
    assert {"·", "░", "▒", "▓", "█"} <= set(drawn)


def test_nothing_measured_and_nothing_chosen_draw_nothing(heat: HeatMap) -> None:
    bare = replace(heat, cells=tuple(replace(c, bits=None, sensitivity=None) for c in heat.cells), outside=())
    assert draw_bits_map(bare, Style()) == ""
    assert draw_sensitivity_map(bare, Style()) == ""
    assert draw_curve(Curve(), Style()) == ""


def test_a_single_point_can_be_drawn() -> None:
    drawn = draw_curve(Curve(chosen=CurvePoint(label="chosen", bpw=5.0, divergence=0.1)), Style())
    assert "● chosen" in drawn
    assert "stored bits per weight" in drawn


def test_wide_tables_break_cells_before_the_interval() -> None:
    table = TextTable(
        title="T",
        columns=("model", "KL, nats/token"),
        rows=(("a-long-model-name-in-a-row", "0.1350 ± 0.0110"),),
        highlight=0,
    )
    lines = draw_table(table, Style(width=40)).splitlines()
    assert lines[-2].endswith(" 0.1350")
    assert lines[-1].endswith(" ± 0.0110")
    assert draw_table(table, Style(width=60)).splitlines()[-1].endswith("0.1350 ± 0.0110")


@pytest.mark.parametrize("width", [80, 100])
def test_long_names_go_on_in_the_next_line_and_nothing_is_cut(width: int) -> None:
    name = "SmolLM2-135M-Instruct-optiq-5.0bpw"
    score = make_score()
    rows = tuple(replace(row, label=name) if row.role == "candidate" else row for row in score.rows)
    report = build_report("m", score=replace(score, rows=rows))
    for table in (report.comparison, report.domains):
        assert table is not None
        drawn = draw_table(table, Style(width=width))
        assert "…" not in drawn
        assert "5.0bpw" in drawn
        assert max(map(len, drawn.splitlines())) <= width


def test_long_paths_outside_of_blocks_are_whole_at_100_columns(heat: HeatMap) -> None:
    path = "language_model.model.embed_tokens"
    long = replace(heat, outside=(replace(heat.outside[0], path=path),))
    drawn = draw_bits_map(long, Style(width=100))
    assert path in drawn
    assert max(map(len, drawn.splitlines())) <= 100


@pytest.mark.parametrize(
    ("environ", "is_terminal", "expected"),
    [
        ({"TERM": "xterm-256color"}, True, "256"),
        ({"TERM": "xterm", "COLORTERM": "truecolor"}, True, "truecolor"),
        ({"TERM": "xterm", "COLORTERM": "24bit"}, False, "none"),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, True, "none"),
        ({"TERM": "xterm", "COLORTERM": "truecolor", "NO_COLOR": "1"}, True, "none"),
        ({"TERM": "xterm", "NO_COLOR": ""}, True, "256"),
        ({"FORCE_COLOR": "3"}, False, "truecolor"),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, "none"),
        ({}, True, "none"),
    ],
)
def test_colours_follow_the_environment(environ: dict[str, str], is_terminal: bool, expected: str) -> None:
    assert detect_colors(environ, is_terminal=is_terminal) == expected


@pytest.mark.parametrize(
    ("color", "index"),
    [("#000000", 16), ("#ffffff", 231), ("#ff0000", 196), ("#808080", 244), ("#2a788e", 30)],
)
def test_256_colours_are_the_nearest(color: str, index: int) -> None:
    assert paint("x", Style(colors="256"), ink=color) == f"\x1b[38;5;{index}mx\x1b[0m"
