"""Requests that wait until their model can be opened: in the order they came, those of one model together.

Knows that models are opened and may have to wait for others; nothing of tokens or rows. Called by ``owner``
on the owner thread.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from mlx_optiq_ext.engine.served import Loaded, ModelSpec
from mlx_optiq_ext.engine.settle import attempt
from mlx_optiq_ext.errors import ModelError, Overloaded

__all__ = ["Opening", "Openings"]

_log = logging.getLogger(__name__)


class Opening(NamedTuple):
    """One that waits."""

    spec: ModelSpec
    then: Callable[[Loaded], None]
    """Called with the model; it was opened once for this."""
    otherwise: Callable[[Exception], None]
    """Told why there is no model, or what ``then`` raised."""
    has_left: Callable[[], bool]
    """Whether nobody waits for it any more; has told so then."""


class Openings:
    """The line of those that wait.

    While the first one waits for a model that answers others, those behind it wait too, also for a model that
    is there: else requests that keep coming for that one would hold the first back for ever.

    Args:
        open_model: Opens a model, or raises :class:`Overloaded` where running requests must end first.
    """

    def __init__(self, open_model: Callable[[ModelSpec], Loaded]) -> None:
        self._open_model = open_model
        self._line: deque[Opening] = deque()

    def __len__(self) -> int:
        return len(self._line)

    def add(self, opening: Opening) -> None:
        """Join the line, and go on at once where that can be."""
        self._line.append(opening)
        self.advance()

    def advance(self) -> None:
        """Open what can be opened now."""
        self._line = deque(each for each in self._line if not each.has_left())
        while self._line:
            spec = self._line[0].spec
            for opening in self._leaving(spec):
                try:
                    loaded = self._open_model(spec)
                except Overloaded:
                    self._line.appendleft(opening)
                    return
                except Exception as error:  # noqa: BLE001  this request's error, told to it
                    _log.warning("%s cannot be opened: %s", spec.name, error)
                    opening.otherwise(_without_path(error, spec))
                    continue
                attempt(partial(opening.then, loaded), opening.otherwise)

    def fail(self, error: Exception) -> None:
        """Nobody's model will be opened."""
        while self._line:
            self._line.popleft().otherwise(error)

    def _leaving(self, spec: ModelSpec) -> Iterator[Opening]:
        """Take out all that wait for a model, one after the other."""
        while (found := next((each for each in self._line if each.spec is spec), None)) is not None:
            self._line.remove(found)
            yield found


def _without_path(error: Exception, spec: ModelSpec) -> Exception:
    """What is wrong with a model, for those who asked from elsewhere: its name in place of its folder."""
    if isinstance(error, ModelError):
        return type(error)(str(error).replace(spec.ref.path, spec.name))
    return error
