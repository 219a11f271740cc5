"""Real clients, started by ``optiq run``, against a live server: answers, tools, prefixes, leaving."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from agents.install import CLIENTS, Client
from agents.shots import COUNT, OWN_FILES, SHOTS, TOOL_ANSWER, USE_TOOL
from agents.watch import Live

pytestmark = pytest.mark.clients

_REPOSITORY = Path(__file__).parents[2]
_PATIENCE_S = 300.0
_NOBODY = "http://127.0.0.1:9"
"""A proxy that is not there: whatever is not on this machine cannot be reached."""


@pytest.fixture(params=CLIENTS, ids=lambda client: client.name)
def client(request: pytest.FixtureRequest) -> Client:
    installed: Client = request.param
    skipped = installed.folder / "skipped"
    if skipped.exists():
        pytest.skip(skipped.read_text())
    assert (installed.folder / installed.program).exists(), "run `make test-clients`, which installs it"
    return installed


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A user's, with files that lead elsewhere; beside it a project."""
    texts = {
        tmp_path / name: textwrap.dedent(text) if isinstance(text, str) else json.dumps(text)
        for name, text in OWN_FILES.items()
    }
    for file, text in texts.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    yield tmp_path / "home"
    assert {file: file.read_text() for file in texts} == texts, "nothing of the user's is touched"


def _run(client: Client, words: Sequence[str], home: Path) -> "subprocess.Popen[str]":
    """``optiq run`` in a project, with a home of its own, in a process group of its own."""
    program = (client.folder / client.program).parent
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), _NOBODY)
    env = {
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "PATH": os.pathsep.join([str(program), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(str(_REPOSITORY / each) for each in (".", "integrations", "tui")),
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        **proxies,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_optiq_ext", "run", client.name, *words],
        cwd=home.parent / "project",
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _end(process: "subprocess.Popen[str]", timeout_s: float = _PATIENCE_S) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        # It stops the client, then what it started.
        process.terminate()
        out, err = process.communicate(timeout=60.0)
    return process.returncode, out, err


def test_a_tool_round_trip_reuses_the_first_turn(
    client: Client, served: Live, home: Path, table: dict[str, tuple[int, int, int]]
) -> None:
    before = served.last_line()
    words = ["--url", served.url, "--", *SHOTS[client.name].ask(USE_TOOL)]
    code, out, err = _end(_run(client, words, home))
    log = served.log_after(before)
    assert code == 0, (out, err, log)
    assert TOOL_ANSWER in out, (out, err, log)
    answered = served.answered_after(before)
    assert [each.status for each in answered] == [200, 200], log
    first, second = answered
    table[client.name] = (first.prompt, second.prompt, second.cached)
    assert second.cached >= 0.98 * first.prompt, "all but the end of the first turn is cached"
    assert " 400 " not in log
    assert " 500 " not in log


def test_ctrl_c_takes_the_row_along(client: Client, served: Live, home: Path) -> None:
    shot = SHOTS[client.name]
    cancelled = served.status()["requests_finished"].get("cancelled", 0)
    process = _run(client, ["--url", served.url, "--", *shot.ask(COUNT)], home)
    try:
        served.wait_for(
            lambda status: any(row["completion_tokens"] >= 3 for row in status["rows"]), _PATIENCE_S
        )
        os.killpg(process.pid, signal.SIGINT)
        served.wait_for(lambda status: not status["rows"], 5.0)
        assert served.status()["requests_finished"]["cancelled"] == cancelled + 1
        code, out, err = _end(process, 30.0)
        assert code == shot.stop_code, (out, err)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_real_model_answers(client: Client, smollm2: Path, home: Path) -> None:
    shot = SHOTS[client.name]
    if shot.lean is None:
        pytest.skip(f"SmolLM2 has 8,192 tokens of context: {shot.why_not}")
    began = time.monotonic()
    serve = "--serve-args=--max-tokens 60 --memory 6GB"
    words = ["-m", str(smollm2), serve, "--", *shot.lean("What is the capital of France?")]
    code, out, err = _end(_run(client, words, home), 590.0)
    assert code == 0, (out, err)
    assert len(out.split()) >= 2, (out, err)
    print(f"{client.name} after {time.monotonic() - began:.0f} s: {out.strip()[:300]}")
