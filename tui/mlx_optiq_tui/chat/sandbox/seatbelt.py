"""macOS: the command that starts a program with ``sandbox-exec`` and a profile of our own.

Everything is denied but: running programs, reading the system and Python, reading and writing workspace and
scratch, and signals to programs in the same sandbox. What is denied fails with EPERM.

Source: sandbox-exec(1), sandbox(7); /System/Library/Sandbox/Profiles for the names of operations.
"""

import msgspec

from mlx_optiq_tui.chat.sandbox.place import Enclosed, Place, python_folders

__all__ = ["SANDBOX_EXEC", "Seatbelt"]

SANDBOX_EXEC = "/usr/bin/sandbox-exec"

_PROFILE = """(version 1)
(deny default)
(allow process-exec process-fork)
(allow process-info* (target same-sandbox))
(allow signal (target same-sandbox))
(allow sysctl-read)
(allow ipc-posix-sem)
(allow file-read*
  (literal "/")
  (subpath "/usr") (subpath "/bin") (subpath "/sbin")
  (subpath "/System/Library") (subpath "/System/Volumes/Preboot/Cryptexes") (subpath "/System/Cryptexes")
  (subpath "/Library/Apple") (subpath "/Library/Developer/CommandLineTools")
  (subpath "/private/var/db/dyld") (subpath "/private/var/db/timezone")
  (literal "/private/etc/localtime") (literal "/private/var/select/sh") (literal "/var") (literal "/etc")
  (literal "/dev/null") (literal "/dev/zero") (literal "/dev/random") (literal "/dev/urandom")
  (subpath "/dev/fd"))
(allow file-write-data (literal "/dev/null") (literal "/dev/zero") (subpath "/dev/fd"))
(allow file-read-metadata (path-ancestors (param "WORKSPACE")) (path-ancestors (param "SCRATCH")))
(allow file-read* file-write* (subpath (param "WORKSPACE")) (subpath (param "SCRATCH")))
"""


class Seatbelt(msgspec.Struct, frozen=True, kw_only=True):
    """Starts programs by ``sandbox-exec``."""

    executable: str = SANDBOX_EXEC
    name: str = "seatbelt"
    user: int | None = None

    def enclose(self, place: Place, filter_descriptor: int | None) -> Enclosed:  # noqa: ARG002 - Linux's
        """How to start a program; paths are parameters, so no path can change the profile."""
        profile = _PROFILE
        words = [self.executable, "-D", f"WORKSPACE={place.workspace}", "-D", f"SCRATCH={place.scratch}"]
        for number, folder in enumerate(python_folders()):
            words += ["-D", f"PYTHON{number}={folder}"]
            profile += (
                f'(allow file-read* (subpath (param "PYTHON{number}")))\n'
                f'(allow file-read-metadata (path-ancestors (param "PYTHON{number}")))\n'
            )
        return Enclosed(words=(*words, "-p", profile), workspace=place.workspace, scratch=place.scratch)
