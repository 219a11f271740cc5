"""What a request's path and headers tell before it is routed: the dialect of its client, or an operator.

Knows ASGI scopes only.
"""

from litestar.types import Scope

from mlx_optiq_ext.serve.auth import header_values
from mlx_optiq_ext.types.status import Dialect

__all__ = ["dialect_of", "is_control"]

_CONTROL = ("/optiq/", "/v1/adapters", "/schema")
_CONTROL_PATHS = ("/", "/health", "/metrics")


def dialect_of(scope: Scope) -> Dialect:
    """The dialect that a client speaks, by path or by header."""
    if scope["path"].startswith("/v1/messages") or header_values(scope["headers"], b"anthropic-version"):
        return "anthropic"
    return "responses" if scope["path"].startswith("/v1/responses") else "openai"


def is_control(scope: Scope) -> bool:
    """Whether a path is for operators: its callers are no clients of a model."""
    return scope["path"] in _CONTROL_PATHS or scope["path"].startswith(_CONTROL)
