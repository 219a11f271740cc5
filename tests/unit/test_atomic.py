import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_optiq_ext.errors import OutputExists, ResourceError, UsageError, VerificationError
from mlx_optiq_ext.formats.atomic import (
    atomic_folder,
    check_disk_space,
    find_stale_folders,
    incomplete_path,
    require_absent,
    require_absent_file,
    write_bytes_atomic,
    write_json_atomic,
)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_file_is_replaced_in_one_step_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.json"
    write_bytes_atomic(path, b"one")
    write_bytes_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["table.json"]


def test_json_is_indented_and_ends_in_a_newline(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "a.json", {"b": [1, 2.5], "c": "é"})
    assert (tmp_path / "a.json").read_text() == '{\n  "b": [\n    1,\n    2.5\n  ],\n  "c": "é"\n}\n'


def test_file_that_cannot_be_written_is_reported_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where a folder is needed")
    with pytest.raises(ResourceError, match=r"cannot write .*taken/a\.json"):
        write_bytes_atomic(tmp_path / "taken" / "a.json", b"")


def test_an_output_that_could_not_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where a folder is needed")
    for check in (require_absent, require_absent_file):
        with pytest.raises(UsageError, match=r"cannot write .*/x: .*taken takes no new files \(not a folder"):
            check(tmp_path / "taken" / "deep" / "x")
    require_absent(tmp_path / "new" / "deep" / "x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_a_folder_of_the_system_is_not_a_full_disk() -> None:
    with pytest.raises(UsageError, match="/proc takes no new files"):
        require_absent(Path("/proc/x"))


def test_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "model"
    with atomic_folder(out) as working:
        (working / "config.json").write_text("{}")
        assert not out.exists()
        assert working.name.startswith(".model.partial-")
        assert working.parent == out.parent
    assert names(out) == ["config.json"]
    assert names(out.parent) == ["model"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_error_or_interrupt_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def write() -> None:
        with atomic_folder(tmp_path / "model") as working:
            (working / "model.safetensors").write_bytes(b"half")
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == []


def test_existing_output_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(OutputExists, match="already exists"), atomic_folder(tmp_path / "model"):
        pytest.fail("the block must not run")


def test_output_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "model"

    def write() -> None:
        with atomic_folder(out):
            out.mkdir()
            (out / "precious").write_text("theirs")

    with pytest.raises(OutputExists):
        write()
    assert names(out) == ["precious"]


def test_failed_verification_keeps_a_folder_no_loader_takes(tmp_path: Path) -> None:
    out = tmp_path / "model"

    def write() -> None:
        with atomic_folder(out) as working:
            (working / "config.json").write_text("{}")
            raise VerificationError("model.layers.0: planned 4g64, on disk 8g64")

    with pytest.raises(VerificationError):
        write()
    assert names(tmp_path) == ["model.incomplete"]
    assert incomplete_path(out) == tmp_path / "model.incomplete"
    assert names(tmp_path / "model.incomplete") == ["INCOMPLETE.txt", "config.json.incomplete"]
    assert "planned 4g64" in (tmp_path / "model.incomplete" / "INCOMPLETE.txt").read_text()


def test_killed_run_leaves_a_stale_folder_that_the_next_run_removes(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from mlx_optiq_ext.formats.atomic import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])) as working:\n"
        "    (working / 'config.json').write_text('{}'); os._exit(9)\n"
    )
    out = tmp_path / "model"
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    assert (
        subprocess.run([sys.executable, "-c", script, str(out)], env=environment, check=False).returncode == 9
    )
    assert not out.exists()
    assert [entry.name for entry in find_stale_folders(out)] == names(tmp_path)
    with atomic_folder(out) as working:
        assert find_stale_folders(out) == []
        (working / "done").write_text("")
    assert names(tmp_path) == ["model"]


def test_working_folder_of_a_living_run_is_left_alone(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "model") as first:
        assert find_stale_folders(tmp_path / "model") == []
        with atomic_folder(tmp_path / "other"):
            assert first.exists()
    foreign = tmp_path / ".model.partial-notours"
    foreign.mkdir()
    assert find_stale_folders(tmp_path / "model") == []


def test_disk_space_is_compared_with_what_is_needed(tmp_path: Path) -> None:
    assert check_disk_space(tmp_path / "not" / "yet", 1) > 0
    with pytest.raises(ResourceError, match=r"needs 1000000000\.00 GB, .* GB free"):
        check_disk_space(tmp_path, 10**18)
