"""Every file of ours is refused with the same words, which say what would work."""

import msgspec
import pytest

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.records import RecordForm, convert_record, parse_json, read_record


class Thing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format_version: int = 2
    count: int
    added: str = ""


FORM = RecordForm(name="thing", remedy="make it again", newest=2)


def convert(text: str) -> Thing:
    return convert_record(parse_json(text.encode(), "t.json", FORM), Thing, "t.json", FORM)


@pytest.mark.parametrize("version", [1, 2])
def test_every_version_up_to_the_newest_is_read(version) -> None:
    assert convert(f'{{"format_version": {version}, "count": 3}}') == Thing(format_version=version, count=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "t.json is not JSON (Input data was truncated); make it again"),
        ("[]", "t.json is not a thing: it has no format_version; make it again"),
        ('{"count": 3}', "t.json is not a thing: it has no format_version; make it again"),
        *(
            (
                f'{{"format_version": {version}, "count": 3}}',
                f"t.json has format version {shown}, this package reads up to 2: upgrade mlx-optiq-ext, or "
                "make it again",
            )
            for version, shown in [("0", "0"), ("3", "3"), ('"1"', "'1'"), ("null", "None"), ("1.5", "1.5")]
        ),
        (
            '{"format_version": 1, "count": "x"}',
            "t.json is not a valid thing: Expected `int`, got `str` - at `$.count`; make it again",
        ),
        (
            '{"format_version": 1, "count": 3, "more": 1}',
            "t.json is not a valid thing: Object contains unknown field `more`; make it again",
        ),
    ],
)
def test_what_is_wrong_is_said(text, message) -> None:
    with pytest.raises(UsageError) as caught:
        convert(text)
    assert str(caught.value) == message


def test_a_file_that_cannot_be_read_is_named(tmp_path) -> None:
    file = tmp_path / "none.json"
    with pytest.raises(UsageError) as caught:
        read_record(file, FORM)
    assert str(caught.value) == f"cannot read thing {file}: No such file or directory; make it again"
