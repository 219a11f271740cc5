"""``optiq serve``: what is wrong is said before anything is loaded."""

import socket
from pathlib import Path

import pytest
from support_serving import tiny_folder

from mlx_optiq_ext.cli.main import main
from mlx_optiq_ext.cli.served_models import find_models
from mlx_optiq_ext.errors import ModelNotFound, UsageError
from mlx_optiq_ext.types.progress import ignore_progress
from mlx_optiq_ext.types.serve import ServeOptions


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
    with pytest.raises(ModelNotFound, match=r"no folder with a config\.json"):
        _find(models_dir=str(tmp_path))
    with pytest.raises(ModelNotFound, match="is no folder"):
        _find(models_dir=str(tmp_path / "none"))
