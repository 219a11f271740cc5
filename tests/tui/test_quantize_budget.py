"""What the quantize screen knows without a screen: sizes, budgets, comparison, commands."""

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_models import LLAMA, save_model_folder, tiny_model
from support_tables import MOE, make_table

from mlx_optiq_ext.allocate.bitmap import allocate
from mlx_optiq_ext.allocate.kv_memory import kv_bytes_per_token
from mlx_optiq_ext.allocate.menu import build_menus
from mlx_optiq_ext.cli.main import COMMANDS, command_parser, main
from mlx_optiq_ext.errors import BudgetInfeasible, ModelNotFound, UsageError
from mlx_optiq_ext.formats.arguments import options_from
from mlx_optiq_ext.formats.sensitivity import write_sensitivity
from mlx_optiq_ext.types.options import AllocateOptions, ConvertOptions
from mlx_optiq_ext.types.quant import Allocation, Choice, SensitivityTable
from mlx_optiq_tui.quantize.budget import (
    BudgetRange,
    budget_curve,
    budget_range,
    compare,
    curve_points,
)
from mlx_optiq_tui.quantize.commands import convert_words, measure_words, places_of, score_words
from mlx_optiq_tui.quantize.fit import fit_of, fit_table, machine_memory_nbytes
from mlx_optiq_tui.quantize.model_facts import ModelFacts, facts_of_folder
from mlx_optiq_tui.quantize.newest import Newest
from mlx_optiq_tui.quantize.pictures import choice_text, curve_text, wishes_text
from mlx_optiq_tui.quantize.recorded import recorded_table
from mlx_optiq_tui.quantize.wishes import Wishes, bpw_of, pin_patterns
from mlx_optiq_tui.themes import Inks

TABLE = make_table(blocks=4)
MENUS = build_menus(TABLE)
EXPERTS = make_table(blocks=3, modules=MOE)
RECORDED = recorded_table()
TABLES = {"dense": TABLE, "experts": EXPERTS, "recorded": RECORDED}
CHOICE = st.sampled_from([Choice(bits=bits, group_size=64) for bits in (2, 3, 4, 5, 6, 8)])


def choose(table: SensitivityTable, bpw: float, wishes: Wishes | None = None) -> Allocation:
    """What the slider chooses."""
    return allocate(table, (wishes or Wishes()).options(table, bpw))


def test_the_slider_runs_from_the_cheapest_allocation_to_the_costliest() -> None:
    ends = budget_range(TABLE)
    assert choose(TABLE, ends.low).achieved_bpw == pytest.approx(2.5, abs=0.05)
    assert choose(TABLE, ends.high).achieved_bpw == pytest.approx(8.5, abs=0.05)
    assert choose(TABLE, ends.high).predicted_divergence < choose(TABLE, ends.low).predicted_divergence
    assert ends.clip(99) == ends.high
    assert ends.clip(0) == ends.low
    assert ends.clip(5.012) == 5.0
    assert ends.start == 5.0


def test_a_range_above_five_bits_starts_at_its_low_end() -> None:
    assert BudgetRange(low=6.0, high=8.0).start == 6.0


def test_an_allocation_is_compared_with_the_best_uniform_choice_that_it_pays() -> None:
    near = compare(choose(TABLE, 5.0))
    assert near.within is not None
    assert near.within.label == "4g64"
    assert near.within.bpw <= 5.0
    assert near.above is not None
    assert near.above.label == "5g64"
    assert near.ratio is not None
    assert near.ratio > 1


def test_the_curve_falls_and_holds_the_choice() -> None:
    points = curve_points(TABLE)
    divergences = [point.divergence for point in points]
    assert len(points) > 10
    assert divergences == sorted(divergences, reverse=True)
    chosen = choose(TABLE, 4.5)
    curve = budget_curve(TABLE, chosen, points)
    assert curve is not None
    assert curve.chosen is not None
    assert curve.chosen.bpw == chosen.achieved_bpw


def test_a_model_fits_or_not_with_its_cache() -> None:
    facts = ModelFacts(source="acme/tiny", numel=1_000_000_000, config=dict(LLAMA))
    context = 1000
    fit = fit_of(facts, "4 bits", 4.5, memory_nbytes=1_000_000_000, context=context)
    per_token = kv_bytes_per_token(LLAMA, context)
    assert per_token == 512  # 2 blocks × 2 heads × 32 numbers × 2 bytes, keys and values
    assert fit.weights_nbytes == 562_500_000
    assert fit.cache_nbytes == 512_000
    assert fit.room_nbytes == 256_000_000
    assert fit.fits
    assert fit.longest_context == (1_000_000_000 - 562_500_000 - 256_000_000) // 512
    assert not fit_of(facts, "as it is", 16, memory_nbytes=1_000_000_000, context=context).fits


def test_sizes_are_not_made_up_where_the_number_of_weights_is_unknown() -> None:
    assert fit_table(ModelFacts(source="acme/x", numel=0), memory_nbytes=10**9, context=10) is None


def test_without_a_config_the_cache_is_unknown() -> None:
    table = fit_table(ModelFacts(source="acme/x", numel=10**6), memory_nbytes=10**9, context=10)
    assert table is not None
    assert {row[3] for row in table.rows} == {"–"}


def test_a_folder_tells_its_weights_and_architecture(tmp_path: Path) -> None:
    facts = facts_of_folder(save_model_folder(tmp_path / "tiny", tiny_model()))
    assert facts.name == "tiny"
    assert facts.numel == 40_960 + 2 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 256 + 2 * 128) + 128
    assert facts.nbytes == 2 * facts.numel
    assert facts.float_bits == 16
    assert facts.architecture == "llama, 2 blocks, 128 wide"
    assert not facts.is_quantized
    with pytest.raises(ModelNotFound, match="holds some: tiny"):
        facts_of_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        facts_of_folder(tmp_path / "empty")


def test_this_machine_has_memory() -> None:
    assert machine_memory_nbytes() > 100_000_000


def test_commands_say_what_was_chosen(tmp_path: Path) -> None:
    places = places_of("tiny", tmp_path, 4.55)
    assert places.out == str(tmp_path / "tiny-optiq-4.55bpw")
    assert measure_words("acme/tiny", places.table, ("--seed", "1"))[-2:] == ("--seed", "1")
    words = convert_words("acme/tiny", places.table, places.out, Wishes().options(TABLE, 4.55))
    assert words[0] == "convert"
    assert words[-4:] == ("--sensitivity", places.table, "--target-bpw", "4.55")
    assert "--uniform" not in score_words("acme/tiny", places.out, "")


def test_pictures_say_what_was_chosen_in_words() -> None:
    table = recorded_table()
    chosen = choose(table, 5.0)
    text = choice_text(table, chosen, None, Inks(accent="blue", good="blue", bad="red")).plain
    assert "of at most 5 " in text
    assert "uniform within it 4g64" in text
    assert "stored bits per weight" in curve_text(table, chosen, curve_points(table), 78, 16).plain


PATHS = tuple(path for unit in TABLE.units for path in unit.paths)
QUERIES = tuple(path for path in PATHS if path.endswith("q_proj"))
FIRST = tuple(path for path in PATHS if path.startswith("model.layers.0."))


def test_what_is_pinned_wider_stays_so_at_every_budget_and_can_be_freed() -> None:
    chosen = choose(TABLE, 4.0)
    wishes = Wishes().stepped(MENUS, chosen, QUERIES, 1)
    for path in QUERIES:
        assert wishes.pins[path].bits > chosen.bit_map.choices[path].bits
    for bpw in (3.5, 4.0, 6.0):
        pinned = choose(TABLE, bpw, wishes)
        assert {path: pinned.bit_map.choices[path] for path in QUERIES} == dict(wishes.pins)
        assert pinned.achieved_bpw <= bpw
        assert pinned.predicted_divergence >= choose(TABLE, bpw).predicted_divergence
    freed = wishes.freed(TABLE, QUERIES[1:])
    assert set(freed.pins) == {QUERIES[0]}
    assert choose(TABLE, 4.0, freed.freed(TABLE, QUERIES)).bit_map == chosen.bit_map


def test_steps_end_at_the_widest_and_the_narrowest_choice() -> None:
    wishes = Wishes()
    for _ in range(8):
        wishes = wishes.stepped(MENUS, choose(TABLE, 6.0), QUERIES[:1], -1)
    assert wishes.pins[QUERIES[0]].bits == 2
    for _ in range(8):
        wishes = wishes.stepped(MENUS, choose(TABLE, 6.0), QUERIES[:1], 1)
    assert wishes.pins[QUERIES[0]].bits == 8


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (QUERIES, ("model.layers.*.self_attn.q_proj=8g64",)),
        (FIRST, ("model.layers.0.*=8g64",)),
        (QUERIES[:1], ("model.layers.0.self_attn.q_proj=8g64",)),
        (QUERIES[:2], tuple(f"model.layers.{block}.self_attn.q_proj=8g64" for block in range(2))),
        (("model.embed_tokens",), ("model.embed_tokens=8g64",)),
    ],
    ids=["kind", "block", "module", "two", "outside"],
)
def test_pins_are_said_in_the_fewest_words_that_pin_nothing_else(
    paths: tuple[str, ...], words: tuple[str, ...]
) -> None:
    choice = Choice(bits=8, group_size=64)
    assert pin_patterns(dict.fromkeys(paths, choice), PATHS) == words
    forced = allocate(TABLE, AllocateOptions(target_bpw=8.0, pin=words)).pins
    assert {pin.path for pin in forced} == set(paths)


def test_wishes_reach_the_command_and_the_words() -> None:
    wishes = Wishes(pins=dict.fromkeys(QUERIES, Choice(bits=8, group_size=64)), edges=True)
    words = convert_words("m", "t", "o", wishes.options(TABLE, 7.5))
    assert words[-6:] == (
        *("--target-bpw", "7.5"),
        *("--pin", "model.layers.*.self_attn.q_proj=8g64"),
        *("--protect", "edges"),
    )
    said = wishes_text(choose(TABLE, 7.5, wishes), wishes, "here")
    assert said.startswith("edges protected, 4 pinned, that costs KL ")
    assert said.endswith("\nhere")
    assert wishes_text(choose(TABLE, 5.5), Wishes(), "") == ""


def test_a_size_or_a_memory_pays_what_convert_says_it_pays() -> None:
    facts = ModelFacts(source="acme/tiny", numel=TABLE.total_numel, config=dict(LLAMA))
    per_token = kv_bytes_per_token(LLAMA, 4096)
    for size, memory in (("20MB", ""), ("", "300MB")):
        bpw = bpw_of(TABLE, facts, size=size, memory=memory, context=4096)
        options = AllocateOptions(target_size=size or None, fit=memory or None, context=4096)
        paid = allocate(TABLE, options, kv_bytes_per_token=per_token).target_bpw
        assert paid - 0.001 <= bpw <= paid
    with pytest.raises(UsageError, match=r"config\.json"):
        bpw_of(TABLE, None, memory="8GB", context=4096)
    with pytest.raises(BudgetInfeasible, match="nothing is left"):
        bpw_of(TABLE, facts, memory="200MB", context=4096)


def test_floors_are_no_cost_of_what_is_wished() -> None:
    """A router is held at eight bits by its family, whoever asks."""
    floors = [pin for pin in choose(EXPERTS, 3.0).pins if pin.reason.startswith("floor")]
    assert sum(pin.cost_divergence for pin in floors) > 0
    router = floors[0]
    wishes = Wishes(pins={router.path: router.choice})
    chosen = choose(EXPERTS, 3.0, wishes)
    asked = [pin for pin in chosen.pins if pin.path == router.path]
    said = wishes_text(chosen, wishes, "")
    assert said in ("1 pinned, that costs nothing", f"1 pinned, that costs KL {asked[0].cost_divergence:.2g}")


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_the_command_that_is_shown_makes_exactly_what_is_shown(data: st.DataObject) -> None:
    """Its options, read by the real parser, are those that the slider allocated with."""
    table = TABLES[data.draw(st.sampled_from(sorted(TABLES)))]
    ends = budget_range(table)
    bpw = ends.clip(data.draw(st.floats(ends.low, ends.high)))
    paths = [path for unit in table.units for path in unit.paths]
    pins = data.draw(st.dictionaries(st.sampled_from(paths), CHOICE, max_size=12))
    wishes = Wishes(pins=pins, edges=data.draw(st.booleans()))
    options = wishes.options(table, bpw)
    parser, _ = command_parser(COMMANDS["convert"])
    words = convert_words("some/model", "table.json", "out", options)
    assert options_from(parser.parse_args(words[1:]), ConvertOptions).allocate == options
    try:
        chosen = allocate(table, options)
    except BudgetInfeasible:
        return
    assert chosen.achieved_bpw <= bpw
    for path, choice in pins.items():
        assert chosen.bit_map.choices[path] == choice


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_the_slider_gives_what_optiq_allocate_gives(
    table: SensitivityTable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "table.json"
    write_sensitivity(file, table)
    ends = budget_range(table)
    start = choose(table, ends.start)
    some = [path for unit in table.units[::5] for path in unit.paths]
    wishes = Wishes().stepped(build_menus(table), start, some, 1)
    for bpw, wished in ((ends.low, Wishes()), (ends.clip(4.35), Wishes()), (ends.clip(6.1), wishes)):
        words = convert_words("some/model", str(file), "out", wished.options(table, bpw))
        assert main(["allocate", str(file), *words[words.index("--target-bpw") :], "--json"]) == 0
        printed = msgspec.json.decode(capsys.readouterr().out, type=Allocation)
        assert printed == choose(table, bpw, wished)


def test_a_window_makes_later_tokens_cheaper_and_the_longest_context_knows() -> None:
    config = {**LLAMA, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
    facts = ModelFacts(
        source="acme/tiny", numel=1_000_000, config=config | {"max_position_embeddings": 10**6}
    )
    for memory in (257_050_000, 260_000_000, 300_000_000):
        fit = fit_of(facts, "8 bits", 8.0, memory_nbytes=memory, context=32)
        left = memory - fit.weights_nbytes - fit.room_nbytes
        assert fit.longest_context is not None
        most = facts.cache_nbytes(fit.longest_context)
        more = facts.cache_nbytes(fit.longest_context + 1)
        assert most is not None
        assert more is not None
        assert most <= left < more
    none = fit_of(facts, "8 bits", 8.0, memory_nbytes=1_000_000, context=32)
    assert none.longest_context == 0


def test_a_narrower_cache_leaves_more_for_weights_and_context() -> None:
    wide = ModelFacts(source="acme/tiny", numel=TABLE.total_numel, config=dict(LLAMA))
    narrow = msgspec.structs.replace(wide, cache_bits=4.0)
    assert wide.cache_nbytes(1000) == 4 * (narrow.cache_nbytes(1000) or 0)
    paid = [bpw_of(TABLE, facts, memory="300MB", context=20_000) for facts in (wide, narrow)]
    saved = (wide.cache_nbytes(20_000) or 0) - (narrow.cache_nbytes(20_000) or 0)
    assert paid[1] - paid[0] == pytest.approx(8 * saved / TABLE.total_numel, abs=0.002)


class Owner:
    """As much of a widget as computing needs."""

    is_attached = True
    display = True

    def __init__(self) -> None:
        self.works: list[asyncio.Task[None]] = []

    def run_worker(self, work: Coroutine[Any, Any, None]) -> None:
        self.works.append(asyncio.ensure_future(work))


def test_of_what_is_asked_meanwhile_only_the_newest_is_computed() -> None:
    used: list[int] = []
    computed: list[int] = []
    go = threading.Event()

    def compute(number: int) -> int:
        go.wait(10)
        computed.append(number)
        return number

    async def script(*, is_attached: bool) -> None:
        owner = Owner()
        newest: Newest[int] = Newest(owner, used.append)  # type: ignore[arg-type]
        for number in range(5):
            newest.ask(lambda number=number: compute(number))  # type: ignore[misc]
            await asyncio.sleep(0)
        assert newest.is_busy
        assert not newest.is_wanted()
        owner.is_attached = is_attached
        go.set()
        await asyncio.gather(*owner.works)
        assert newest.is_busy is not is_attached

    asyncio.run(script(is_attached=True))
    assert used == computed == [0, 4]
    go.clear()
    asyncio.run(script(is_attached=False))
    assert used == [0, 4]  # What is gone draws nothing.
    assert computed == [0, 4, 0]
