"""Zed: an OpenAI-compatible provider in its settings.

Source: Zed documentation, "LLM Providers: OpenAI API compatible".
"""

import json

from mlx_optiq_integrations.client import Client, Setting, Snippet, nested
from mlx_optiq_integrations.facts import ClientFacts

__all__ = ["CLIENT"]


def _snippets(facts: ClientFacts) -> tuple[Snippet, ...]:
    model = {
        "name": facts.model,
        "display_name": facts.model,
        "max_tokens": facts.context,
        "max_output_tokens": facts.max_output,
        "max_completion_tokens": facts.max_output,
        "capabilities": {
            "tools": facts.calls_tools,
            "images": facts.sees_images,
            "parallel_tool_calls": facts.calls_tools,
            "prompt_cache_key": True,
        },
    }
    place = ("language_models", "openai_compatible", "optiq")
    settings = (Setting((*place, "api_url"), facts.api), Setting((*place, "available_models"), [model]))
    return (
        Snippet(
            language="json",
            code=json.dumps(nested(settings), indent=2),
            where="~/.config/zed/settings.json, among what is there",
        ),
        Snippet(
            language="sh",
            code=f"export OPTIQ_API_KEY={facts.api_key}",
            where="environment of Zed, which wants a key for every provider",
        ),
    )


CLIENT = Client(
    name="zed",
    title="Zed",
    about="Editor with an agent, through /v1/chat/completions",
    docs="https://zed.dev/docs/ai/llm-providers",
    snippets=_snippets,
)
