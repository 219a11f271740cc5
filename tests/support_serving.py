"""A real engine on a tiny random model, and requests to it that wait for their events."""

import queue
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from support_models import LLAMA, save_model_folder, tiny_model

from mlx_optiq_ext.engine.engine import LocalEngine
from mlx_optiq_ext.engine.served import ModelSpec
from mlx_optiq_ext.types.chat import Generation, Sampling
from mlx_optiq_ext.types.events import Event, Failed, Finished, TextDelta
from mlx_optiq_ext.types.kv import KVConfig
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.serve import ServeOptions

__all__ = ["Asked", "ask", "engine_on", "greedy", "spec_of", "text_of", "tiny_folder"]

_PATIENCE_S = 60.0
GREEDY = Sampling(temperature=0.0)


def tiny_folder(folder: Path, seed: int = 0, **changed: Any) -> Path:
    """A tiny Llama in float32."""
    config = {**LLAMA, "torch_dtype": "float32", "max_position_embeddings": 2048, **changed}
    return save_model_folder(folder, tiny_model(config, seed, mx.float32), config)


def spec_of(folder: Path, kv_config: KVConfig | None = None) -> ModelSpec:
    """What the engine is told of a model folder."""
    return ModelSpec(
        name=folder.name, ref=ModelRef(path=str(folder), source=str(folder)), kv_config=kv_config
    )


def engine_on(*specs: ModelSpec, **options: Any) -> LocalEngine:
    """A started engine; the caller closes it."""
    engine = LocalEngine(specs, ServeOptions(**{"memory": "2GB", **options}))
    engine.start()
    return engine


def greedy(prompt: tuple[int, ...] | str, max_tokens: int = 12, **changed: Any) -> Generation:
    """Go on from a raw prompt, without chance."""
    return Generation(prompt=prompt, max_tokens=max_tokens, **{"sampling": GREEDY, **changed})


class Asked:
    """One request under way."""

    def __init__(self, engine: LocalEngine, request: Generation) -> None:
        self.events: list[Event] = []
        self._queue: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._engine = engine
        self.job = engine.submit(request, self._queue.put)

    def until(self, kind: type[Event]) -> Event:
        """Wait for the first event of a kind; the last one ends the wait too."""
        while True:
            event = self._queue.get(timeout=_PATIENCE_S)
            self.events.append(event)
            if isinstance(event, (kind, Finished, Failed)):
                return event

    def end(self) -> list[Event]:
        """All events."""
        while not (self.events and isinstance(self.events[-1], Finished | Failed)):
            self.until(Finished)
        return self.events

    def cancel(self) -> None:
        """Leave."""
        self._engine.cancel(self.job)


def ask(engine: LocalEngine, request: Generation) -> list[Event]:
    """All events of one request."""
    return Asked(engine, request).end()


def text_of(events: list[Event]) -> str:
    """The visible answer."""
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def raising(model: nn.Module, error: Exception, *, calls: int) -> None:
    """Let the next ``calls`` forward passes of a model raise."""
    stock = type(model)

    class Failing(stock):  # type: ignore[misc, valid-type]
        left = calls

        def __call__(self, *args: Any, **named: Any) -> Any:
            if Failing.left > 0:
                Failing.left -= 1
                raise error
            return super().__call__(*args, **named)

    model.__class__ = Failing
