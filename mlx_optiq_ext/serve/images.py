"""Pictures in a request: base64 and ``data:`` URLs, and remote URLs where the user allowed them.

A remote picture is fetched by this machine, so its address is checked after name resolution and the
connection goes to the checked address: no page, cloud metadata service or printer of the local network can be
reached through a prompt. Blocks on the network: call it on a worker thread. Decodes no picture.
"""

import binascii
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import SplitResult, urljoin, urlsplit

import msgspec

from mlx_optiq_ext.errors import RequestError
from mlx_optiq_ext.types.chat import Image

__all__ = ["ImageReader", "is_public"]

MEDIA_TYPES = ("image/png", "image/jpeg", "image/gif", "image/webp")
_DATA = re.compile(r"data:(?P<type>[^;,]*)(?P<parameters>(?:;[^,]*)?),", re.IGNORECASE)
_SPACE = re.compile(r"\s+")
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 3


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, through any wrapping of IPv4 in IPv6."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if inner is not None:
            return is_public(str(inner))
        if ip in ipaddress.ip_network("64:ff9b::/96"):
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip not in ipaddress.ip_network("2000::/3"):  # all global unicast addresses (RFC 4291, IANA)
            return False
    return ip.is_global and not ip.is_multicast


class ImageReader(msgspec.Struct, frozen=True, kw_only=True):
    """Takes the pictures of requests, within the limits that a server sets."""

    fetch: bool = False
    """Fetch ``http`` and ``https`` URLs."""
    max_nbytes: int = 20 << 20
    """Of one picture, encoded as PNG, JPEG, GIF or WebP."""
    timeout_s: float = 10.0
    """For one answer of a picture's server."""
    may_reach: Callable[[str], bool] = is_public
    """Whether an IP address may be asked."""

    def from_base64(self, data: str, media_type: str, *, param: str) -> Image:
        """Take a picture that came as base64.

        Args:
            data: Standard alphabet; white space is ignored.
            media_type: As the client names it.
            param: Path of the field, for errors.
        Raises:
            RequestError: No base64, too large, empty, or a type that no picture has.
        """
        _check_type(media_type, param)
        if len(data) > self.max_nbytes * 1.4 + 4:
            raise self._too_large(param)
        try:
            content = binascii.a2b_base64(_SPACE.sub("", data), strict_mode=True)
        except ValueError as error:
            raise RequestError(f"the picture is not valid base64: {error}", param=param) from None
        return self._checked(content, media_type, param)

    def from_url(self, url: str, *, param: str) -> Image:
        """Take a picture by its URL; blocks while a remote one is fetched.

        Args:
            url: ``data:`` with base64, or ``http``/``https`` where this server fetches.
            param: Path of the field, for errors.
        Raises:
            RequestError: Anything that keeps the picture away, with what would work.
        """
        data = _DATA.match(url)
        if data is not None:
            if not data["parameters"].lower().endswith(";base64"):
                raise RequestError("a data: URL must end its head in ;base64", param=param)
            return self.from_base64(url[data.end() :], data["type"].lower(), param=param)
        if _split(url, param).scheme not in ("http", "https"):
            raise RequestError("a picture is a data: URL with base64, or an http(s) URL", param=param)
        if not self.fetch:
            raise RequestError(
                "this server fetches no pictures; send it as base64, or start the server with --image-urls",
                param=param,
            )
        return self._fetched(url, param)

    def _fetched(self, url: str, param: str) -> Image:
        for _ in range(_MAX_REDIRECTS + 1):
            parts = _split(url, param)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
                raise RequestError("a picture's URL is http(s)://host/... without a user name", param=param)
            try:
                address = self._checked_address(parts.hostname, _port(parts), param)
                with _response(parts, address, self.timeout_s) as response:
                    if response.status not in _REDIRECTS:
                        return self._from_response(response, param)
                    url = urljoin(url, response.getheader("location") or "")
            except (OSError, http.client.HTTPException, UnicodeError) as error:
                raise RequestError(
                    f"the picture could not be fetched ({type(error).__name__}); send a data: URL",
                    param=param,
                ) from None
        raise RequestError(f"the picture's URL redirects more than {_MAX_REDIRECTS} times", param=param)

    def _from_response(self, response: http.client.HTTPResponse, param: str) -> Image:
        if response.status != 200:
            raise RequestError(f"the picture's server answered {response.status}", param=param)
        media_type = (response.getheader("content-type") or "").split(";")[0].strip().lower()
        _check_type(media_type, param)
        return self._checked(response.read(self.max_nbytes + 1), media_type, param)

    def _checked_address(self, host: str, port: int, param: str) -> str:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        if not found or not all(self.may_reach(address) for address in found):
            raise RequestError("the picture's host is not on the public internet", param=param)
        return found[0]

    def _checked(self, content: bytes, media_type: str, param: str) -> Image:
        if not content:
            raise RequestError("the picture is empty", param=param)
        if len(content) > self.max_nbytes:
            raise self._too_large(param)
        return Image(data=content, media_type=media_type, param=param)

    def _too_large(self, param: str) -> RequestError:
        return RequestError(f"the picture has more than {self.max_nbytes:,} bytes", param=param)


@contextmanager
def _response(parts: SplitResult, address: str, timeout_s: float) -> Iterator[http.client.HTTPResponse]:
    """Ask ``address`` for a URL; everything ends when the time is over."""
    channel = socket.create_connection((address, _port(parts)), timeout=timeout_s)

    def end() -> None:
        with suppress(OSError):
            channel.shutdown(socket.SHUT_RDWR)

    # The time limit of a socket holds per read; ending it from outside bounds them all together.
    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    deadline = time.monotonic() + timeout_s
    timer.start()
    connection = http.client.HTTPConnection(parts.hostname or "", _port(parts))
    try:
        if parts.scheme == "https":
            channel = ssl.create_default_context().wrap_socket(
                channel, server_hostname=parts.hostname, do_handshake_on_connect=False
            )
            channel.do_handshake()
        connection.sock = channel
        path = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
        connection.request("GET", path, headers={"Accept": ", ".join(MEDIA_TYPES)})
        yield connection.getresponse()
        if time.monotonic() >= deadline:
            raise TimeoutError("the picture was not complete in time")
    finally:
        timer.cancel()
        connection.close()
        channel.close()


def _split(url: str, param: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _port(parts)
    except ValueError as error:
        raise RequestError(f"not a URL: {error}", param=param) from None
    return parts


def _port(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


def _check_type(media_type: str, param: str) -> None:
    if media_type not in MEDIA_TYPES:
        raise RequestError(
            f"picture of type {media_type[:80]!r}; send one of {', '.join(MEDIA_TYPES)}", param=param
        )
