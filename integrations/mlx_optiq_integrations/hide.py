"""Leave the values of keys and tokens out of text for a screen: the server's, and the user's own.

Knows no client: a value is left out for the name before it. Called for every diff.
"""

import re

from mlx_optiq_integrations.facts import NO_KEY

__all__ = ["hide_keys"]

_SECRET = re.compile(
    # A name that ends so, but not one of a variable that holds a key (``env_key``) ...
    r"""((?:(?<!env_)key|token|secret|password|authorization)["']?[ \t]*[:=][ \t]*)"""
    # ... and a quoted value, or all that follows; not a table, nor what stands for no key.
    rf"""(?!["']?{re.escape(NO_KEY)}\b)("(?:[^"\\\n]|\\.)*"|'[^'\n]*'|[^\s{{\["'][^\n]*)""",
    re.IGNORECASE,
)


def hide_keys(text: str) -> str:
    """The text with ``<hidden>`` in place of every value whose name says that it is a secret."""
    return _SECRET.sub(r"\1<hidden>", text)
