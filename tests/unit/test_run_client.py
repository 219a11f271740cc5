"""``optiq run``: which server, which configuration, and what becomes of both."""

import json
import os
import sys
import textwrap
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mlx_optiq_ext.cli.commands import run as command
from mlx_optiq_ext.cli.main import main
from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.types.status import EngineStatus, ServedModel
from mlx_optiq_integrations.client import all_clients
from mlx_optiq_integrations.facts import ClientFacts
from mlx_optiq_integrations.launch_choice import choose_server, named_as

MODEL = ServedModel(id="tiny", aliases=("small",), source="org/tiny", loaded=True, created=0, context=65536)
STATUS = EngineStatus(state="ready", version="1", uptime_s=1.0, models=(MODEL,))
GOLDEN = Path(__file__).parents[1] / "golden" / "run"
FACTS = ClientFacts(
    url="http://127.0.0.1:8080",
    model="org/My-Model",
    context=65536,
    max_output=16384,
    sees_images=True,
    thinks=True,
)
RUNNABLE = ("claude-code", "codex", "hermes", "openclaw", "opencode")

FAKE_CLIENT = """\
    #!{python}
    import json, os, pathlib, sys
    words = [word for word in sys.argv if word.endswith("settings.json")]
    seen = {{"argv": sys.argv[1:], "env": dict(os.environ)}}
    seen["files"] = {{word: pathlib.Path(word).read_text() for word in words}}
    pathlib.Path({seen!r}).write_text(json.dumps(seen))
    sys.exit(3)
"""
FAKE_SERVER = """\
    import json, sys, time
    sys.stderr.write("INFO loaded\\n")
    pathlib = __import__("pathlib")
    pathlib.Path({seen!r}).write_text(json.dumps([__import__("os").getpid(), *sys.argv[1:]]))
    print(json.dumps({{"url": {url!r}}}), flush=True)
    time.sleep(60)
"""


_asked: list[str] = []
"""Of the server, by its clients."""


class _Answers(BaseHTTPRequestHandler):
    told = STATUS

    def do_GET(self) -> None:
        _asked.append(f"GET {self.path}")
        body = msgspec.json.encode(self.told) if self.path == "/optiq/status" else b'{"ok": true}'
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        _asked.append(f"POST {self.path}")
        body = msgspec.json.encode(STATUS)
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def url() -> Iterator[str]:
    """A server that says of itself what ours does."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(autouse=True)
def _nothing_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.delenv("OPTIQ_API_KEY", raising=False)
    # Whatever listens on the default port of this machine is none of ours.
    monkeypatch.setattr(command, "_URL", "http://127.0.0.1:9")


@pytest.fixture
def claude(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that writes what it sees, and ends with 3."""
    program = tmp_path / "bin" / "claude"
    program.parent.mkdir()
    seen = tmp_path / "client.json"
    program.write_text(textwrap.dedent(FAKE_CLIENT).format(python=sys.executable, seen=str(seen)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return seen


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> Path:
    """A program in place of ``optiq serve`` that writes its arguments."""
    seen, program = tmp_path / "server.json", tmp_path / "serve.py"
    program.write_text(textwrap.dedent(FAKE_SERVER).format(seen=str(seen), url=url))

    def serve(model: str, port: int, options: list[str]) -> tuple[str, ...]:
        return (sys.executable, str(program), model, str(port), *options)

    monkeypatch.setattr(command, "serve_command", serve)
    return seen


def test_a_server_that_answers_is_reused(url: str, claude: Path, tmp_path: Path) -> None:
    assert main(["run", "claude-code", "-m", "small", "--url", url, "--", "-p", "hi", "--json"]) == 3
    seen = json.loads(claude.read_text())
    assert seen["argv"][2:] == ["-p", "hi", "--json"]
    [text] = seen["files"].values()
    settings = json.loads(text)
    assert settings["permissions"] == {"defaultMode": "default"}
    assert settings["env"]["ANTHROPIC_BASE_URL"] == url
    assert settings["env"]["ANTHROPIC_MODEL"] == "tiny"
    assert settings["env"]["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "65536"
    assert list((tmp_path / "tmp").iterdir()) == [], "nothing is left behind"


def test_a_variable_that_would_mislead_the_client_is_taken_away(
    url: str, claude: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "of the user")
    main(["run", "claude-code", "--url", url])
    assert "ANTHROPIC_API_KEY" not in json.loads(claude.read_text())["env"]


def test_a_server_is_started_for_the_session_only(claude: Path, started: Path, tmp_path: Path) -> None:
    words = ["run", "claude-code", "-m", "org/tiny", "--serve-args=--context 4096 --kv-config 'a b'"]
    assert main(words) == 3
    pid, model, _, *options = json.loads(started.read_text())
    assert [model, *options] == [
        "org/tiny",
        "--context",
        "4096",
        "--kv-config",
        "a b",
        "--json",
        "--progress-json",
    ]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    [settings] = json.loads(claude.read_text())["files"].values()
    assert json.loads(settings)["env"]["ANTHROPIC_MODEL"] == "tiny"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_server_that_is_kept_is_told(
    claude: Path, started: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "claude-code", "-m", "org/tiny", "--keep-server"]) == 3
    pid = json.loads(started.read_text())[0]
    assert f"process {pid}" in capsys.readouterr().err
    os.kill(pid, 9)


def test_a_client_that_is_missing_starts_nothing(
    started: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["run", "codex", "-m", "org/tiny"]) == 2
    assert "install it with `npm install -g @openai/codex`" in capsys.readouterr().err
    assert not started.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["emacs"], "no client 'emacs'; there are: "),
        (["curl"], "`optiq snippet curl` shows its configuration"),
        (["codex"], "give -m MODEL to start one"),
        (["codex", "--url", "http://127.0.0.1:9"], "no optiq server answers at http://127.0.0.1:9"),
    ],
)
def test_what_cannot_be_had_is_said(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *words]) != 0
    assert message in capsys.readouterr().err


def test_another_program_on_the_default_port_is_passed_by_aloud(
    url: str, started: Path, claude: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_URL", f"{url}/something")
    assert main(["run", "claude-code", "-m", "org/tiny"]) == 3
    assert "passed by: " in capsys.readouterr().err
    assert started.exists()
    assert main(["run", "claude-code", "--url", f"{url}/something"]) != 0
    assert "not as an optiq server of this version" in capsys.readouterr().err


def test_a_given_url_is_never_left_for_another_server(url: str) -> None:
    with pytest.raises(UsageError, match="serves tiny, not other; without --url one is started"):
        choose_server(STATUS, "other", url, [])
    with pytest.raises(UsageError, match="--serve-args are for a server that is started"):
        choose_server(STATUS, "tiny", url, ["--context", "4096"])


def test_a_server_with_another_model_is_left_alone() -> None:
    choice = choose_server(STATUS, "other", None, [])
    assert not choice.is_running
    assert not choose_server(STATUS, "tiny", None, ["--context", "4096"]).is_running
    assert choose_server(STATUS, "org/tiny", None, []).is_running


def test_a_model_is_known_by_name_alias_repository_and_folder(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    for name in ("", "tiny", "small", "org/tiny", str(tmp_path / "tiny")):
        assert named_as(STATUS, name) == "tiny"
    assert named_as(STATUS, "small@sql") == "tiny@sql"
    assert named_as(STATUS, "org/other") is None


def test_a_dry_run_shows_all_and_runs_nothing(
    claude: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTIQ_API_KEY", "a-secret")
    assert main(["run", "claude-code", "-m", "org/tiny", "--dry-run", "--json", "--", "-c"]) == 0
    shown = capsys.readouterr().out
    plan = json.loads(shown)
    assert plan["server"][1:6] == ["-m", "mlx_optiq_ext", "serve", "--model", "org/tiny"]
    assert plan["argv"][0] == "claude"
    assert plan["argv"][-1] == "-c"
    [settings] = plan["files"].values()
    assert json.loads(settings)["env"]["ANTHROPIC_AUTH_TOKEN"] == "•••"
    assert "ANTHROPIC_API_KEY" in plan["unset"]
    assert "a-secret" not in shown
    assert not claude.exists()


def test_a_dry_run_loads_no_model_of_a_running_server(
    url: str, claude: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = msgspec.structs.replace(MODEL, loaded=False, context=0)
    monkeypatch.setattr(_Answers, "told", msgspec.structs.replace(STATUS, models=(idle,)))
    _asked.clear()
    assert main(["run", "claude-code", "-m", "tiny", "--url", url, "--dry-run", "--json"]) == 0
    assert {each.partition(" ")[0] for each in _asked} == {"GET"}
    plan = json.loads(capsys.readouterr().out)
    assert plan["is_assumed"]
    assert plan["server"] == []
    assert main(["run", "claude-code", "-m", "tiny", "--url", url]) == 3
    assert "POST /optiq/models/load" in _asked, "a session loads it"


def test_a_dry_run_reads_as_text(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "codex", "--url", url, "--dry-run", "--", "exec", "a b"]) == 0
    shown = capsys.readouterr().out
    assert f"server: (runs at {url})" in shown
    assert "model_context_window=65536" in shown
    assert shown.endswith("exec 'a b'\n")


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_session_of_each_client_is_the_golden_one(name: str) -> None:
    client = all_clients()[name]
    assert client.session is not None
    session = client.session(FACTS, Path("/folder"))
    document = msgspec.json.format(msgspec.json.encode(session), indent=2).decode() + "\n"
    golden = GOLDEN / f"{name}.json"
    if os.environ.get("OPTIQ_WRITE_GOLDEN"):
        golden.write_text(document)
    assert document == golden.read_text()


def test_what_will_not_work_is_said_before_the_client_starts(
    url: str, claude: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["run", "claude-code", "--url", url])
    assert "tiny has no tool calls in its chat template" in capsys.readouterr().err
