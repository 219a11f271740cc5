"""Put our settings into a client's configuration, and keep everything else that is in it.

Text in, text out; knows no files. TOML and YAML keep comments and order (tomlkit, ruamel.yaml: the extra
``clients``); JSON keeps order and indentation.
"""

import io
import json
import re
from decimal import Decimal
from typing import Any

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_integrations.client import Format, Setting

__all__ = ["Unreadable", "fresh_text", "merged_text"]


class Unreadable(UsageError):
    """What is there cannot be read, so it cannot be kept."""


def fresh_text(format: Format, settings: tuple[Setting, ...]) -> str:
    """The settings as a file of their own; with their reasons, where the format has comments.

    Raises:
        UsageError: The extra ``clients`` is not installed.
    """
    return merged_text(format, "", settings)


def merged_text(format: Format, text: str, settings: tuple[Setting, ...]) -> str:
    """The text with the settings in it.

    Args:
        format: Of the text.
        text: As it is; empty for a file that does not exist.
        settings: Values replace those at the same path; other keys stay.
    Raises:
        Unreadable: The text is not of that format, or one of our paths leads through something else.
        UsageError: The extra ``clients`` is not installed.
    """
    merged = {"json": _json, "toml": _toml, "yaml": _yaml}[format](text, settings)
    return re.sub(r"(?<!\r)\n", "\r\n", merged) if "\r\n" in text else merged


def _json(text: str, settings: tuple[Setting, ...]) -> str:
    try:
        document = (
            json.loads(text, object_pairs_hook=_pairs, parse_float=_float, parse_constant=_constant)
            if text.strip()
            else {}
        )
    except ValueError as error:
        raise Unreadable(
            f"it is no plain JSON that could be kept whole ({error}). Paste the settings yourself"
        ) from error
    _put(_mapping(document), settings)
    indent = re.search(r"^([ \t]+)\S", text, re.MULTILINE)
    written = json.dumps(
        document,
        indent=indent.group(1) if indent else 2,
        # Half a surrogate pair is a character of JSON and none of UTF-8.
        ensure_ascii="\\ud" in text.lower(),
    )
    return written + "\n"


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("a key is there twice")
    return document


def _float(text: str) -> float:
    value = float(text)
    if Decimal(repr(value)) != Decimal(text):
        raise ValueError(f"the number {text} would be rounded")
    return value


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no value in JSON")


def _toml(text: str, settings: tuple[Setting, ...]) -> str:
    try:
        import tomlkit
        from tomlkit.exceptions import TOMLKitError
    except ModuleNotFoundError as error:
        raise _extra_missing("tomlkit") from error
    if not text.strip():
        return _fresh_toml(settings)
    try:
        document = tomlkit.parse(text)
    except TOMLKitError as error:
        raise Unreadable(f"it is no TOML ({error})") from error
    _put(document, settings)
    return tomlkit.dumps(document)


def _fresh_toml(settings: tuple[Setting, ...]) -> str:
    """Values before tables, each with its reason behind it: merging alone would lose the reasons."""
    import tomlkit

    lines: list[str] = []
    tables: dict[tuple[str, ...], list[str]] = {}
    for setting in settings:
        value = tomlkit.item(setting.value).as_string()
        line = f"{tomlkit.key(setting.path[-1]).as_string()} = {value}"
        tables.setdefault(setting.path[:-1], []).append(line + (f"  # {setting.why}" if setting.why else ""))
    for table, rows in sorted(tables.items(), key=lambda item: bool(item[0])):
        if table:
            lines += ["", f"[{tomlkit.key(list(table)).as_string()}]"]
        lines += rows
    return "\n".join(lines).strip() + "\n"


def _yaml(text: str, settings: tuple[Setting, ...]) -> str:
    try:
        from ruamel.yaml import YAML
        from ruamel.yaml.comments import CommentedMap
        from ruamel.yaml.error import YAMLError
    except ModuleNotFoundError as error:
        raise _extra_missing("ruamel.yaml") from error
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    inner = re.search(r"^[^\s#-][^\n]*:[ \t]*\n( +)[^\s#-]", text, re.MULTILINE)
    dash = re.search(r"^( *)[^\s#-][^\n]*:[ \t]*\n\1( *)- ", text, re.MULTILINE)
    offset = len(dash.group(2)) if dash else 0
    yaml.indent(mapping=len(inner.group(1)) if inner else 2, sequence=offset + 2, offset=offset)
    try:
        document = yaml.load(text) if text.strip() else None
    except YAMLError as error:
        raise Unreadable(f"it is no YAML ({error})") from error
    is_fresh = document is None
    document = CommentedMap() if is_fresh else _mapping(document)
    _put(document, settings, CommentedMap)
    if is_fresh:
        for setting in settings:
            if setting.why:
                _parent(document, setting).yaml_add_eol_comment(setting.why, setting.path[-1])
    written = io.StringIO()
    yaml.dump(document, written)
    # Nothing holds the comments of a document that is empty.
    kept = re.findall(r"^[ \t]*#[^\n]*\n?", text, re.MULTILINE) if is_fresh else ()
    return "".join(line.rstrip("\r\n") + "\n" for line in kept) + written.getvalue()


def _put(document: Any, settings: tuple[Setting, ...], make: type[Any] = dict) -> None:
    """Set each value at its path, making what is missing on the way."""
    for setting in settings:
        place = document
        for depth, key in enumerate(setting.path[:-1]):
            if key not in place:
                place[key] = make()
            place = _mapping(place[key], setting.path[: depth + 1])
        if place.get(setting.path[-1]) != setting.value:
            place[setting.path[-1]] = setting.value


def _parent(document: Any, setting: Setting) -> Any:
    for key in setting.path[:-1]:
        document = document[key]
    return document


def _mapping(value: Any, path: tuple[str, ...] = ()) -> Any:
    if not isinstance(value, dict):
        raise Unreadable(f"{'.'.join(path) or 'the document'} is no table of settings there")
    return value


def _extra_missing(package: str) -> UsageError:
    return UsageError(f"this format needs {package}: pip install 'mlx-optiq-ext[clients]'")
