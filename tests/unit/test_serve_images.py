"""Pictures in requests: limits, and that no prompt reaches the local network."""

import base64
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mlx_optiq_ext.errors import RequestError
from mlx_optiq_ext.serve.images import ImageReader, is_public
from mlx_optiq_ext.types.chat import Image

PIXELS = b"\x89PNG rest of a picture"
PRIVATE = """
127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 0.0.0.0 100.64.0.1 224.0.0.1 255.255.255.255
198.18.0.1
::1 :: fe80::1 fe80::1%eth0 fd00::1 ff02::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 2002:7f00:1:: 64:ff9b::7f00:1
64:ff9b:1::a00:1 ::127.0.0.1 ::a9fe:a9fe fec0::1
"""
CODE = base64.b64encode(PIXELS).decode()


class _Pictures(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        kind = self.path.strip("/").split("?")[0]
        if kind == "slow":
            self.send_response(200)
            self.send_header("content-type", "image/png")
            self.end_headers()
            with suppress(OSError):
                for _ in range(50):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
            return
        status = 302 if kind in ("again", "inside", "scheme") else 404 if kind == "none" else 200
        self.send_response(status)
        targets = {"again": "/png", "inside": "http://10.0.0.1/png", "scheme": "file:///etc/passwd"}
        if kind in targets:
            self.send_header("location", targets[kind])
        self.send_header("content-type", "text/html" if kind == "page" else "image/png; x=y")
        self.end_headers()
        self.wfile.write(b"y" * 5000 if kind == "large" else PIXELS)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def pictures() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Pictures)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def _fetching(**options: object) -> ImageReader:
    return ImageReader(fetch=True, may_reach=lambda address: address == "127.0.0.1", **options)  # type: ignore[arg-type]


def _refusal(reader: ImageReader, url: str) -> str:
    with pytest.raises(RequestError) as caught:
        reader.from_url(url, param="messages[0].content[1].image_url.url")
    assert caught.value.param == "messages[0].content[1].image_url.url"
    return str(caught.value)


def test_data_url_is_taken_as_it_is() -> None:
    image = ImageReader().from_url(f"data:image/png;base64,{CODE}", param="p")
    assert image == Image(data=PIXELS, media_type="image/png", param="p")
    wrapped = ImageReader().from_base64(CODE[:8] + "\n " + CODE[8:], "image/png", param="p")
    assert wrapped == image


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("data:image/png,abc", ";base64"),
        ("data:image/svg+xml;base64,AAAA", "image/svg+xml"),
        ("data:;base64,AAAA", "type ''"),
        ("data:image/png;base64,A$AA", "not valid base64"),
        ("data:image/png;base64,", "empty"),
        ("file:///etc/passwd", "data: URL"),
        ("ftp://example.org/a.png", "data: URL"),
        ("http://[::1", "not a URL"),
        ("http://host:port/x", "not a URL"),
        ("https://example.org/a.png", "--image-urls"),
    ],
)
def test_what_is_no_picture_is_refused(url: str, word: str) -> None:
    assert word in _refusal(ImageReader(), url)


def test_large_pictures_are_refused_before_decoding() -> None:
    reader = ImageReader(max_nbytes=16)
    assert "more than 16 bytes" in _refusal(reader, f"data:image/png;base64,{CODE}")
    assert "more than 16 bytes" in _refusal(reader, f"data:image/png;base64,{'A' * 1000}")


@pytest.mark.parametrize("address", PRIVATE.split())
def test_private_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:4700::1111", "::ffff:93.184.216.34"])
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "0x7f.1", "2130706433", "[::1]", "[::ffff:127.0.0.1]"]
)
def test_no_spelling_of_a_private_address_is_asked(host: str) -> None:
    message = _refusal(ImageReader(fetch=True), f"http://{host}:9/a.png")
    assert "public internet" in message or "could not be fetched" in message


def test_remote_picture_is_fetched_where_allowed(pictures: str) -> None:
    assert _fetching().from_url(f"{pictures}/png?x=1", param="p") == Image(
        data=PIXELS, media_type="image/png", param="p"
    )
    assert _fetching().from_url(f"{pictures}/again", param="p").data == PIXELS


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("none", "answered 404"),
        ("page", "text/html"),
        ("inside", "public internet"),
        ("scheme", "http(s)://"),
        ("large", "more than 1,000 bytes"),
    ],
)
def test_bad_remote_pictures_are_refused(pictures: str, kind: str, word: str) -> None:
    assert word in _refusal(_fetching(max_nbytes=1000), f"{pictures}/{kind}")


def test_user_names_in_urls_are_refused() -> None:
    assert "without a user name" in _refusal(_fetching(), "http://me:secret@example.org/x.png")


def test_a_dripping_server_is_left_in_time(pictures: str) -> None:
    begin = time.monotonic()
    assert "TimeoutError" in _refusal(_fetching(timeout_s=0.4), f"{pictures}/slow")
    assert time.monotonic() - begin < 2.0
