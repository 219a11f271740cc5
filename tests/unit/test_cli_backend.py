"""optiq doctor's word on the back end of MLX: packages that share one library, as pip leaves them."""

import importlib.metadata
from pathlib import Path

import pytest

from mlx_optiq_ext.cli import kernels
from mlx_optiq_ext.cli.backend import check_back_end, import_fix

LIBRARY = "mlx/lib/libmlx.so"


def _install(site: Path, name: str, nbytes: int, *, version: str = "0.32.4") -> None:
    """What pip writes: the library, over whatever was there, and the record of it."""
    (site / LIBRARY).parent.mkdir(parents=True, exist_ok=True)
    (site / LIBRARY).write_bytes(bytes(nbytes))
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(f"{LIBRARY},sha256=x,{nbytes}\n{info.name}/METADATA,,\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def distribution(name: str) -> importlib.metadata.Distribution:
        found = next(importlib.metadata.distributions(name=name, path=[str(tmp_path)]), None)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    return tmp_path


def test_one_back_end_is_named(site: Path) -> None:
    _install(site, "mlx-cpu", 10)
    finding = check_back_end()
    assert (finding.state, finding.found) == ("ok", "CPU, of mlx-cpu 0.32.4")


def test_with_two_the_library_that_lies_there_is_active(site: Path) -> None:
    _install(site, "mlx-cpu", 10)
    _install(site, "mlx-cuda-13", 20)
    finding = check_back_end()
    assert finding.state == "ok"
    assert finding.found.startswith("CUDA 13, of mlx-cuda-13 0.32.4, mlx-cpu 0.32.4: one library for all")


def test_a_cuda_library_that_the_cpu_package_covers_is_noted_with_its_remedy(site: Path) -> None:
    _install(site, "mlx-cuda-13", 20)
    _install(site, "mlx-cpu", 10)
    finding = check_back_end()
    assert finding.state == "note"
    assert finding.found.startswith("CPU, of ")
    assert finding.fix == "pip install --force-reinstall --no-deps mlx-cuda-13==0.32.4"


def test_a_library_that_was_removed_with_another_package_is_broken(site: Path) -> None:
    _install(site, "mlx-cpu", 10)
    (site / LIBRARY).unlink()
    finding = check_back_end()
    assert finding.state == "broken"
    assert finding.fix == "pip install --force-reinstall --no-deps mlx-cpu==0.32.4"


def test_without_any_wheel_nothing_is_claimed(site: Path) -> None:
    assert check_back_end().state == "note"


def test_mlx_that_finds_no_driver_is_told_both_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ImportError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(kernels, "_mlx", fail)
    finding = kernels.check_device()
    assert finding.state == "broken"
    assert "needs the NVIDIA driver" in finding.fix
    assert "--force-reinstall --no-deps mlx-cpu==" in finding.fix


def test_a_missing_library_is_reinstalled(site: Path) -> None:
    _install(site, "mlx-cpu", 10)
    assert import_fix("libmlx.so: cannot open") == ("pip install --force-reinstall --no-deps mlx-cpu==0.32.4")
