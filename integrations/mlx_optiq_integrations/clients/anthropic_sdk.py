"""The Anthropic SDK for Python."""

from mlx_optiq_integrations.client import Client, Snippet
from mlx_optiq_integrations.facts import ClientFacts

__all__ = ["CLIENT"]


def _snippets(facts: ClientFacts) -> tuple[Snippet, ...]:
    code = f"""\
from anthropic import Anthropic

client = Anthropic(base_url={facts.url!r}, api_key={facts.api_key!r}, timeout=900)
answer = client.messages.create(
    model={facts.model!r},
    messages=[{{"role": "user", "content": "Why is the sky blue?"}}],
    max_tokens={min(facts.max_output, 512)},
)
print(next(block.text for block in answer.content if block.type == "text"))"""
    return (Snippet(language="python", code=code),)


CLIENT = Client(
    name="anthropic-sdk",
    title="Anthropic SDK",
    about="Python library, through /v1/messages",
    docs="https://github.com/anthropics/anthropic-sdk-python",
    install="pip install anthropic",
    snippets=_snippets,
)
