"""Entry point of ``optiq``: find the command, run it, turn errors into exit codes.

Knows the names of the commands and nothing of what they do; a command's module is imported only when the
command is called, so ``optiq --help`` is instant and needs no MLX. Called by the console script and by
``python -m mlx_optiq_ext``.
"""

import argparse
import ast
import importlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import msgspec

from mlx_optiq_ext import __version__
from mlx_optiq_ext.blas import preload_blas
from mlx_optiq_ext.errors import OptiqError, UsageError
from mlx_optiq_ext.stop import clean_stop, exit_code

__all__ = ["COMMANDS", "Command", "HelpFormatter", "command_parser", "main", "summary"]

_EXIT_UNEXPECTED = 1
_log = logging.getLogger(__name__)


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """Where a command lives and what it needs from the entry point."""

    name: str
    needs_mlx: bool = False
    """The fast BLAS is loaded before the command's module is imported."""
    resumes: bool = False
    """Running the same command again continues where it was stopped."""
    passes_on: bool = False
    """Words after ``--`` are another program's; its ``run`` finds them as ``args.passed_on``."""

    @property
    def module(self) -> str:
        """Dotted name of the module with ``add_arguments`` and ``run``; a group is a package of its own."""
        group, _, name = self.name.replace("-", "_").rpartition(" ")
        return f"mlx_optiq_ext.cli.{group or 'commands'}.{name}"


COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        Command(name="convert", needs_mlx=True, resumes=True),
        Command(name="measure", needs_mlx=True, resumes=True),
        Command(name="allocate"),
        Command(name="kv-cache", needs_mlx=True, resumes=True),
        Command(name="score", needs_mlx=True),
        Command(name="serve", needs_mlx=True),
        Command(name="lora train", needs_mlx=True, resumes=True),
        Command(name="lora info", needs_mlx=True),
        Command(name="lora merge", needs_mlx=True),
        Command(name="lora fuse", needs_mlx=True),
        Command(name="lora export", needs_mlx=True),
        Command(name="adapters list"),
        Command(name="adapters mount"),
        Command(name="adapters unmount"),
        Command(name="adapters use"),
        Command(name="run", passes_on=True),
        Command(name="tui"),
        Command(name="lab"),
        Command(name="mcp"),
        Command(name="snippet"),
        Command(name="report"),
        Command(name="import-gguf"),
        Command(name="doctor", needs_mlx=True),
    )
}


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises our error in place of leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``optiq`` and return its exit code.

    Args:
        argv: Arguments without the program name; None takes them from ``sys.argv``.
    Returns:
        0 on success, else the ``exit_code`` of the error (see :mod:`mlx_optiq_ext.errors`), 1 for an
        unexpected error, 130 after an interrupt, 143 after SIGTERM, 129 after SIGHUP.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    command = COMMANDS.get(" ".join(words[:2])) or COMMANDS.get(" ".join(words[:1]))
    passed_on: list[str] = []
    if command is not None and command.passes_on and "--" in words:
        words, passed_on = words[: words.index("--")], words[words.index("--") + 1 :]
    wants_json = "--json" in words
    try:
        if command is None:
            return _top_level(words)
        with clean_stop():
            return _run(command, words[1 + command.name.count(" ") :], passed_on)
    except OptiqError as error:
        _report(error, error.exit_code, wants_json)
        return error.exit_code
    except KeyboardInterrupt as stop:
        print(f"\noptiq: stopped; {_what_now(stop, command)}", file=sys.stderr)
        return exit_code(stop)
    except BrokenPipeError:
        # The reader of our output went away; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_UNEXPECTED
    except Exception as error:  # noqa: BLE001 - the border where the unexpected is logged and reported
        _log.debug("unexpected error", exc_info=True)
        unexpected = RuntimeError(_unexpected(error))
        _report(unexpected, _EXIT_UNEXPECTED, wants_json, kind=type(error).__name__)
        return _EXIT_UNEXPECTED


def _run(command: Command, words: Sequence[str], passed_on: Sequence[str]) -> int:
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    if "--debug" in words:
        logging.getLogger("mlx_optiq_ext").setLevel(logging.DEBUG)
    if command.needs_mlx and not {"-h", "--help"}.intersection(words):
        preload_blas()
    parser, module = command_parser(command)
    args = parser.parse_args(words)
    if command.passes_on:
        args.passed_on = tuple(passed_on)
    code = module.run(args)
    sys.stdout.flush()
    return int(code or 0)


def command_parser(command: Command) -> tuple[argparse.ArgumentParser, ModuleType]:
    """Import one command's module and build its parser.

    Returns:
        The parser, and the module whose ``run`` takes the parsed namespace.
    Raises:
        UsageError: The module is not part of this installation.
    """
    try:
        module = importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        if error.name != command.module:
            raise
        raise UsageError(
            f"`optiq {command.name}` is not part of this installation ({command.module})"
        ) from None
    parser = _Parser(
        prog=f"optiq {command.name}",
        description=(module.__doc__ or "").strip().split("\n\n")[0],
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="Print one JSON document on stdout.")
    group.add_argument("--quiet", action="store_true", help="Draw no progress.")
    group.add_argument(
        "--progress-json", action="store_true", help="Write progress on stderr as one JSON object a line."
    )
    group.add_argument("--debug", action="store_true", help="Show debug messages and tracebacks.")
    parser.usage = _usage(parser) + (" [-- ARGUMENTS…]" if command.passes_on else "")
    return parser, module


def summary(command: Command) -> str:
    """First line of a command module's docstring, read without importing the module."""
    spec = importlib.util.find_spec(command.module)
    if spec is None or spec.origin is None:
        return "(not part of this installation)"
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
    return (docstring or "").split("\n")[0].rstrip(".")


def _usage(parser: argparse.ArgumentParser) -> str:
    """One line: what must be given, then ``[options]``; the options are listed below it anyway."""
    words = [parser.prog]
    for action in parser._actions:
        if not action.option_strings:
            name = str(action.metavar or action.dest.upper())
            words.append({"+": f"{name}…", "*": f"[{name}…]", "?": f"[{name}]"}.get(str(action.nargs), name))
        elif action.required:
            words.append(f"{action.option_strings[0]} {action.metavar or action.dest.upper()}")
    return " ".join([*words, "[options]"])


def _unexpected(error: Exception) -> str:
    if isinstance(error, ImportError) and (error.name or "").split(".")[0] == "mlx":
        return f"mlx does not start ({error}); `optiq doctor` says what would help"
    return f"unexpected {type(error).__name__}: {error}; --debug shows the traceback"


def _what_now(stop: KeyboardInterrupt, command: Command | None) -> str:
    """What the stopped command says of itself (its exception's notes), else whether it can go on."""
    said = getattr(stop, "__notes__", ())
    if said:
        return "; ".join(said)
    if command is not None and command.resumes:
        return "run the same command again to go on from here"
    return "nothing was left half-written"


def _top_level(words: Sequence[str]) -> int:
    """Answer ``--help`` and ``--version``, also of a group of commands; anything else is a mistake."""
    group = words[0] if words and any(name.startswith(f"{words[0]} ") for name in COMMANDS) else ""
    commands = [command for command in COMMANDS.values() if command.name.startswith(group)]
    parser = _Parser(
        prog=f"optiq {group}".strip(),
        usage=f"{' '.join(filter(None, ('optiq', group)))} COMMAND [options]",
        description="Make, tune and serve local language models with MLX.",
        epilog="Options of a command: optiq COMMAND --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mlx-optiq-ext {__version__}")
    section = parser.add_argument_group("commands")
    wants_help = bool({"-h", "--help"}.intersection(words))
    if wants_help or list(words) in ([], [group]):
        for command in commands:
            section.add_argument(f"{command.name:12s}", nargs="?", help=summary(command))
        parser.print_help(sys.stdout if wants_help else sys.stderr)
        return 0 if wants_help else UsageError.exit_code
    if words[0].startswith("-"):
        try:
            parser.parse_args(words)
        except SystemExit as leaving:
            return int(leaving.code or 0)
    unknown = " ".join(words[:2]) if group else words[0]
    raise UsageError(
        f"no command {unknown!r}; commands are {', '.join(command.name for command in commands)}"
    )


class HelpFormatter(argparse.HelpFormatter):
    """Help that is the same on every terminal and Python: fixed width, ``-o, --out OUT``."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, action.dest.upper())
        return f"{', '.join(action.option_strings)} {value}"


def _report(error: Exception, exit_code: int, as_json: bool, kind: str = "") -> None:
    if as_json:
        document = {"type": kind or type(error).__name__, "message": str(error), "exit_code": exit_code}
        print(json.dumps({"error": document}, ensure_ascii=False))
    print(f"optiq: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
