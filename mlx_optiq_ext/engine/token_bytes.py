"""The exact bytes that a token stands for, alone: a token may be a part of a character.

Knows how vocabularies spell bytes: byte-level (one letter per byte), sentencepiece (``▁`` and ``<0x0A>``),
plain text. Called for log-probabilities and to build the vocabulary of constrained decoding.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

__all__ = ["added_tokens", "token_bytes"]

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPELLINGS: "WeakKeyDictionary[Any, _Spelling]" = WeakKeyDictionary()


def token_bytes(tokenizer: Any, tokens: Sequence[int]) -> list[bytes]:
    """Bytes of each token; empty where the tokenizer has no such token.

    Args:
        tokenizer: mlx-lm's wrapper or a tokenizer of transformers.
    """
    spelling = _SPELLINGS.get(tokenizer)
    if spelling is None:
        spelling = _SPELLINGS[tokenizer] = _Spelling(tokenizer)
    known = [token for token in tokens if 0 <= token < spelling.num_tokens]
    pieces = dict(zip(known, tokenizer.convert_ids_to_tokens(known), strict=True))
    return [
        spelling.added.get(token) or spelling.spell(pieces[token]) if pieces.get(token) else b""
        for token in tokens
    ]


def added_tokens(tokenizer: Any) -> dict[str, int]:
    """Tokens that are matched as a whole, by their text: special ones and others."""
    return dict(tokenizer.get_added_vocab())


class _Spelling:
    def __init__(self, tokenizer: Any) -> None:
        self.num_tokens = len(tokenizer)
        self.added = {token: text.encode() for text, token in added_tokens(tokenizer).items()}
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        kind = decoder.__getstate__().decode() if decoder is not None else ""
        self.spell: Callable[[str], bytes]
        if "ByteLevel" in kind or hasattr(tokenizer, "byte_decoder"):
            self.spell = _byte_level
        elif "▁" in kind or "ByteFallback" in kind or hasattr(tokenizer, "sp_model"):
            self.spell = _sentencepiece
        else:
            to_string = tokenizer.convert_tokens_to_string
            self.spell = lambda piece: str(to_string([piece])).encode()


def _byte_level(piece: str) -> bytes:
    letters = _letters()
    return b"".join(letters.get(letter) or letter.encode() for letter in piece)


def _sentencepiece(piece: str) -> bytes:
    byte = _BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


@cache
def _letters() -> dict[str, bytes]:
    """Byte of each letter of byte-level vocabularies: printable Latin-1 stands for itself, others follow 255.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): bytes([byte]) for byte in printable}
    return letters | {chr(256 + n): bytes([byte]) for n, byte in enumerate(others)}
