"""llms.txt and the help texts are what the code generates; `make docs` brings them up to date."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from mlx_optiq_ext.cli.main import COMMANDS, command_parser, summary
from mlx_optiq_ext.cli.reference import generated_files
from mlx_optiq_ext.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
GENERATED = generated_files(ROOT)


@pytest.mark.parametrize("path", GENERATED, ids=str)
def test_generated_text_is_fresh(path: Path) -> None:
    stored = (ROOT / path).read_text(encoding="utf-8") if (ROOT / path).is_file() else ""
    assert stored == GENERATED[path], f"{path} is stale: run `make docs` and commit the result"


def test_no_golden_help_of_a_command_that_is_gone() -> None:
    stored = {path.stem for path in (ROOT / "tests/golden/help").glob("*.txt")}
    assert stored == {name.replace(" ", "-") for name in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.name)
def test_every_command_says_what_it_does_and_every_option_too(command) -> None:
    assert 20 <= len(summary(command)) <= 90
    parser, _ = command_parser(command)
    assert [action.dest for action in parser._actions if not (action.help or "").strip()] == []


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
    ],
)
def test_documents_name_only_files_that_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in link]
    missing = [link for link in links if not (ROOT / document).parent.joinpath(link).exists()]
    assert missing == []


@pytest.mark.parametrize(
    "document", ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
)
def test_documents_use_only_options_that_exist(document: str) -> None:
    known = {"--optiq", "--quant-predicate", "--hf-path", "--mlx-path", "--model", "--prompt", "--max-tokens"}
    for command in COMMANDS.values():
        known |= {flag for action in command_parser(command)[0]._actions for flag in action.option_strings}
    text = (ROOT / document).read_text(encoding="utf-8")
    shown = [
        flag
        for line in text.splitlines()
        if "optiq " in line
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z](?![\w-])", line)
    ]
    unknown = {flag for flag in shown if flag not in known and flag.replace("--optiq-", "--") not in known}
    assert unknown == set()


def test_the_python_example_imports_only_public_names() -> None:
    (example,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    imports = [node for node in ast.walk(ast.parse(example)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if (node.module or "").startswith("mlx_optiq_ext")]
    assert len(ours) >= 3
    for node in ours:
        public = importlib.import_module(str(node.module)).__all__
        assert {alias.name for alias in node.names} <= set(public)


def _shown_commands(document: str) -> list[str]:
    """Lines of a document's shell blocks that call ``optiq``, continued lines joined."""
    text = (ROOT / document).read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("optiq ")]


@pytest.mark.parametrize(
    "document", ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
)
def test_commands_that_documents_show_are_taken_by_their_parsers(document: str) -> None:
    for line in _shown_commands(document):
        words = shlex.split(re.split(r" [12]?> | \| | && | &$", line)[0], comments=True)[1:]
        if words[:1] == ["--help"] or "…" in line:
            continue
        command = COMMANDS.get(" ".join(words[:2])) or COMMANDS.get(words[0])
        assert command is not None, line
        parser, _ = command_parser(command)
        try:
            parser.parse_args(words[1 + command.name.count(" ") :])
        except (UsageError, SystemExit) as error:
            pytest.fail(f"{document}: {line}: {error}")


def test_recipes_show_commands() -> None:
    assert len(_shown_commands("docs/recipes.md")) > 15
