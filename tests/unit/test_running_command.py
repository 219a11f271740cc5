"""Commands of our own as processes that are followed."""

import asyncio
import json
from pathlib import Path

import pytest

from mlx_optiq_integrations.command import CommandFailed, CommandProgress, RunningCommand


def _followed(command: RunningCommand, *lines: str) -> RunningCommand:
    """Give it the lines of a progress stream without a process."""

    async def feed() -> None:
        stream = asyncio.StreamReader()
        stream.feed_data("".join(f"{line}\n" for line in lines).encode())
        stream.feed_eof()
        await command._read_progress(stream)

    asyncio.run(feed())
    return command


def test_a_command_gives_its_document() -> None:
    async def run() -> object:
        command = RunningCommand(("lora", "info", "--help"))
        await command.start()
        assert command.is_running
        return await command.wait()

    assert asyncio.run(run()) is None, "help is no JSON document"


def test_a_failure_carries_the_commands_own_words_and_code(tmp_path: Path) -> None:
    async def run() -> RunningCommand:
        command = RunningCommand(("report", str(tmp_path / "missing")))
        await command.start()
        with pytest.raises(CommandFailed, match="missing"):
            await command.wait()
        return command

    command = asyncio.run(run())
    assert command.exit_code is not None
    assert command.exit_code > 0
    assert not command.is_running


def test_a_command_that_is_killed_says_by_what(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setattr("mlx_optiq_integrations.command.sys.executable", str(program))

    async def run() -> None:
        command = RunningCommand(("convert",))
        await command.start()
        with pytest.raises(CommandFailed, match="ended by SIGKILL; the system may have been out of memory"):
            await command.wait()

    asyncio.run(run())


def test_lines_are_told_apart() -> None:
    step = {"stage": "train", "done": 3, "total": 9, "seconds_left": None, "values": {"loss": 1.5}, "new": 1}
    command = _followed(
        RunningCommand(("x",)),
        json.dumps({"note": "8 units are pinned"}),
        "WARNING mlx: plain text",
        json.dumps(step),
        json.dumps({"ranks": {"a.b": 4}}),
        "[1, 2]",
    )
    assert command.notes == ["8 units are pinned", "WARNING mlx: plain text", "[1, 2]"]
    assert command.progress == CommandProgress(stage="train", done=3, total=9, values={"loss": 1.5})
    assert command.said == {"ranks": {"a.b": 4}}


def test_notes_are_bounded_and_the_newest_stay() -> None:
    command = _followed(RunningCommand(("x",)), *(json.dumps({"note": str(k)}) for k in range(1000)))
    assert len(command.notes) == 200
    assert command.notes[-1] == "999"


def test_changes_end_with_the_command_and_show_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> tuple[list[int], RunningCommand]:
        command = RunningCommand(("x",))
        out, err = asyncio.StreamReader(), asyncio.StreamReader()

        class _Process:
            pid, returncode, stdout, stderr = 0, None, out, err

            async def wait(self) -> int:
                return 0

        command._follower = asyncio.create_task(command._follow(_Process()))  # type: ignore[arg-type]
        seen: list[int] = []

        async def read() -> None:
            seen.extend([progress.done async for progress in command.changes()])

        reader = asyncio.create_task(read())
        for done in range(3):
            err.feed_data(json.dumps({"stage": "s", "done": done, "total": 2}).encode() + b"\n")
            await asyncio.sleep(0.01)
        out.feed_data(b'{"path": "there"}')
        out.feed_eof()
        err.feed_eof()
        await asyncio.wait_for(reader, 5)
        return seen, command

    seen, command = asyncio.run(run())
    assert seen == [0, 1, 2]
    assert command.result == {"path": "there"}
    assert command.exit_code == 0


def test_a_stopped_command_says_that_it_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "mlx_optiq_ext"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import sys, time\n"
        'print(\'{"stage": "s", "done": 0, "total": 1}\', file=sys.stderr, flush=True)\n'
        "time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    async def run() -> RunningCommand:
        command = RunningCommand(())
        await command.start()
        async for _ in command.changes():
            break
        await command.close()
        with pytest.raises(CommandFailed, match="goes on"):
            await command.wait()
        return command

    monkeypatch.chdir(tmp_path)
    assert asyncio.run(run()).exit_code == -15
