"""The response object as it is when the answer begins: what was asked, said again, and nothing answered yet.

Every field of the API is there, so that strict readers are content. Called by the routes.

Source: OpenAI Responses API, "The response object"; Open Responses specification.
"""

import secrets
import time
from typing import Any

import msgspec

from mlx_optiq_ext.serve.responses.schema import ResponsesRequest, TextFormat, Tool
from mlx_optiq_ext.types.events import Usage

__all__ = ["is_stored", "response_document", "usage_of"]


def is_stored(request: ResponsesRequest) -> bool:
    """Whether the response is kept; so it is where the request says nothing."""
    return request.store is not False


def response_document(request: ResponsesRequest) -> dict[str, Any]:
    """Make the response object of a request."""
    form = request.text.format if request.text and request.text.format else TextFormat()
    return {
        "id": f"resp_{secrets.token_hex(24)}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "conversation": None,
        "error": None,
        "frequency_penalty": request.frequency_penalty or 0.0,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": None,
        "metadata": request.metadata or {},
        "model": request.model or "",
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "presence_penalty": request.presence_penalty or 0.0,
        "previous_response_id": request.previous_response_id,
        "prompt": None,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {
            "effort": request.reasoning.effort if request.reasoning else None,
            "summary": request.reasoning.summary if request.reasoning else None,
        },
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "store": is_stored(request),
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {
            "format": {"type": form.type, **msgspec.to_builtins(form)},
            "verbosity": (request.text.verbosity if request.text else None) or "medium",
        },
        "tool_choice": "auto" if request.tool_choice is None else msgspec.to_builtins(request.tool_choice),
        "tools": [_tool(tool) for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": request.user,
    }


def usage_of(usage: Usage) -> dict[str, Any]:
    """What the answer took."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _tool(tool: Tool) -> dict[str, Any]:
    said: dict[str, Any] = msgspec.to_builtins(tool)
    if tool.type != "function":
        return said
    return {"description": None, "parameters": None, "strict": None, **said}
