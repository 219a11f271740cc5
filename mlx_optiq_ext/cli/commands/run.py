"""Run a coding agent on a local model, configured for this session only.

Takes the server that answers at --url, or at http://127.0.0.1:8080, if it serves the model; else starts
`optiq serve`, and stops it when the client has ended. The client is configured by environment, arguments and
temporary files: nothing of the user's own is touched. What follows `--` goes to the client:
`optiq run claude-code -m Qwen3-8B-optiq-4.5bpw -- --continue`. Its exit code is the client's.
"""

import argparse
import contextlib
import json
import os
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

from mlx_optiq_ext.cli.api_key import read_api_key
from mlx_optiq_ext.cli.console import Console
from mlx_optiq_ext.cli.running import ask_server
from mlx_optiq_ext.errors import EngineError, RequestError, UsageError
from mlx_optiq_ext.types.status import EngineStatus
from mlx_optiq_integrations.client import Client, Session, all_clients, find_client
from mlx_optiq_integrations.facts import ClientFacts, assumed_facts, served_facts
from mlx_optiq_integrations.launch import find_program, run_program, write_files
from mlx_optiq_integrations.launch_choice import ServerChoice, choose_server, named_as
from mlx_optiq_integrations.launch_server import free_port, serve_command, started_server

__all__ = ["Plan", "add_arguments", "run"]

_URL = "http://127.0.0.1:8080"
_PORT = 8080


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What would be run: the result of ``--dry-run``."""

    server: tuple[str, ...]
    """Command that starts it; empty where one runs already."""
    url: str
    is_assumed: bool
    """Limits are guesses until the server runs."""
    argv: tuple[str, ...]
    env: dict[str, str]
    """Added to the user's environment."""
    unset: tuple[str, ...]
    """Variables that are taken away."""
    files: dict[str, str]
    """Text by path."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``optiq run``."""
    parser.add_argument("client", metavar="CLIENT", help=f"One of {', '.join(_runnable())}.")
    parser.add_argument(
        "-m", "--model", default="", help="Folder, Hub repository, or a name that the server knows."
    )
    parser.add_argument("--url", help="Where a server listens; then none is started.")
    parser.add_argument(
        "--serve-args",
        metavar="OPTIONS",
        default="",
        help="Options for the server that is started, as one word: --serve-args='--context 32768'.",
    )
    parser.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="File with the API key, in place of the variable OPTIQ_API_KEY.",
    )
    parser.add_argument("--keep-server", action="store_true", help="Leave a started server running.")
    parser.add_argument(
        "--dry-run", action="store_true", help="Print commands, environment and files; run nothing."
    )


def run(args: argparse.Namespace) -> int:
    """Find or start a server, then run the client until it ends."""
    console = Console.from_args(args)
    client = _find(args.client)
    options = shlex.split(args.serve_args)
    choice = choose_server(_status_at(args, console), args.model, args.url, options)
    if args.api_key_file is not None:
        options += ["--api-key-file", args.api_key_file]
    command = () if choice.is_running else serve_command(choice.model, free_port(_PORT), options)
    if args.dry_run:
        plan = _plan(args, client, choice, command)
        console.result(plan, _text(plan))
        return 0
    program = find_program(client.program, client.install)
    with contextlib.ExitStack() as stack:
        url = choice.url
        if command:
            server = stack.enter_context(started_server(command, console.progress, keep=args.keep_server))
            url = server.url
            if args.keep_server:
                console.note(f"the server stays at {url} (process {server.pid}, log {server.log})")
        facts = _facts(args, url, choice)
        for warning in client.warnings(facts):
            console.note(warning)
        folder = Path(stack.enter_context(_temporary_folder(client.name)))
        session = _session(client, facts, folder)
        write_files(folder, session.files)
        return run_program([program, *session.argv, *args.passed_on], _environment(session))


def _runnable() -> list[str]:
    return [name for name, client in all_clients().items() if client.session is not None]


def _find(name: str) -> Client:
    client = find_client(name)
    if client.session is None:
        raise UsageError(
            f"{client.title} is nothing that could be run; `optiq snippet {name}` shows its configuration. "
            f"Clients that can be run: {', '.join(_runnable())}"
        )
    return client


def _temporary_folder(name: str) -> "tempfile.TemporaryDirectory[str]":
    # What a client leaves running may still write there.
    return tempfile.TemporaryDirectory(prefix=f"optiq-{name}-", ignore_cleanup_errors=True)


def _session(client: Client, facts: ClientFacts, folder: Path) -> Session:
    assert client.session is not None
    return client.session(facts, folder)


def _status_at(args: argparse.Namespace, console: Console) -> EngineStatus | None:
    """What a server says of itself; None where nobody answers at the default address, or none of ours."""
    try:
        return _status(args, args.url or _URL, "GET", "/optiq/status")
    except EngineError:
        if args.url is not None:
            raise
    except RequestError as error:
        if args.url is not None:
            raise
        console.note(f"passed by: {error}")
    return None


def _status(args: argparse.Namespace, url: str, method: str, path: str, body: object = None) -> EngineStatus:
    server = argparse.Namespace(url=url, api_key_file=args.api_key_file)
    answer = ask_server(server, method, path, body)
    try:
        return msgspec.convert(answer, EngineStatus)
    except msgspec.ValidationError as error:
        raise RequestError(f"{url}: answers, but not as an optiq server of this version ({error})") from error


def _facts(args: argparse.Namespace, url: str, choice: ServerChoice, *, load: bool = True) -> ClientFacts:
    """What the server says of the model, which is loaded for it, or assumed where it is not to be."""
    status = _status(args, url, "GET", "/optiq/status")
    name = named_as(status, choice.model) or ""
    key = read_api_key(args.api_key_file)
    facts = served_facts(status, url, name, key)
    if facts.is_assumed and load:
        body = {"model": name.partition("@")[0]}
        status = _status(args, url, "POST", "/optiq/models/load", body)
        facts = served_facts(status, url, name, key)
    return facts


def _environment(session: Session) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in session.unset}
    return {**kept, **session.env}


def _plan(args: argparse.Namespace, client: Client, choice: ServerChoice, command: tuple[str, ...]) -> Plan:
    folder = Path(tempfile.gettempdir()) / f"optiq-{client.name}-…"
    key = read_api_key(args.api_key_file)
    if choice.is_running:
        facts = _facts(args, choice.url, choice, load=False)
    else:
        name = Path(choice.model).expanduser().name if Path(choice.model).is_dir() else choice.model
        port = command[command.index("--port") + 1]
        facts = assumed_facts(f"http://127.0.0.1:{port}", name or "MODEL", api_key=key)
    session = _session(client, facts, folder)
    plan = Plan(
        server=command,
        url=facts.url,
        is_assumed=facts.is_assumed,
        argv=(client.program, *session.argv, *args.passed_on),
        env=session.env,
        unset=session.unset,
        files={str(folder / name): text for name, text in session.files.items()},
    )
    return _masked(plan, key)


def _masked(plan: Plan, key: str | None) -> Plan:
    """Without the key, wherever it stands."""
    if not key:
        return plan
    text = msgspec.json.encode(plan).decode().replace(json.dumps(key, ensure_ascii=False)[1:-1], "•••")
    return msgspec.json.decode(text, type=Plan)


def _text(plan: Plan) -> str:
    server = shlex.join(plan.server) if plan.server else f"(runs at {plan.url})"
    lines = [f"server: {server}"]
    if plan.is_assumed:
        lines.append("  (limits below are guesses; those of the session come from the server)")
    lines += ["environment:", *_assignments(plan.env), *(f"  unset {name}" for name in plan.unset)]
    for path, text in plan.files.items():
        lines += [f"file {path}:", *(f"  {line}" for line in text.splitlines())]
    return "\n".join([*lines, f"client: {shlex.join(plan.argv)}"])


def _assignments(env: Mapping[str, str]) -> list[str]:
    return [f"  {name}={shlex.quote(value)}" for name, value in env.items()]
