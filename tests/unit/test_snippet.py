"""Clients' configurations: what is in them, how they are merged, written and taken back."""

import json
import stat
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tomlkit
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from ruamel.yaml import YAML

from mlx_optiq_ext.cli.main import main
from mlx_optiq_ext.errors import EngineError, UsageError
from mlx_optiq_ext.types.status import EngineStatus, ServedModel
from mlx_optiq_integrations.client import Client, ConfigFile, Setting, all_clients, find_client, nested
from mlx_optiq_integrations.facts import NO_KEY, ClientFacts, assumed_facts, served_facts
from mlx_optiq_integrations.merge import Unreadable, fresh_text, merged_text
from mlx_optiq_integrations.shown import show_client
from mlx_optiq_integrations.user_files import UserFiles

FACTS = ClientFacts(
    url="http://127.0.0.1:8080",
    model="org/My-Model-4bit",
    context=65_536,
    max_output=8_192,
    sees_images=True,
    thinks=True,
)
FORMATS = ("json", "toml", "yaml")
CLIENTS = tuple(all_clients().values())
NAMES = [client.name for client in CLIENTS]
NOBODY = "http://127.0.0.1:9"


def _parsed(format: str, text: str) -> Any:
    if format == "json":
        return json.loads(text)
    if format == "toml":
        return tomllib.loads(text)
    return YAML(typ="safe").load(text) or {}


@pytest.mark.parametrize("client", CLIENTS, ids=NAMES)
def test_every_client_says_where_it_comes_from_and_shows_something(client: Client) -> None:
    assert client.docs.startswith("https://")
    assert bool(client.program) == bool(client.session)
    assert client.install or not client.program
    shown = show_client(client, FACTS, {}, Path("/home/someone"))
    assert shown.files or shown.snippets
    for file in shown.files:
        assert _parsed(file.format, file.text) == nested(file.settings)
    text = json.dumps([file.text for file in shown.files]) + json.dumps([s.code for s in shown.snippets])
    assert FACTS.model in text
    assert "127.0.0.1:8080" in text


@pytest.mark.parametrize("client", CLIENTS, ids=NAMES)
def test_keys_are_never_shown(client: Client) -> None:
    secret = replace(FACTS, api_key="sk-very-secret", needs_key=True)
    assert "sk-very-secret" not in str(show_client(client, secret, {}, Path("/home/someone")))


def test_limits_and_abilities_are_those_of_the_server() -> None:
    served = ServedModel(
        id="m", aliases=("gpt",), source="m", loaded=True, created=0, context=20_000, calls_tools=False
    )
    status = EngineStatus(state="ready", version="1", uptime_s=1.0, models=(served,))
    facts = served_facts(status, "http://h:1/", "gpt@style")
    assert (facts.url, facts.model, facts.context, facts.max_output) == (
        "http://h:1",
        "m@style",
        20_000,
        5_000,
    )
    assert facts.api_key == NO_KEY
    (warning,) = find_client("claude-code").warnings(facts)
    assert "no tool calls" in warning
    assert "64,000" in find_client("hermes").warnings(facts)[0]
    with pytest.raises(EngineError, match="serves m, not 'other'"):
        served_facts(status, "http://h:1", "other")
    assert assumed_facts("http://h:1", "x").is_assumed
    assert find_client("aider").warnings(facts) == (), "it edits by text, not by tool calls"


def test_what_a_server_has_not_loaded_is_assumed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served = ServedModel(id="m", source="m", loaded=False, created=0, context=0)
    status = EngineStatus(state="ready", version="1", uptime_s=1.0, models=(served,))
    facts = served_facts(status, "http://h:1/", "m@style", "key")
    assert facts == assumed_facts("http://h:1", "m@style", api_key="key")
    assert facts.calls_tools
    answer = msgspec.to_builtins(status)
    monkeypatch.setattr("mlx_optiq_ext.cli.commands.snippet.ask_server", lambda *_: answer)
    assert _optiq("opencode", "--context", "40000", "--json") == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["context"] == 40_000
    assert "m is not loaded" in told.err


@pytest.mark.parametrize("format", FORMATS)
def test_merging_keeps_what_is_there(format: str) -> None:
    texts = {
        "json": '{\n    "theirs": [1, 2],\n    "env": {"A": "b"}\n}\n',
        "toml": '# theirs\ntheirs = [1, 2] # why\n[env]\nA = "b" # their reason\n',
        "yaml": '# theirs\ntheirs: [1, 2] # why\nenv:\n  A: "b" # their reason\n',
    }
    ours = (Setting(("env", "B"), "c", "ours"), Setting(("model",), "m"))
    merged = merged_text(format, texts[format], ours)  # type: ignore[arg-type]
    assert _parsed(format, merged) == {"theirs": [1, 2], "env": {"A": "b", "B": "c"}, "model": "m"}
    if format != "json":
        for comment in ("# theirs", "# why", "# their reason"):
            assert comment in merged
    else:
        assert '\n    "theirs"' in merged, "the file's own indentation"
    assert merged_text(format, merged, ours) == merged, "a second time changes nothing"  # type: ignore[arg-type]


_KEYS = st.text(st.characters(codec="utf-8", categories=("L", "N")), min_size=1, max_size=5)
_VALUES = st.recursive(
    st.booleans()
    | st.integers(-(2**31), 2**31)
    | st.text(st.characters(categories=("L", "N", "P")), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(document=st.dictionaries(_KEYS, _VALUES, max_size=5), format=st.sampled_from(FORMATS))
def test_any_document_survives_a_merge(document: dict[str, Any], format: str) -> None:
    whole = {**document, "model_providers": {"theirs": document}}
    text = {
        "json": lambda: json.dumps(whole),
        "toml": lambda: tomlkit.dumps(whole),
        "yaml": lambda: json.dumps(whole, ensure_ascii=False),
    }[format]()
    before = _parsed(format, text)
    ours = (Setting(("model_providers", "optiq", "name"), "optiq"), Setting(("ours-alone",), 3))
    after = _parsed(format, merged_text(format, text, ours))  # type: ignore[arg-type]
    assert after.pop("ours-alone") == 3
    assert after["model_providers"].pop("optiq") == {"name": "optiq"}
    assert after == before


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("json", '{"a": 1, // why\n}'),
        ("json", "[1]"),
        ("json", '{"env": 5}'),
        ("toml", "a = = 1"),
        ("toml", "env = 3"),
        ("yaml", "a: [1"),
        ("yaml", "- 1"),
        ("yaml", "env: text"),
    ],
)
def test_what_cannot_be_kept_is_refused(format: str, text: str) -> None:
    with pytest.raises(Unreadable):
        merged_text(format, text, (Setting(("env", "B"), "c"),))  # type: ignore[arg-type]


def test_a_file_of_its_own_has_the_reasons() -> None:
    ours = (Setting(("a",), 1, "one"), Setting(("t", "b"), "x", "two"), Setting(("c",), True, "three"))
    for format in ("toml", "yaml"):
        text = fresh_text(format, ours)  # type: ignore[arg-type]
        assert _parsed(format, text) == {"a": 1, "c": True, "t": {"b": "x"}}
        assert all(f"# {why}" in text for why in ("one", "two", "three"))


def _file() -> ConfigFile:
    return ConfigFile(
        folder="~/.thing",
        variable="THING_HOME",
        name="config.toml",
        format="toml",
        settings=(Setting(("model",), "m"),),
    )


def test_writing_keeps_mode_links_and_a_copy_and_undo_is_exact(tmp_path: Path) -> None:
    real = tmp_path / "dotfiles" / "thing.toml"
    real.parent.mkdir()
    before = b'# mine\r\nmodel = "theirs"\r\n'
    real.write_bytes(before)
    real.chmod(0o640)
    link = tmp_path / ".thing" / "config.toml"
    link.parent.mkdir()
    link.symlink_to(real)
    users = UserFiles({}, tmp_path)
    change = users.planned(_file())
    assert '-model = "theirs"' in change.diff
    backup = users.write(change)
    assert backup is not None
    assert backup.read_bytes() == before
    assert link.is_symlink()
    assert tomllib.loads(real.read_text())["model"] == "m"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert users.planned(_file()).is_empty
    back = users.planned_undo(_file())
    assert users.is_as_written(back)
    users.undo(back)
    assert real.read_bytes() == before
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert not backup.exists()
    with pytest.raises(UsageError, match="nothing to undo"):
        users.planned_undo(_file())


def test_a_new_file_is_private_and_undo_takes_it_away(tmp_path: Path) -> None:
    users = UserFiles({"THING_HOME": str(tmp_path / "elsewhere")}, tmp_path)
    change = users.planned(_file())
    assert change.path == tmp_path / "elsewhere" / "config.toml"
    assert users.write(change) is None
    assert stat.S_IMODE(change.path.stat().st_mode) == 0o600
    users.undo(users.planned_undo(_file()))
    assert not change.path.exists()


def test_the_first_copy_is_the_one_that_comes_back(tmp_path: Path) -> None:
    path = tmp_path / ".thing" / "config.toml"
    path.parent.mkdir()
    path.write_text("a = 1\n")
    users = UserFiles({}, tmp_path)
    users.write(users.planned(_file()))
    other = replace(_file(), settings=(Setting(("model",), "n"),))
    users.write(users.planned(other))
    users.undo(users.planned_undo(other))
    assert path.read_text() == "a = 1\n"


def test_a_file_that_changed_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    users = UserFiles({}, tmp_path)
    change = users.planned(_file())
    change.path.parent.mkdir()
    change.path.write_text("theirs = 1\n")
    with pytest.raises(UsageError, match="meanwhile"):
        users.write(change)
    assert change.path.read_text() == "theirs = 1\n"


def _optiq(*words: str) -> int:
    return main(["snippet", *words, "--url", NOBODY])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("CODEX_HOME", "CLAUDE_CONFIG_DIR", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "OPTIQ_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_command_shows_writes_and_takes_back(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _optiq("claude-code", "--model", "org/m", "--context", "40000", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["is_assumed"] is True
    assert shown["context"] == 40_000
    path = home / ".claude" / "settings.json"
    path.parent.mkdir()
    path.write_text('{"env": {"MINE": "1"}, "permissions": {"deny": ["Read(.env)"]}}')
    assert _optiq("claude-code", "--model", "org/m", "--write") == 2, "nobody can be asked"
    assert "--yes" in capsys.readouterr().err
    assert "org/m" not in path.read_text()
    assert _optiq("claude-code", "--model", "org/m", "--write", "--yes", "--json") == 0
    (written,) = json.loads(capsys.readouterr().out)
    assert written["changed"] is True
    document = json.loads(path.read_text())
    assert document["env"]["MINE"] == "1"
    assert document["env"]["ANTHROPIC_MODEL"] == "org/m"
    assert document["permissions"] == {"deny": ["Read(.env)"], "defaultMode": "default"}
    path.write_text(path.read_text().replace("org/m", "org/n"))
    assert _optiq("claude-code", "--undo") == 2
    assert "changed by others" in capsys.readouterr().err
    assert _optiq("claude-code", "--undo", "--yes") == 0
    assert json.loads(path.read_text()) == {"env": {"MINE": "1"}, "permissions": {"deny": ["Read(.env)"]}}


def test_a_file_at_home_itself_is_written_there(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = home / "project"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert _optiq("aider", "--model", "m", "--write", "--yes") == 0
    assert "openai/m" in (home / ".aider.conf.yml").read_text()
    assert list(elsewhere.iterdir()) == []
    assert _optiq("aider", "--undo", "--yes") == 0
    assert not (home / ".aider.conf.yml").exists()
    capsys.readouterr()


def test_a_real_key_reaches_the_file_and_no_screen(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPTIQ_API_KEY", "sk-very-secret")
    assert _optiq("opencode", "--model", "m") == 0
    assert _optiq("opencode", "--model", "m", "--write", "--yes") == 0
    shown = capsys.readouterr()
    assert "sk-very-secret" not in shown.out + shown.err
    assert "<OPTIQ_API_KEY>" in shown.out
    assert "<hidden>" in shown.err
    path = home / ".config" / "opencode" / "opencode.json"
    assert json.loads(path.read_text())["provider"]["optiq"]["options"]["apiKey"] == "sk-very-secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_with_comments_is_left_alone(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = home / ".config" / "opencode" / "opencode.json"
    path.parent.mkdir(parents=True)
    path.write_text('{\n  // mine\n  "model": "x"\n}\n')
    assert _optiq("opencode", "--model", "m", "--write", "--yes") == 2
    assert "nothing was changed" in capsys.readouterr().err
    assert "// mine" in path.read_text()


def test_unknown_clients_and_those_without_a_file_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert _optiq("emacs") == 2
    assert "there are: " in capsys.readouterr().err
    assert _optiq("curl", "--write") == 2
    assert "no file to write into" in capsys.readouterr().err
    assert main(["snippet", "--json"]) == 0
    assert {row["client"] for row in json.loads(capsys.readouterr().out)} == set(NAMES)


def test_other_packages_add_clients_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = Client(name="theirs", title="Theirs", about="A client of another package", docs="https://x.y")

    class Point:
        def load(self) -> Client:
            return theirs

    asked: list[str] = []

    def found(*, group: str) -> list[Point]:
        asked.append(group)
        return [Point()]

    monkeypatch.setattr("mlx_optiq_integrations.client.entry_points", found)
    all_clients.cache_clear()
    try:
        assert find_client("theirs") is theirs
        assert asked == ["mlx_optiq_ext.clients"]
        assert set(all_clients()) == {*NAMES, "theirs"}
    finally:
        all_clients.cache_clear()
