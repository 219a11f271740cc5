"""Which server a client talks to: one that answers already and serves the model, or one to be started.

Knows a server's ``/optiq/status`` and nothing of clients. Called by ``optiq run``.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.types.status import EngineStatus

__all__ = ["ServerChoice", "choose_server", "named_as"]

_DEFAULT_URL = "http://127.0.0.1:8080"


class ServerChoice(msgspec.Struct, frozen=True, kw_only=True):
    """What to do about a server."""

    url: str
    """Where it is, or will be; the port may turn out to be another one."""
    model: str
    """What the client asks for; of a server that is to be started, what it is given."""
    is_running: bool


def named_as(status: EngineStatus, model: str) -> str | None:
    """How requests name the model that a user means; None: it is not served.

    Args:
        status: Of a server that answers.
        model: A served name or alias, also ``model@adapter``, a folder, a Hub repository; empty: the default.
    """
    folder = Path(model).expanduser()
    name, _, adapter = model.partition("@")
    if model and folder.is_dir():
        name, adapter = folder.resolve().name, ""
    for served in status.models:
        if name in ("", served.id, served.source, *served.aliases):
            return f"{served.id}@{adapter}" if adapter else served.id
    return None


def choose_server(
    status: EngineStatus | None, model: str, url: str | None, options: Sequence[str]
) -> ServerChoice:
    """Reuse the server that answers, or start one.

    Args:
        status: What answers at ``url`` or at the default address; None: nobody.
        model: As the user named it; empty for the default one.
        url: Where the user says it is; None: not said.
        options: For a server that is to be started; given ones rule out one that runs already.
    Raises:
        UsageError: What was said cannot be had.
    """
    name = named_as(status, model) if status is not None and not options else None
    if name is not None:
        return ServerChoice(url=url or _DEFAULT_URL, model=name, is_running=True)
    if url is not None:
        _refuse(status, model, url, options)
    if not model and not options:
        raise UsageError(f"no server answers at {_DEFAULT_URL}; give -m MODEL to start one, or --url")
    return ServerChoice(url=_DEFAULT_URL, model=model, is_running=False)


def _refuse(status: EngineStatus | None, model: str, url: str, options: Sequence[str]) -> None:
    if options:
        raise UsageError("--serve-args are for a server that is started here; leave out --url or them")
    if status is None:
        raise UsageError(f"no optiq server answers at {url}; without --url one is started")
    known = ", ".join(served.id for served in status.models)
    raise UsageError(f"the server at {url} serves {known}, not {model}; without --url one is started")
