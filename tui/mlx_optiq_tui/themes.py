"""Colours of the dashboard: a dark and a light theme that any colour vision can read, and one without hue.

States differ by symbol and word too; colour only helps. Ramps of bits and sensitivity are those of
``mlx_optiq_ext.types.palette``.

Source: M. Okabe and K. Ito, "Color Universal Design" (2008): blue, orange, vermillion, sky blue.
"""

from collections.abc import Mapping

import msgspec
from textual.theme import Theme

__all__ = ["DEFAULT_THEME", "THEMES", "Inks"]

DEFAULT_THEME = "optiq-dark"


class Inks(msgspec.Struct, frozen=True, kw_only=True):
    """Colours of the theme that is on, for pictures made of text."""

    accent: str
    good: str
    bad: str

    @classmethod
    def of(cls, variables: Mapping[str, str]) -> "Inks":
        """Of the variables that a theme gives to CSS."""
        return cls(accent=variables["primary"], good=variables["success"], bad=f"bold {variables['error']}")


THEMES: tuple[Theme, ...] = (
    Theme(
        name="optiq-dark",
        primary="#56b4e9",
        secondary="#cc79a7",
        accent="#e69f00",
        success="#56b4e9",
        warning="#e69f00",
        error="#ff7f50",
        foreground="#e4e8ec",
        background="#10151b",
        surface="#161d25",
        panel="#1f2933",
        dark=True,
    ),
    Theme(
        name="optiq-light",
        primary="#0067a3",
        secondary="#a3437c",
        accent="#835400",
        success="#0067a3",
        warning="#835400",
        error="#a33b00",
        foreground="#1b232b",
        background="#fbfbf8",
        surface="#f1f2ee",
        panel="#e3e6e3",
        dark=False,
    ),
    Theme(
        name="optiq-grey",
        primary="#d0d0d0",
        secondary="#a8a8a8",
        accent="#ffffff",
        success="#d0d0d0",
        warning="#ffffff",
        error="#ffffff",
        foreground="#e8e8e8",
        background="#000000",
        surface="#141414",
        panel="#262626",
        dark=True,
    ),
)
