"""From items and the body of ``/v1/responses`` to the request that the engine takes.

Called by the routes, for an answer and for a token count alike, so that both speak of the same prompt.
"""

from collections.abc import Mapping, Sequence

import msgspec

from mlx_optiq_ext.errors import RequestError
from mlx_optiq_ext.serve.images import ImageReader
from mlx_optiq_ext.serve.responses import schema
from mlx_optiq_ext.serve.responses.tools import INPUT, ToolTable, flat_name
from mlx_optiq_ext.serve.turns import Turns, parse_arguments
from mlx_optiq_ext.serve.unseen import reveal
from mlx_optiq_ext.types.chat import (
    Constraint,
    Generation,
    Image,
    Message,
    Reasoning,
    ReasoningOptions,
    Role,
    Sampling,
    Text,
    ToolCall,
    ToolResult,
)

__all__ = ["LOGPROBS", "Conversation", "session_of", "to_generation"]

LOGPROBS = "message.output_text.logprobs"
"""What ``include`` calls the log-probabilities."""


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """What the request is about, references resolved."""

    earlier: Sequence[schema.Item] = ()
    """Of the responses that it goes on from."""
    own: Sequence[schema.Item]
    """Of the request itself, in the form of ``items.normalized``."""


def to_generation(
    request: schema.InputTokensRequest, conversation: Conversation, table: ToolTable, images: ImageReader
) -> Generation:
    """Translate a request.

    Args:
        request: As decoded.
        conversation: All items.
        table: The tools of the request.
        images: Which pictures are taken; one by URL is fetched here, so call this on a worker thread.
    Raises:
        RequestError: It cannot be served; the message says which field and why.
    """
    _refuse_unsupported(request)
    generation = Generation(
        model=request.model or "",
        adapter=request.adapter,
        messages=_messages(request.instructions, conversation, images),
        tools=table.specs,
        tool_choice=table.choice,
        constraint=_constraint(request.text),
        reasoning=_reasoning(request.reasoning),
    )
    if not isinstance(request, schema.ResponsesRequest):
        return generation
    wanted = LOGPROBS in (request.include or ())
    return msgspec.structs.replace(
        generation,
        sampling=Sampling(
            temperature=request.temperature,
            top_p=request.top_p,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            logprobs=(request.top_logprobs or 0) if wanted else request.top_logprobs or None,
        ),
        max_tokens=request.max_output_tokens,
    )


def session_of(request: schema.ResponsesRequest, headers: Mapping[str, str]) -> str:
    """Tell the session that a request belongs to: by header, else by cache key or user; empty if none."""
    return (
        headers.get("session-id")
        or request.prompt_cache_key
        or request.safety_identifier
        or request.user
        or ""
    )


def _refuse_unsupported(request: schema.InputTokensRequest) -> None:
    if request.conversation is not None:
        raise RequestError(
            "there are no stored conversations; use previous_response_id", param="conversation"
        )
    if request.prompt is not None:
        raise RequestError("there are no stored prompts; send instructions and input", param="prompt")
    if isinstance(request, schema.ResponsesRequest) and request.background:
        raise RequestError("background responses are not supported; use stream", param="background")


def _messages(
    instructions: str | None, conversation: Conversation, images: ImageReader
) -> tuple[Message, ...]:
    turns = Turns()
    if instructions:
        turns.add("system", Text(text=instructions))
    for item in conversation.earlier:
        _add(turns, item, "previous_response_id", images)
    for index, item in enumerate(conversation.own):
        _add(turns, item, f"input[{index}]", images)
    messages = turns.messages()
    if not messages:
        raise RequestError("input is empty; at least one message is needed", param="input")
    return messages


def _add(turns: Turns, item: schema.Item, path: str, images: ImageReader) -> None:
    call_id, name = item.call_id or "", flat_name(item.name or "", item.namespace)
    match item.type:
        case "reasoning":
            text = _reasoning_text(item)
            if text:
                turns.add("assistant", Reasoning(text=text))
        case "function_call":
            arguments = parse_arguments(item.arguments or "")
            turns.add("assistant", ToolCall(id=call_id, name=name, arguments=arguments))
        case "custom_tool_call":
            turns.add("assistant", ToolCall(id=call_id, name=name, arguments={INPUT: item.input or ""}))
        case "function_call_output" | "custom_tool_call_output":
            turns.add("tool", ToolResult(id=call_id, parts=_parts(item.output, f"{path}.output", images)))
        case _:
            role: Role = "system" if item.role == "developer" else item.role or "user"
            for place, part in enumerate(_parts(item.content, f"{path}.content", images)):
                if isinstance(part, Image) and role != "user":
                    message = f"a message of role {item.role!r} cannot hold a picture"
                    raise RequestError(message, param=f"{path}.content[{place}]")
                if isinstance(part, Image) or part.text:
                    turns.add(role, part)


def _reasoning_text(item: schema.Item) -> str:
    content = item.content if isinstance(item.content, list) else []
    return (
        "".join(part.text or "" for part in content)
        or reveal(item.encrypted_content or "")
        or "\n\n".join(part.text or "" for part in item.summary or ())
    )


def _parts(
    content: str | Sequence[schema.ContentPart] | None, path: str, images: ImageReader
) -> tuple[Text | Image, ...]:
    if isinstance(content, str):
        return (Text(text=content),)
    return tuple(_part(part, f"{path}[{index}]", images) for index, part in enumerate(content or ()))


def _part(part: schema.ContentPart, path: str, images: ImageReader) -> Text | Image:
    if part.type != "input_image":
        return Text(text=part.refusal or part.text or "")
    if part.image_url is None:
        raise RequestError("a picture needs image_url; there are no stored files", param=f"{path}.image_url")
    return images.from_url(part.image_url, param=f"{path}.image_url")


def _constraint(text: schema.TextConfig | None) -> Constraint | None:
    form = text.format if text else None
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return Constraint(kind="json_object", param="text.format")
    if form.schema is None:
        raise RequestError("text.format of type json_schema has no schema", param="text.format.schema")
    return Constraint(kind="json_schema", value=form.schema, param="text.format.schema")


def _reasoning(config: schema.ReasoningConfig | None) -> ReasoningOptions:
    effort = config.effort if config else None
    if effort is None:
        return ReasoningOptions()
    if effort == "none":
        return ReasoningOptions(enabled=False)
    return ReasoningOptions(enabled=True, effort="xhigh" if effort == "max" else effort)
