"""Claude Code: environment in its settings file; speaks the Anthropic dialect.

Source: Claude Code documentation, "Settings" and "LLM gateways"; what versions really send was recorded.
"""

import json
from pathlib import Path

from mlx_optiq_integrations.client import Client, ConfigFile, Session, Setting, nested
from mlx_optiq_integrations.facts import ClientFacts

__all__ = ["CLIENT"]

_MODELS = (
    "ANTHROPIC_MODEL",
    "ANTHROPIC_DEFAULT_OPUS_MODEL",
    "ANTHROPIC_DEFAULT_SONNET_MODEL",
    "ANTHROPIC_DEFAULT_HAIKU_MODEL",
    "CLAUDE_CODE_SUBAGENT_MODEL",
)


def _environment(facts: ClientFacts) -> tuple[tuple[str, str, str], ...]:
    return (
        ("ANTHROPIC_BASE_URL", facts.url, "the server, without /v1"),
        ("ANTHROPIC_AUTH_TOKEN", facts.api_key, "sent as Bearer; it insists on one"),
        (
            _MODELS[0],
            facts.model,
            "without it another model is asked for, with answers of 128,000 tokens",
        ),
        *(
            (name, facts.model, "so that other parts of Claude Code do not ask for other models")
            for name in _MODELS[1:]
        ),
        (
            "CLAUDE_CODE_MAX_CONTEXT_TOKENS",
            str(facts.context),
            "drives its compaction; otherwise a window of a million tokens is assumed",
        ),
        (
            "CLAUDE_CODE_MAX_OUTPUT_TOKENS",
            str(facts.max_output),
            "leaves room for the prompt; the default is 32,000",
        ),
        ("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1", "nothing is sent elsewhere"),
        (
            "CLAUDE_CODE_ATTRIBUTION_HEADER",
            "0",
            "this line differs in every session: without it sessions share their cached prefix",
        ),
        ("API_TIMEOUT_MS", "3000000", "a local model may take long over a long prompt"),
        *(
            ()
            if facts.thinks or facts.is_assumed
            else (("MAX_THINKING_TOKENS", "0", "the model does not think: nothing is asked for it"),)
        ),
    )


_MODE = Setting(
    ("permissions", "defaultMode"),
    "default",
    "the mode `auto` needs a classifier on Anthropic's servers; tools would be refused",
)


def _files(facts: ClientFacts) -> tuple[ConfigFile, ...]:
    settings = tuple(Setting(("env", name), value, why) for name, value, why in _environment(facts))
    return (
        ConfigFile(
            folder="~/.claude",
            variable="CLAUDE_CONFIG_DIR",
            name="settings.json",
            format="json",
            settings=(*settings, _MODE),
        ),
    )


def _session(facts: ClientFacts, folder: Path) -> Session:
    # The environment of the user's own settings goes before that of the process; --settings go before both.
    [file] = _files(facts)
    return Session(
        unset=("ANTHROPIC_API_KEY", "CLAUDE_CODE_USE_BEDROCK", "CLAUDE_CODE_USE_VERTEX"),
        argv=("--settings", str(folder / "settings.json")),
        files={"settings.json": json.dumps(nested(file.settings), indent=2)},
    )


CLIENT = Client(
    name="claude-code",
    title="Claude Code",
    about="Anthropic's coding agent, through /v1/messages",
    docs="https://code.claude.com/docs/en/settings",
    program="claude",
    install="npm install -g @anthropic-ai/claude-code",
    least_context=16_384,
    files=_files,
    session=_session,
    notes=(
        "A prompt begins with about 12,600 tokens, 8,500 of them tools; `--tools Bash,Read,Edit,Write` "
        "brings that to about 5,000.",
    ),
)
