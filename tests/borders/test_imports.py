"""Import borders: the contracts of pyproject.toml, and what a fresh interpreter really loads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "integrations"), str(ROOT / "tui")]),
}
HEAVY = ("mlx", "mlx_lm", "transformers", "torch")


def _loaded_heavy_modules(code: str) -> set[str]:
    """Top-level heavy packages in ``sys.modules`` after ``code`` ran in a fresh interpreter."""
    script = (
        f"import sys\n{code}\nsys.stderr.write(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=ENVIRONMENT,
    )
    return set(done.stderr.split()) & set(HEAVY)


def _modules_below(*names: str) -> list[str]:
    package = ROOT / "mlx_optiq_ext"
    files = [path for name in names for path in sorted((package / name).rglob("*.py"))]
    files += [package / "errors.py", package / "blas.py"]
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files
    ]


def test_import_contracts_hold() -> None:
    lint_imports = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run(
        [lint_imports], cwd=ROOT, capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stdout


def test_plain_data_layers_load_without_mlx() -> None:
    modules = _modules_below("types", "formats", "hub", "allocate")
    assert _loaded_heavy_modules("\n".join(f"import {module}" for module in modules)) == set()


@pytest.mark.parametrize("name", ["mlx_optiq_ext", "mlx_optiq_integrations", "mlx_optiq_tui"])
def test_importing_a_package_loads_nothing_heavy(name: str) -> None:
    assert _loaded_heavy_modules(f"import {name}") == set()


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["nonsense"], []])
def test_command_line_answers_without_mlx(words: list[str]) -> None:
    code = f"from mlx_optiq_ext.cli.main import main\nmain({words!r})"
    assert _loaded_heavy_modules(code) == set()


@pytest.mark.parametrize("name", ["allocate", "report"])
def test_commands_that_read_files_only_load_without_mlx(name: str) -> None:
    code = f"from mlx_optiq_ext.cli.main import COMMANDS, command_parser\ncommand_parser(COMMANDS[{name!r}])"
    assert _loaded_heavy_modules(code) == set()
