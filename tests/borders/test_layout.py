"""The repository's top level is fixed, and modules and functions stay small."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mlx_optiq_ext", "integrations", "tui")

TOP_LEVEL = {
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "benchmarks",
    "docs",
    "integrations",
    "llms.txt",
    "mlx_optiq_ext",
    "pyproject.toml",
    "tests",
    "tui",
}

MAX_MODULE_LINES = 300
MAX_FUNCTION_LINES = 80
MAX_PARAMETERS = 6

# Exceptions may only shrink: a function that is gone, or that fits, has to leave this table.
PARAMETER_EXCEPTIONS: dict[str, int] = {
    "mlx_optiq_ext/quant/gptq.py:_refit": 7,
}

# They stand in for a command of mlx-lm, or are run as a script whose stdout another process reads.
PRINTING = {
    "mlx_optiq_ext/_hook.py",
    "mlx_optiq_ext/patches/convert_call.py",
    "mlx_optiq_ext/patches/convert_recipe.py",
    "mlx_optiq_ext/patches/kv_command.py",
    "mlx_optiq_ext/patches/kv_commands.py",
    "mlx_optiq_ext/patches/lora_command.py",
    "mlx_optiq_ext/quant/verify_stock.py",
}


def _modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def _functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in _modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(ROOT)}:{node.name}", node


def _num_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def test_top_level_is_exactly_what_was_agreed() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in listed.stdout.splitlines()} <= TOP_LEVEL
    assert all((ROOT / name).exists() for name in TOP_LEVEL)


def test_no_module_is_longer_than_300_lines() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in _modules()}
    assert {name: n for name, n in lengths.items() if n > MAX_MODULE_LINES} == {}


def test_no_function_is_longer_than_80_lines() -> None:
    lengths = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in _functions()}
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}


def test_no_function_takes_more_than_six_parameters() -> None:
    counts = {name: _num_parameters(node) for name, node in _functions()}
    assert {name: n for name, n in counts.items() if n > MAX_PARAMETERS} == PARAMETER_EXCEPTIONS


def test_no_module_has_a_name_that_says_nothing() -> None:
    empty_names = {"utils.py", "helpers.py", "common.py", "misc.py"}
    assert [path for path in _modules() if path.name in empty_names] == []


def test_library_code_never_prints() -> None:
    printing = {
        str(path.relative_to(ROOT))
        for path in _modules()
        if "cli" not in path.parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert printing == PRINTING
