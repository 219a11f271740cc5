"""curl, in both dialects."""

import json
import shlex
from typing import Any

from mlx_optiq_integrations.client import Client, Snippet
from mlx_optiq_integrations.facts import ClientFacts

__all__ = ["CLIENT"]


def _snippets(facts: ClientFacts) -> tuple[Snippet, ...]:
    body = {
        "model": facts.model,
        "messages": [{"role": "user", "content": "Why is the sky blue?"}],
        "max_tokens": min(facts.max_output, 512),
    }
    key = (f"Authorization: Bearer {facts.api_key}",) if facts.needs_key else ()
    return tuple(
        Snippet(language="sh", code=_call(f"{facts.api}/{path}", headers, body))
        for path, headers in (
            ("chat/completions", key),
            ("messages", ("anthropic-version: 2023-06-01", *key)),
        )
    )


def _call(url: str, headers: tuple[str, ...], body: dict[str, Any]) -> str:
    lines = [f"curl {shlex.quote(url)}"]
    lines += [f"-H {shlex.quote(header)}" for header in ("Content-Type: application/json", *headers)]
    return " \\\n  ".join([*lines, f"-d {shlex.quote(json.dumps(body, ensure_ascii=False))}"])


CLIENT = Client(
    name="curl",
    title="curl",
    about="One request on the command line, in both dialects",
    docs="https://curl.se/docs/manpage.html",
    snippets=_snippets,
)
