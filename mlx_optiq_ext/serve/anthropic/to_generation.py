"""From the body of ``/v1/messages`` to the request that the engine takes.

Called by the routes, for an answer and for a token count alike, so that both speak of the same prompt.
"""

from collections.abc import Mapping

import msgspec

from mlx_optiq_ext.errors import RequestError
from mlx_optiq_ext.serve.anthropic import schema
from mlx_optiq_ext.serve.anthropic.to_messages import to_messages
from mlx_optiq_ext.serve.images import ImageReader
from mlx_optiq_ext.types.chat import (
    Constraint,
    Generation,
    ReasoningOptions,
    Sampling,
    ToolChoice,
    ToolSpec,
)

__all__ = ["ThreadUnsupported", "session_of", "to_generation"]

PLACEHOLDER = "DeferredToolPlaceholder"
"""A tool without a use but to mark where deferred ones will come."""


class ThreadUnsupported(RequestError):
    """The request counts on a conversation that the server would have to remember."""


def to_generation(request: schema.CountTokensRequest, images: ImageReader, session: str = "") -> Generation:
    """Translate a request.

    Args:
        request: As decoded.
        images: Which pictures are taken; one by URL is fetched here, so call this on a worker thread.
        session: What :func:`session_of` says.
    Raises:
        ThreadUnsupported: It asks for a thread on the server.
        RequestError: It cannot be served; the message says which field and why.
    """
    if request.thread is not None:
        raise ThreadUnsupported("threads are not supported; send the whole conversation", param="thread")
    tools = _tools(request.tools or [])
    generation = Generation(
        model=request.model,
        adapter=request.adapter,
        messages=to_messages(request, tools, images),
        tools=tuple(tool for tool in tools if tool.name != PLACEHOLDER),
        tool_choice=_tool_choice(request.tool_choice, tools),
        constraint=_constraint(request.output_config),
        reasoning=_reasoning(request.thinking, request.output_config),
        session=session,
    )
    if not isinstance(request, schema.MessagesRequest):
        return generation
    return msgspec.structs.replace(
        generation,
        sampling=Sampling(temperature=request.temperature, top_p=request.top_p, top_k=request.top_k),
        stop=tuple(request.stop_sequences or ()),
        max_tokens=request.max_tokens,
    )


def session_of(request: schema.CountTokensRequest, headers: Mapping[str, str]) -> str:
    """Tell the session that a request belongs to: by header, else by the user's id; empty if neither."""
    named = headers.get("x-claude-code-session-id")
    user = (request.metadata.user_id if request.metadata else None) or ""
    if named or not user.startswith("{"):
        return named or user
    try:
        return msgspec.json.decode(user, type=_UserId).session_id or user
    except (msgspec.DecodeError, RecursionError):
        return user


class _UserId(msgspec.Struct, frozen=True, kw_only=True):
    session_id: str = ""


def _tools(tools: list[schema.Tool]) -> list[ToolSpec]:
    """Those of the client; the API's own (web search and its like) run on a server that this is not."""
    specs: dict[str, ToolSpec] = {}
    for index, tool in enumerate(tools):
        if tool.type not in (None, "custom"):
            continue
        if not tool.name:
            raise RequestError("a tool has no name", param=f"tools[{index}].name")
        if tool.name in specs:
            raise RequestError(f"two tools are named {tool.name!r}", param=f"tools[{index}].name")
        if tool.input_schema is None:
            raise RequestError(
                f"tool {tool.name!r} has no input_schema", param=f"tools[{index}].input_schema"
            )
        specs[tool.name] = ToolSpec(
            name=tool.name,
            description=tool.description or "",
            parameters=tool.input_schema,
            deferred=bool(tool.defer_loading),
        )
    return list(specs.values())


def _tool_choice(choice: schema.ToolChoice | None, tools: list[ToolSpec]) -> ToolChoice:
    if choice is None:
        return ToolChoice()
    parallel = not choice.disable_parallel_tool_use
    if choice.type == "tool":
        if choice.name not in {tool.name for tool in tools}:
            raise RequestError(
                f"tool_choice names {choice.name!r}, which is not among the tools", param="tool_choice.name"
            )
        return ToolChoice(mode="named", name=choice.name, parallel=parallel)
    if choice.type == "any":
        if not tools:
            raise RequestError("tool_choice asks for a call and there are no tools", param="tool_choice.type")
        return ToolChoice(mode="required", parallel=parallel)
    return ToolChoice(mode=choice.type, parallel=parallel)


def _constraint(config: schema.OutputConfig | None) -> Constraint | None:
    if config is None or config.format is None:
        return None
    return Constraint(kind="json_schema", value=config.format.schema, param="output_config.format.schema")


def _reasoning(
    thinking: schema.ThinkingConfig | None, config: schema.OutputConfig | None
) -> ReasoningOptions:
    effort = config.effort if config else None
    return ReasoningOptions(
        enabled=None if thinking is None else thinking.type != "disabled",
        effort="xhigh" if effort == "max" else effort,
        budget=thinking.budget_tokens if thinking else None,
    )
