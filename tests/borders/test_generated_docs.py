"""llms.txt and the help texts are what the code generates; `make docs` brings them up to date."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from mlx_optiq_ext.cli.main import COMMANDS, command_parser, summary
from mlx_optiq_ext.cli.reference import generated_files

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
