"""Hermes Agent: a custom provider in config.yaml; speaks the OpenAI chat dialect.

Source: Hermes Agent documentation, "Configuration"; what versions really send was recorded.
"""

import json
from pathlib import Path

from mlx_optiq_integrations.client import Client, ConfigFile, Session, Setting, nested
from mlx_optiq_integrations.facts import ClientFacts

__all__ = ["CLIENT"]


def _settings(facts: ClientFacts) -> tuple[Setting, ...]:
    return (
        Setting(("model", "default"), facts.model),
        Setting(("model", "provider"), "custom"),
        Setting(("model", "base_url"), facts.api),
        Setting(("model", "api_key"), facts.api_key),
        Setting(
            ("model", "context_length"),
            facts.context,
            "otherwise it asks a dozen addresses before every turn; must be 64,000 or more",
        ),
        *((Setting(("model", "supports_vision"), True),) if facts.sees_images else ()),
    )


def _files(facts: ClientFacts) -> tuple[ConfigFile, ...]:
    return (
        ConfigFile(
            folder="~/.hermes",
            variable="HERMES_HOME",
            name="config.yaml",
            format="yaml",
            settings=_settings(facts),
        ),
    )


def _session(facts: ClientFacts, folder: Path) -> Session:
    return Session(
        env={"HERMES_HOME": str(folder)},
        # JSON is YAML too.
        files={"config.yaml": json.dumps(nested(_settings(facts)), indent=2)},
    )


CLIENT = Client(
    name="hermes",
    title="Hermes Agent",
    about="Nous Research's agent, through /v1/chat/completions",
    docs="https://hermes-agent.nousresearch.com/docs",
    program="hermes",
    install="pip install hermes-agent",
    least_context=64_000,
    files=_files,
    session=_session,
    notes=(
        "A prompt begins with about 12,100 tokens, 10,500 of them tools.",
        "It refuses to start with a context below 64,000 tokens.",
    ),
)
