"""Aider: an OpenAI-compatible endpoint in its configuration file.

Source: Aider documentation, "OpenAI compatible APIs" and "Advanced model settings".
"""

import json
from pathlib import Path

from mlx_optiq_integrations.client import Client, ConfigFile, Session, Setting, Snippet, nested
from mlx_optiq_integrations.facts import ClientFacts

__all__ = ["CLIENT"]


def _settings(facts: ClientFacts) -> tuple[Setting, ...]:
    return (
        Setting(("model",), f"openai/{facts.model}", "openai/ means: whatever openai-api-base is"),
        Setting(("openai-api-base",), facts.api),
        Setting(("openai-api-key",), facts.api_key),
        Setting(("show-model-warnings",), False, "it does not know local models"),
        Setting(("timeout",), 900, "a local model may take long over a long prompt"),
    )


def _files(facts: ClientFacts) -> tuple[ConfigFile, ...]:
    return (ConfigFile(folder="~", name=".aider.conf.yml", format="yaml", settings=_settings(facts)),)


def _limits(facts: ClientFacts) -> str:
    limits = {
        "max_input_tokens": facts.context - facts.max_output,
        "max_output_tokens": facts.max_output,
        "input_cost_per_token": 0,
        "output_cost_per_token": 0,
        "litellm_provider": "openai",
        "mode": "chat",
    }
    return json.dumps({f"openai/{facts.model}": limits}, indent=2)


def _snippets(facts: ClientFacts) -> tuple[Snippet, ...]:
    return (
        Snippet(language="json", code=_limits(facts), where="~/.aider.model.metadata.json, for its limits"),
    )


def _session(facts: ClientFacts, folder: Path) -> Session:
    return Session(
        argv=(
            "--config",
            str(folder / "aider.conf.yml"),
            "--model-metadata-file",
            str(folder / "metadata.json"),
        ),
        # JSON is YAML too.
        files={
            "aider.conf.yml": json.dumps(nested(_settings(facts)), indent=2),
            "metadata.json": _limits(facts),
        },
    )


CLIENT = Client(
    name="aider",
    title="Aider",
    about="Pair programmer in the terminal, through /v1/chat/completions",
    docs="https://aider.chat/docs/llms/openai-compat.html",
    program="aider",
    install="python -m pip install aider-install && aider-install",
    calls_tools=False,
    files=_files,
    snippets=_snippets,
    session=_session,
)
