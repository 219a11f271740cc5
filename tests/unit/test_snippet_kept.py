"""What must survive a merge and an undo in users' files, and what no screen may show."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from ruamel.yaml import YAML

from mlx_optiq_ext.cli.main import main
from mlx_optiq_integrations.client import ConfigFile, Setting, find_client
from mlx_optiq_integrations.facts import NO_KEY, assumed_facts
from mlx_optiq_integrations.hide import hide_blocks, hide_keys
from mlx_optiq_integrations.merge import Unreadable, merged_text
from mlx_optiq_integrations.user_files import Change, UserFiles

OURS = (Setting(("env", "B"), "c"),)
NOBODY = "http://127.0.0.1:9"
SECRET = "sk-very-secret"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("CODEX_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "OPTIQ_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def _optiq(*words: str) -> int:
    return main(["snippet", *words, "--url", NOBODY])


@pytest.mark.parametrize(
    "text",
    ['{"a": 1, "a": 2}', '{"a": NaN}', '{"a": -Infinity}', '{"a": 1e400}', '{"a": 0.1000000000000000055}'],
)
def test_json_whose_values_would_change_is_refused(text: str) -> None:
    with pytest.raises(Unreadable, match="kept whole"):
        merged_text("json", text, OURS)


def test_json_keeps_characters_that_utf8_lacks_and_its_line_ends() -> None:
    merged = merged_text("json", '{\r\n  "a": "\\ud83d",\r\n  "b": 1E5\r\n}\r\n', OURS)
    assert json.loads(merged) == {"a": "\ud83d", "b": 100000.0, "env": {"B": "c"}}
    assert merged.encode().count(b"\n") == merged.encode().count(b"\r\n")


@pytest.mark.parametrize("text", ["# mine\n\n  # too", "# mine\r\n  # too\r\n", "---\n# mine\n  # too\n"])
def test_yaml_of_comments_alone_keeps_them(text: str) -> None:
    merged = merged_text("yaml", text, OURS)
    assert "# mine" in merged
    assert "# too" in merged
    assert YAML(typ="safe").load(merged) == {"env": {"B": "c"}}


@pytest.mark.parametrize("inner", [2, 3, 4])
@pytest.mark.parametrize("offset", [0, 2, 4])
def test_yaml_keeps_its_indentation(inner: int, offset: int) -> None:
    step, dash = " " * inner, " " * offset
    before = f"list:\n{dash}- 1\n{dash}- x: 2\n{dash}  y: 3\nenv:\n{step}A: b # why\n"
    assert merged_text("yaml", before, OURS) == f"{before}{step}B: c\n"


_WORD = st.text("abcxyz", min_size=1, max_size=4)
_TREE = st.recursive(
    st.integers() | _WORD | st.none(),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3) | st.dictionaries(_WORD, inner, min_size=1, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(tree=st.dictionaries(_WORD, _TREE, max_size=4), mapping=st.integers(1, 5), offset=st.integers(0, 4))
def test_yaml_of_any_indentation_survives(
    tree: dict[str, Any], mapping: int, offset: int, tmp_path_factory: Any
) -> None:
    writer = YAML()
    writer.indent(mapping=mapping, sequence=offset + 2, offset=offset)
    path = tmp_path_factory.mktemp("yaml") / "a.yaml"
    writer.dump(tree or {"a": 1}, path)
    before = YAML(typ="safe").load(path.read_text())
    after = YAML(typ="safe").load(merged_text("yaml", path.read_text(), OURS))
    assert after.pop("env") == {"B": "c"}
    assert after == before


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ('"apiKey": "sk-a\\"b", "x": 1', '"apiKey": <hidden>, "x": 1'),
        ("openai-api-key: sk-a b", "openai-api-key: <hidden>"),
        ("GITHUB_TOKEN = 'ghp'", "GITHUB_TOKEN = <hidden>"),
        ('"Authorization": "Bearer x"', '"Authorization": <hidden>'),
        (f'"apiKey": "{NO_KEY}"', None),
        (f"api_key: {NO_KEY}", None),
        ('env_key = "OPTIQ_API_KEY"', None),
        ('"CLAUDE_CODE_MAX_OUTPUT_TOKENS": "4096"', None),
        ('"token": {', None),
    ],
)
def test_values_of_keys_are_left_out(line: str, shown: str | None) -> None:
    assert hide_keys(f"-{line}\n+after\n") == f"-{shown or line}\n+after\n"


@pytest.mark.parametrize(
    "value",
    [
        'key = """-----BEGIN\nSECRET-1\nSECRET-2"""',
        "key = '''SECRET-0\nSECRET-1'''",
        "api_key: |\n  SECRET-1\n\n  SECRET-2",
        "- api_key: >-\n    SECRET-1\n    SECRET-2",
        '"token": "SECRET-0\n  SECRET-1\\" SECRET-2"',
        "password: SECRET-0\n  SECRET-1",
        "password:\n  SECRET-1",
    ],
)
def test_values_over_several_lines_are_left_out_of_diffs(value: str, tmp_path: Path) -> None:
    text = f"{value}\nlast: shown\n"
    hidden = hide_keys(hide_blocks(text))
    assert "SECRET" not in hidden
    assert hidden.endswith("last: shown\n")
    assert hidden.count("\n") == text.count("\n")
    change = Change(path=tmp_path / "a", before=text, after=f"{text}more: 1\n")
    assert "SECRET" not in change.diff
    assert "+more: 1" in change.diff


def test_what_is_no_secret_stays_as_it_is() -> None:
    text = (
        "token:\n  kind: oauth\n  list:\n    - a\nmodel: |\n  text\n"
        '{"token": {\n  "kind": 1\n}}\napi_key: sk-1\nnext:\n  deeper: 1\nkey = [\n  "a"\n]\n'
    )
    assert hide_blocks(text) == text


@pytest.mark.parametrize("key_is_known", [True, False])
def test_no_way_of_undoing_shows_a_key(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key_is_known: bool
) -> None:
    path = home / ".config" / "opencode" / "opencode.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"provider": {"theirs": {"options": {"apiKey": "sk-theirs"}}}}')
    monkeypatch.setenv("OPTIQ_API_KEY", SECRET)
    assert _optiq("opencode", "--model", "m", "--write", "--yes") == 0
    assert SECRET in path.read_text()
    if not key_is_known:
        monkeypatch.delenv("OPTIQ_API_KEY")
    path.write_text(path.read_text().replace('"disabled"', '"manual"'))
    assert _optiq("opencode", "--undo", "--json") == 2
    assert _optiq("opencode", "--undo", "--yes") == 0
    told = capsys.readouterr()
    assert "changed by others" in told.out + told.err
    for secret in (SECRET, "sk-theirs"):
        assert secret not in told.out + told.err
    assert "sk-theirs" in path.read_text()


def test_every_state_that_a_user_made_comes_back(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = home / ".codex" / "config.toml"
    path.parent.mkdir()
    path.write_text('model = "mine"\n')
    taken = path.with_name("config.toml.before-optiq")
    taken.write_text("a copy of the user's own\n")
    assert _optiq("codex", "--model", "a", "--write", "--yes") == 0
    changed = "theirs = 1\n" + path.read_text()
    path.write_text(changed)
    assert _optiq("codex", "--model", "b", "--write", "--yes") == 0
    assert tomllib.loads(path.read_text())["model"] == "b"
    assert _optiq("codex", "--undo", "--yes") == 0
    assert path.read_text() == changed
    assert _optiq("codex", "--undo") == 2, "others have changed it after the first time"
    assert _optiq("codex", "--undo", "--yes") == 0
    assert path.read_text() == 'model = "mine"\n'
    assert {each.name for each in path.parent.iterdir()} == {"config.toml", taken.name}
    assert taken.read_text() == "a copy of the user's own\n"
    capsys.readouterr()


def test_undo_of_a_file_that_is_gone_already_is_no_error(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _optiq("codex", "--model", "a", "--write", "--yes") == 0
    (home / ".codex" / "config.toml").unlink()
    assert _optiq("codex", "--undo") == 0
    assert "as it should be" in capsys.readouterr().out


def test_the_file_that_goes_before_is_the_one_that_is_changed(tmp_path: Path) -> None:
    (file,) = (find_client("opencode").files or (lambda _: ()))(assumed_facts(NOBODY, "m"))
    folder = tmp_path / ".config" / "opencode"
    folder.mkdir(parents=True)
    assert file.locate({}, tmp_path) == folder / "opencode.json"
    (folder / "opencode.jsonc").write_text('{"model": "theirs/x"}')
    change = UserFiles({}, tmp_path).planned(file)
    assert change.path == folder / "opencode.jsonc"
    assert json.loads(change.after or "")["model"] == "optiq/m"


def test_an_assumed_context_that_is_too_short_is_said() -> None:
    facts = assumed_facts(NOBODY, "m", 8_192)
    (warning,) = find_client("hermes").warnings(facts)
    assert "64,000" in warning
    assert "8,192 are assumed" in warning
    assert find_client("codex").warnings(facts) == ()
    assert find_client("hermes").warnings(replace(facts, context=64_000)) == ()


def test_a_variable_that_names_a_folder_goes_before_home(tmp_path: Path) -> None:
    file = ConfigFile(folder="~/.a", variable="A_HOME", name="b", format="json", settings=OURS)
    assert file.locate({"A_HOME": ""}, tmp_path) == tmp_path / ".a" / "b"
    assert file.locate({"A_HOME": "~/c"}, tmp_path) == tmp_path / "c" / "b"
    itself = replace(file, file_variable="A_FILE")
    assert itself.locate({"A_HOME": "~/c", "A_FILE": "~/d.json"}, tmp_path) == tmp_path / "d.json"
    assert itself.locate({"A_HOME": "~/c", "A_FILE": ""}, tmp_path) == tmp_path / "c" / "b"
