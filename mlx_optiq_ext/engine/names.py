"""Which model a name means.

Names are names, never paths: what is not known reaches the default model, or nothing. Knows no model.
"""

from collections.abc import Iterable, Mapping

from mlx_optiq_ext.errors import UnknownName, UsageError

__all__ = ["ModelNames"]


class ModelNames:
    """The names that requests may use.

    Args:
        models: Names of the models, the default one first.
        aliases: ``NAME`` (for the default) or ``NAME=MODEL``.
        strict: Refuse unknown names.
    Raises:
        UsageError: An alias names no model.
    """

    def __init__(self, models: Iterable[str], aliases: Iterable[str] = (), *, strict: bool = False) -> None:
        self.models = tuple(models)
        self._strict = strict
        self._aliases: dict[str, str] = {}
        for alias in aliases:
            name, _, model = alias.partition("=")
            target = model or self.models[0]
            if not name:
                raise UsageError(f"--alias {alias!r} has no name; write NAME, or NAME=MODEL")
            if target not in self.models:
                raise UsageError(f"--alias {alias}: no model {target!r}; there are {', '.join(self.models)}")
            self._aliases[name] = target

    @property
    def aliases(self) -> Mapping[str, str]:
        """Alias → model."""
        return self._aliases

    def resolve(self, name: str) -> str:
        """The model that answers to a name; the default one where none is named.

        Raises:
            UnknownName: None does, and names are strict.
        """
        if not name:
            return self.models[0]
        if name in self.models:
            return name
        if name in self._aliases:
            return self._aliases[name]
        tails = [model for model in self.models if model.rsplit("/", 1)[-1] == name.rsplit("/", 1)[-1]]
        if len(tails) == 1:
            return tails[0]
        if self._strict:
            known = ", ".join((*self.models, *self._aliases))
            raise UnknownName(f"no model {name!r}; there are {known}", param="model")
        return self.models[0]
