"""What was recorded of a real server: its snapshots, its log, a few answers.

Knows the file and no HTTP. Written by ``docs/pictures/record.py``, read by ``demo.server``.
"""

import gzip
from importlib import resources

import msgspec

from mlx_optiq_ext.types.port import LogLine
from mlx_optiq_ext.types.status import AdapterStatus, EngineStatus
from mlx_optiq_tui.chat_stream import ChatDelta

__all__ = ["Answer", "Moment", "Recording", "read_recording", "recording_bytes"]

_FILE = "recording.json.gz"


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """A second of the recording."""

    status: EngineStatus
    lines: tuple[LogLine, ...] = ()
    """Of the log, since the moment before."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a model with an adapter said to a prompt."""

    prompt: str
    adapter: str = ""
    deltas: tuple[ChatDelta, ...]
    first_token_s: float
    seconds: float


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    format_version: int = 1
    moments: tuple[Moment, ...]
    answers: tuple[Answer, ...]
    available: tuple[AdapterStatus, ...] = ()
    """Adapters that were not mounted and can be."""


def read_recording() -> Recording:
    """The recording that comes with this package."""
    data = resources.files("mlx_optiq_tui").joinpath("data", _FILE).read_bytes()
    return msgspec.json.decode(gzip.decompress(data), type=Recording)


def recording_bytes(recording: Recording) -> bytes:
    """The file's content; equal recordings give equal bytes."""
    return gzip.compress(msgspec.json.encode(recording), mtime=0)
