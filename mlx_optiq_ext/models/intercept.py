"""Stand between a model and its modules for a while, and step back without a trace.

A module's class is swapped for a subclass whose ``__call__`` asks a handler, so ``isinstance`` checks,
attributes and parameters of the module stay as they are. Knows nothing of what the handler does.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn

__all__ = ["Handler", "constant_indices", "intercepted"]

_CHOOSING = ("argmax", "argmin", "argpartition", "argsort")

Handler: TypeAlias = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""``handler(module, original, args, kwargs)``: whatever it returns is the module's output."""


@contextmanager
def intercepted(modules: Iterable[nn.Module], handler: Handler) -> Iterator[None]:
    """Route every call of the given modules through ``handler`` until the context ends.

    ``Embedding.as_linear`` (the tied head) is routed as well. Undo restores the identical classes, also
    when the body raises.
    """
    # A class is part of reference cycles and outlives the context: it must not hold the handler's arrays.
    slot = [handler]
    subclasses: dict[type, type] = {}
    swapped: list[tuple[nn.Module, type]] = []
    try:
        for module in {id(m): m for m in modules}.values():
            original = type(module)
            if original not in subclasses:
                subclasses[original] = _subclass(original, slot)
            swapped.append((module, original))
            module.__class__ = subclasses[original]
        yield
    finally:
        for module, original in swapped:
            module.__class__ = original
        slot.clear()


@contextmanager
def constant_indices() -> Iterator[None]:
    """Let functions of ``mlx.core`` that return indices return constants while the body runs.

    Families that gather by indices computed from activations cannot be differentiated otherwise: mlx
    refuses a gradient for indices in place of taking it as zero. Undo restores the identical functions.
    """
    originals = {name: getattr(mx, name) for name in _CHOOSING}

    def constant(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
        return lambda *args, **kwargs: mx.stop_gradient(original(*args, **kwargs))

    try:
        for name, original in originals.items():
            setattr(mx, name, constant(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(mx, name, original)


def _subclass(original: type, slot: list[Handler]) -> type:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return slot[0](self, original.__call__.__get__(self), args, kwargs)

    members: dict[str, Any] = {"__call__": call}
    as_linear = getattr(original, "as_linear", None)
    if as_linear is not None:

        def call_as_linear(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return slot[0](self, as_linear.__get__(self), args, {**kwargs, "_as_linear": True})

        members["as_linear"] = call_as_linear
    return type(original.__name__, (original,), members)
