"""Show, write or take back the configuration that connects a client to the server.

Without CLIENT: which there are. The model's name, the context that fits and what the model can do come from
the running server; where none answers they are assumed, and said to be. --write merges into the client's own
file: everything else in it stays, a copy is kept, the change is shown first; --undo brings the copy back.
"""

import argparse
import os
import sys
from pathlib import Path

import msgspec

from mlx_optiq_ext.cli.api_key import read_api_key
from mlx_optiq_ext.cli.console import Console, format_table
from mlx_optiq_ext.cli.running import add_address_arguments, ask_server
from mlx_optiq_ext.errors import EngineError, UsageError
from mlx_optiq_ext.types.status import EngineStatus
from mlx_optiq_integrations.client import Client, ConfigFile, all_clients, find_client
from mlx_optiq_integrations.facts import ClientFacts, assumed_facts, served_facts
from mlx_optiq_integrations.shown import ShownClient, ShownFile, mask, show_client
from mlx_optiq_integrations.user_files import Change, UserFiles

__all__ = ["Written", "add_arguments", "run", "shown_text"]

_ANY_MODEL = "local"
"""Reaches the default model of a server, as any unknown name does."""


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--write --json`` and ``--undo --json`` print, by file."""

    path: str
    changed: bool
    backup: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``optiq snippet``."""
    parser.add_argument(
        "client", metavar="CLIENT", nargs="?", help="Which client; without one, all are listed."
    )
    parser.add_argument("--model", default="", help="Served model, or MODEL@ADAPTER; default: the first.")
    parser.add_argument("--base-url", default="", help="Address for the client, if not that of --url.")
    parser.add_argument(
        "--context", metavar="TOKENS", type=int, default=0, help="Context to assume where no server says it."
    )
    parser.add_argument("--write", action="store_true", help="Merge into the client's own file.")
    parser.add_argument("--undo", action="store_true", help="Bring back what was there before --write.")
    parser.add_argument("--yes", action="store_true", help="Do not ask.")
    add_address_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Show, write or undo."""
    console = Console.from_args(args)
    if args.client is None:
        clients = tuple(all_clients().values())
        rows = [(each.name, each.title, each.about) for each in clients]
        console.result(
            [{"client": each.name, "title": each.title, "about": each.about} for each in clients],
            format_table(("client", "", ""), rows),
        )
        return 0
    if args.write and args.undo:
        raise UsageError("give --write or --undo, not both")
    client = find_client(args.client)
    facts = _facts(args, console)
    if args.write or args.undo:
        console.result(*_change(args, client, facts, console))
        return 0
    shown = show_client(client, facts, os.environ, Path.home())
    console.result(shown, shown_text(shown))
    return 0


def _facts(args: argparse.Namespace, console: Console) -> ClientFacts:
    """Of the model that a server has loaded, else assumed."""
    key = read_api_key(args.api_key_file)
    base = args.base_url or args.url
    try:
        status = msgspec.convert(ask_server(args, "GET", "/optiq/status"), EngineStatus)
    except EngineError as error:
        if not args.undo:
            console.note(f"note: {error}. Limits and abilities are assumed")
        return assumed_facts(base, args.model or _ANY_MODEL, args.context, key)
    facts = served_facts(status, base, args.model, key)
    if not facts.is_assumed:
        return facts
    if not args.undo:
        console.note(
            f"note: {facts.model} is not loaded at {args.url}: limits and abilities are assumed. "
            "Ask it something first, or give --context"
        )
    return assumed_facts(base, facts.model, args.context, key)


def _change(
    args: argparse.Namespace, client: Client, facts: ClientFacts, console: Console
) -> tuple[list[Written], str]:
    if client.files is None:
        raise UsageError(f"{client.title} has no file to write into; `optiq snippet {client.name}` shows it")
    users = UserFiles(os.environ, Path.home())
    files = client.files(facts)
    changes = [_planned(args, users, file) for file in files]
    for warning in () if args.undo else client.warnings(facts):
        console.note(f"warning: {warning}")
    if all(change.is_empty for change in changes):
        done = [Written(path=str(change.path), changed=False) for change in changes]
        return done, "\n".join(f"{each.path} is as it should be" for each in done)
    for change in changes:
        console.note(mask(change.diff, facts).rstrip())
    _agree(args)
    return _done(args, users, changes)


def _planned(args: argparse.Namespace, users: UserFiles, file: ConfigFile) -> Change:
    if not args.undo:
        return users.planned(file)
    change = users.planned_undo(file)
    if not users.is_as_written(change) and not args.yes:
        raise UsageError(
            f"{change.path} was changed by others since; --yes brings the former content back all the same:\n"
            f"{change.diff}"
        )
    return change


def _done(args: argparse.Namespace, users: UserFiles, changes: list[Change]) -> tuple[list[Written], str]:
    done = []
    for change in changes:
        if args.undo:
            users.undo(change)
            done.append(Written(path=str(change.path), changed=True))
        else:
            backup = users.write(change)
            done.append(Written(path=str(change.path), changed=True, backup=str(backup) if backup else None))
    lines = []
    for each in done:
        kept = f"; what was there is in {each.backup}" if each.backup else ""
        lines.append(f"{each.path} {'is as it was' if args.undo else 'is written'}{kept}")
    if not args.undo:
        lines.append(f"`optiq snippet {args.client} --undo` takes it back")
    return done, "\n".join(lines)


def _agree(args: argparse.Namespace) -> None:
    """Ask, unless told not to."""
    if args.yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("nobody can be asked here; give --yes to write without asking")
    sys.stderr.write("Write this? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError("nothing was written")


def shown_text(shown: ShownClient) -> str:
    """The configuration for people."""
    limits = f"{shown.context:,} tokens of context, answers up to {shown.max_output:,}"
    assumed = " (assumed)" if shown.is_assumed else ""
    lines = [f"{shown.title}: model {shown.model} at {shown.url}, {limits}{assumed}"]
    lines += [f"warning: {warning}" for warning in shown.warnings]
    for file in shown.files:
        lines += ["", f"── {file.path}", file.text.rstrip()]
        if file.format == "json":
            lines += ["", "Why:", *_reasons(file)]
    for snippet in shown.snippets:
        lines += ["", f"── {snippet.where or snippet.language}", snippet.code]
    if shown.notes:
        lines += ["", *shown.notes]
    if shown.files:
        lines += ["", f"`optiq snippet {shown.client} --write` merges this into the file."]
    if shown.install:
        lines += [f"Install: {shown.install}   Documentation: {shown.docs}"]
    return "\n".join(lines)


def _reasons(file: ShownFile) -> list[str]:
    """Reasons of a format without comments; settings with the same one on one line."""
    reasons: dict[str, list[str]] = {}
    for setting in file.settings:
        if setting.why:
            reasons.setdefault(setting.why, []).append(setting.path[-1])
    return [f"  {', '.join(names)}: {why}" for why, names in reasons.items()]
