"""Every error of a request as one value, ``Failed``, which each dialect renders in its own shape.

Knows the error tree, the engine's failures and Litestar's own refusals; no dialect. Called by the exception
handlers of all routes and by streams that fail in the middle.
"""

import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException

from mlx_optiq_ext.errors import OptiqError
from mlx_optiq_ext.serve.account import Account
from mlx_optiq_ext.serve.run import JobFailed
from mlx_optiq_ext.types.events import Failed

__all__ = [
    "BodyOf",
    "ExceptionHandler",
    "noted_problem",
    "problem_handler",
    "problem_of",
    "problem_response",
    "retry_headers",
    "with_allow",
]

_log = logging.getLogger(__name__)

_RETRY_AFTER_S = 5.0
_RETRIED = (429, 503, 529)
_WORDS = {
    404: "there is nothing at this path; GET /schema lists what is",
    405: "this path does not take that method",
    413: "the request body is larger than this server takes (--max-body)",
}


BodyOf = Callable[[Failed], Any]
"""A dialect's error shape: what msgspec writes as the body."""
ExceptionHandler = Callable[[Request[Any, Any, Any], Exception], Response[Any]]


def problem_of(error: Exception) -> Failed:
    """Say what an exception means to a client; one that nobody raised on purpose is logged, not shown."""
    if isinstance(error, JobFailed):
        return error.failed
    if isinstance(error, OptiqError):
        return Failed.of(error)
    if isinstance(error, HTTPException):
        message = _WORDS.get(error.status_code, error.detail)
        return Failed(status=error.status_code, kind=_kind(error.status_code), message=message)
    if isinstance(error, RecursionError):
        return Failed(status=400, kind="RequestError", message="the request is nested too deeply")
    _log.error("a request failed unexpectedly", exc_info=error)
    return Failed(
        status=500,
        kind="InternalError",
        message="an unexpected error, see the server's log; the server goes on",
    )


def _kind(status: int) -> str:
    """``NotFound`` for 404."""
    known = status in HTTPStatus.__members__.values()
    return "".join(HTTPStatus(status).phrase.title().split()) if known else "HTTPException"


def noted_problem(request: Request[Any, Any, Any], error: Exception) -> Failed:
    """Say the same, and note it for the log."""
    problem = problem_of(error)
    Account.of(request.scope).see(problem)
    return problem


def problem_handler(body_of: BodyOf, statuses: Mapping[int, int] | None = None) -> ExceptionHandler:
    """Make the Litestar exception handler of a dialect, for ``exception_handlers={Exception: ...}``.

    Args:
        body_of: The dialect's shape.
        statuses: Statuses that the dialect knows by another number.
    """

    def handle(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
        return with_allow(problem_response(noted_problem(request, error), body_of, statuses), error)

    return handle


def problem_response(
    problem: Failed, body_of: BodyOf, statuses: Mapping[int, int] | None = None
) -> Response[Any]:
    """Render a problem as an answer; 429, 503 and 529 say when to ask again."""
    status = (statuses or {}).get(problem.status, problem.status)
    return Response(
        msgspec.json.encode(body_of(problem)),
        status_code=status,
        media_type="application/json",
        headers=retry_headers(problem),
    )


def with_allow(response: Response[Any], error: Exception) -> Response[Any]:
    """The answer, with the methods that its path takes where the error is that this one is none.

    Source: RFC 9110, section 15.5.6.
    """
    if isinstance(error, HTTPException) and error.status_code == 405:
        response.headers.update(error.headers or {})
    return response


def retry_headers(problem: Failed) -> dict[str, str]:
    """``Retry-After`` in whole seconds, at least one, where waiting helps."""
    if problem.retry_after_s is None and problem.status not in _RETRIED:
        return {}
    return {"retry-after": str(max(1, round(problem.retry_after_s or _RETRY_AFTER_S)))}
