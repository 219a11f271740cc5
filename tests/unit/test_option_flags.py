"""Flags derived from a Struct accept what the Struct accepts and name themselves when they refuse."""

import argparse
from typing import Annotated, Literal

import msgspec
import pytest

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.arguments import add_options, given_options, option_names, options_from
from mlx_optiq_ext.types import options as all_options


class Inner(msgspec.Struct, frozen=True, kw_only=True):
    """Nested."""

    depth: Annotated[int, msgspec.Meta(ge=1, description="Depth in 100% of cases; see --speed.")] = 3
    tag: Annotated[tuple[str, ...], msgspec.Meta(description="Tags.")] = ()


class Outer(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a flag can be."""

    inner: Inner = Inner()
    speed: Annotated[float, msgspec.Meta(gt=0, description="Speed.")] | None = None
    mode: Annotated[Literal["a", "b"], msgspec.Meta(description="Mode.")] = "a"
    resume: Annotated[bool, msgspec.Meta(description="Resume.")] = True
    name: Annotated[str | None, msgspec.Meta(description="Name.")] = None


def parse(*words: str, prefix: str = "") -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser.add_argument_group("group"), Outer, prefix=prefix)
    return parser.parse_args(words)


@pytest.mark.parametrize("prefix", ["", "optiq-"])
def test_given_flags_override_and_the_rest_keeps_its_default(prefix):
    words = ("speed", "2.5", "depth", "7", "tag", "x", "tag", "y", "mode", "b", "name", "null")
    flags = [f"--{prefix}{word}" if index % 2 == 0 else word for index, word in enumerate(words)]
    namespace = parse(*flags, f"--no-{prefix}resume", prefix=prefix)
    expected = Outer(inner=Inner(depth=7, tag=("x", "y")), speed=2.5, mode="b", resume=False, name="null")
    assert options_from(namespace, Outer, prefix=prefix) == expected
    assert options_from(parse(prefix=prefix), Outer, prefix=prefix) == Outer()


def test_flags_not_given_leave_no_trace():
    assert vars(parse()) == {}


@pytest.mark.parametrize("prefix", ["", "optiq-"])
def test_what_was_given_is_known_by_name(prefix):
    words = (f"--{prefix}mode", "b", f"--no-{prefix}resume", f"--{prefix}depth", "3")
    given = given_options(parse(*words, prefix=prefix), Outer, prefix=prefix)
    assert set(given) == {"mode", "resume", "depth"}
    assert given == tuple(name for name in option_names(Outer) if name in given)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--speed", "0"), "argument --speed: '0' will not do, it takes a number (above 0)"),
        (("--depth", "two"), "argument --depth: 'two' will not do, it takes a whole number (at least 1)"),
        (("--depth", "1.5"), "argument --depth: '1.5' will not do, it takes a whole number"),
        (("--mode", "c"), "argument --mode: invalid choice: 'c'"),
    ],
)
def test_the_command_line_refuses_by_flag(capsys, words, message):
    with pytest.raises(SystemExit):
        parse(*words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depth": 0}, r"--depth: 0 .* a whole number \(at least 1\)"),
        ({"mode": "c"}, "--mode: 'c' .* one of a, b"),
        ({"tag": "x"}, "--tag: 'x' .* a list of texts"),
    ],
)
def test_values_from_elsewhere_are_checked_alike(values, message):
    with pytest.raises(UsageError, match=message):
        options_from(argparse.Namespace(**values), Outer)


def test_help_shows_defaults_and_prefixed_neighbours(capsys):
    with pytest.raises(SystemExit):
        parse("--help", prefix="optiq-")
    text = " ".join(capsys.readouterr().out.split())
    assert "Depth in 100% of cases; see --optiq-speed. (default: 3)" in text
    assert "Resume. (default: yes)" in text


@pytest.mark.parametrize("name", all_options.__all__)
def test_every_options_struct_can_be_a_command_line(name):
    struct_type = getattr(all_options, name)
    parser = argparse.ArgumentParser()
    add_options(parser, struct_type)
    assert options_from(parser.parse_args([]), struct_type) == struct_type()
    assert len(set(option_names(struct_type))) == len(option_names(struct_type))


@pytest.mark.parametrize(
    ("prefix", "words", "value"),
    [
        ("", ["--no-score"], False),
        ("", ["--score"], True),
        ("optiq-", ["--optiq-no-score"], False),
        ("optiq-", ["--no-optiq-score"], False),
        ("optiq-", ["--optiq-no-score", "--optiq-score"], True),
    ],
)
def test_a_switch_can_be_said_both_ways(prefix: str, words: list[str], value: bool) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, all_options.ConvertOptions, prefix=prefix)
    assert options_from(parser.parse_args(words), all_options.ConvertOptions, prefix=prefix).score is value
