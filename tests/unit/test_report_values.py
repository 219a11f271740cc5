"""What a report says: tables, heat map, curve, axes, palette; the score record's file."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from support_tables import MOE, make_allocation, make_score, make_table

from mlx_optiq_ext.allocate.heat_map import build_heat_map, module_role, order_modules, short_names
from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.score import decode_score, encode_score, read_score
from mlx_optiq_ext.quant.picture import Dot, Text
from mlx_optiq_ext.quant.picture_curve import curve_scene
from mlx_optiq_ext.quant.report import (
    bits_table,
    build_report,
    comparison_table,
    domains_table,
    pins_table,
)
from mlx_optiq_ext.types.axis import LinearAxis, LogAxis, tick_text
from mlx_optiq_ext.types.figures import size_text
from mlx_optiq_ext.types.palette import (
    BITS_LEVELS,
    SENSITIVITY_RAMP,
    bits_color,
    ink_on,
    parse_hex,
    ramp_color,
)
from mlx_optiq_ext.types.quant import KEEP, Choice, ProbeCheck, Unit


def test_comparison_shows_intervals_and_marks_this_model() -> None:
    table = comparison_table(make_score())
    assert table.highlight == 1
    assert table.rows[1] == (
        "this model",
        "4.997",
        "84 MB",
        "0.135 ± 0.011",
        "1",
        "87.2 ± 1.2 %",
        "13.50 ± 0.80",
    )
    assert table.rows[2][4] == "5.33 (5.00–5.71)"
    assert table.rows[0][3] == "0"
    assert "2048 held-out tokens" in table.note
    assert "uniform: plain rounding" in table.note


def test_comparison_without_candidates_or_errors_still_has_rows() -> None:
    score = make_score()
    rows = tuple(
        replace(row, divergence_half_width=0.0, against_first=None, by_domain={})
        for row in score.rows
        if row.role != "candidate"
    )
    table = comparison_table(replace(score, rows=rows))
    assert table.highlight is None
    assert table.rows[1][3:5] == ("0.720", "")
    assert domains_table(replace(score, rows=rows)) is None


def test_domains_are_rows_and_models_are_columns() -> None:
    table = domains_table(make_score())
    assert table is not None
    assert table.columns == ("domain", "this model", "uniform 4g64", "uniform 5g64", "uniform 6g64")
    assert table.rows[2] == ("math", "0.189", "1.01", "0.249", "0.0770")


def test_bits_table_counts_every_module_and_all_weights() -> None:
    table = make_table()
    allocation = make_allocation(table)
    made = bits_table(allocation, table)
    assert sum(int(row[2]) for row in made.rows) == len(allocation.bit_map.choices)
    assert sum(float(row[3].rstrip(" %")) for row in made.rows) == pytest.approx(100, abs=0.2)
    assert sum(float(row[4]) for row in made.rows) == pytest.approx(allocation.predicted_divergence, rel=5e-3)
    assert bits_table(allocation).columns == ("storage", "bits/weight", "modules")


def test_pins_show_reason_and_cost() -> None:
    assert pins_table(make_allocation(make_table())).rows == (
        ("model.embed_tokens", "4g64", "asked for", "+0", "+512"),
    )


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(999, "999 B"), (12_345, "12.3 kB"), (98_600_000, "98.6 MB"), (4_970_000_000, "4.97 GB")],
)
def test_sizes_are_decimal(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text


def test_report_has_only_what_is_there() -> None:
    table = make_table()
    alone = build_report("m", table=table)
    assert (alone.comparison, alone.bits, alone.pins, alone.curve) == (None, None, None, None)
    assert alone.heat_map is not None
    assert all(cell.bits is None for cell in alone.heat_map.cells)
    assert build_report("m").heat_map is None
    assert build_report("m", score=make_score()).curve is not None


def test_curve_leaves_out_what_a_log_axis_cannot_show() -> None:
    allocation = make_allocation(make_table())
    kept = replace(allocation, predicted_divergence=0.0, uniform=(*allocation.uniform, ("keep", 16.0, 0.0)))
    curve = build_report("m", allocation=kept).curve
    assert curve is not None
    assert curve.chosen is None
    assert "keep" not in {point.label for point in curve.uniform}


def test_predictions_have_no_interval_and_tell_what_probes_say() -> None:
    table = make_table()
    allocation = make_allocation(table)
    assert allocation.predicted_stderr > 0
    plain = dict(build_report("m", table=table, allocation=allocation).facts)["predicted KL"]
    assert plain == "0.283 nats/token, raw estimate on calibration text"
    table = replace(table, probe_check=ProbeCheck(num_probes=24, ratio=2.56, low=1.7, high=4.1))
    report = build_report("m", table=table, allocation=allocation, score=make_score())
    facts = dict(report.facts)
    assert facts["predicted KL"] == f"{plain}; 24 exact single-tensor probes say ×2.56: about 0.72"
    assert facts["measured KL"] == "0.135 ± 0.011 nats/token on 2048 held-out tokens"
    assert list(facts).index("measured KL") < list(facts).index("predicted KL")
    assert report.curve is not None
    assert report.curve.chosen is not None
    assert report.curve.chosen.half_width == 0
    assert "×2.56" in report.curve.note
    exact = dict(build_report("m", table=replace(table, method="kl"), allocation=allocation).facts)
    assert "sum of single-tensor probes" in exact["predicted KL"]


def test_the_static_method_predicts_nothing() -> None:
    table = replace(make_table(), method="static")
    report = build_report("m", table=table, allocation=make_allocation(table))
    assert dict(report.facts)["predicted KL"].startswith("none")
    assert report.curve is None
    assert report.bits is not None
    assert "predicted KL" not in report.bits.columns


@pytest.mark.parametrize(("correction", "word"), [("none", "plain"), ("fast", "fast"), ("full", "full")])
def test_uniform_points_say_their_rounding_and_give_way_to_measured_ones(correction, word) -> None:
    table = replace(make_table(), correction=correction)
    curve = build_report("m", table=table, allocation=make_allocation(table), score=make_score()).curve
    assert curve is not None
    assert curve.predicted_as == f"predicted with {word} rounding"
    assert [point.label for point in curve.uniform] == ["2g64", "3g64", "8g64"]
    assert [point.label for point in curve.measured_uniform] == ["4g64", "5g64", "6g64"]
    scene = curve_scene(curve)
    assert scene is not None
    texts = [shape.text for shape in scene.shapes if isinstance(shape, Text)]
    assert f"uniform, predicted with {word} rounding" in texts
    assert "uniform, measured, plain rounding" in texts
    tips = [shape.tip for shape in scene.shapes if isinstance(shape, Dot) and shape.tip]
    assert any(tip.startswith(f"2g64 (uniform, predicted with {word} rounding)") for tip in tips)


def test_notes_are_said_once_and_budgets_to_fit_are_broken_down() -> None:
    table = replace(make_table(), notes=("a", "b", "a"))
    fit = "--fit 8GB: 5.20 GB for weights after 0.81 GB KV cache at 8192 tokens and 0.80 GB head room"
    allocation = replace(make_allocation(table), budget=fit)
    report = build_report("m", table=table, allocation=allocation, score=replace(make_score(), notes=("b",)))
    assert report.notes == ("a", "b")
    assert dict(report.facts)["budget"] == fit
    plain = replace(allocation, budget="--target-bpw 5")
    assert "budget" not in dict(build_report("m", allocation=plain).facts)


def test_names_of_folders_do_not_reach_the_report() -> None:
    table = make_table()
    table = replace(table, model=replace(table.model, source="/home/someone/models/base-135m/"))
    facts = dict(build_report("m", table=table).facts)
    assert facts["model"].startswith("base-135m (")


def test_heat_map_places_every_path_once() -> None:
    table = make_table(blocks=4, modules=MOE)
    heat = build_heat_map(table, make_allocation(table))
    assert heat is not None
    assert len({(cell.row, cell.block) for cell in heat.cells}) == len(heat.cells) == 4 * len(MOE)
    assert [cell.path for cell in heat.outside] == ["model.embed_tokens"]
    assert heat.outside[0].pinned
    assert heat.probe == "4g64"
    probe = next(p for p in table.probes if p.path == "model.layers.2.mlp.gate" and p.choice.label == "4g64")
    assert next(c for c in heat.cells if c.path == probe.path).sensitivity == probe.divergence


def test_paths_of_a_fused_unit_each_get_their_own_row() -> None:
    prefix = "model.layers.3.self_attn."
    unit = Unit(
        paths=tuple(prefix + name for name in ("q_proj", "k_proj", "v_proj")),
        shape=(8, 8),
        numel=192,
        kind="linear",
        block=3,
        module="self_attn.q_proj",
    )
    table = replace(make_table(blocks=1), units=(unit,), probes=())
    heat = build_heat_map(table, None)
    assert heat is not None
    assert heat.modules == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert {cell.numel for cell in heat.cells} == {64}
    assert module_role(unit, "odd.5.name.w") == "name.w"


def test_a_bit_map_alone_is_laid_out_by_its_paths() -> None:
    allocation = make_allocation(make_table(blocks=2))
    choices = {"lm_head": KEEP, "model.layers.1.mlp.up_proj": Choice(bits=4, group_size=32)}
    heat = build_heat_map(
        None, replace(allocation, bit_map=replace(allocation.bit_map, choices=choices), pins=())
    )
    assert heat is not None
    assert (heat.blocks, heat.modules) == ((1,), ("mlp.up_proj",))
    assert heat.outside[0].bits == 16


def test_rows_follow_the_flow_of_data_and_names_stay_distinct() -> None:
    roles = (
        "mlp.switch_mlp.down_proj",
        "mlp.gate",
        "linear_attn.out_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
    )
    assert order_modules(roles) == (
        *("linear_attn.out_proj", "self_attn.q_proj", "self_attn.o_proj"),
        *("mlp.gate", "mlp.switch_mlp.down_proj"),
    )
    assert short_names(("mlp.up_proj", "feed_forward.up_proj", "mlp.gate")) == (
        "mlp.up_proj",
        "feed_forward.up_proj",
        "router",
    )


@given(st.floats(1e-9, 1e6), st.floats(1.0, 1e6))
def test_log_axis_holds_its_values_and_few_round_ticks(low: float, ratio: float) -> None:
    axis = LogAxis.around([low, low * ratio, 0.0, -1.0], most_decades=7)
    assert axis is not None
    assert 0 <= axis.fraction(low) <= axis.fraction(low * ratio) <= 1
    ticks = axis.ticks(8)
    assert len(ticks) <= 8
    assert list(ticks) == sorted(set(ticks))
    assert all(axis.low * 0.999 <= tick <= axis.high * 1.001 for tick in ticks)


def test_axes_without_values_and_linear_ticks() -> None:
    assert LogAxis.around([0.0, float("inf"), float("nan")]) is None
    axis = LinearAxis(low=2.2, high=8.8)
    assert axis.ticks(8) == (3, 4, 5, 6, 7, 8)
    assert axis.fraction(5.5) == pytest.approx(0.5)
    assert (axis.fraction(0), axis.fraction(99)) == (0, 1)
    assert [tick_text(v) for v in (0.05, 2.0, 1e-5, 1500.0)] == ["0.05", "2", "1e-5", "1500"]


def _lightness(color: str) -> float:
    red, green, blue = ((c / 255) ** 2.2 for c in parse_hex(color))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_ramps_rise_in_lightness_so_that_colour_vision_does_not_matter() -> None:
    for ramp in ([color for _, color in BITS_LEVELS], SENSITIVITY_RAMP):
        lightness = [_lightness(color) for color in ramp]
        assert all(b > a * 1.25 for a, b in pairwise(lightness))


def test_ink_reads_on_every_colour_and_ramps_meet_their_stops() -> None:
    for color in (*(color for _, color in BITS_LEVELS), *(ramp_color(i / 40) for i in range(41))):
        light, dark = sorted((_lightness(color) + 0.05, _lightness(ink_on(color)) + 0.05), reverse=True)
        assert light / dark >= 4.5
    assert [ramp_color(i / 8) for i in range(9)] == list(SENSITIVITY_RAMP)
    assert (ramp_color(-1), ramp_color(2)) == (SENSITIVITY_RAMP[0], SENSITIVITY_RAMP[-1])
    assert [bits_color(b) for b in (7, 8, 32)] == [BITS_LEVELS[5][1], BITS_LEVELS[5][1], BITS_LEVELS[6][1]]


def test_score_record_round_trips_and_bad_ones_are_refused(tmp_path) -> None:
    report = make_score()
    assert decode_score(encode_score(report)) == report
    with pytest.raises(UsageError, match="format version 99"):
        decode_score(encode_score(replace(report, format_version=99)))
    with pytest.raises(UsageError, match="not a score record"):
        decode_score(b'{"rows": 3}', "x.json")
    with pytest.raises(UsageError, match="cannot read score record"):
        read_score(tmp_path / "none.json")
