"""What a client's configuration is made from: where the server is, and what it serves.

Knows no client. Made from a running server's status, or assumed where nobody answers.
"""

import msgspec

from mlx_optiq_ext.errors import EngineError
from mlx_optiq_ext.types.status import EngineStatus, ServedModel

__all__ = ["NO_KEY", "ClientFacts", "assumed_facts", "facts_of", "served_facts"]

NO_KEY = "optiq-local"
"""Stands where a client insists on a key and the server needs none."""

_ASSUMED_CONTEXT = 32_768
_MOST_OUTPUT = 16_384
_OUTPUT_SHARE = 4


class ClientFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about the model that answers and the server it is behind."""

    url: str
    """Of the server, without ``/v1`` and without a slash at the end."""
    model: str
    """What requests name."""
    context: int
    """Tokens of prompt and answer together that fit."""
    max_output: int
    """Tokens of one answer that a client should ask for."""
    sees_images: bool = False
    thinks: bool = False
    calls_tools: bool = True
    api_key: str = NO_KEY
    needs_key: bool = False
    is_assumed: bool = False
    """Nobody answered, or the model is not loaded: limits and abilities are guesses."""

    @property
    def api(self) -> str:
        """Base of the OpenAI dialect."""
        return f"{self.url}/v1"


def facts_of(served: ServedModel, url: str, api_key: str | None = None) -> ClientFacts:
    """Take the facts from what a server says of a model.

    Args:
        served: From its status; of a model that is not loaded, limits and abilities are assumed.
        url: Where the server is.
        api_key: None: the server needs none.
    """
    if not served.context:
        return assumed_facts(url, served.id, api_key=api_key)
    return ClientFacts(
        url=url.rstrip("/"),
        model=served.id,
        context=served.context,
        max_output=_output(served.context),
        sees_images=served.sees_images,
        thinks=served.thinks,
        calls_tools=served.calls_tools,
        api_key=api_key or NO_KEY,
        needs_key=api_key is not None,
    )


def served_facts(status: EngineStatus, url: str, model: str = "", api_key: str | None = None) -> ClientFacts:
    """Take the facts of one of a server's models.

    Args:
        status: What the server says of itself.
        url: Where it is.
        model: Name or alias, also ``model@adapter``; empty: the default one.
        api_key: None: the server needs none.
    Raises:
        EngineError: It serves no such model.
    """
    name, _, adapter = model.partition("@")
    for served in status.models:
        if name in ("", served.id, *served.aliases):
            facts = facts_of(served, url, api_key)
            return msgspec.structs.replace(facts, model=f"{served.id}@{adapter}") if adapter else facts
    known = ", ".join(served.id for served in status.models) or "no model"
    raise EngineError(f"the server at {url} serves {known}, not {model!r}")


def assumed_facts(url: str, model: str, context: int = 0, api_key: str | None = None) -> ClientFacts:
    """Guess the facts where no server answers.

    Args:
        url: Where it will be.
        model: What requests will name.
        context: Tokens that fit; 0: a guess.
        api_key: None: the server will need none.
    """
    tokens = context or _ASSUMED_CONTEXT
    return ClientFacts(
        url=url.rstrip("/"),
        model=model,
        context=tokens,
        max_output=_output(tokens),
        api_key=api_key or NO_KEY,
        needs_key=api_key is not None,
        is_assumed=True,
    )


def _output(context: int) -> int:
    return min(_MOST_OUTPUT, context // _OUTPUT_SHARE)
