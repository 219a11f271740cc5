"""Usage as the OpenAI dialect tells it, over all answers of a request."""

from typing import Any

from mlx_optiq_ext.types.events import Usage

__all__ = ["UsageSum", "usage_document"]


class UsageSum:
    """Adds up the answers to each prompt: a prompt counts once, however many answers it gets.

    Args:
        num_answers: All answers of the request.
        answers_per_prompt: Of these, those that share one prompt; by default there is one prompt.
    """

    def __init__(self, num_answers: int, answers_per_prompt: int | None = None) -> None:
        self._left = num_answers
        self._share = answers_per_prompt or num_answers
        self._usages: list[Usage] = []

    def add(self, usage: Usage) -> bool:
        """Add an answer; whether it was the last one."""
        self._usages.append(usage)
        self._left -= 1
        return not self._left

    def document(self) -> dict[str, Any]:
        """The sum, once all have ended."""
        share = self._share
        return usage_document(
            Usage(
                prompt_tokens=sum(u.prompt_tokens for u in self._usages) // share,
                cached_tokens=sum(u.cached_tokens for u in self._usages) // share,
                completion_tokens=sum(u.completion_tokens for u in self._usages),
                reasoning_tokens=sum(u.reasoning_tokens for u in self._usages),
            )
        )


def usage_document(usage: Usage) -> dict[str, Any]:
    """One answer's usage."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }
