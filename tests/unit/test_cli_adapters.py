"""``optiq adapters`` against a live server with a real engine on a tiny model."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import pytest
from support_serving import engine_on, spec_of, tiny_folder

import mlx_optiq_ext
from mlx_optiq_ext import _hook
from mlx_optiq_ext.cli.main import main
from mlx_optiq_ext.lora.factors import Adapter, Factors
from mlx_optiq_ext.lora.files import write_adapter
from mlx_optiq_ext.serve.app import create_app
from mlx_optiq_ext.serve.run_server import Server
from mlx_optiq_ext.types.adapter import AdapterConfig
from mlx_optiq_ext.types.serve import ServeOptions

PATH = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    mlx_optiq_ext.install()
    folder, shelf = tmp_path_factory.mktemp("models") / "tiny", tmp_path_factory.mktemp("adapters")
    for k, name in enumerate(("one", "two")):
        factors = {PATH: Factors(mx.ones((128, 2 + k)), mx.ones((2 + k, 128)))}
        write_adapter(shelf / name, Adapter(AdapterConfig(ranks={PATH: 2 + k}, scale=1.0), factors))
    engine = engine_on(spec_of(tiny_folder(folder)), adapters_dir=(str(shelf),))
    options, told = ServeOptions(port=0, adapters_dir=(str(shelf),)), threading.Event()
    where: list[str] = []

    def listening(found: tuple[str, ...]) -> None:
        where.append(found[0])
        told.set()

    server = Server(create_app(engine, options, None), engine, options, listening)
    thread = threading.Thread(target=server.serve_until_stopped)
    thread.start()
    assert told.wait(30)
    yield where[0]
    server.stop()
    thread.join(30)
    _hook.uninstall()


def _run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["adapters", *words])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_adapters_are_listed_mounted_chosen_and_unmounted(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ("--url", url)
    assert _run(capsys, "list", *at)[1] == "no adapter is mounted\n"
    code, out, _ = _run(capsys, "mount", "mine", "one", *at, "--json")
    mounted = json.loads(out)
    assert (code, mounted["name"], mounted["rank"], mounted["source"]) == (0, "mine", 2, "one")
    assert _run(capsys, "mount", "other", "two", *at)[0] == 0
    assert _run(capsys, "use", "mine", *at)[0] == 0
    _, out, _ = _run(capsys, "list", *at)
    assert "mine (default)" in out
    assert "not said" in out
    listed = httpx.get(f"{url}/v1/adapters").json()
    assert [each["name"] for each in listed["data"]] == ["mine", "other"]
    assert listed["available"] == ["one", "two"]
    models = [row["id"] for row in httpx.get(f"{url}/v1/models").json()["data"]]
    assert models == ["tiny", "tiny@mine", "tiny@other"]
    assert _chat(url, "tiny@other").status_code == 200
    assert _run(capsys, "use", "base", *at)[0] == 0
    for name in ("mine", "other"):
        assert _run(capsys, "unmount", name, *at)[0] == 0
    assert json.loads(_run(capsys, "list", *at, "--json")[1])["data"] == []
    assert _chat(url, "tiny@other").status_code == 404


def _chat(url: str, model: str) -> httpx.Response:
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("mount", "mine", "../secret"), "no adapter folder"),
        (("mount", "a/b", "one"), "no name for an adapter"),
        (("unmount", "nobody"), "no adapter 'nobody' is mounted"),
        (("unmount", "../x"), "there is nothing at this path"),
        (("use", "nobody"), "no adapter 'nobody' is mounted"),
    ],
)
def test_what_the_server_refuses_is_said_in_its_words(
    url: str, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    code, out, err = _run(capsys, *words, "--url", url)
    assert code != 0
    assert message in err
    assert not out


def test_no_server_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = _run(capsys, "list", "--url", "http://127.0.0.1:9")
    assert code == 6
    assert "no optiq server answers at http://127.0.0.1:9" in err
    assert _run(capsys, "list", "--url", "file:///etc/passwd")[0] == 2
    assert _run(capsys, "list", "--api-key-file", str(tmp_path / "none"))[0] == 2
