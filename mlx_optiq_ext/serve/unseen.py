"""Reasoning that travels through a client unseen: in a signature, or as encrypted content.

A client may ask not to be shown what the model thinks, and still has to bring it back with the next turn, so
that the prompt keeps its prefix. The text is encoded, not encrypted: it is the client's own conversation.
"""

import base64

__all__ = ["conceal", "reveal"]

_MARK = "optiq1."


def conceal(text: str) -> str:
    """Encode reasoning as an opaque word; never empty, also where ``text`` is."""
    return _MARK + base64.urlsafe_b64encode(text.encode()).decode("ascii")


def reveal(word: str) -> str:
    """Decode what :func:`conceal` made; empty for the words of other servers."""
    if not word.startswith(_MARK):
        return ""
    try:
        return base64.b64decode(word[len(_MARK) :], altchars=b"-_", validate=True).decode()
    except ValueError:  # no base64, or no UTF-8 in it
        return ""
