"""What every client's module says of its client, and where to find those modules.

A client is one module in ``clients`` with a ``CLIENT``; other packages add theirs by the entry-point group
``mlx_optiq_ext.clients``. Nothing here or there needs MLX.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_integrations.facts import ClientFacts

__all__ = [
    "Client",
    "ConfigFile",
    "Format",
    "Session",
    "Setting",
    "Snippet",
    "all_clients",
    "find_client",
    "nested",
]

_GROUP = "mlx_optiq_ext.clients"

Format: TypeAlias = Literal["json", "toml", "yaml"]


class Setting(msgspec.Struct, frozen=True):
    """One value in a client's configuration, and why it is there."""

    path: tuple[str, ...]
    value: Any
    """Plain data: text, number, bool, list, dict."""
    why: str = ""


class ConfigFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the user's that a client reads, and what belongs into it."""

    folder: str
    """As the client finds it: ``~/.codex``."""
    name: str
    """Below the folder."""
    variable: str = ""
    """Environment variable that names another folder."""
    file_variable: str = ""
    """Environment variable that names the file itself; it goes before the folder's."""
    others: tuple[str, ...] = ()
    """Names of files that go before it in the client, where there is one."""
    format: Format
    settings: tuple[Setting, ...]

    def locate(self, environ: Mapping[str, str], home: Path) -> Path:
        """Where the file is for this user.

        Args:
            environ: Of the process.
            home: Stands for ``~``.
        """
        given = environ.get(self.variable, "") if self.variable else ""
        itself = environ.get(self.file_variable, "") if self.file_variable else ""
        folder = itself or given or self.folder
        place = home / folder[2:] if folder == "~" or folder.startswith("~/") else Path(folder)
        if itself:
            return place
        return next((place / name for name in self.others if (place / name).exists()), place / self.name)


class Snippet(msgspec.Struct, frozen=True, kw_only=True):
    """Lines to copy, for what has no file of its own that we could merge into."""

    language: str
    """Of a fenced code block."""
    code: str
    where: str = ""
    """Where they belong."""


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """How to start a client for one session without touching the user's files."""

    env: dict[str, str] = {}
    unset: tuple[str, ...] = ()
    """Variables that would win over ours."""
    argv: tuple[str, ...] = ()
    """Arguments before the user's own."""
    files: dict[str, str] = {}
    """Text by relative path, below the session's folder."""


class Client(msgspec.Struct, frozen=True, kw_only=True):
    """One program or library that can talk to the server."""

    name: str
    title: str
    about: str
    docs: str
    """Where its configuration is documented."""
    program: str = ""
    """On the PATH; empty: nothing to run."""
    install: str = ""
    """The one command that installs it."""
    least_context: int = 0
    """Tokens below which it does not work."""
    calls_tools: bool = True
    """Whether it works through tool calls."""
    files: Callable[[ClientFacts], tuple[ConfigFile, ...]] | None = None
    snippets: Callable[[ClientFacts], tuple[Snippet, ...]] | None = None
    session: Callable[[ClientFacts, Path], Session] | None = None
    """Takes the facts and the session's folder."""
    notes: tuple[str, ...] = ()
    """What a user should know besides."""

    def warnings(self, facts: ClientFacts) -> tuple[str, ...]:
        """What will not work with this server."""
        found = []
        if facts.is_assumed:
            if facts.context >= self.least_context:
                return ()
            return (
                f"{self.title} needs a context of {self.least_context:,} tokens, {facts.context:,} are "
                "assumed: start the server, or give --context",
            )
        if facts.context < self.least_context:
            found.append(
                f"{self.title} needs a context of {self.least_context:,} tokens, {facts.model} fits "
                f"{facts.context:,} here: serve a model with a longer one, or where memory is what lacks, "
                "with more --memory or a smaller KV cache (--kv-config)"
            )
        if self.program and self.calls_tools and not facts.calls_tools:
            found.append(
                f"{facts.model} has no tool calls in its chat template: {self.title} lives on them, and the "
                "server describes its tools in a system text, which the model may not heed"
            )
        return tuple(found)


def nested(settings: tuple[Setting, ...]) -> dict[str, Any]:
    """The settings as the document that holds just them."""
    document: dict[str, Any] = {}
    for setting in settings:
        place = document
        for key in setting.path[:-1]:
            place = place.setdefault(key, {})
        place[setting.path[-1]] = setting.value
    return document


@cache
def all_clients() -> dict[str, Client]:
    """Every client by its name: ours, then those of other packages."""
    package = importlib.import_module("mlx_optiq_integrations.clients")
    ours = [
        importlib.import_module(f"{package.__name__}.{module.name}").CLIENT
        for module in pkgutil.iter_modules(package.__path__)
    ]
    others = [point.load() for point in entry_points(group=_GROUP)]
    return {client.name: client for client in (*ours, *others)}


def find_client(name: str) -> Client:
    """One client by its name.

    Raises:
        UsageError: There is none of that name.
    """
    clients = all_clients()
    if name not in clients:
        raise UsageError(f"no client {name!r}; there are: {', '.join(clients)}")
    return clients[name]
