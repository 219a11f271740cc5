"""How the sandbox is started, and that nothing runs where it does not hold."""

import asyncio
import shutil
import stat
import struct
import sys
from pathlib import Path

import pytest

from mlx_optiq_tui.chat.sandbox import probe
from mlx_optiq_tui.chat.sandbox.bubblewrap import Bubblewrap
from mlx_optiq_tui.chat.sandbox.place import Enclosed, Place, python_folders, sandbox_environment
from mlx_optiq_tui.chat.sandbox.probe import NoSandbox, find_launcher, open_sandbox
from mlx_optiq_tui.chat.sandbox.seatbelt import Seatbelt
from mlx_optiq_tui.chat.sandbox.syscalls import seccomp_filter

PLACE = Place(workspace=Path("/data/workspace"), scratch=Path("/data/scratch"))
PTRACE_X86, GETPID_X86, CLONE_X86, CLONE3_X86, SOCKET_X86, PRCTL_X86 = 101, 39, 56, 435, 41, 157
ALLOW, KILL, EPERM, ENOSYS, EAFNOSUPPORT = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026, 0x00050061
X86 = 0xC000003E


class Open:
    """A launcher that confines nothing."""

    name = "nothing"
    user = None

    def enclose(self, place: Place, filter_descriptor: int | None) -> Enclosed:
        return Enclosed(words=("/usr/bin/env",), workspace=place.workspace, scratch=place.scratch)


def bound(words: tuple[str, ...], kind: str) -> list[str]:
    """Targets of one kind of mount."""
    return [words[index + 2] for index, word in enumerate(words) if word == kind]


def test_bubblewrap_shares_nothing_and_binds_only_workspace_and_scratch_for_writing() -> None:
    words = Bubblewrap(executable="/usr/bin/bwrap", is_root=False).enclose(PLACE, 7).words
    assert words[0] == "/usr/bin/bwrap"
    assert words[-1] == "--"
    assert {"--unshare-all", "--die-with-parent", "--new-session"} <= set(words)
    assert not {"--share-net", "--dev-bind", "--cap-add"} & set(words)
    assert bound(words, "--bind") == ["/tmp", "/dev/shm", "/workspace"]
    assert words[words.index("--seccomp") + 1] == "7"
    for home in (Path.home(), Path("/home"), Path("/root"), Path("/etc"), Path("/run"), Path("/")):
        assert str(home) not in bound(words, "--ro-bind")


def test_root_becomes_nobody_instead_of_root_in_a_namespace() -> None:
    launcher = Bubblewrap(executable="bwrap", is_root=True)
    words = launcher.enclose(PLACE, None).words
    assert launcher.user == 65534
    assert {"--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts"} <= set(words)
    assert "--unshare-user" not in words
    added = [words[index + 1] for index, word in enumerate(words) if word == "--cap-add"]
    assert added == ["CAP_SETUID", "CAP_SETGID"]
    assert Bubblewrap(executable="bwrap", is_root=False).user is None


def test_seatbelt_denies_by_default_and_takes_paths_as_parameters() -> None:
    place = Place(workspace=Path('/data/a "quoted" (place)'), scratch=Path("/data/scratch"))
    words = Seatbelt().enclose(place, None).words
    parameters = ("-D", f"WORKSPACE={place.workspace}", "-D", "SCRATCH=/data/scratch")
    assert words[:5] == ("/usr/bin/sandbox-exec", *parameters)
    profile = words[-1]
    assert words[-2] == "-p"
    assert profile.startswith("(version 1)\n(deny default)\n")
    assert "network" not in profile
    assert "mach-lookup" not in profile
    assert '"quoted"' not in profile
    assert profile.count("(") == profile.count(")")
    writable = [line for line in profile.splitlines() if "file-write" in line]
    assert writable == [
        '(allow file-write-data (literal "/dev/null") (literal "/dev/zero") (subpath "/dev/fd"))',
        '(allow file-read* file-write* (subpath (param "WORKSPACE")) (subpath (param "SCRATCH")))',
    ]


@pytest.mark.skipif(sys.platform != "darwin", reason="sandbox-exec is a part of macOS")
def test_seatbelt_holds_on_a_mac() -> None:
    asyncio.run(probe.prove(Seatbelt()))


def test_a_folder_that_holds_the_home_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "base_prefix", str(Path.home()))
    assert Path.home().resolve() not in python_folders()


def test_the_environment_is_made_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    environment = sandbox_environment(Path("/workspace"), Path("/tmp"))
    assert environment["HOME"] == "/workspace"
    assert "HF_TOKEN" not in environment
    assert "secret" not in "".join(environment.values())


def run_filter(program: bytes, number: int, argument: int = 0, architecture: int = X86) -> int:
    """What the filter answers to a system call: classic BPF, of which it uses five instructions."""
    data = struct.pack("=IIQQ", number, architecture, 0, argument)
    at, held = 0, 0
    while True:
        code, then, otherwise, value = struct.unpack_from("=HBBI", program, 8 * at)
        at += 1
        if code == 0x20:
            held = struct.unpack_from("=I", data, value)[0]
        elif code == 0x06:
            return int(value)
        else:
            holds = {0x15: held == value, 0x35: held >= value, 0x45: bool(held & value)}[code]
            at += then if holds else otherwise


def test_the_filter_refuses_what_it_lists_and_nothing_else() -> None:
    program = seccomp_filter("x86_64")
    assert program is not None
    assert run_filter(program, PTRACE_X86) == EPERM
    assert run_filter(program, GETPID_X86) == ALLOW
    assert run_filter(program, GETPID_X86 | 0x40000000) == EPERM
    assert run_filter(program, GETPID_X86, architecture=0x40000003) == KILL
    assert run_filter(program, CLONE3_X86) == ENOSYS
    assert run_filter(program, CLONE_X86, 0x10000000) == EPERM  # CLONE_NEWUSER
    assert run_filter(program, CLONE_X86, 0x003D0F00) == ALLOW  # a thread
    assert [run_filter(program, SOCKET_X86, family) for family in (1, 2, 10, 16)] == [ALLOW] * 4
    assert {run_filter(program, SOCKET_X86, family) for family in (0, 3, 17, 38, 40)} == {EAFNOSUPPORT}
    assert run_filter(program, PRCTL_X86, 4) == EPERM  # PR_SET_DUMPABLE
    assert run_filter(program, PRCTL_X86, 15) == ALLOW  # PR_SET_NAME
    arm = seccomp_filter("aarch64")
    assert arm is not None
    assert run_filter(arm, 117, architecture=0xC00000B7) == EPERM
    assert seccomp_filter("riscv64") is None


def test_a_launcher_that_confines_nothing_is_found_out(tmp_path: Path) -> None:
    with pytest.raises(NoSandbox, match="nothing does not hold here: a program in it can read outside"):
        asyncio.run(open_sandbox(tmp_path / "workspace", Open))
    assert not (tmp_path / "workspace").exists()


def test_without_bubblewrap_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(NoSandbox, match="apt install bubblewrap"):
        find_launcher()
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(NoSandbox, match="no sandbox for win32; use macOS or Linux"):
        find_launcher()


@pytest.mark.skipif(sys.platform != "linux", reason="bubblewrap is Linux's")
def test_a_bubblewrap_that_may_not_make_namespaces_is_refused_in_its_words(tmp_path: Path) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(
        NoSandbox, match=r"setting up uid map: Permission denied; unprivileged user namespaces"
    ):
        asyncio.run(probe.prove(Bubblewrap(executable=str(broken))))
