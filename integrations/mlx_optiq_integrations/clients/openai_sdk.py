"""The OpenAI SDK for Python."""

from mlx_optiq_integrations.client import Client, Snippet
from mlx_optiq_integrations.facts import ClientFacts

__all__ = ["CLIENT"]


def _snippets(facts: ClientFacts) -> tuple[Snippet, ...]:
    code = f"""\
from openai import OpenAI

client = OpenAI(base_url={facts.api!r}, api_key={facts.api_key!r}, timeout=900)
answer = client.chat.completions.create(
    model={facts.model!r},
    messages=[{{"role": "user", "content": "Why is the sky blue?"}}],
    max_tokens={min(facts.max_output, 512)},
)
print(answer.choices[0].message.content)"""
    return (Snippet(language="python", code=code),)


CLIENT = Client(
    name="openai-sdk",
    title="OpenAI SDK",
    about="Python library, through /v1/chat/completions and /v1/responses",
    docs="https://github.com/openai/openai-python",
    install="pip install openai",
    snippets=_snippets,
)
