"""What --candidate-bits and --candidate-groups take, and what they refuse."""

import pytest

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.quant.reference import parse_candidates
from mlx_optiq_ext.types.options import MeasureOptions


def test_widths_stand_for_themselves_at_every_group() -> None:
    found = parse_candidates(MeasureOptions(candidate_bits="4, 3g128 ,keep", candidate_groups="64, 32"))
    assert [choice.label for choice in found] == ["3g128", "4g64", "4g32", "keep"]


@pytest.mark.parametrize("groups", ["abc", "64,x", "48", "-64", "6 4"])
def test_a_group_that_is_none_is_refused(groups: str) -> None:
    with pytest.raises(UsageError, match=r"--candidate-groups: .* is not one of \(32, 64, 128\)"):
        parse_candidates(MeasureOptions(candidate_groups=groups))


@pytest.mark.parametrize("bits", ["", " , "])
def test_no_choice_at_all_is_refused(bits: str) -> None:
    with pytest.raises(UsageError, match="--candidate-bits names no choice"):
        parse_candidates(MeasureOptions(candidate_bits=bits))
