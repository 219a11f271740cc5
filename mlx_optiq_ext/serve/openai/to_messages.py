"""From the messages of a chat request to our own.

Knows the OpenAI dialect and our types, no template. Called by ``to_generation``.
"""

from collections.abc import Sequence

from mlx_optiq_ext.errors import RequestError
from mlx_optiq_ext.serve.images import ImageReader
from mlx_optiq_ext.serve.openai import schema
from mlx_optiq_ext.serve.turns import Turns, parse_arguments
from mlx_optiq_ext.types.chat import Image, Message, Reasoning, Text, ToolCall, ToolResult

__all__ = ["to_messages"]


def to_messages(messages: Sequence[schema.ChatMessage], images: ImageReader) -> tuple[Message, ...]:
    """Translate every turn; blocks while a remote picture is fetched.

    Consecutive turns of one role are one, so results of parallel calls stay together in their order.
    Arguments of earlier calls become objects, however the client spaced them; where they are no JSON object,
    the text is kept under ``_raw``.

    Args:
        messages: As decoded.
        images: Reads pictures.
    Raises:
        RequestError: A part is in a turn that cannot hold it, or something is missing.
    """
    turns = Turns()
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        if message.role == "assistant":
            _add_assistant(turns, message, path)
        elif message.role == "tool":
            _add_result(turns, message, path, images)
        elif message.role == "user":
            for part in _content(message, path, images):
                turns.add("user", part)
        else:
            for text in _texts(message, path, "a system message"):
                turns.add("system", text)
    return turns.messages()


def _add_assistant(turns: Turns, message: schema.ChatMessage, path: str) -> None:
    thought = message.reasoning_content or message.reasoning
    if thought:
        turns.add("assistant", Reasoning(text=thought))
    calls = message.tool_calls or []
    if message.content or not (calls or thought):
        texts = _texts(message, path, "an assistant message") if message.content is not None else []
        for text in texts or [Text(text="")]:
            turns.add("assistant", text)
    for call in calls:
        arguments = call.function.arguments
        parsed = parse_arguments(arguments) if isinstance(arguments, str) else arguments
        turns.add("assistant", ToolCall(id=call.id, name=call.function.name, arguments=parsed))


def _add_result(turns: Turns, message: schema.ChatMessage, path: str, images: ImageReader) -> None:
    if message.tool_call_id is None:
        raise RequestError(
            "is missing; a tool message names the call that it answers", param=f"{path}.tool_call_id"
        )
    parts = _content(message, path, images)
    turns.add("tool", ToolResult(id=message.tool_call_id, parts=tuple(parts), name=message.name or ""))


def _texts(message: schema.ChatMessage, path: str, where: str) -> list[Text]:
    """Content that may hold words only."""
    content = _present(message, path)
    if isinstance(content, str):
        return [Text(text=content)]
    texts = []
    for index, part in enumerate(content):
        if isinstance(part, schema.ImagePart):
            raise RequestError(f"{where} cannot hold a picture", param=f"{path}.content[{index}]")
        texts.append(_text(part))
    return texts or [Text(text="")]


def _content(message: schema.ChatMessage, path: str, images: ImageReader) -> list[Text | Image]:
    """Content that may hold words and pictures."""
    content = _present(message, path)
    if isinstance(content, str):
        return [Text(text=content)]
    parts: list[Text | Image] = []
    for index, part in enumerate(content):
        if not isinstance(part, schema.ImagePart):
            parts.append(_text(part))
        elif isinstance(part.image_url, str):
            parts.append(images.from_url(part.image_url, param=f"{path}.content[{index}].image_url"))
        else:
            parts.append(images.from_url(part.image_url.url, param=f"{path}.content[{index}].image_url.url"))
    return parts or [Text(text="")]


def _present(message: schema.ChatMessage, path: str) -> str | list[schema.ContentPart]:
    if message.content is None:
        raise RequestError(
            f"is missing; {_articled(message.role)} message needs content", param=f"{path}.content"
        )
    return message.content


def _articled(role: str) -> str:
    return f"an {role}" if role == "assistant" else f"a {role}"


def _text(part: schema.TextPart | schema.RefusalPart) -> Text:
    return Text(text=part.text if isinstance(part, schema.TextPart) else part.refusal)
