"""Talk to a running server: one JSON request, one JSON answer, errors in the server's own words.

Knows HTTP and no command. Called by ``optiq adapters``.
"""

import argparse
import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from mlx_optiq_ext.cli.api_key import read_api_key
from mlx_optiq_ext.errors import EngineError, RequestError, UsageError

__all__ = ["add_address_arguments", "add_server_arguments", "ask_server", "path_of"]

_TIMEOUT_S = 600
_URL = "http://127.0.0.1:8080"


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where the server is, and which of its models is meant."""
    add_address_arguments(parser)
    parser.add_argument("--model", default="", help="Which of several models; the default one without it.")


def add_address_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where the server is."""
    parser.add_argument("--url", default=_URL, help=f"Where the server listens (default: {_URL}).")
    parser.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="File with the API key, in place of the variable OPTIQ_API_KEY.",
    )


def path_of(*parts: str, **query: str) -> str:
    """A path with its parts and query quoted."""
    path = "/" + "/".join(urllib.parse.quote(part, safe="") for part in parts)
    given = {name: value for name, value in query.items() if value}
    return f"{path}?{urllib.parse.urlencode(given)}" if given else path


def ask_server(args: argparse.Namespace, method: str, path: str, body: object = None) -> Any:
    """Send one request.

    Args:
        args: With what :func:`add_server_arguments` added.
        path: From :func:`path_of`.
        body: Sent as JSON; None sends none.
    Raises:
        EngineError: Nobody answers there, or it is no such server.
        RequestError: The server refuses.
    """
    url = args.url.rstrip("/") + path
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"--url {args.url!r} is no address; write it like {_URL}")
    request = urllib.request.Request(url, method=method, headers={"Accept": "application/json"})
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    key = read_api_key(args.api_key_file)
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        raise RequestError(f"{args.url}: {_reason(error)}") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        raise EngineError(
            f"no optiq server answers at {args.url} ({why}); start one, or give --url"
        ) from error


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"answered {error.code}; is it an optiq server?"
