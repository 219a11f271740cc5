"""The engine as the HTTP layer sees it: plain values in, plain values out, from any thread."""

from concurrent.futures import Future
from typing import Protocol

import msgspec

from mlx_optiq_ext.types.chat import Generation
from mlx_optiq_ext.types.events import EventSink
from mlx_optiq_ext.types.status import AdapterStatus, EngineStatus

__all__ = ["Embeddings", "Engine", "LogLine"]


class LogLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the server's log, without secrets."""

    number: int
    """Counts up; ask for lines after one."""
    time: float
    level: str
    text: str


class Embeddings(msgspec.Struct, frozen=True, kw_only=True):
    """Vectors of the inputs, in order, and what they cost."""

    model: str
    vectors: tuple[tuple[float, ...], ...]
    prompt_tokens: int


class Engine(Protocol):
    """Runs requests; every method may be called from any thread; only the last two block for long."""

    def submit(self, request: Generation, deliver: EventSink) -> str:
        """Take a request and return its job's name.

        ``deliver`` gets every event, in order, on a thread of the engine: hand it over and return at once.
        After ``Finished`` or ``Failed`` it is not called again.

        Raises:
            RequestError: It can be refused without rendering it.
            QueueFull: Too many wait.
            EngineStopped: Draining, or failed.
        """

    def cancel(self, job: str) -> None:
        """Forget a job; its row leaves before the next step. An unknown or ended job is no error."""

    def count_tokens(self, request: Generation) -> "Future[int]":
        """Prompt tokens that :meth:`submit` of the same request would use; fails as ``submit`` would."""

    def embed(self, model: str, inputs: tuple[str | tuple[int, ...], ...]) -> "Future[Embeddings]":
        """One vector per input: the mean of the last hidden states, of unit length."""

    def status(self) -> EngineStatus:
        """The latest snapshot."""

    def load(self, model: str) -> "Future[None]":
        """Load a model by its name now, making room where the memory limit needs it."""

    def unload(self, model: str) -> "Future[None]":
        """Drop a model that no row uses."""

    def mount(self, name: str, source: str, model: str = "") -> "Future[AdapterStatus]":
        """Mount an adapter from a folder or the Hub under a name; rows go on meanwhile.

        Raises:
            RequestError: No name for an adapter, or one that is taken.
            AdapterError: (from the future) It does not fit the model, or its numbers are not finite.
        """

    def unmount(self, name: str, model: str = "") -> "Future[None]":
        """Take an adapter away from new requests at once, and from memory when no row uses it."""

    def use(self, name: str | None, model: str = "") -> "Future[None]":
        """Let requests that name no adapter get this one; None: the base."""

    def clear_prefix_cache(self) -> "Future[int]":
        """Drop every entry, on disk too; the number of bytes that were held."""

    def log_lines(self, after: int = 0) -> tuple[LogLine, ...]:
        """The lines that are kept, newer than ``after``."""

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for those that run; whether all of them ended. Blocks."""

    def close(self, timeout_s: float = 60.0) -> None:
        """End what runs, keep what survives a restart, stop. Blocks."""
