"""The first program inside the sandbox: takes on the limits, gives up root, becomes what was asked for.

It gives way to other programs, and is the first that a machine without memory ends. Its text is given to an
interpreter that sees nothing of this package, so it imports the standard library only. Arguments: the limits
as JSON (resource names without ``RLIMIT_``; ``user`` to become and ``folder`` to start in), then the words.
"""

import contextlib
import json
import os
import resource
import sys

__all__ = ["enter"]

_NICE = 10


def enter(told: str, words: list[str]) -> None:
    """Become ``words``; returns only by an exception."""
    limits = json.loads(told)
    user, folder = limits.pop("user"), limits.pop("folder")
    for name, value in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))
    os.nice(_NICE)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    os.chdir(folder)
    os.execvp(words[0], words)


if __name__ == "__main__":
    enter(sys.argv[1], sys.argv[2:])
