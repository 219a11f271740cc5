"""What a live server says of its requests, over its own paths for operators."""

import json
import re
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Answered", "Live", "wait_until_listening"]

_ANSWERED = re.compile(r"POST (\S+) (\d+) model=\S+ prompt=(\d+) cached=(\d+) out=(\d+)")


class Answered(NamedTuple):
    """One request that ended."""

    path: str
    status: int
    prompt: int
    cached: int
    out: int


class Live:
    """A server at an address."""

    def __init__(self, url: str) -> None:
        self.url = url

    def status(self) -> Any:
        """The snapshot as JSON."""
        return self._get("/optiq/status")

    def last_line(self) -> int:
        """Number of the newest line of the log."""
        return max((line["number"] for line in self._get("/optiq/log")["lines"]), default=0)

    def log_after(self, number: int) -> str:
        """The lines since then."""
        lines = self._get(f"/optiq/log?after={number}")["lines"]
        return "\n".join(line["text"] for line in lines)

    def answered_after(self, number: int) -> list[Answered]:
        """Requests that ended since then, in this order."""
        found = _ANSWERED.findall(self.log_after(number))
        return [Answered(path, *map(int, figures)) for path, *figures in found]

    def wait_for(self, is_so: Callable[[Any], bool], timeout_s: float) -> float:
        """Seconds until a snapshot is so; fails when none is in time."""
        began = time.monotonic()
        while not is_so(self.status()):
            assert time.monotonic() - began < timeout_s, self.status()["rows"]
            time.sleep(0.02)
        return time.monotonic() - began

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.loads(answer.read())


def wait_until_listening(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """The URL that ``optiq serve --json`` prints."""
    assert process.stdout is not None
    lines: list[bytes] = []
    for line in process.stdout:
        lines.append(line)
        if line.rstrip() == b"}":
            return str(json.loads(b"".join(lines))["url"])
    raise AssertionError(log.read_text()[-3000:])
