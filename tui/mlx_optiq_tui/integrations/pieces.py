"""What a client needs to be told, piece by piece: its files, then what it has no file for.

Knows the clients' registry and no widget.
"""

import msgspec

from mlx_optiq_integrations.client import Client, ConfigFile
from mlx_optiq_integrations.facts import ClientFacts
from mlx_optiq_integrations.merge import fresh_text

__all__ = ["Piece", "pieces_of"]


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """Something to copy, or to write."""

    title: str
    language: str
    text: str
    file: ConfigFile | None = None
    """Where it can be written; None: it can only be copied."""


def pieces_of(client: Client, facts: ClientFacts) -> tuple[Piece, ...]:
    """All of them, files first.

    Raises:
        UsageError: The extra ``clients`` is not installed, which a file's format needs.
    """
    files = client.files(facts) if client.files else ()
    snippets = client.snippets(facts) if client.snippets else ()
    return (
        *(
            Piece(
                title=f"{file.folder}/{file.name}",
                language=file.format,
                text=fresh_text(file.format, file.settings),
                file=file,
            )
            for file in files
        ),
        *(
            Piece(title=snippet.where or snippet.language, language=snippet.language, text=snippet.code)
            for snippet in snippets
        ),
    )
