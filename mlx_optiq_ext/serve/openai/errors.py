"""Errors as the OpenAI dialect says them.

Source: OpenAI API reference, "Error codes"; the words on a full context are what clients read limits from.
"""

from collections.abc import Mapping
from typing import Any

from mlx_optiq_ext.types.events import Failed

__all__ = ["STATUSES", "error_body"]

STATUSES: Mapping[int, int] = {529: 503}
"""Statuses that this dialect knows by another number."""

_CODES: Mapping[str, str] = {
    "PromptTooLong": "context_length_exceeded",
    "UnknownName": "model_not_found",
    "Unauthorized": "invalid_api_key",
    "QueueFull": "rate_limit_exceeded",
    "Overloaded": "server_overloaded",
    "EngineStopped": "server_unavailable",
}


def error_body(problem: Failed) -> dict[str, Any]:
    """The body of an error."""
    message = problem.text
    if problem.limit is not None:
        message = f"the maximum context length is {problem.limit} tokens; {message}"
    return {
        "error": {
            "message": message,
            "type": _type(problem.status),
            "param": problem.param,
            "code": _CODES.get(problem.kind),
        }
    }


def _type(status: int) -> str:
    if status >= 500:
        return "server_error"
    named = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return named.get(status, "invalid_request_error")
