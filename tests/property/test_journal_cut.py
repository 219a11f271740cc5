"""A journal cut off anywhere gives back whole units, exactly as they were."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_optiq_ext.quant.journal import Journal, journal_path

_NUMBERS = st.floats(0, 1e6, allow_nan=False).map(float)
_COSTS = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(_NUMBERS, min_size=width, max_size=width), min_size=1, max_size=3)
)
_PATHS = st.text(st.characters(codec="utf-8", exclude_characters="\n"), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(_PATHS, _COSTS, min_size=1, max_size=5), st.data())
def test_every_whole_line_survives_a_cut_at_any_byte(units: dict, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        name = Path(folder) / "journal"
        file = journal_path(name, "key")
        journal = Journal.open(name, "key", resume=True)
        for path, costs in units.items():
            journal.add(path, np.array(costs))
        whole = file.read_bytes()
        size = data.draw(st.integers(0, len(whole)))
        file.write_bytes(whole[:size])
        num_lines = whole[:size].count(b"\n") if size >= len(b"key\n") else 0
        again = Journal.open(name, "key", resume=True)
        # A cut just before a line end leaves a whole line, which may be taken or not.
        assert list(again.costs) in (list(units)[: max(num_lines - 1, 0)], list(units)[:num_lines])
        for path, costs in again.costs.items():
            np.testing.assert_array_equal(costs, np.array(units[path]))
        for path, costs in units.items():
            if path not in again.costs:
                again.add(path, np.array(costs))
        assert sorted(file.read_bytes().splitlines()) == sorted(whole.splitlines())
