"""Codex: a provider in its config.toml; speaks the Responses dialect.

Source: Codex documentation, "config.toml"; what versions really send was recorded.
"""

import json
from pathlib import Path

from mlx_optiq_integrations.client import Client, ConfigFile, Session, Setting
from mlx_optiq_integrations.facts import ClientFacts

__all__ = ["CLIENT"]

_KEY_VARIABLE = "OPTIQ_API_KEY"
_COMPACT_SHARE = 0.85


def _settings(facts: ClientFacts) -> tuple[Setting, ...]:
    provider = ("model_providers", "optiq")
    return (
        Setting(("model",), facts.model),
        Setting(("model_provider",), "optiq"),
        Setting(("model_context_window",), facts.context, "what fits; Codex does not ask the server"),
        Setting(
            ("model_auto_compact_token_limit",),
            int(facts.context * _COMPACT_SHARE),
            "compacts before the window is full",
        ),
        Setting(("web_search",), "disabled", "searching is done by OpenAI's servers"),
        *(
            ()
            if facts.thinks or facts.is_assumed
            else (Setting(("model_reasoning_summary",), "none", "the model does not think"),)
        ),
        Setting(("features", "multi_agent"), False, "saves 10 kB of tools in every prompt"),
        Setting(("features", "goals"), False, "saves three tools in every prompt"),
        Setting((*provider, "name"), "optiq"),
        Setting((*provider, "base_url"), facts.api),
        Setting((*provider, "wire_api"), "responses", "the only one that Codex still speaks"),
        *(
            (Setting((*provider, "env_key"), _KEY_VARIABLE, "the variable that holds the key"),)
            if facts.needs_key
            else ()
        ),
        Setting((*provider, "request_max_retries"), 1, "a repeated request is computed again"),
        Setting((*provider, "stream_max_retries"), 1),
        Setting(
            (*provider, "stream_idle_timeout_ms"), 600_000, "a local model may take long over a long prompt"
        ),
    )


def _files(facts: ClientFacts) -> tuple[ConfigFile, ...]:
    return (
        ConfigFile(
            folder="~/.codex",
            variable="CODEX_HOME",
            name="config.toml",
            format="toml",
            settings=_settings(facts),
        ),
    )


def _session(facts: ClientFacts, _folder: Path) -> Session:
    # Text, numbers and truth values are written alike in JSON and in TOML.
    words = [
        word
        for setting in _settings(facts)
        for word in ("-c", f"{'.'.join(setting.path)}={json.dumps(setting.value)}")
    ]
    return Session(argv=tuple(words), env={_KEY_VARIABLE: facts.api_key} if facts.needs_key else {})


CLIENT = Client(
    name="codex",
    title="Codex",
    about="OpenAI's coding agent, through /v1/responses",
    docs="https://developers.openai.com/codex/config-reference",
    program="codex",
    install="npm install -g @openai/codex",
    least_context=8_192,
    files=_files,
    session=_session,
    notes=(
        "A prompt begins with about 5,700 tokens; with its own defaults it would be 8,900.",
        'Its warning "Model metadata not found" means nothing here.',
    ),
)
