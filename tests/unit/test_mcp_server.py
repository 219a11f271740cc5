"""The MCP server, through the protocol's own client in memory and over a real pipe."""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from mcp import StdioServerParameters
from mcp.client.client import Client
from support_tables import make_table

from mlx_optiq_ext.errors import EngineError, RequestError
from mlx_optiq_ext.formats.sensitivity import write_sensitivity
from mlx_optiq_integrations.mcp_jobs import Jobs
from mlx_optiq_integrations.mcp_server import make_mcp_server


class _Server:
    """A running optiq server's answers, and what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, object]] = []

    def __call__(self, method: str, path: str, body: object) -> Any:
        self.asked.append((method, path, body))
        if path == "/optiq/status":
            return {"state": "ready", "models": []}
        if path.startswith("/v1/adapters/none"):
            raise RequestError("there is no adapter 'none'; mounted are: none")
        return {"data": []} if method == "GET" else {"name": "style"}


def _with_client(work: Callable[[Client], Awaitable[None]], server: Any = None) -> None:
    async def run() -> None:
        async with Client(make_mcp_server(server or _Server(), "0")) as client:
            await work(client)

    asyncio.run(run())


def test_tools_are_described_with_what_they_change() -> None:
    async def work(client: Client) -> None:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {
            *("quantize", "score", "job", "list_jobs", "stop_job", "report"),
            *("status", "adapters", "mount_adapter", "unmount_adapter", "use_adapter"),
        }
        for name, tool in tools.items():
            assert tool.annotations is not None
            looks = name in ("job", "list_jobs", "report", "status", "adapters")
            assert tool.annotations.read_only_hint is looks
            assert tool.description
            for field, schema in tool.input_schema.get("properties", {}).items():
                assert schema.get("description"), f"{name}.{field}"
        assert tools["quantize"].input_schema["required"] == ["model", "out", "target"]

    _with_client(work)


def test_the_running_server_is_asked_and_its_refusals_reach_the_agent() -> None:
    server = _Server()

    async def work(client: Client) -> None:
        status = await client.call_tool("status", {})
        assert status.structured_content == {"state": "ready", "models": []}
        await client.call_tool("mount_adapter", {"name": "style", "source": "org/style"})
        await client.call_tool("unmount_adapter", {"name": "a/b c", "model": "m"})
        await client.call_tool("use_adapter", {"name": None})
        refused = await client.call_tool("unmount_adapter", {"name": "none"})
        assert refused.is_error
        assert "mounted are: none" in str(refused.content)

    _with_client(work, server)
    assert server.asked[1:4] == [
        ("POST", "/v1/adapters", {"name": "style", "source": "org/style", "model": ""}),
        ("DELETE", "/v1/adapters/a%2Fb%20c?model=m", None),
        ("POST", "/v1/adapters/use", {"name": None, "model": ""}),
    ]


def test_no_server_is_an_answer_with_what_to_do() -> None:
    def nobody(method: str, path: str, body: object) -> Any:
        raise EngineError("no optiq server answers at http://127.0.0.1:8080; start one, or give --url")

    async def work(client: Client) -> None:
        answer = await client.call_tool("status", {})
        assert answer.is_error
        assert "start one" in str(answer.content)

    _with_client(work, nobody)


@pytest.mark.parametrize(
    ("target", "words"),
    [("4.5", ["--target-bpw", "4.5"]), ("900MB", ["--target-size", "900MB"]), ("fit 8GB", ["--fit", "8GB"])],
)
def test_a_failing_job_says_why_and_stays_listed(target: str, words: list[str], tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")

    async def work(client: Client) -> None:
        started = await client.call_tool(
            "quantize", {"model": missing, "out": str(tmp_path / "out"), "target": target, "wait_s": 60}
        )
        view = started.structured_content
        assert view is not None
        assert view["state"] == "failed"
        assert view["error"].startswith("no folder")
        assert view["command"][:4] == ["optiq", "convert", missing, "-o"]
        assert view["command"][-4:] == [*words, "--context", "8192"]
        listed = await client.call_tool("list_jobs", {})
        assert view["job"] in str(listed.content)
        unknown = await client.call_tool("job", {"name": "no-1"})
        assert unknown.is_error
        assert view["job"] in str(unknown.content)

    _with_client(work)


def test_waiting_ends_while_the_job_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "mlx_optiq_ext"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import sys, time\n"
        'print(\'{"stage": "measure", "done": 1, "total": 9}\', file=sys.stderr, flush=True)\n'
        "time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    seen: list[int] = []

    async def run() -> None:
        jobs = Jobs()

        async def note(progress: Any) -> None:
            seen.append(progress.done)

        name = await jobs.start(["convert", "x"])
        view: dict[str, Any] = {}
        while not seen:
            view = await jobs.wait(name, 0.2, note)
        assert view["state"] == "running"
        assert view["progress"]["total"] == 9
        assert (await jobs.stop(name))["state"] == "stopped"
        assert (await jobs.wait(name, 60, note))["error"].endswith("goes on from here")

    asyncio.run(run())
    assert seen[0] == 1


def test_reports_leave_every_tensor_out_unless_asked(tmp_path: Path) -> None:
    table = tmp_path / "sensitivity.json"
    write_sensitivity(table, make_table())

    async def work(client: Client) -> None:
        short = (await client.call_tool("report", {"folder": str(table)})).structured_content
        long = (await client.call_tool("report", {"folder": str(table), "tensors": True})).structured_content
        assert short is not None
        assert long is not None
        assert "facts" in short
        assert set(long) - set(short) == {"heat_map"}

    _with_client(work)


def test_the_command_speaks_over_a_pipe() -> None:
    async def run() -> None:
        program = StdioServerParameters(
            command=sys.executable,
            args=["-m", "mlx_optiq_ext", "mcp", "--url", "http://127.0.0.1:9"],
            env={"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        async with Client(program) as client:
            assert len((await client.list_tools()).tools) == 11
            answer = await client.call_tool("adapters", {})
            assert answer.is_error
            assert "no optiq server answers at http://127.0.0.1:9" in str(answer.content)

    asyncio.run(run())
