"""OpenClaw: a provider in openclaw.json; speaks the OpenAI chat dialect.

Source: OpenClaw documentation, "Configuration"; what versions really send was recorded.
"""

import json
from pathlib import Path

from mlx_optiq_integrations.client import Client, ConfigFile, Session, Setting, nested
from mlx_optiq_integrations.facts import ClientFacts

__all__ = ["CLIENT"]


def _settings(facts: ClientFacts) -> tuple[Setting, ...]:
    provider = ("models", "providers", "optiq")
    model = {
        "id": facts.model,
        "name": facts.model,
        "reasoning": facts.thinks,
        "input": ["text", "image"] if facts.sees_images else ["text"],
        "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0},
        "contextWindow": facts.context,
        "maxTokens": facts.max_output,
    }
    return (
        Setting(("models", "mode"), "merge", "other providers stay"),
        Setting((*provider, "baseUrl"), facts.api),
        Setting((*provider, "apiKey"), facts.api_key),
        Setting((*provider, "api"), "openai-completions"),
        Setting((*provider, "timeoutSeconds"), 900, "a local model may take long over a long prompt"),
        Setting((*provider, "models"), [model], "limits drive its compaction"),
        Setting(("agents", "defaults", "model", "primary"), f"optiq/{facts.model}"),
    )


def _files(facts: ClientFacts) -> tuple[ConfigFile, ...]:
    return (
        ConfigFile(
            folder="~/.openclaw",
            variable="OPENCLAW_STATE_DIR",
            file_variable="OPENCLAW_CONFIG_PATH",
            name="openclaw.json",
            format="json",
            settings=_settings(facts),
        ),
    )


def _session(facts: ClientFacts, folder: Path) -> Session:
    return Session(
        env={"OPENCLAW_CONFIG_PATH": str(folder / "openclaw.json")},
        files={"openclaw.json": json.dumps(nested(_settings(facts)), indent=2)},
    )


CLIENT = Client(
    name="openclaw",
    title="OpenClaw",
    about="Personal agent, through /v1/chat/completions",
    docs="https://docs.openclaw.ai",
    program="openclaw",
    install="npm install -g openclaw",
    least_context=24_576,
    files=_files,
    session=_session,
    notes=(
        "A prompt begins with about 15,500 tokens; `openclaw agent exec … --local-model-lean` with 8,800.",
        "It needs Node.js 24.16 or later.",
    ),
)
