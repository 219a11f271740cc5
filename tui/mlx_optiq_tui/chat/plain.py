"""Text of others made harmless to show: what a terminal would obey becomes a symbol.

Textual writes control characters as they are, so an answer, a page that was found or a program's output could
else set the clipboard or the title, or clear the screen; direction marks could show code in another order
than it runs. Knows no widget.

Source: ECMA-48 (control functions); Unicode Standard Annex #9 (explicit directional formatting).
"""

__all__ = ["plain", "plainest"]

_LINE_KEPT = "\n\t"
_DIRECTIONS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029)
_SYMBOLS: dict[int, int | str] = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in _LINE_KEPT},
    0x7F: 0x2421,
    **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)},
    **{code: f"\\u{code:04x}" for code in _DIRECTIONS},
}


def plain(text: str) -> str:
    """For reading: control characters and direction marks as symbols."""
    return text.replace("\r\n", "\n").translate(_SYMBOLS)


def plainest(text: str) -> str:
    """For consent: everything that is not seen, as its number."""
    return "".join(
        character
        if character.isprintable() or character in _LINE_KEPT
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
