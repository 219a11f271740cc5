"""What a program in the sandbox may use, and what became of it.

Plain values; made by ``sandbox.run``, told to the model by ``tools``.
"""

import msgspec

__all__ = ["SandboxLimits", "SandboxResult"]


class SandboxLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one program may use."""

    wall_s: float = 60.0
    cpu_s: int = 60
    """Of each process."""
    memory_nbytes: int = 2 * 2**30
    """Resident, all processes together; on Linux also what each may ask for."""
    address_space_nbytes: int = 8 * 2**30
    """Of each process; not enforced by macOS."""
    processes: int = 64
    """Threads count too."""
    open_files: int = 512
    """Of each process."""
    file_nbytes: int = 256 * 2**20
    disk_nbytes: int = 2**30
    """Workspace and scratch together, and on Linux files that were removed and are still open."""
    spare_nbytes: int = 2**30
    """A program is stopped when the disk has less than this left, whoever filled it."""
    files: int = 20_000
    output_nbytes: int = 32 * 2**10
    """Of each stream, kept; the rest is counted."""
    dropped_nbytes: int = 8 * 2**20
    """A program that writes more than this beyond what is kept is stopped."""


class SandboxResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a program ended."""

    exit_code: int
    """Negative: the signal that ended it."""
    stdout: str
    stderr: str
    stdout_dropped: int = 0
    """Bytes that were written after those kept."""
    stderr_dropped: int = 0
    stopped: str = ""
    """Why it was stopped, in words; empty where it ended by itself."""
    files: tuple[str, ...] = ()
    """New or changed files of the workspace, relative to it."""
    seconds: float = 0.0
