"""A Hub on the loopback interface: the few routes that huggingface-hub asks, over files in memory."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Repositories by id, and what the next answers should be; one instance per test."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.sizes: dict[str, int] = {}
        """File name → size the listing claims."""
        self.status: int | None = None
        """Answer everything with this status."""
        self.broken_files: set[str] = set()
        """Files whose download ends after half of the bytes."""
        self.account: dict[str, object] | None = None
        self.found: dict[str, dict[str, object]] = {}
        """What a search answers: id → further facts."""
        self.asked: list[str] = []
        self.url = ""

    def downloads(self) -> list[str]:
        """Names of files whose content was sent."""
        return [
            path.rsplit("/", 1)[1] for path in self.asked if path.startswith("GET ") and "/resolve/" in path
        ]


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Answer on a free port until the block ends."""

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def use_hub(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send every question to a served Hub, with a cache of its own."""
    use_endpoint(hub.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def use_endpoint(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send every question to another address; huggingface-hub derives the template at import."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.asked.append(f"{self.command} {path}")
        if self.state.status is not None:
            return self._send(self.state.status, b"{}")
        if path == "/api/whoami-v2":
            return self._send_json(self.state.account) if self.state.account else self._send(401, b"{}")
        if path == "/api/models":
            return self._send_json([{"id": name, **facts} for name, facts in self.state.found.items()])
        if path.startswith("/api/models/"):
            return self._model_api(path.removeprefix("/api/models/"))
        return self._file(path.lstrip("/"))

    def _model_api(self, rest: str) -> None:
        parts = rest.split("/")
        repo_id, tail = "/".join(parts[:2]), parts[2:]
        files = self.state.repositories.get(repo_id)
        if files is None:
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if tail[:1] == ["auth-check"]:
            if repo_id in self.state.gated:
                return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
            return self._send(200, b"{}")
        if tail[:1] == ["revision"] and tail[1] not in ("main", COMMIT, "v1"):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if tail[:1] == ["tree"]:
            return self._send_json(
                [{"type": "file", "path": n, "size": len(c), "oid": _etag(c)} for n, c in files.items()]
            )
        siblings = [
            {"rfilename": name, "size": self.state.sizes.get(name, len(content)), "blobId": _etag(content)}
            for name, content in files.items()
        ]
        gated = "auto" if repo_id in self.state.gated else False
        return self._send_json({"id": repo_id, "sha": COMMIT, "gated": gated, "siblings": siblings})

    def _file(self, path: str) -> None:
        owner, name, _, _, file = path.split("/", 4)
        content = self.state.repositories.get(f"{owner}/{name}", {}).get(file)
        if content is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT}
        if file in self.state.broken_files and self.command == "GET":
            return self._send(
                200, content[: len(content) // 2], headers | {"Content-Length": str(len(content))}
            )
        return self._send(200, content, headers)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(body))} | (headers or {})
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if int(headers["Content-Length"]) != len(body):
            self.close_connection = True


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
