"""How to run a finished checkpoint with stock mlx-lm: command line, Python, server.

Pure text; knows nothing of files or of how the checkpoint was made. Shown at the end of a conversion and in
the model card.
"""

import json
import shlex

import msgspec

__all__ = ["Snippet", "snippets_markdown", "snippets_text", "usage_snippets"]

_PROMPT = "In two sentences: why is the sky blue?"
_PORT = 8080


class Snippet(msgspec.Struct, frozen=True, kw_only=True):
    """Some lines to copy."""

    title: str
    language: str
    """Language of a fenced code block: ``sh``, ``python``."""
    code: str
    """Lines without a trailing newline."""


def usage_snippets(model: str, *, is_chat: bool = True) -> tuple[Snippet, ...]:
    """Snippets that run ``model``.

    Args:
        model: Folder or Hub repository, as the reader would type it.
        is_chat: Whether the checkpoint has a chat template; without one, text is continued.
    """
    word = shlex.quote(model)
    prompt = _PROMPT if is_chat else "The sky is blue because"
    path, body = _request(model, prompt, is_chat)
    return (
        Snippet(
            title="Command line",
            language="sh",
            code=f"pip install mlx-lm\nmlx_lm.generate --model {word} --prompt {shlex.quote(prompt)}"
            + (f"\nmlx_lm.chat --model {word}" if is_chat else ""),
        ),
        Snippet(title="Python", language="python", code=_python(model, prompt, is_chat)),
        Snippet(
            title="Server (OpenAI API)",
            language="sh",
            code=f"mlx_lm.server --model {word} --port {_PORT}\n"
            f"curl http://localhost:{_PORT}{path} -H 'Content-Type: application/json' \\\n"
            f"  -d {shlex.quote(json.dumps(body, ensure_ascii=False))}",
        ),
    )


def snippets_markdown(snippets: tuple[Snippet, ...], *, level: int = 3) -> str:
    """The snippets as Markdown: a heading of ``level`` and a fenced block each."""
    heading = "#" * level
    return "\n\n".join(
        f"{heading} {snippet.title}\n\n```{snippet.language}\n{snippet.code}\n```" for snippet in snippets
    )


def snippets_text(snippets: tuple[Snippet, ...]) -> str:
    """The snippets for a terminal: a title and indented lines each."""
    return "\n\n".join(
        "\n".join([f"{snippet.title}:", *(f"  {line}".rstrip() for line in snippet.code.split("\n"))])
        for snippet in snippets
    )


def _python(model: str, prompt: str, is_chat: bool) -> str:
    # json.dumps writes a string that Python reads too.
    lines = [
        "from mlx_lm import generate, load",
        "",
        f"model, tokenizer = load({json.dumps(model)})",
        f"prompt = {json.dumps(prompt)}",
    ]
    if is_chat:
        lines.append('messages = [{"role": "user", "content": prompt}]')
        lines.append("prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)")
    lines.append("print(generate(model, tokenizer, prompt=prompt, max_tokens=256))")
    return "\n".join(lines)


def _request(model: str, prompt: str, is_chat: bool) -> tuple[str, dict[str, object]]:
    """Path and body of one request to ``mlx_lm.server``."""
    if is_chat:
        messages = [{"role": "user", "content": prompt}]
        return "/v1/chat/completions", {"model": model, "messages": messages, "max_tokens": 256}
    return "/v1/completions", {"model": model, "prompt": prompt, "max_tokens": 256}
