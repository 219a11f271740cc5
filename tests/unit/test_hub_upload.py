"""An upload that cannot work is refused before the work; one that can creates, uploads and reports."""

import pytest
from huggingface_hub import HfApi, constants
from support_hub import FakeHub, serve

from mlx_optiq_ext.errors import OptiqError, UsageError
from mlx_optiq_ext.hub.upload import check_upload, upload_folder

ACCOUNT = {"name": "ann", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}}


@pytest.fixture
def hub(monkeypatch):
    hub = FakeHub()
    hub.account = ACCOUNT
    with serve(hub):
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setattr("time.sleep", lambda _: None)
        yield hub


@pytest.mark.parametrize(
    ("given", "full"), [("ann/model", "ann/model"), ("lab/model", "lab/model"), ("model", "ann/model")]
)
def test_own_and_organisation_names_pass(hub, given, full):
    assert check_upload(given) == full


def test_foreign_namespace_names_the_possible_ones(hub):
    with pytest.raises(UsageError, match=r"cannot write to bob/…; upload to one of: ann, lab"):
        check_upload("bob/model")


def test_invalid_id_never_asks_the_network(hub):
    with pytest.raises(UsageError, match="no Hub id"):
        check_upload("a/b/c")
    assert hub.asked == []


def test_missing_login_is_refused(hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="hf auth login"):
        check_upload("ann/model")


def test_refused_token_is_told_apart_from_no_connection(hub):
    hub.account = None
    with pytest.raises(UsageError, match="does not accept the token"):
        check_upload("ann/model")
    hub.status = 503
    with pytest.raises(UsageError, match="does not answer"):
        check_upload("ann/model")


def test_token_that_may_only_read_is_refused(hub):
    hub.account = ACCOUNT | {"auth": {"accessToken": {"role": "read"}}}
    with pytest.raises(UsageError, match="may only read"):
        check_upload("ann/model")


def test_upload_creates_the_repository_and_sends_the_folder(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "sub" / "metadata.json").write_text("{}")
    calls = []

    class Commit:
        commit_url = "https://huggingface.co/ann/model/commit/1"

    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo_id, **options: calls.append((repo_id, options))
    )
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: calls.append(options) or Commit())
    events = []
    address = upload_folder(tmp_path, "ann/model", private=True, progress=events.append)
    assert address == Commit.commit_url
    assert calls[0] == ("ann/model", {"private": True, "exist_ok": True})
    assert (calls[1]["repo_id"], calls[1]["folder_path"]) == ("ann/model", tmp_path)
    assert [(event.stage, event.done, event.total) for event in events] == [
        ("upload", 0, 2),
        ("upload", 2, 2),
    ]


def test_failed_upload_says_how_to_try_again(hub, tmp_path):
    hub.status = 403
    with pytest.raises(OptiqError, match=f"hf upload ann/model {tmp_path}"):
        upload_folder(tmp_path, "ann/model")
