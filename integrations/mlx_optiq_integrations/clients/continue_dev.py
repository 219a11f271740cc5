"""Continue: a model in its config.yaml.

Source: Continue documentation, "config.yaml reference".
"""

import json

from mlx_optiq_integrations.client import Client, Snippet
from mlx_optiq_integrations.facts import ClientFacts

__all__ = ["CLIENT"]


def _snippets(facts: ClientFacts) -> tuple[Snippet, ...]:
    abilities = [
        name for name, has in (("tool_use", facts.calls_tools), ("image_input", facts.sees_images)) if has
    ]
    code = f"""\
models:
  - name: optiq (local)
    provider: openai
    model: {json.dumps(facts.model)}
    apiBase: {json.dumps(facts.api)}
    apiKey: {json.dumps(facts.api_key)}
    roles: [chat, edit, apply]
    capabilities: [{", ".join(abilities)}]
    defaultCompletionOptions:
      contextLength: {facts.context}
      maxTokens: {facts.max_output}"""
    return (Snippet(language="yaml", code=code, where="~/.continue/config.yaml, below `models:`"),)


CLIENT = Client(
    name="continue",
    title="Continue",
    about="Assistant in VS Code and JetBrains editors, through /v1/chat/completions",
    docs="https://docs.continue.dev/reference",
    snippets=_snippets,
)
