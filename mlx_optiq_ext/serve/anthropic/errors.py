"""Errors as the Anthropic dialect says them.

Source: Anthropic API, "Errors", and the rejection of threads that its SDK answers by sending full history.
"""

from collections.abc import Mapping
from typing import Any

from mlx_optiq_ext.types.events import Failed

__all__ = ["error_body"]

_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}


def error_body(problem: Failed, request_id: str = "") -> dict[str, Any]:
    """The body of an error; the field to blame is named in the message, there being no other place for it."""
    error: dict[str, Any] = {
        "type": _TYPES.get(problem.status, "api_error" if problem.status >= 500 else "invalid_request_error"),
        "message": problem.text,
    }
    if problem.kind == "ThreadUnsupported":
        error["details"] = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    return {"type": "error", "error": error, "request_id": request_id or None}
