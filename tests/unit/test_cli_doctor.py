"""optiq doctor: what it finds, and when it fails."""

import importlib.metadata
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from mlx_optiq_ext.cli import health, kernels
from mlx_optiq_ext.cli.commands import doctor
from mlx_optiq_ext.cli.main import main


@pytest.fixture
def hub(monkeypatch):
    """A server on this machine in place of the Hub."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *words) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


def test_json_document_holds_every_finding(capsys) -> None:
    code = main(["doctor", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["healthy"] == (code == 0)
    names = {finding["name"] for finding in document["findings"]}
    assert {"platform", "python", "mlx", "mlx-lm", "memory", "disk", "device", "matmul"} <= names
    assert {"kernels float32", "kernels float16", "kernels bfloat16"} <= names
    assert "hub" not in names


def test_a_version_outside_the_range_is_broken_and_says_what_to_install(monkeypatch, capsys) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.31.3")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "BROKEN  mlx-lm" in out
    assert "pip install 'mlx-lm>=0.32,<0.33'" in out


def test_a_missing_package_is_broken(monkeypatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    states = {finding.name: finding.state for finding in health.check_versions()}
    assert states["mlx"] == states["mlx-lm"] == "broken"


@pytest.mark.parametrize(
    ("version", "state"), [("0.32.0", "ok"), ("0.32.9.dev1", "ok"), ("0.33.0", "broken")]
)
def test_version_range_is_half_open(monkeypatch, version: str, state: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert {f.state for f in health.check_versions() if f.name != "mlx-optiq-ext"} == {state}


def test_a_hub_that_answers_is_ok(hub) -> None:
    assert health.check_hub().state == "ok"


def test_a_hub_that_is_silent_is_a_note_not_a_failure(monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    finding = health.check_hub()
    assert finding.state == "note"
    assert "folder" in finding.fix


def test_float32_kernels_agree_with_dequantized_weights() -> None:
    findings = {finding.name: finding for finding in kernels.check_kernels()}
    assert findings["kernels float32"].state == "ok"


def test_float32_kernels_that_are_off_are_broken(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "_kernel_error", lambda mx, dtype, bits: 0.5)
    states = {finding.name: finding.state for finding in kernels.check_kernels()}
    assert states == {"kernels float32": "broken", "kernels float16": "note", "kernels bfloat16": "note"}


def test_a_slow_matmul_on_the_cpu_hints_at_a_blas(monkeypatch) -> None:
    import mlx.core as mx

    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("the hint is for CPUs")
    monkeypatch.setattr(kernels, "_SLOW_GFLOPS", 1e9)
    finding = kernels.check_blas(side=64, repeats=1)
    assert finding.state == "note"
    assert "libopenblas" in finding.fix


def test_fix_shows_the_remedy_of_notes(monkeypatch) -> None:
    note = health.Finding(name="disk", state="note", found="1 GB", fix="make room")
    assert "make room" not in doctor._as_text([note], with_fix=False)
    assert "--fix" in doctor._as_text([note], with_fix=False)
    assert "make room" in doctor._as_text([note], with_fix=True)
