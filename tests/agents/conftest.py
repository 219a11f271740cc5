"""A live ``optiq serve`` for real clients, and the table of what they cost."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from agents.install import ROOT
from agents.scripted_model import scripted_model
from agents.shots import RULES
from agents.watch import Live, wait_until_listening
from mlx_optiq_ext.cli.served_models import find_models
from mlx_optiq_ext.types.progress import ignore_progress
from mlx_optiq_ext.types.serve import ServeOptions

_TABLE: dict[str, tuple[int, int, int]] = {}
_REPORT = ROOT / "report.md"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real small model: the folder that OPTIQ_TEST_MODEL names, else the one of ``--demo-model``."""
    named = os.environ.get("OPTIQ_TEST_MODEL")
    return Path(named or find_models(ServeOptions(demo_model=True), ignore_progress)[0].ref.path)


@pytest.fixture(scope="session")
def served(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The scripted model behind the server's own command."""
    folder = tmp_path_factory.mktemp("scripted")
    rules = folder / "rules.json"
    rules.write_bytes(msgspec.json.encode(RULES))
    model = scripted_model(folder / "scripted", smollm2)
    script = Path(__file__).with_name("scripted_server.py")
    words = ["--model", str(model), "--port", "0", "--json", "--memory", "6GB"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(script), str(rules), *words], stdout=subprocess.PIPE, stderr=log
        )
    try:
        yield Live(wait_until_listening(process, folder / "log"))
    finally:
        process.terminate()
        assert process.wait(60) == 0, "SIGTERM is a clean stop"


@pytest.fixture(scope="session")
def table() -> dict[str, tuple[int, int, int]]:
    """By client: prompt tokens of turn 1, prompt tokens of turn 2, those of them that were cached."""
    return _TABLE


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the table, and keep it beside the clients."""
    if not _TABLE:
        return
    lines = [
        "| client | prompt tokens, turn 1 | prompt tokens, turn 2 | of these cached |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {first:,} | {second:,} | {cached:,} |"
        for name, (first, second, cached) in _TABLE.items()
    ]
    _REPORT.write_text("\n".join(lines) + "\n")
    terminalreporter.section("what clients cost")
    for line in lines:
        terminalreporter.write_line(line)
