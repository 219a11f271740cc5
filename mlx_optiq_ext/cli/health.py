"""Checks of the machine and the installation that need no MLX, and the form every check answers in.

Knows nothing of how findings are shown. Called by ``optiq doctor``; the checks that run MLX are in
:mod:`mlx_optiq_ext.cli.kernels`.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Literal

import msgspec

from mlx_optiq_ext import __version__

__all__ = [
    "SUPPORTED",
    "Finding",
    "check_disk",
    "check_hub",
    "check_memory",
    "check_platform",
    "check_python",
    "check_versions",
]

SUPPORTED: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "mlx": ((0, 32), (0, 33)),
    "mlx-lm": ((0, 32), (0, 33)),
}
"""Lowest version we run with and the first one we do not, as in pyproject.toml."""

_PYTHONS = ((3, 11), (3, 15))
_LITTLE_DISK_GB = 2.0
_HUB_TIMEOUT_S = 3.0


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of one check."""

    name: str
    state: Literal["ok", "note", "broken"]
    """note: works, but the user should know; broken: something will fail or give wrong results."""
    found: str
    fix: str = ""
    """What mends it, as a command where there is one."""


def check_platform() -> Finding:
    """Name the operating system and processor; MLX has wheels for macOS on Apple silicon and for Linux."""
    found = f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} cores"
    fits = sys.platform == "linux" or (sys.platform == "darwin" and platform.machine() == "arm64")
    fix = "" if fits else "use macOS on Apple silicon, or Linux"
    return Finding(name="platform", state="ok" if fits else "broken", found=found, fix=fix)


def check_python() -> Finding:
    """Compare the running Python with the supported range."""
    low, end = _PYTHONS
    fits = low <= sys.version_info[:2] < end
    fix = "" if fits else f"use Python {low[0]}.{low[1]} to {end[0]}.{end[1] - 1}"
    found = f"{platform.python_version()} ({sys.executable})"
    return Finding(name="python", state="ok" if fits else "broken", found=found, fix=fix)


def check_versions() -> list[Finding]:
    """Compare the installed mlx and mlx-lm with the range this version was made for."""
    findings = [Finding(name="mlx-optiq-ext", state="ok", found=__version__)]
    for name, (low, end) in SUPPORTED.items():
        wanted = f"{name}>={low[0]}.{low[1]},<{end[0]}.{end[1]}"
        fix = f"pip install '{wanted}'"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name=name, state="broken", found="not installed", fix=fix))
            continue
        fits = low <= _major_minor(version) < end
        found = version if fits else f"{version}, outside of {wanted}"
        findings.append(
            Finding(name=name, state="ok" if fits else "broken", found=found, fix="" if fits else fix)
        )
    return findings


def check_memory() -> Finding:
    """Report physical memory, and what is free of it where the system tells."""
    page = os.sysconf("SC_PAGE_SIZE")
    found = f"{os.sysconf('SC_PHYS_PAGES') * page / 1e9:.1f} GB"
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        found += f", {os.sysconf('SC_AVPHYS_PAGES') * page / 1e9:.1f} GB free"
    return Finding(name="memory", state="ok", found=found)


def check_disk(folder: Path) -> Finding:
    """Report free space where a command run from ``folder`` writes."""
    free_gb = shutil.disk_usage(folder).free / 1e9
    little = free_gb < _LITTLE_DISK_GB
    return Finding(
        name="disk",
        state="note" if little else "ok",
        found=f"{free_gb:.1f} GB free in {folder}",
        fix="a conversion needs room for the source model and the result" if little else "",
    )


def check_hub() -> Finding:
    """Ask the Hub for its front page; no answer is a note, since folders work without it."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(endpoint, timeout=_HUB_TIMEOUT_S) as answer:
            return Finding(name="hub", state="ok", found=f"{endpoint} answers ({answer.status})")
    except (OSError, urllib.error.URLError, ValueError) as error:
        fix = "pass a folder in place of a repository id, or set HF_ENDPOINT"
        return Finding(name="hub", state="note", found=f"{endpoint} does not answer: {error}", fix=fix)


def _major_minor(version: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)
