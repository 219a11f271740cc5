"""The model card of a converted checkpoint: Markdown with the Hub's front matter.

Pure text from plain values; reads and writes no files. Called at the end of a conversion.
Source: https://huggingface.co/docs/hub/model-cards (fields of the front matter).
"""

import json
import re

import msgspec

from mlx_optiq_ext.types.report import TextTable

__all__ = ["CardFacts", "License", "license_of_card", "render_card"]

_REPO_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_PLAIN_SCALAR = re.compile(r"^[A-Za-z][A-Za-z0-9 ._/-]*$")
_YAML_WORDS = {"true", "false", "yes", "no", "on", "off", "null"}


class License(msgspec.Struct, frozen=True, kw_only=True):
    """Licence as the front matter of a model card states it."""

    id: str = ""
    """Identifier of the Hub: ``apache-2.0``, ``other``."""
    name: str = ""
    """``license_name``, where the identifier is ``other``."""
    link: str = ""
    """``license_link``: a URL or a file of the repository."""


class CardFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the card says."""

    name: str
    """Title: the folder's or repository's name."""
    base_model: str
    """Repository id or folder name of the source."""
    base_revision: str = ""
    license: License = License()
    summary: tuple[tuple[str, str], ...] = ()
    """Name and value: bits, size, divergence, how it was measured."""
    comparison: TextTable | None = None
    domains: TextTable | None = None
    bits: TextTable | None = None
    pins: TextTable | None = None
    calibration_sha256: str = ""
    held_out_sha256: str = ""
    command: str = ""
    """What makes this checkpoint again."""
    package_version: str = ""
    usage: str = ""
    """Markdown below the heading "Use"."""
    notes: tuple[str, ...] = ()


def render_card(facts: CardFacts) -> str:
    """Write the card.

    Args:
        facts: What is known; empty parts are left out.
    Returns:
        Markdown with YAML front matter, ending in a newline; the same text for the same facts.
    """
    source = _base_link(facts)
    version = f" {facts.package_version}" if facts.package_version else ""
    parts = [
        _front_matter(facts),
        f"# {facts.name}",
        f"{source}, quantized to mixed precision for [MLX](https://github.com/ml-explore/mlx) with "
        f"mlx-optiq-ext{version}. Every tensor got its own number of bits, from how much the model's output "
        "changes when this tensor has fewer. It is an ordinary MLX checkpoint: stock mlx-lm runs it.",
        _markdown_list(facts.summary),
        _section("Use", facts.usage),
        _section("Quality", _tables(facts.comparison, facts.domains)),
        _section("Bits", _tables(facts.bits, facts.pins)),
        _section("How it was made", _making(facts)),
        _section("Notes", "\n".join(f"- {_escape(note)}" for note in facts.notes)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def license_of_card(text: str) -> License:
    """Find the licence in the front matter of another model card.

    Args:
        text: A README.md, with or without front matter.
    Returns:
        Empty where none is stated or it is more than one word or line (a list).
    """
    match = re.match(r"^\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    found: dict[str, str] = {}
    for line in match[1].splitlines() if match else ():
        key, colon, value = line.partition(":")
        if colon and key in {"license", "license_name", "license_link"}:
            value = re.sub(r"\s+#.*$", "", value).strip()
            found[key] = "" if value[:1] in {"[", "{", "|", ">", "&", "*"} else value.strip("'\"")
    return License(
        id=found.get("license", ""), name=found.get("license_name", ""), link=found.get("license_link", "")
    )


def _front_matter(facts: CardFacts) -> str:
    lines = ["---", "library_name: mlx", "pipeline_tag: text-generation"]
    if _REPO_ID.match(facts.base_model):
        lines += [f"base_model: {_scalar(facts.base_model)}", "base_model_relation: quantized"]
    for key, value in (
        ("license", facts.license.id),
        ("license_name", facts.license.name),
        ("license_link", facts.license.link),
    ):
        if value:
            lines.append(f"{key}: {_scalar(value)}")
    lines += ["tags:", "- mlx", "- quantized", "- mixed-precision", "---"]
    return "\n".join(lines)


def _base_link(facts: CardFacts) -> str:
    if not _REPO_ID.match(facts.base_model):
        return f"`{facts.base_model}`"
    link = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
    return f"{link} (revision `{facts.base_revision[:12]}`)" if facts.base_revision else link


def _making(facts: CardFacts) -> str:
    parts = []
    if facts.command:
        parts.append(f"```sh\npip install mlx-optiq-ext\n{facts.command}\n```")
    hashes = [
        f"- {name} text: sha256 `{sha256}`"
        for name, sha256 in (("Calibration", facts.calibration_sha256), ("Held-out", facts.held_out_sha256))
        if sha256
    ]
    if hashes:
        parts.append("\n".join(hashes))
    parts.append(
        "The files in `optiq/` hold every number (metadata, sensitivity, scores where there are any); "
        "`optiq allocate` makes another budget from them without measuring again, `optiq report` draws them."
    )
    return "\n\n".join(parts)


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _tables(*tables: TextTable | None) -> str:
    return "\n\n".join(_markdown_table(table) for table in tables if table is not None)


def _markdown_table(table: TextTable) -> str:
    rules = [":---" if table.is_text(i) else "---:" for i in range(len(table.columns))]
    rows = [_cells(table.columns), f"| {' | '.join(rules)} |"]
    for index, row in enumerate(table.rows):
        cells = tuple(
            f"**{_escape(cell)}**" if cell and index == table.highlight else _escape(cell) for cell in row
        )
        rows.append(f"| {' | '.join(cells)} |")
    note = f"\n\n{_escape(table.note)}" if table.note else ""
    return f"{_escape(table.title)}:\n\n" + "\n".join(rows) + note


def _cells(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(_escape(cell) for cell in cells)} |"


def _markdown_list(facts: tuple[tuple[str, str], ...]) -> str:
    return "\n".join(f"- {_escape(name)}: {_escape(value)}" for name, value in facts)


def _escape(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]|<>])", r"\\\1", text.replace("\n", " "))


def _scalar(text: str) -> str:
    """A YAML string: plain where that is safe, else in double quotes (JSON strings are YAML)."""
    is_plain = _PLAIN_SCALAR.match(text) and text.lower() not in _YAML_WORDS and text == text.strip()
    return text if is_plain else json.dumps(text)
