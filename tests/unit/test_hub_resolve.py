"""Folders and Hub ids become pinned model folders; what cannot is explained before any long work."""

import json
import logging
from pathlib import Path

import pytest
from huggingface_hub import constants
from support_hub import COMMIT, FakeHub, serve, use_endpoint, use_hub

from mlx_optiq_ext.errors import ModelNotFound, ResourceError, UsageError
from mlx_optiq_ext.hub.adapters import fetch_adapter
from mlx_optiq_ext.hub.dataset import fetch_dataset
from mlx_optiq_ext.hub.resolve import check_model_folder, resolve_model

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model-00001-of-00002.safetensors": b"a" * 3_000_000,
    "model-00002-of-00002.safetensors": b"b" * 2_000_000,
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "modeling.py": b"raise SystemExit",
    "pytorch_model.bin": b"p" * 1000,
    "consolidated.safetensors": b"c" * 1000,
    "onnx/config.json": b"{}",
    "picture.png": b"png",
}
NEEDED = {
    name for name in FILES if name.startswith(("config", "tokenizer", "model")) and not name.endswith(".py")
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = FakeHub()
    hub.repositories["org/model"] = dict(FILES)
    with serve(hub):
        use_hub(hub, tmp_path / "cache", monkeypatch)
        # Waiting for retries is not what is tested.
        monkeypatch.setattr("time.sleep", lambda _: None)
        yield hub


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in FILES.items():
        if "/" not in name:
            (folder / name).write_bytes(content)
    return folder


def test_folder_is_taken_as_it_is(folder):
    ref = resolve_model(str(folder))
    assert (ref.path, ref.source, ref.revision, ref.is_local) == (str(folder), str(folder), "", True)


def test_folder_with_a_revision_is_refused(folder):
    with pytest.raises(UsageError, match="no revision 'v1'"):
        resolve_model(str(folder), "v1")


@pytest.mark.parametrize(
    ("removed", "added", "message"),
    [
        (["config.json"], [], r"no config\.json; give the folder"),
        (["config.json"], ["x.gguf"], r"optiq import-gguf .*x\.gguf -o DIR"),
        (["model-0"], [], "PyTorch weights must be saved as safetensors"),
        (["model-0", "pytorch"], [], r"files of that name only, and there is consolidated\.safetensors"),
        (["model-0", "pytorch", "cons"], ["adapters.safetensors"], "holds an adapter"),
        (["model-0", "pytorch", "cons"], [], "the download is incomplete"),
        (
            ["model-00002", "model.safetensors.index"],
            [],
            r"lacks 1 of its weight files, model-00002-of-00002",
        ),
        (["model-00002"], [], r"lacks 1 of its weight files, model-00002-of-00002\.safetensors among them"),
    ],
)
def test_unusable_folder_says_what_would_work(folder, removed, added, message):
    for path in list(folder.iterdir()):
        if path.name.startswith(tuple(removed)):
            path.unlink()
    for name in added:
        (folder / name).write_bytes(b"")
    with pytest.raises(ModelNotFound, match=message):
        resolve_model(str(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": ', r"/config\.json cannot be read as JSON"),
        ("[1]", r"/config\.json is no JSON object"),
    ],
)
def test_damaged_config_is_named(folder, content, message):
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelNotFound, match=message):
        resolve_model(str(folder))


def test_damaged_weight_index_is_named(folder):
    (folder / "model.safetensors.index.json").write_text("[1]")
    with pytest.raises(ModelNotFound, match="is not a weight index"):
        resolve_model(str(folder))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/model", "no folder /nowhere/model"),
        ("./nowhere", r"no folder \./nowhere"),
        ("a/b/c", "no folder a/b/c"),
        (".models/tiny", r"no folder \.models/tiny"),
        ("org/na me", "neither a folder here nor a Hub id"),
        ("", "neither a folder|no folder|no config"),
    ],
)
def test_what_is_neither_folder_nor_id_never_asks_the_network(hub, source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match=message):
        resolve_model(source)
    assert hub.asked == []


def test_gguf_file_points_to_the_importer(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFound, match="optiq import-gguf"):
        resolve_model(str(tmp_path / "x.gguf"))


def test_repository_is_pinned_and_only_what_is_needed_is_downloaded(hub, tmp_path):
    events = []
    ref = resolve_model("org/model", progress=events.append)
    assert (ref.source, ref.revision, ref.is_local) == ("org/model", COMMIT, False)
    assert ref.path == str(tmp_path / "cache" / "models--org--model" / "snapshots" / COMMIT)
    assert set(hub.downloads()) == NEEDED
    assert {event.stage for event in events} == {"download"}
    assert (events[-1].done, events[-1].total) == (5, 5)
    assert [event.done for event in events] == sorted(event.done for event in events)


def test_code_is_downloaded_only_when_it_is_trusted(hub):
    resolve_model("org/model", "v1", trust_remote_code=True)
    assert set(hub.downloads()) == NEEDED | {"modeling.py"}


def test_second_time_nothing_is_downloaded(hub):
    first = resolve_model("org/model")
    hub.asked.clear()
    assert resolve_model("org/model", COMMIT) == first
    assert hub.downloads() == []


def test_stopped_download_goes_on_where_it_was(hub):
    hub.broken_files = {"model-00001-of-00002.safetensors"}
    with pytest.raises(ModelNotFound, match=r"the download of org/model broke off .*; run again"):
        resolve_model("org/model")
    hub.broken_files = set()
    hub.asked.clear()
    resolve_model("org/model")
    assert "model-00001-of-00002.safetensors" in hub.downloads()
    assert "config.json" not in hub.downloads()


@pytest.mark.parametrize("offline", ["mode", "server", "status"])
def test_cached_model_serves_when_the_hub_does_not_answer(hub, offline, monkeypatch, caplog):
    online = resolve_model("org/model")
    go_offline(hub, offline, monkeypatch)
    with caplog.at_level(logging.WARNING, "mlx_optiq_ext"):
        assert resolve_model("org/model") == online
    assert f"using org/model at commit {COMMIT} from the cache" in caplog.text


@pytest.mark.parametrize(
    ("offline", "message"),
    [
        ("mode", "HF_HUB_OFFLINE is set"),
        ("server", "did not answer"),
        ("status", r"did not answer .*status 503"),
    ],
)
def test_unreachable_hub_without_a_copy_is_explained(hub, offline, message, monkeypatch):
    go_offline(hub, offline, monkeypatch)
    with pytest.raises(ModelNotFound, match=message):
        resolve_model("org/model")


@pytest.mark.parametrize("offline", ["mode", "server"])
def test_what_was_looked_for_is_what_is_asked_for(hub, offline, monkeypatch):
    go_offline(hub, offline, monkeypatch)
    for kind, fetch in (
        ("a model", resolve_model),
        ("an adapter", fetch_adapter),
        ("a data set", _fetch_data),
    ):
        with pytest.raises(ModelNotFound, match=f"give the folder of {kind}$"):
            fetch("org/thing")


def _fetch_data(repo_id):
    return fetch_dataset(repo_id, {"train": ("train",)})


@pytest.mark.parametrize("offline", ["mode", "server", None])
def test_a_mistyped_folder_is_told_from_a_hub_id(hub, offline, monkeypatch, tmp_path):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    if offline:
        go_offline(hub, offline, monkeypatch)
    with pytest.raises(ModelNotFound, match=r"^no folder models/tyni here; as a Hub id: .*models/tyni "):
        resolve_model("models/tyni")


def test_incomplete_cached_copy_does_not_pass_for_a_model(hub, monkeypatch):
    hub.broken_files = {"model-00001-of-00002.safetensors"}
    with pytest.raises(ModelNotFound):
        resolve_model("org/model")
    go_offline(hub, "mode", monkeypatch)
    with pytest.raises(
        ModelNotFound, match=r"lacks 1 of its weight files, model-00001|the download is incomplete"
    ):
        resolve_model("org/model", COMMIT)
    with pytest.raises(ModelNotFound, match="not in the cache"):
        resolve_model("org/model")


def test_missing_repository_and_revision_are_told_apart(hub):
    with pytest.raises(ModelNotFound, match="org/none is not on the Hub, or is private"):
        resolve_model("org/none")
    with pytest.raises(ModelNotFound, match="org/model has no revision 'v9'"):
        resolve_model("org/model", "v9")


def test_gated_repository_is_explained_before_any_download(hub):
    hub.gated.add("org/model")
    with pytest.raises(ModelNotFound, match=r"is gated: ask for access at .*/org/model, then log in"):
        resolve_model("org/model")
    assert hub.downloads() == []


@pytest.mark.parametrize(
    ("status", "message"), [(401, "not on the Hub, or is private"), (403, "refuses access")]
)
def test_refusals_are_explained(hub, status, message):
    hub.status = status
    with pytest.raises(ModelNotFound, match=message):
        resolve_model("org/model")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["README.md"], r"no config\.json; it is no language model"),
        (["model-Q4_K_M.gguf"], r"no config\.json; it holds GGUF files"),
        (["config.json", "pytorch_model.bin"], r"no model\*\.safetensors; it holds PyTorch weights only"),
        (["adapter_config.json", "adapter_model.safetensors"], "it holds an adapter"),
    ],
)
def test_repository_without_a_usable_model_is_refused(hub, names, message):
    hub.repositories["org/other"] = dict.fromkeys(names, b"x")
    with pytest.raises(ModelNotFound, match=message):
        resolve_model("org/other")
    assert hub.downloads() == []


def test_full_disk_is_known_before_the_download_with_both_numbers(hub):
    hub.sizes["model-00001-of-00002.safetensors"] = 10**18
    with pytest.raises(ResourceError, match=r"needs 1000000000\.00 GB, the cache .* has \d+\.\d\d GB free"):
        resolve_model("org/model")
    assert hub.downloads() == []


def test_cached_files_need_no_room(hub, monkeypatch):
    resolve_model("org/model")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 0})())
    assert resolve_model("org/model").revision == COMMIT


def go_offline(hub, how, monkeypatch):
    """Take the Hub away in one of three ways."""
    if how == "mode":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "server":
        use_endpoint("http://127.0.0.1:9", monkeypatch)
    else:
        hub.status = 503


def test_a_folder_of_models_and_no_folder_are_told_apart_from_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="there is no folder"):
        check_model_folder(tmp_path / "nowhere")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.json").write_text("{}")
    with pytest.raises(ModelNotFound, match=r"no model but holds some: one; name one .*--models-dir"):
        check_model_folder(tmp_path)
