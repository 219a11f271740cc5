"""The ranges named in the code are those of pyproject.toml."""

import re
import tomllib
from pathlib import Path

from mlx_optiq_ext.cli.health import SUPPORTED

ROOT = Path(__file__).resolve().parents[2]


def test_supported_versions_are_those_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {}
    for requirement in project["dependencies"]:
        match = re.match(r"(mlx(?:-lm)?)(?:\[\w+\])?>=(\d+)\.(\d+),<(\d+)\.(\d+)", requirement)
        if match:
            low, end = (int(match[2]), int(match[3])), (int(match[4]), int(match[5]))
            assert declared.setdefault(match[1], (low, end)) == (low, end)
    assert declared == SUPPORTED


def test_the_lowest_versions_are_those_that_make_installs() -> None:
    (line,) = re.findall(r"^LOWEST := (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert line == " ".join(f"{name}=={low[0]}.{low[1]}.0" for name, (low, _) in SUPPORTED.items())


def test_supported_pythons_are_those_of_the_distribution() -> None:
    from mlx_optiq_ext.cli import health

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (low_major, low_minor), (end_major, end_minor) = health._PYTHONS
    assert project["requires-python"] == f">={low_major}.{low_minor},<{end_major}.{end_minor}"
