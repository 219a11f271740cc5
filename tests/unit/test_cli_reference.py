"""The generated reference: what it takes from source text."""

from pathlib import Path

from mlx_optiq_ext.cli.docstrings import describe_module, module_docstring

SOURCE = '''"""Shapes.

More about shapes.
"""
from typing import Annotated

__all__ = ["LIMIT", "Circle", "area"]

LIMIT = 3
"""Most circles allowed."""

HIDDEN = 4


class Circle(Struct, frozen=True):
    """A round thing."""

    radius: Annotated[float, Meta(gt=0, description="From the middle to the rim.")] = 1.0
    name: Annotated[str, Meta(max_length=9, description="What it is called.")] | None = None

    @property
    def width(self) -> float:
        """Twice the radius."""
        return 2 * self.radius

    def _secret(self):
        """Not shown."""


def area(circle: Circle, *, digits: int = 2) -> float:
    """Area in square units.

    Raises:
        ValueError: Not round.
    """
    return _pi()


def _pi():
    """Not shown."""
'''

EXPECTED = """LIMIT = 3
    Most circles allowed.

class Circle(Struct)
    A round thing.
    radius: float = 1.0
        From the middle to the rim.
    name: str | None = None
        What it is called.
    @property
    def width(self) -> float
        Twice the radius.

def area(circle: Circle, *, digits: int=2) -> float
    Area in square units.

    Raises:
        ValueError: Not round."""


def test_public_names_are_listed_with_signature_and_docstring(tmp_path: Path) -> None:
    path = tmp_path / "shapes.py"
    path.write_text(SOURCE)
    assert describe_module(path) == EXPECTED
    assert module_docstring(path) == "Shapes.\n\nMore about shapes."


def test_a_module_without_public_names_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "empty.py"
    path.write_text('"""Nothing."""\nx = 1\n')
    assert describe_module(path) == ""
