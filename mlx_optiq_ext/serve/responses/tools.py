"""Tools of the Responses dialect as the model sees them, and the way back from a call to the client's words.

A tool of a namespace is ``namespace.name`` to the model; a custom tool, which reads text, is a function of
one string. Called by ``to_generation`` and by ``from_events``; knows no template.
"""

from collections.abc import Mapping, Sequence

import msgspec

from mlx_optiq_ext.errors import RequestError
from mlx_optiq_ext.serve.responses.schema import NamedChoice, Tool
from mlx_optiq_ext.types.chat import ToolChoice, ToolSpec

__all__ = ["INPUT", "Origin", "ToolTable", "flat_name", "tool_table"]

INPUT = "input"
"""The one argument of a custom tool."""


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """What the client calls a tool."""

    name: str
    namespace: str | None = None
    custom: bool = False


class ToolTable(msgspec.Struct, frozen=True, kw_only=True):
    """The tools that the model gets, whether it must call, and what the client calls each."""

    specs: tuple[ToolSpec, ...] = ()
    choice: ToolChoice = ToolChoice()
    origins: Mapping[str, Origin] = {}

    def origin(self, name: str) -> Origin:
        """What the client calls the tool of a call; an unknown one has the name that the model gave it."""
        return self.origins.get(name) or Origin(name=name)


def flat_name(name: str, namespace: str | None) -> str:
    """The name of a tool as the model sees it."""
    return f"{namespace}.{name}" if namespace else name


def tool_table(
    tools: Sequence[Tool], choice: str | NamedChoice | None, *, parallel: bool = True
) -> ToolTable:
    """Flatten the tools of a request and read its choice among them.

    Tools that another server would run (web search and its like) are left out.

    Args:
        tools: As the client sent them.
        choice: ``auto``, ``none``, ``required``, a tool, or those that are allowed.
        parallel: More than one call in a turn.
    Raises:
        RequestError: A tool lacks its name, two have the same, or the choice names none of them.
    """
    specs: dict[str, ToolSpec] = {}
    origins: dict[str, Origin] = {}
    for path, tool, namespace in _functions(tools):
        name = flat_name(tool.name or "", namespace)
        if not tool.name:
            raise RequestError("a tool has no name", param=f"{path}.name")
        if name in specs:
            raise RequestError(f"two tools are named {name!r}", param=f"{path}.name")
        specs[name] = _spec(name, tool)
        origins[name] = Origin(name=tool.name, namespace=namespace, custom=tool.type == "custom")
    if isinstance(choice, NamedChoice) and choice.type == "allowed_tools":
        allowed = {_chosen(each, specs) for each in choice.tools or ()}
        specs = {name: spec for name, spec in specs.items() if name in allowed}
        choice = choice.mode or "auto"
    return ToolTable(
        specs=tuple(specs.values()), choice=_tool_choice(choice, specs, parallel=parallel), origins=origins
    )


def _functions(tools: Sequence[Tool]) -> list[tuple[str, Tool, str | None]]:
    found: list[tuple[str, Tool, str | None]] = []
    for index, tool in enumerate(tools):
        if tool.type in ("function", "custom"):
            found.append((f"tools[{index}]", tool, None))
        elif tool.type == "namespace":
            inner = [(f"tools[{index}].tools[{place}]", each) for place, each in enumerate(tool.tools or ())]
            found += [(path, each, tool.name) for path, each in inner if each.type in ("function", "custom")]
    return found


def _spec(name: str, tool: Tool) -> ToolSpec:
    description, parameters = tool.description or "", tool.parameters or {}
    if tool.type == "custom":
        if tool.format is not None and tool.format.definition:
            description += (
                f"\n\nThe input follows this {tool.format.syntax} grammar:\n{tool.format.definition}"
            )
        text = {"type": "string", "description": "All that the tool reads."}
        parameters = {"type": "object", "properties": {INPUT: text}, "required": [INPUT]}
    return ToolSpec(
        name=name,
        description=description.strip(),
        parameters=parameters or {"type": "object", "properties": {}},
        deferred=bool(tool.defer_loading),
    )


def _tool_choice(
    choice: str | NamedChoice | None, specs: Mapping[str, ToolSpec], *, parallel: bool
) -> ToolChoice:
    if isinstance(choice, NamedChoice):
        return ToolChoice(mode="named", name=_chosen(choice, specs), parallel=parallel)
    if choice == "required":
        if not specs:
            raise RequestError("tool_choice asks for a call and there are no tools", param="tool_choice")
        return ToolChoice(mode="required", parallel=parallel)
    return ToolChoice(mode="none" if choice == "none" else "auto", parallel=parallel)


def _chosen(choice: NamedChoice, specs: Mapping[str, ToolSpec]) -> str:
    name = flat_name(choice.name or "", choice.namespace)
    if choice.type not in ("function", "custom") or name not in specs:
        raise RequestError(
            f"tool_choice asks for {choice.name or choice.type!r}, which is not among the functions",
            param="tool_choice",
        )
    return name
