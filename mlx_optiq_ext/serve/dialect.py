"""Which dialect a request is in where its path does not say: unknown paths, wrong methods, models."""

from typing import Any

from litestar import Request, Response

from mlx_optiq_ext.serve.anthropic.routes import answer_problem as answer_anthropic
from mlx_optiq_ext.serve.openai.routes import answer_problem as answer_openai
from mlx_optiq_ext.serve.paths import dialect_of

__all__ = ["answer_problem", "is_anthropic"]


def is_anthropic(request: Request[Any, Any, Any]) -> bool:
    """Whether the client speaks Anthropic's dialect."""
    return dialect_of(request.scope) == "anthropic"


def answer_problem(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """Answer with an error in the shape that the client understands."""
    return answer_anthropic(request, error) if is_anthropic(request) else answer_openai(request, error)
