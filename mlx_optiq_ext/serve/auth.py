"""Who may ask: the API key, the host name that a request is addressed to, and the web page it comes from.

A server on this machine is in reach of every web page that its user opens. Pages are told by ``Origin``; one
that had its own name resolved to this machine (DNS rebinding) is told by ``Host``. Keys are never logged.
Knows headers only; called for every request before it is routed.
"""

import hmac
import ipaddress
import re
import socket
from collections.abc import Iterable
from typing import Self
from urllib.parse import urlsplit

import msgspec

from mlx_optiq_ext.errors import Forbidden, Unauthorized, UsageError
from mlx_optiq_ext.types.serve import ServeOptions

__all__ = ["Doors", "header_values", "is_loopback", "require_key_for"]

_LOOPBACK_NAMES = ("localhost", "ip6-localhost")
_OPEN_PATHS = ("/", "/health")
_BEARER = b"bearer "
_ALLOWED_METHODS = "GET, POST, DELETE"
_EXPOSED = "retry-after, request-id, x-request-id"

_HOST_NAME = re.compile(r"[\w-]+(\.[\w-]+)*\.?")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+")
_OTHER_ORIGINS = ("*", "null")
"""All pages; pages without an origin, such as files."""

Headers = Iterable[tuple[bytes, bytes]]


def is_loopback(host: str) -> bool:
    """Whether a name or address means this machine only."""
    name = host.strip("[]").lower().rstrip(".")
    if name in _LOOPBACK_NAMES or name.endswith(".localhost"):
        return True
    return _is_address(name) and ipaddress.ip_address(name.split("%")[0]).is_loopback


def require_key_for(host: str, key: str | None) -> None:
    """Refuse to listen beyond this machine without a key.

    Raises:
        UsageError: The address is no loopback one, and there is no key.
    """
    if key is None and not is_loopback(host):
        raise UsageError(
            f"--host {host or '(all)'} is in reach of other machines; set OPTIQ_API_KEY or --api-key-file, "
            "or listen on 127.0.0.1"
        )


def header_values(headers: Headers, name: bytes) -> list[bytes]:
    """All values of a header; ASGI gives names in lower case."""
    return [value for key, value in headers if key == name]


class Doors(msgspec.Struct, frozen=True, kw_only=True):
    """What a request must show to be let in."""

    key: str | None = None
    """None: any key, or none, will do."""
    hosts: tuple[str, ...] = ()
    """Names besides loopback ones and the address that was connected to."""
    origins: tuple[str, ...] = ()
    """Web pages that may call, as ``https://host:port``; ``*`` for all."""

    @classmethod
    def of(cls, options: ServeOptions, key: str | None) -> Self:
        """The doors that a user asked for; beyond this machine, its own name is served too.

        Raises:
            UsageError: An allowed host or origin is none.
        """
        own = () if is_loopback(options.host) else (socket.gethostname(),)
        return cls(
            key=key,
            hosts=(options.host, *own, *(_host_name(name) for name in options.allow_host)),
            origins=tuple(_origin(page) for page in options.allow_origin),
        )

    def check(self, path: str, headers: Headers, server: str | None) -> None:
        """Let a request in.

        Args:
            path: Of the request; health needs no key.
            headers: As they came.
            server: Address that the client connected to.
        Raises:
            Forbidden: Another origin, or a host name that is not served.
            Unauthorized: No key, or a wrong one.
        """
        headers = list(headers)
        for value in header_values(headers, b"host"):
            if not self._serves(value.decode("latin-1"), server):
                raise Forbidden(
                    f"this server does not answer for host {_shown(value)}; name it with --allow-host"
                )
        for value in header_values(headers, b"origin"):
            if not self._allows(value, headers):
                raise Forbidden(f"origin {_shown(value)} may not call this server; see --allow-origin")
        if path not in _OPEN_PATHS:
            self._check_key(headers)

    def cors(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        """What a page of an allowed origin has to be told; nothing for other clients."""
        origins = header_values(headers, b"origin")
        if len(origins) != 1 or not self._listed(origins[0]):
            return []
        return [
            (b"access-control-allow-origin", origins[0]),
            (b"access-control-expose-headers", _EXPOSED.encode()),
            (b"vary", b"origin"),
        ]

    def preflight(
        self, method: str, headers: Headers, server: str | None
    ) -> list[tuple[bytes, bytes]] | None:
        """What answers a browser's question before a call, besides :meth:`cors`; None if this is none.

        Raises:
            Forbidden: The page, or the host name, is not allowed.
        """
        headers = list(headers)
        if method != "OPTIONS" or not header_values(headers, b"access-control-request-method"):
            return None
        self.check("/", headers, server)
        asked = b", ".join(header_values(headers, b"access-control-request-headers"))
        answer = [
            (b"access-control-allow-methods", _ALLOWED_METHODS.encode()),
            (b"access-control-allow-headers", asked),
            (b"access-control-max-age", b"600"),
        ]
        if header_values(headers, b"access-control-request-private-network"):
            answer.append((b"access-control-allow-private-network", b"true"))
        return answer

    def _serves(self, host: str, server: str | None) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        name = name.rstrip(".")
        if is_loopback(name):
            return True
        known = {each.strip("[]").lower() for each in (*self.hosts, server or "") if each}
        return name in known

    def _allows(self, origin: bytes, headers: Headers) -> bool:
        """A listed page, or one of this server itself."""
        own = [
            scheme + host for host in header_values(headers, b"host") for scheme in (b"http://", b"https://")
        ]
        return self._listed(origin) or origin in own

    def _listed(self, origin: bytes) -> bool:
        return "*" in self.origins or origin.decode("latin-1") in self.origins

    def _check_key(self, headers: Headers) -> None:
        if self.key is None:
            return
        given = header_values(headers, b"x-api-key")
        for value in header_values(headers, b"authorization"):
            if value[: len(_BEARER)].lower() == _BEARER:
                given.append(value[len(_BEARER) :].strip())
        if not given:
            raise Unauthorized("this server needs a key: send Authorization: Bearer KEY or x-api-key: KEY")
        key = self.key.encode()
        if not any(hmac.compare_digest(each, key) for each in given):
            raise Unauthorized("the API key is not the one of this server")


def _host_name(given: str) -> str:
    if not (_HOST_NAME.fullmatch(given) or _is_address(given)):
        raise UsageError(
            f"--allow-host {given!r} is no host name; give the name alone, without scheme and port, "
            "like llm.example.org"
        )
    return given


def _origin(given: str) -> str:
    """A page's origin as browsers write it."""
    if given in _OTHER_ORIGINS:
        return given
    if not _ORIGIN.fullmatch(given.lower()):
        raise UsageError(
            f"--allow-origin {given!r} is no origin; give scheme and host without a path, like "
            "https://chat.example.org or http://localhost:3000, or * for all pages"
        )
    return given.lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]").split("%")[0])
    except ValueError:
        return False
    return True


def _shown(value: bytes) -> str:
    return repr(value[:100].decode("latin-1"))
