"""A client's configuration as text for people and as data for programs; keys are never shown.

Knows no files. Called by ``optiq snippet`` and by the dashboard.
"""

from collections.abc import Mapping
from pathlib import Path

import msgspec
from msgspec.structs import replace

from mlx_optiq_integrations.client import Client, Setting, Snippet
from mlx_optiq_integrations.facts import ClientFacts
from mlx_optiq_integrations.merge import fresh_text

__all__ = ["ShownClient", "ShownFile", "mask", "show_client"]

_MASK = "<OPTIQ_API_KEY>"


class ShownFile(msgspec.Struct, frozen=True, kw_only=True):
    """What belongs into one file."""

    path: str
    """For this user, with ``~`` for the home folder."""
    format: str
    text: str
    """As a file of its own, with reasons as comments where the format has comments."""
    settings: tuple[Setting, ...]


class ShownClient(msgspec.Struct, frozen=True, kw_only=True):
    """All that a user needs to connect one client."""

    client: str
    title: str
    docs: str
    install: str
    url: str
    model: str
    context: int
    max_output: int
    is_assumed: bool
    """The limits are guesses: no server answered."""
    files: tuple[ShownFile, ...]
    snippets: tuple[Snippet, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def show_client(client: Client, facts: ClientFacts, environ: Mapping[str, str], home: Path) -> ShownClient:
    """Render a client's configuration.

    Args:
        client: Which.
        facts: Of the server; a key that it needs is replaced by a word.
        environ: Of the process: where files are.
        home: Stands for ``~``.
    Raises:
        UsageError: A format needs the extra ``clients``.
    """
    shown = replace(facts, api_key=_MASK) if facts.needs_key else facts
    files = client.files(shown) if client.files else ()
    return ShownClient(
        client=client.name,
        title=client.title,
        docs=client.docs,
        install=client.install,
        url=facts.url,
        model=facts.model,
        context=facts.context,
        max_output=facts.max_output,
        is_assumed=facts.is_assumed,
        files=tuple(
            ShownFile(
                path=_short(file.locate(environ, home), home),
                format=file.format,
                text=fresh_text(file.format, file.settings),
                settings=file.settings,
            )
            for file in files
        ),
        snippets=client.snippets(shown) if client.snippets else (),
        warnings=client.warnings(facts),
        notes=client.notes,
    )


def mask(text: str, facts: ClientFacts) -> str:
    """The text without the server's key."""
    return text.replace(facts.api_key, _MASK) if facts.needs_key else text


def _short(path: Path, home: Path) -> str:
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
