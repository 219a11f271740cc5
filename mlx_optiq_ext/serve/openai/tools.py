"""From the tools of a chat request, and the choice among them, to our own."""

from mlx_optiq_ext.errors import RequestError
from mlx_optiq_ext.serve.openai import schema
from mlx_optiq_ext.types.chat import ToolChoice, ToolSpec

__all__ = ["to_tools"]


def to_tools(request: schema.ChatRequest) -> tuple[tuple[ToolSpec, ...], ToolChoice]:
    """Translate the tools, and who may be called.

    Raises:
        RequestError: Two tools share a name, one has no function, or the choice names none of them.
    """
    specs = _specs(request.tools or [])
    choice = request.tool_choice
    parallel = request.parallel_tool_calls is not False
    if choice is None or isinstance(choice, str):
        if choice == "required" and not specs:
            raise RequestError("tool_choice is required, and there are no tools", param="tool_choice")
        return tuple(specs.values()), ToolChoice(mode=choice or "auto", parallel=parallel)
    if choice.type == "function":
        name = choice.function.name if choice.function else ""
        _known(name, specs, "tool_choice.function.name")
        return tuple(specs.values()), ToolChoice(mode="named", name=name, parallel=parallel)
    if choice.allowed_tools is None:
        raise RequestError("allowed_tools needs the tools", param="tool_choice.allowed_tools")
    names = [tool.function.name for tool in choice.allowed_tools.tools]
    for index, name in enumerate(names):
        _known(name, specs, f"tool_choice.allowed_tools.tools[{index}].function.name")
    allowed = tuple(spec for name, spec in specs.items() if name in names)
    if choice.allowed_tools.mode == "required" and not allowed:
        raise RequestError("one of no tools is required", param="tool_choice.allowed_tools.tools")
    return allowed, ToolChoice(mode=choice.allowed_tools.mode, parallel=parallel)


def _specs(tools: list[schema.ToolDefinition]) -> dict[str, ToolSpec]:
    """Functions by name; tools of other kinds run on servers that this is not."""
    specs: dict[str, ToolSpec] = {}
    for index, tool in enumerate(tools):
        if tool.type != "function":
            continue
        if tool.function is None:
            raise RequestError(
                "is missing; a tool of type function needs it", param=f"tools[{index}].function"
            )
        name = tool.function.name
        if name in specs:
            raise RequestError(f"two tools are named {name!r}", param=f"tools[{index}].function.name")
        specs[name] = ToolSpec(
            name=name,
            description=tool.function.description or "",
            parameters=tool.function.parameters or {},
        )
    return specs


def _known(name: str, specs: dict[str, ToolSpec], param: str) -> None:
    if name not in specs:
        known = ", ".join(specs) or "none"
        raise RequestError(f"no tool {name!r}; there are: {known}", param=param)
