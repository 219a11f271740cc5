"""How each client is asked once without a terminal, and what the scripted model answers."""

import json
from collections.abc import Callable
from typing import NamedTuple

from agents.scripted_server import Rule

__all__ = ["COUNT", "OWN_FILES", "RULES", "SHOTS", "TOOL_ANSWER", "USE_TOOL", "Shot"]

USE_TOOL = "USE-TOOL once, then say what it said."
COUNT = "COUNT-SLOWLY, please."
TOOL_ANSWER = "The tool said hi-from-tool."
_COMMAND = "printf %s-%s hi from-tool"
"""What it prints is not among its own words, so that the script knows a result from the call."""


class Shot(NamedTuple):
    """One client."""

    ask: Callable[[str], tuple[str, ...]]
    """Its arguments for one question, allowed to run commands."""
    tool: str
    arguments: dict[str, str]
    lean: Callable[[str], tuple[str, ...]] | None
    """The same with a prompt that fits a context of 8,192 tokens; None: there is no such way."""
    why_not: str = ""
    stop_code: int = 130
    """Exit code after Ctrl-C, as the client has it."""


def _claude(question: str, tools: str = "default") -> tuple[str, ...]:
    return ("-p", question, "--allowedTools", "Bash", "--tools", tools)


def _codex(question: str) -> tuple[str, ...]:
    return ("exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", question)


def _opencode(question: str) -> tuple[str, ...]:
    return ("run", "--auto", question)


def _hermes(question: str) -> tuple[str, ...]:
    return ("-z", question)


def _openclaw(question: str) -> tuple[str, ...]:
    return ("agent", "exec", question, "--local-model-lean", "--json")


SHOTS = {
    "claude-code": Shot(
        _claude, "Bash", {"command": _COMMAND}, lambda question: _claude(question, "Bash"), stop_code=0
    ),
    "codex": Shot(_codex, "exec_command", {"cmd": _COMMAND}, _codex, stop_code=1),
    "opencode": Shot(
        _opencode,
        "bash",
        {"command": _COMMAND, "description": "Print"},
        None,
        "it compacts its 7,600 tokens again and again",
    ),
    "hermes": Shot(_hermes, "terminal", {"command": _COMMAND}, None, "it refuses less than 64,000 tokens"),
    "openclaw": Shot(_openclaw, "exec", {"command": _COMMAND}, None, "its leanest prompt has 9,000 tokens"),
}

_ELSEWHERE = "http://127.0.0.1:9"
OWN_FILES = {
    "home/.claude/settings.json": {
        "env": {"ANTHROPIC_BASE_URL": _ELSEWHERE, "ANTHROPIC_MODEL": "other"},
        "permissions": {"defaultMode": "plan"},
    },
    "home/.codex/config.toml": f"""\
        model = "other"
        model_provider = "elsewhere"
        [model_providers.elsewhere]
        name = "elsewhere"
        base_url = "{_ELSEWHERE}/v1"
        wire_api = "responses"
    """,
    "home/.hermes/config.yaml": {"model": {"default": "other", "provider": "custom", "base_url": _ELSEWHERE}},
    "home/.openclaw/openclaw.json": {"agents": {"defaults": {"model": {"primary": "elsewhere/other"}}}},
    "project/opencode.json": {
        # OpenCode itself adds it where it is missing.
        "$schema": "https://opencode.ai/config.json",
        "model": "elsewhere/other",
        "provider": {"optiq": {"options": {"baseURL": f"{_ELSEWHERE}/v1"}}},
    },
}
"""Configuration of the user's that leads elsewhere; a session must neither follow nor change it."""


def _call(shot: Shot) -> str:
    call = json.dumps({"name": shot.tool, "arguments": shot.arguments})
    return f"<tool_call>\n{call}\n</tool_call>"


RULES = (
    Rule(when=("hi-from-tool",), say=TOOL_ANSWER),
    *(Rule(when=("USE-TOOL", f'"name": "{shot.tool}"'), say=_call(shot)) for shot in SHOTS.values()),
    Rule(when=("COUNT-SLOWLY",), say=" ".join(["one two three four five"] * 60), pause_s=0.2),
    Rule(say="Hello from the script."),
)
