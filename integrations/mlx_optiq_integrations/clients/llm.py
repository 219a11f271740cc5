"""The llm tool: a model in its extra-openai-models.yaml.

Source: llm documentation, "Other models: OpenAI-compatible models".
"""

import json
import shlex

from mlx_optiq_integrations.client import Client, Snippet
from mlx_optiq_integrations.facts import ClientFacts

__all__ = ["CLIENT"]


def _snippets(facts: ClientFacts) -> tuple[Snippet, ...]:
    code = f"""\
- model_id: optiq
  model_name: {json.dumps(facts.model)}
  api_base: {json.dumps(facts.api)}
  api_key_name: optiq
  supports_tools: {json.dumps(facts.calls_tools)}
  supports_schema: true
  vision: {json.dumps(facts.sees_images)}"""
    shell = f"""\
llm keys set optiq --value {shlex.quote(facts.api_key)}
llm -m optiq 'Why is the sky blue?'"""
    return (
        Snippet(
            language="yaml",
            code=code,
            where='extra-openai-models.yaml in the folder of "$(dirname "$(llm logs path)")"',
        ),
        Snippet(language="sh", code=shell),
    )


CLIENT = Client(
    name="llm",
    title="llm",
    about="Command-line tool for many models, through /v1/chat/completions",
    docs="https://llm.datasette.io/en/stable/other-models.html",
    install="pip install llm",
    snippets=_snippets,
)
