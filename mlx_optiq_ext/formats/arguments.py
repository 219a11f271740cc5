"""Options Struct → argparse flags → options Struct; the one place where a flag gets its name.

Knows argparse and msgspec, no command and no model. Called by the command line and by the extension of
mlx-lm's own parser, so that both offer the same options under the same rules.
"""

import argparse
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import msgspec

from mlx_optiq_ext.errors import UsageError

__all__ = [
    "Option",
    "add_options",
    "check_value",
    "flag_name",
    "given_options",
    "option_names",
    "options_from",
    "options_of",
]

_S = TypeVar("_S", bound=msgspec.Struct)
_METAVARS = {
    **dict.fromkeys(("allocation", "calibration", "held_out", "kv_config", "out", "sensitivity"), "FILE"),
    "adapter": "NAME=DIR",
    "alias": "NAME=MODEL",
    "candidate_bits": "CHOICES",
    "fit": "SIZE",
    "kv_uniform": "CHOICES",
    **dict.fromkeys(("max_body", "memory", "prompt_cache", "prompt_cache_disk"), "SIZE"),
    "pin": "PATTERN=CHOICE",
    "uniform": "CHOICES",
}
"""What stands for a value in the help, where the last word of the name would not say it."""


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """One field of a Struct, flattened: what a flag or a form's field is made from."""

    name: str
    """Of the field; :func:`flag_name` makes the flag of it."""
    parents: tuple[str, ...]
    """Names of the Struct fields it is nested in."""
    annotation: Any
    default: Any
    description: str

    @property
    def kind(self) -> Any:
        """The annotation without ``Annotated`` and ``| None``."""
        return _plain(self.annotation)

    @property
    def wanted(self) -> str:
        """What it takes, for people: ``a whole number (at least 1)``."""
        kind = self.kind
        if typing.get_origin(kind) is typing.Literal:
            return f"one of {', '.join(map(str, typing.get_args(kind)))}"
        if kind not in (int, float):
            return {bool: "yes or no (True or False)", str: "a text"}.get(kind, "a list of texts")
        bounds = [
            f"{words} {bound:g}"
            for meta in _metas(self.annotation)
            for words, bound in (("above", meta.gt), ("at least", meta.ge), ("at most", meta.le))
            if bound is not None
        ]
        number = "a whole number" if kind is int else "a number"
        return f"{number} ({', '.join(bounds)})" if bounds else number


def add_options(
    parser: argparse._ActionsContainer, struct_type: type[msgspec.Struct], *, prefix: str = ""
) -> None:
    """Add one flag per field of ``struct_type``; fields that are Structs are flattened.

    A flag that is not given leaves no attribute in the namespace: the Struct keeps its default.

    Args:
        parser: A parser or an argument group.
        struct_type: Every field needs a default and a ``msgspec.Meta`` description.
        prefix: Put before every name: ``"optiq-"`` gives ``--optiq-target-bpw`` and ``optiq_target_bpw``.
    """
    for option in options_of(struct_type):
        parser.add_argument(
            flag_name(option.name, prefix=prefix),
            dest=_dest(option.name, prefix),
            default=argparse.SUPPRESS,
            help=_help(option, prefix),
            **_argparse_keywords(option),
        )


def options_from(namespace: argparse.Namespace, struct_type: type[_S], *, prefix: str = "") -> _S:
    """Build the Struct from what was given on the command line.

    Args:
        namespace: Result of a parser that :func:`add_options` filled; other attributes are ignored.
        struct_type: The Struct given to :func:`add_options`.
        prefix: The prefix given to :func:`add_options`.
    Returns:
        The options, bounds checked.
    Raises:
        UsageError: A value is out of bounds or of the wrong type; the message names the flag.
    """
    values: dict[str, Any] = {}
    for option in options_of(struct_type):
        dest = _dest(option.name, prefix)
        if not hasattr(namespace, dest):
            continue
        level = values
        for parent in option.parents:
            level = level.setdefault(parent, {})
        level[option.name] = check_value(option, getattr(namespace, dest), prefix=prefix)
    return msgspec.convert(values, struct_type)


def given_options(
    namespace: argparse.Namespace, struct_type: type[msgspec.Struct], *, prefix: str = ""
) -> tuple[str, ...]:
    """Names of the fields whose flags were given, after flattening, in declaration order."""
    return tuple(
        option.name for option in options_of(struct_type) if hasattr(namespace, _dest(option.name, prefix))
    )


def option_names(struct_type: type[msgspec.Struct]) -> tuple[str, ...]:
    """Field names after flattening, in declaration order."""
    return tuple(option.name for option in options_of(struct_type))


def flag_name(name: str, *, prefix: str = "") -> str:
    """The flag of a field: ``target_bpw`` → ``--target-bpw``."""
    return f"--{prefix}{name.replace('_', '-')}"


def options_of(struct_type: type[msgspec.Struct], parents: tuple[str, ...] = ()) -> Iterator[Option]:
    """The fields of a Struct in declaration order; those that are Structs are flattened.

    Args:
        struct_type: Every field needs a default and a ``msgspec.Meta`` description.
        parents: Names of the fields that ``struct_type`` is nested in.
    """
    hints = typing.get_type_hints(struct_type, include_extras=True)
    for field in msgspec.structs.fields(struct_type):
        annotation = hints[field.name]
        plain = _plain(annotation)
        if isinstance(plain, type) and issubclass(plain, msgspec.Struct):
            yield from options_of(plain, (*parents, field.name))
            continue
        yield Option(
            name=field.name,
            parents=parents,
            annotation=annotation,
            default=field.default,
            description=_description(annotation),
        )


def check_value(option: Option, value: Any, *, prefix: str = "") -> Any:
    """Convert and check the value of one option.

    Args:
        option: From :func:`options_of`.
        value: Of its type, or text for a number.
        prefix: Of the flag, for messages.
    Raises:
        UsageError: It is out of bounds or of the wrong type; the message names the flag.
    """
    try:
        return _convert(option, value)
    except msgspec.ValidationError:
        flag = flag_name(option.name, prefix=prefix)
        raise UsageError(f"{flag}: {value!r} will not do, it takes {option.wanted}") from None


def _dest(name: str, prefix: str) -> str:
    return f"{prefix.replace('-', '_')}{name}"


def _plain(annotation: Any) -> Any:
    """Strip ``Annotated`` and ``| None``."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(annotation) if arg is not types.NoneType]
        if len(inner) == 1:
            return _plain(inner[0])
    return annotation


def _description(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Annotated:
        for meta in typing.get_args(annotation)[1:]:
            if isinstance(meta, msgspec.Meta) and meta.description:
                return meta.description
    # Bounds of an optional number stand inside of the union, and the description with them.
    return next(filter(None, map(_description, typing.get_args(annotation))), "")


def _metas(annotation: Any) -> Iterator[msgspec.Meta]:
    if isinstance(annotation, msgspec.Meta):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _metas(part)


def _help(option: Option, prefix: str) -> str:
    # Descriptions name other flags without the prefix.
    text = option.description.replace("--", f"--{prefix}")
    if isinstance(option.default, bool):
        text += f" (default: {'yes' if option.default else 'no'})"
    elif option.default not in (None, "", ()):
        text += f" (default: {option.default})"
    return text.replace("%", "%%")


def _argparse_keywords(option: Option) -> dict[str, Any]:
    kind = option.kind
    metavar = _METAVARS.get(option.name, option.name.rpartition("_")[2].upper())
    if kind is bool:
        return {"action": _YesOrNo}
    if typing.get_origin(kind) is typing.Literal:
        return {"choices": list(typing.get_args(kind))}
    if typing.get_origin(kind) is tuple:
        return {"action": "append", "metavar": metavar}
    return {"type": _parser_of(option), "metavar": metavar}


class _YesOrNo(argparse.BooleanOptionalAction):
    """``--score`` and ``--no-score``; with our prefix ``--optiq-no-score`` and ``--no-optiq-score``."""

    def __init__(self, option_strings: Sequence[str], dest: str, **keywords: Any) -> None:
        super().__init__(option_strings, dest, **keywords)
        for flag in option_strings:
            if flag.startswith("--optiq-"):
                self.option_strings = [*self.option_strings, flag.replace("--optiq-", "--optiq-no-", 1)]

    def __call__(
        self,
        parser: Any,  # noqa: ARG002
        namespace: argparse.Namespace,
        values: Any,  # noqa: ARG002
        option_string: str | None = None,
    ) -> None:
        """Set the value that the flag says."""
        is_no = option_string is not None and option_string.startswith(("--no-", "--optiq-no-"))
        setattr(namespace, self.dest, not is_no)


def _parser_of(option: Option) -> Callable[[str], Any]:
    """Read one value; argparse puts the flag's name before the message."""

    def parse(text: str) -> Any:
        try:
            return _convert(option, text)
        except msgspec.ValidationError:
            raise argparse.ArgumentTypeError(f"{text!r} will not do, it takes {option.wanted}") from None

    return parse


def _convert(option: Option, value: Any) -> Any:
    """Check one value; text becomes a number where a number is asked for, and stays text elsewhere."""
    return msgspec.convert(value, option.annotation, strict=option.kind not in (int, float))
