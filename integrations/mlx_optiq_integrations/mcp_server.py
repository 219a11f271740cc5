"""An MCP server that lets agents quantize and score models and look after a running server.

Needs the extra ``mcp`` (the official Model Context Protocol SDK). Models are touched by commands in processes
of their own (``command``) and by the running server over HTTP; here are only names, words and answers.
Source: Model Context Protocol specification (modelcontextprotocol.io).
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeAlias, TypeVar
from urllib.parse import quote

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import Field

from mlx_optiq_ext.errors import OptiqError
from mlx_optiq_integrations.command import CommandProgress
from mlx_optiq_integrations.mcp_jobs import Jobs, OnProgress, run_short

__all__ = ["Ask", "make_mcp_server"]

Ask: TypeAlias = Callable[[str, str, object], Any]
"""Method, path and body of a request to the running server; its answer, or an OptiqError."""

Answer = TypeVar("Answer")

_WAIT_S = 45.0
_LOOKS = ToolAnnotations(read_only_hint=True)
_STARTS = ToolAnnotations(read_only_hint=False, destructive_hint=False)
_CHANGES = ToolAnnotations(read_only_hint=False, destructive_hint=True, idempotent_hint=True)
_INSTRUCTIONS = """\
Quantize MLX language models by measured sensitivity, score them, and look after a running `optiq serve`.
quantize and score take minutes to hours: they answer after wait_s with a job; ask `job` again until its
state is finished, failed or stopped. The same call after a stop goes on from where it was. Bits count
everything that is stored (scales included). Divergence is KL(reference || quantized) in nats per token."""

Wait: TypeAlias = Annotated[float, Field(ge=0, le=600, description="Seconds to wait for the end.")]
Name: TypeAlias = Annotated[str, Field(description="Name of a job, as quantize or score gave it.")]
Adapter: TypeAlias = Annotated[str, Field(description="Name of an adapter, as requests call it.")]
Model: TypeAlias = Annotated[str, Field(description="Which of several served models; empty: the default.")]


def make_mcp_server(ask: Ask, version: str) -> MCPServer[Any]:
    """Build the server; ``run()`` on it speaks over stdin and stdout.

    Args:
        ask: Talks to the running optiq server; called on other threads.
        version: Told to clients.
    """
    jobs = Jobs()

    @asynccontextmanager
    async def lifespan(_: MCPServer[Any]) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await jobs.close()

    server: MCPServer[Any] = MCPServer(
        "optiq", instructions=_INSTRUCTIONS, version=version, lifespan=lifespan, log_level="WARNING"
    )
    _add_job_tools(server, jobs)
    _add_server_tools(server, ask)
    return server


def _add_job_tools(server: MCPServer[Any], jobs: Jobs) -> None:
    async def begin(words: list[str], wait_s: float, ctx: Context[Any, Any]) -> dict[str, Any]:
        name = await _said(jobs.start(words))
        return await _said(jobs.wait(name, wait_s, _reporter(ctx)))

    @server.tool(annotations=_STARTS)
    async def quantize(
        ctx: Context[Any, Any],
        model: Annotated[str, Field(description="Hub repository or folder of the unquantized model.")],
        out: Annotated[str, Field(description="Folder to make; must not exist.")],
        target: Annotated[
            str,
            Field(
                description="Ceiling: stored bits per weight ('4.5'), bytes of the weights ('4.5GB'), or "
                "memory that weights, KV cache at context and head room fit into ('fit 8GB')."
            ),
        ],
        context: Annotated[int, Field(ge=1, description="Tokens of context that 'fit' is for.")] = 8192,
        wait_s: Wait = _WAIT_S,
    ) -> dict[str, Any]:
        """Make a mixed-precision MLX checkpoint: measure sensitivity, choose bits, write, verify, score."""
        words = ["convert", model, "-o", out, *_budget(target), "--context", str(context)]
        return await begin(words, wait_s, ctx)

    @server.tool(annotations=_STARTS)
    async def score(
        ctx: Context[Any, Any],
        reference: Annotated[str, Field(description="The unquantized model: Hub repository or folder.")],
        candidates: Annotated[list[str], Field(description="Checkpoints made from it.")],
        uniform: Annotated[
            str, Field(description="Also score these uniform quantizations: such as 4,5,6g32.")
        ] = "",
        num_tokens: Annotated[int, Field(ge=256, description="Held-out tokens.")] = 2048,
        wait_s: Wait = _WAIT_S,
    ) -> dict[str, Any]:
        """Compare checkpoints with their reference on held-out text: divergence, with intervals."""
        words = ["score", reference, *candidates, "--num-tokens", str(num_tokens)]
        return await begin([*words, *(["--uniform", uniform] if uniform else [])], wait_s, ctx)

    @server.tool(annotations=_LOOKS)
    async def job(ctx: Context[Any, Any], name: Name, wait_s: Wait = _WAIT_S) -> dict[str, Any]:
        """Say how far a job is; waits for its end at most wait_s. Has the result once it is finished."""
        return await _said(jobs.wait(name, wait_s, _reporter(ctx)))

    @server.tool(annotations=_LOOKS)
    async def list_jobs() -> list[dict[str, Any]]:
        """List the jobs of this session, newest last."""
        return await jobs.views()

    @server.tool(annotations=_CHANGES)
    async def stop_job(name: Name) -> dict[str, Any]:
        """Stop a job; the same call of quantize later goes on from what it had measured."""
        return await _said(jobs.stop(name))

    @server.tool(annotations=_LOOKS)
    async def report(
        folder: Annotated[str, Field(description="Folder that quantize made, or a sensitivity file.")],
        tensors: Annotated[bool, Field(description="Also list every tensor's bits (long).")] = False,
    ) -> dict[str, Any]:
        """Show how a checkpoint's bits were spent: comparison, bits by kind, divergence by budget."""
        shown = dict(await _said(run_short(["report", folder])))
        if not tensors:
            shown.pop("heat_map", None)
        return shown


def _add_server_tools(server: MCPServer[Any], ask: Ask) -> None:
    async def asked(method: str, path: str, body: object = None) -> Any:
        return await _said(asyncio.to_thread(ask, method, path, body))

    def at(name: str, model: str) -> str:
        return f"/v1/adapters/{quote(name, safe='')}" + (f"?model={quote(model, safe='')}" if model else "")

    @server.tool(annotations=_LOOKS)
    async def status() -> dict[str, Any]:
        """Show what the running server does: models, running requests, memory, caches, speed, adapters."""
        return dict(await asked("GET", "/optiq/status"))

    @server.tool(annotations=_LOOKS)
    async def adapters() -> Any:
        """List the LoRA adapters that requests to the running server can name."""
        return await asked("GET", "/v1/adapters")

    @server.tool(annotations=_STARTS)
    async def mount_adapter(
        name: Adapter,
        source: Annotated[str, Field(description="Folder below the server's --adapters-dir, or a Hub id.")],
        model: Model = "",
    ) -> Any:
        """Mount an adapter on the running server while it answers; requests then name it model@adapter."""
        return await asked("POST", "/v1/adapters", {"name": name, "source": source, "model": model})

    @server.tool(annotations=_CHANGES)
    async def unmount_adapter(name: Adapter, model: Model = "") -> Any:
        """Take an adapter off the running server; requests that use it end first."""
        return await asked("DELETE", at(name, model))

    @server.tool(annotations=_CHANGES)
    async def use_adapter(
        name: Annotated[str | None, Field(description="Name of a mounted adapter; null: none.")],
        model: Model = "",
    ) -> Any:
        """Choose which adapter the requests get that name none."""
        return await asked("POST", "/v1/adapters/use", {"name": name, "model": model})


def _budget(target: str) -> tuple[str, str]:
    """The option of ``optiq convert`` that a target means; wrong values are refused by the command."""
    word, _, size = target.strip().partition(" ")
    if word == "fit":
        return "--fit", size.strip()
    is_number = target.strip().replace(".", "", 1).isdigit()
    return "--target-bpw" if is_number else "--target-size", target.strip()


def _reporter(ctx: Context[Any, Any]) -> OnProgress:
    async def report_progress(progress: CommandProgress) -> None:
        said = f"{progress.stage} {progress.detail}".strip()
        await ctx.report_progress(progress.done, progress.total, said)

    return report_progress


async def _said(work: Awaitable[Answer]) -> Answer:
    """The work's result; our errors become the tool's, with their words."""
    try:
        return await work
    except OptiqError as error:
        raise ToolError(str(error)) from error
