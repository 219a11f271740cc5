"""Errors of this dialect: OpenAI's shape, with a code of its own for what is not stored.

Source: OpenAI Responses API, "error" of the response object.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from mlx_optiq_ext.serve.openai import errors as openai_errors
from mlx_optiq_ext.types.events import Failed

__all__ = ["error_body", "failure"]

_NOT_STORED: Mapping[str | None, str] = {
    "previous_response_id": "previous_response_not_found",
    "response_id": "response_not_found",
    "input": "item_not_found",
    "path": "not_supported",
}


def error_body(problem: Failed) -> dict[str, Any]:
    """The body of an error before the answer has begun."""
    if problem.param == "messages":
        problem = msgspec.structs.replace(problem, param="input")
    body = openai_errors.error_body(problem)
    if problem.kind == "UnknownName" and problem.param in _NOT_STORED:
        body["error"]["code"] = _NOT_STORED[problem.param]
    return body


def failure(problem: Failed) -> dict[str, Any]:
    """The ``error`` of a response that failed in the middle."""
    codes = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
    return {"code": codes.get(problem.status, "server_error"), "message": problem.text}
