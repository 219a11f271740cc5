"""The entry point: dispatch, exit codes, errors for people and for programs."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from mlx_optiq_ext import __version__
from mlx_optiq_ext.cli import main as entry
from mlx_optiq_ext.errors import BudgetInfeasible, ModelNotFound, ResourceError
from mlx_optiq_ext.stop import clean_stop

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def install_command(monkeypatch):
    """Put a command in place of ``optiq allocate`` whose ``run`` is the given function."""

    def install(run, *, resumes=False):
        module = ModuleType("fake_command")
        module.__doc__ = "Do nothing, for a test."
        module.add_arguments = lambda parser: parser.add_argument("table", help="A table.")
        module.run = run
        command = entry.Command(name="allocate", resumes=resumes)
        monkeypatch.setitem(entry.COMMANDS, "allocate", command)
        monkeypatch.setitem(sys.modules, command.module, module)

    return install


def _raising(error):
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


def test_version_is_printed_and_succeeds(capsys) -> None:
    assert entry.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mlx-optiq-ext {__version__}\n"


def test_help_lists_every_command(capsys) -> None:
    assert entry.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", out, re.MULTILINE) for name in entry.COMMANDS)


def test_no_command_shows_the_help_on_stderr_and_fails(capsys) -> None:
    assert entry.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "commands:" in captured.err


def test_unknown_command_names_the_known_ones(capsys) -> None:
    assert entry.main(["quantize"]) == 2
    assert "'quantize'" in (err := capsys.readouterr().err)
    assert "import-gguf" in err


def test_run_receives_the_parsed_arguments_and_its_code_is_returned(install_command) -> None:
    seen = []
    install_command(lambda args: seen.append((args.table, args.json, args.quiet)) or 3)
    assert entry.main(["allocate", "a.json", "--quiet"]) == 3
    assert seen == [("a.json", False, True)]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BudgetInfeasible("too small"), 2),
        (ModelNotFound("no such folder"), 3),
        (ResourceError("disk full"), 6),
    ],
)
def test_our_errors_are_one_line_and_their_own_exit_code(install_command, capsys, error, code) -> None:
    install_command(_raising(error))
    assert entry.main(["allocate", "a.json"]) == code
    captured = capsys.readouterr()
    assert captured.err == f"optiq: {error}\n"
    assert captured.out == ""


def test_errors_are_one_json_document_with_json(install_command, capsys) -> None:
    install_command(_raising(BudgetInfeasible("3.2 bpw is below 4.5")))
    assert entry.main(["allocate", "a.json", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document == {
        "error": {"type": "BudgetInfeasible", "message": "3.2 bpw is below 4.5", "exit_code": 2}
    }


def test_usage_mistakes_are_reported_like_every_other_error(install_command, capsys) -> None:
    install_command(lambda args: 0)
    assert entry.main(["allocate", "a.json", "--no-such-flag", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["error"]["type"] == "UsageError"
    assert "--no-such-flag" in document["error"]["message"]


def test_unexpected_error_says_how_to_see_more_and_exits_1(install_command, capsys, caplog) -> None:
    install_command(_raising(ZeroDivisionError("division by zero")))
    with caplog.at_level("DEBUG", logger="mlx_optiq_ext"):
        assert entry.main(["allocate", "a.json"]) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError: division by zero" in err
    assert "--debug" in err
    assert "Traceback" not in err
    assert caplog.records[-1].exc_info is not None


def test_an_mlx_that_does_not_start_sends_to_the_doctor(install_command, capsys) -> None:
    install_command(_raising(ImportError("libcuda.so.1: cannot open shared object file", name="mlx.core")))
    assert entry.main(["allocate", "a.json"]) == 1
    err = capsys.readouterr().err
    assert "mlx does not start (libcuda.so.1: cannot open shared object file); `optiq doctor`" in err


@pytest.mark.parametrize(("resumes", "hint"), [(True, "same command again"), (False, "half-written")])
def test_interrupt_exits_130_and_says_what_now(install_command, capsys, resumes, hint) -> None:
    install_command(_raising(KeyboardInterrupt()), resumes=resumes)
    assert entry.main(["allocate", "a.json"]) == 130
    assert hint in capsys.readouterr().err


def test_a_stopped_command_may_say_itself_what_is_left_to_do(install_command, capsys) -> None:
    stop = KeyboardInterrupt()
    stop.add_note("out is complete but not scored; `optiq score m out` does that")
    install_command(_raising(stop), resumes=True)
    assert entry.main(["allocate", "a.json"]) == 130
    err = capsys.readouterr().err
    assert "out is complete but not scored; `optiq score m out` does that" in err
    assert "same command again" not in err


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_termination_signal_is_a_clean_stop(install_command, capsys, signum, code) -> None:
    cleaned = []

    def run(args) -> int:
        try:
            os.kill(os.getpid(), signum)
            time.sleep(5)
        finally:
            cleaned.append(True)
        return 0

    install_command(run, resumes=True)
    before = signal.signal(signum, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        assert entry.main(["allocate", "a.json"]) == code
        assert cleaned == [True]
        assert "optiq: stopped; run the same command again" in capsys.readouterr().err
        assert signal.getsignal(signum) is signal.SIG_DFL
    finally:
        signal.signal(signum, before)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with clean_stop():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_command_that_is_not_installed_says_so(monkeypatch, capsys) -> None:
    monkeypatch.setitem(entry.COMMANDS, "gone", entry.Command(name="gone"))
    assert entry.main(["gone"]) == 2
    assert "not part of this installation" in capsys.readouterr().err


def test_a_broken_import_inside_a_command_is_not_taken_for_a_missing_command(monkeypatch, capsys) -> None:
    def import_module(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'mlx'", name="mlx")

    monkeypatch.setattr(entry.importlib, "import_module", import_module)
    assert entry.main(["allocate", "x"]) == 1
    assert "No module named 'mlx'" in capsys.readouterr().err


def test_summary_is_the_first_line_of_the_docstring_without_importing() -> None:
    sys.modules.pop("mlx_optiq_ext.cli.commands.doctor", None)
    assert entry.summary(entry.COMMANDS["doctor"]).startswith("Check this machine")
    assert "mlx_optiq_ext.cli.commands.doctor" not in sys.modules


def test_closed_pipe_ends_quietly() -> None:
    script = f"{sys.executable} -m mlx_optiq_ext doctor | true"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_help_takes_less_than_a_third_of_a_second_more_than_python_itself() -> None:
    def seconds(*words: str) -> float:
        start = time.perf_counter()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, *words], capture_output=True, check=True, env=environment)
        return time.perf_counter() - start

    # Best of five: the machine may be busy.
    ours = min(seconds("-m", "mlx_optiq_ext", "--help") for _ in range(5))
    bare = min(seconds("-c", "pass") for _ in range(5))
    assert ours - bare < 0.3
