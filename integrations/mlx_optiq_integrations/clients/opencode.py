"""OpenCode: a provider in opencode.json; speaks the OpenAI chat dialect.

Source: OpenCode documentation, "Config" and "Providers"; what versions really send was recorded.
"""

import json
from pathlib import Path
from typing import Any

from mlx_optiq_integrations.client import Client, ConfigFile, Session, Setting, nested
from mlx_optiq_integrations.facts import ClientFacts

__all__ = ["CLIENT"]


def _model(facts: ClientFacts) -> dict[str, Any]:
    model: dict[str, Any] = {
        "name": facts.model,
        "limit": {"context": facts.context, "output": facts.max_output},
        "tool_call": facts.calls_tools,
    }
    if facts.thinks:
        model |= {"reasoning": True, "interleaved": {"field": "reasoning_content"}}
    if facts.sees_images:
        model |= {"attachment": True, "modalities": {"input": ["text", "image"], "output": ["text"]}}
    return model


def _settings(facts: ClientFacts) -> tuple[Setting, ...]:
    provider = ("provider", "optiq")
    return (
        Setting(("$schema",), "https://opencode.ai/config.json"),
        Setting(("model",), f"optiq/{facts.model}"),
        Setting(("small_model",), f"optiq/{facts.model}", "otherwise small jobs go to another provider"),
        Setting(("share",), "disabled", "conversations stay on this machine"),
        Setting(
            ("agent", "title", "disable"),
            True,
            "a request for a title would run beside the first turn of every session",
        ),
        Setting((*provider, "npm"), "@ai-sdk/openai-compatible"),
        Setting((*provider, "name"), "optiq (local)"),
        Setting((*provider, "options", "baseURL"), facts.api),
        Setting((*provider, "options", "apiKey"), facts.api_key),
        Setting(
            (*provider, "models", facts.model),
            _model(facts),
            "limits drive its compaction; without `image` among the inputs pictures become an error text",
        ),
    )


def _files(facts: ClientFacts) -> tuple[ConfigFile, ...]:
    return (
        ConfigFile(
            folder="~/.config",
            variable="XDG_CONFIG_HOME",
            name="opencode/opencode.json",
            others=("opencode/opencode.jsonc",),
            format="json",
            settings=_settings(facts),
        ),
    )


def _session(facts: ClientFacts, _folder: Path) -> Session:
    return Session(
        env={
            # Read after all files: a project's own opencode.json cannot lead to another model.
            "OPENCODE_CONFIG_CONTENT": json.dumps(nested(_settings(facts))),
            "OPENCODE_DISABLE_MODELS_FETCH": "1",
            "OPENCODE_DISABLE_AUTOUPDATE": "1",
        },
    )


CLIENT = Client(
    name="opencode",
    title="OpenCode",
    about="Open-source coding agent, through /v1/chat/completions",
    docs="https://opencode.ai/docs/config",
    program="opencode",
    install="npm install -g opencode-ai",
    least_context=12_288,
    files=_files,
    session=_session,
    notes=("A prompt begins with about 7,600 tokens, 5,400 of them tools.",),
)
