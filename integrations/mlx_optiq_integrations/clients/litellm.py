"""LiteLLM: a model in the proxy's config.yaml.

Source: LiteLLM documentation, "OpenAI-Compatible Endpoints" and "Proxy config.yaml".
"""

import json

from mlx_optiq_integrations.client import Client, Snippet
from mlx_optiq_integrations.facts import ClientFacts

__all__ = ["CLIENT"]


def _snippets(facts: ClientFacts) -> tuple[Snippet, ...]:
    code = f"""\
model_list:
  - model_name: {json.dumps(facts.model)}
    litellm_params:
      model: {json.dumps(f"openai/{facts.model}")}
      api_base: {json.dumps(facts.api)}
      api_key: {json.dumps(facts.api_key)}
      timeout: 900
    model_info:
      max_input_tokens: {facts.context - facts.max_output}
      max_output_tokens: {facts.max_output}
      supports_function_calling: {json.dumps(facts.calls_tools)}
      supports_vision: {json.dumps(facts.sees_images)}"""
    return (Snippet(language="yaml", code=code, where="config.yaml, for `litellm --config config.yaml`"),)


CLIENT = Client(
    name="litellm",
    title="LiteLLM",
    about="Proxy before many providers, through /v1/chat/completions",
    docs="https://docs.litellm.ai/docs/providers/openai_compatible",
    install="pip install 'litellm[proxy]'",
    snippets=_snippets,
)
