"""``optiq serve``: what is wrong is said before anything is loaded."""

import logging
import shutil
import socket
from pathlib import Path

import mlx.core as mx
import pytest
from support_serving import tiny_folder

from mlx_optiq_ext.cli.commands.serve import banner, start_engine
from mlx_optiq_ext.cli.main import main
from mlx_optiq_ext.cli.served_models import find_models
from mlx_optiq_ext.errors import ModelNotFound, OptiqError, UsageError
from mlx_optiq_ext.types.progress import ignore_progress
from mlx_optiq_ext.types.serve import ServeOptions
from mlx_optiq_ext.types.status import AdapterStatus, EngineStatus, ServedModel


def test_a_port_in_use_is_said_before_the_model_is_looked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--model", "/nowhere", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_an_open_address_needs_a_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPTIQ_API_KEY", raising=False)
    assert main(["serve", "--model", "/nowhere", "--host", "0.0.0.0", "--json"]) == 2
    shown = capsys.readouterr()
    assert "OPTIQ_API_KEY" in shown.out + shown.err


def test_an_empty_key_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_text("\n")
    assert main(["serve", "--model", "/nowhere", "--api-key-file", str(tmp_path / "key")]) == 2
    assert "is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--allow-origin", "banana"), "--allow-origin 'banana' is no origin; give scheme and host"),
        (("--allow-origin", "https://chat.example/"), "is no origin"),
        (("--allow-host", "http://llm.example"), "--allow-host 'http://llm.example' is no host name"),
        (("--allow-host", "llm.example:8080"), "is no host name"),
        (("--max-body", "large"), "--max-body"),
        (("--log-level", "loud"), "--log-level"),
    ],
)
def test_options_that_say_nothing_are_refused_before_the_model_is_looked_for(
    words: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--model", "/nowhere", "--port", "0", *words]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "/nowhere" not in shown


def test_half_precision_on_a_cpu_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = mx.default_device()
    mx.set_default_device(mx.Device(mx.cpu))
    try:
        for dtype, warned in (("bfloat16", True), ("float16", True), ("float32", False), ("auto", False)):
            assert main(["serve", "--model", "/nowhere", "--port", "0", "--dtype", dtype]) == 3
            assert (f"--dtype {dtype}: half precision is inexact" in capsys.readouterr().err) is warned
    finally:
        mx.set_default_device(device)


def test_the_log_shows_what_its_level_asks_for_and_keeps_the_rest_for_operators(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = logging.getLogger("mlx_optiq_ext.access")
    for level, shown in (("error", ""), ("warning", "two"), ("info", "one two"), ("debug", "zero one two")):
        assert main(["serve", "--model", "/nowhere", "--port", "0", "--log-level", level]) == 3
        capsys.readouterr()
        log.debug("zero")
        log.info("one")
        log.warning("two")
        assert [line.split()[-1] for line in capsys.readouterr().err.splitlines()] == shown.split()
        assert log.isEnabledFor(logging.INFO)


def _find(**options: object) -> list[str]:
    return [spec.name for spec in find_models(ServeOptions(**options), ignore_progress)]  # type: ignore[arg-type]


def test_models_are_found_by_folder_with_their_own_storage(tmp_path: Path) -> None:
    one = tiny_folder(tmp_path / "models" / "one")
    tiny_folder(tmp_path / "models" / "two", 1)
    (tmp_path / "models" / "notes").mkdir()
    (one / "kv_config.json").write_text('[{"layer_idx": 0, "bits": 8, "group_size": 32}]')
    assert _find(models_dir=str(tmp_path / "models")) == ["one", "two"]
    assert _find(model=str(tmp_path / "models" / "two"), models_dir=str(tmp_path / "models")) == [
        "two",
        "one",
    ]
    specs = find_models(ServeOptions(models_dir=str(tmp_path / "models")), ignore_progress)
    assert [spec.kv_config is not None for spec in specs] == [True, False]


def test_what_names_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model to serve"):
        _find()
    with pytest.raises(UsageError, match="two default models"):
        _find(model="a", demo_model=True)
    with pytest.raises(UsageError, match="--kv-config belongs to --model"):
        _find(models_dir=str(tmp_path), kv_config="x")
    with pytest.raises(UsageError, match=r"--adapters-dir .*/none is no folder"):
        _find(model="a", adapters_dir=(str(tmp_path / "none"),))
    with pytest.raises(UsageError, match="--revision main belongs to --model"):
        _find(models_dir=str(tmp_path), revision="main")
    with pytest.raises(ModelNotFound, match=r"no folder with a config\.json"):
        _find(models_dir=str(tmp_path))
    with pytest.raises(ModelNotFound, match="is no folder"):
        _find(models_dir=str(tmp_path / "none"))


def test_recent_tokens_need_a_kv_configuration(tmp_path: Path) -> None:
    one = tiny_folder(tmp_path / "one")
    with pytest.raises(UsageError, match="--kv-recent keeps the newest tokens of a stored KV cache"):
        _find(model=str(one), kv_recent=32)
    (one / "kv_config.json").write_text('[{"layer_idx": 0, "bits": 8, "group_size": 32}]')
    assert _find(model=str(one), kv_recent=32, kv_config=str(one)) == ["one"]
    assert _find(models_dir=str(tmp_path), kv_recent=32) == ["one"]


def test_a_folder_that_cannot_be_served_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    models = tmp_path / "models"
    tiny_folder(models / "good")
    shutil.copytree(models / "good", models / "cut")
    (models / "cut" / "model.safetensors").unlink()
    shutil.copytree(models / "good", models / "odd")
    (models / "odd" / "kv_config.json").write_text("{")
    assert _find(models_dir=str(models)) == ["good"]
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 2
    assert warned[0].startswith("--models-dir: cut is left out: ")
    assert "has no model*.safetensors" in warned[0]
    assert warned[1].startswith("--models-dir: odd is left out: ")
    shutil.rmtree(models / "good")
    with pytest.raises(ModelNotFound, match="only cut, odd, which cannot be served"):
        _find(models_dir=str(models))


def test_a_model_that_does_not_load_makes_way_for_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_folder(tmp_path / "b")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text('{"model_type": "nothing_like_it"}')
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "a" / "model.safetensors")
    options = ServeOptions(models_dir=str(tmp_path), memory="2GB")
    specs = find_models(options, ignore_progress)
    assert [spec.name for spec in specs] == ["a", "b"]
    engine = start_engine(specs, options, ignore_progress)
    try:
        assert [(model.id, model.loaded) for model in engine.status().models] == [("b", True)]
    finally:
        engine.close()
    assert "--models-dir: a is left out: " in caplog.text
    with pytest.raises(OptiqError):
        start_engine(specs[:1], options, ignore_progress)


def test_the_banner_names_adapters_and_whether_they_belong_to_the_weights() -> None:
    models = (
        ServedModel(
            id="one", loaded=True, context=4096, bpw=3.5075, created=0, source="s", weights_nbytes=10**9
        ),
        ServedModel(id="two", loaded=False, context=0, created=0, source="s"),
    )
    adapters = tuple(
        AdapterStatus(
            name=name,
            model="one",
            source="s",
            rank=8,
            nbytes=2_500_000,
            fits_base=fits,
            is_default=fits is None,
        )
        for name, fits in (("own", True), ("other", False), ("silent", None))
    )
    status = EngineStatus(state="ready", version="1", uptime_s=0.0, models=models, adapters=adapters)
    lines = banner(("http://127.0.0.1:1",), status, needs_key=False).splitlines()
    assert lines[1] == "  one: 1.00 GB, 3.51 bits per weight, full-precision KV cache, context 4,096"
    assert lines[2:5] == [
        "    adapter own: rank up to 8, 2.5 MB, trained on these weights",
        "    adapter other: rank up to 8, 2.5 MB, trained on OTHER weights: its answers may be poor",
        "    adapter silent, default: rank up to 8, 2.5 MB, does not say on which weights it was trained",
    ]
    assert lines[5] == "  two: loaded when a request names it"
