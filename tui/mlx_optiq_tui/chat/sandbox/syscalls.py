"""A seccomp filter for programs in the sandbox: system calls that only somebody who wants out needs.

Namespaces are the wall; this closes the parts of the kernel that breaks of walls were made of: new namespaces
and mounts, other processes' memory, keys, eBPF, io_uring, modules. It also closes what passes by the wall and
the limits: sockets of families without namespaces (``AF_VSOCK`` reaches the host of a virtual machine), and
memory that no process's count holds. Refused calls fail with EPERM, sockets with EAFNOSUPPORT, ``clone3``
with ENOSYS, for its flags cannot be seen and C libraries then use ``clone``.

Source: Linux, ``include/uapi/linux/{seccomp,filter,audit,sched}.h``, ``include/linux/socket.h``, and the
system call tables of x86-64 and arm64.
"""

import errno
import platform
import struct

__all__ = ["seccomp_filter"]

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""Audit number, and column in the table below."""

_REFUSED: dict[str, tuple[int, int]] = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467),
    "listmount": (458, 458),
    "statmount": (457, 457),
    "fanotify_init": (300, 262),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "acct": (163, 89),
    "syslog": (103, 116),
    "lookup_dcookie": (212, 18),
    "move_pages": (279, 239),
    "process_madvise": (440, 440),
    "unshare": (272, 97),
    "setns": (308, 268),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
}
_CLONE = (56, 220)
_CLONE3 = (435, 435)
_NEW_NAMESPACES = 0x7E020000
_PRCTL = (157, 167)
_SET_DUMPABLE = 4
"""``PR_SET_DUMPABLE``: a program could hide from us what it holds open."""
_SOCKET = (41, 198)
_FAMILIES = (1, 2, 10, 16)
"""AF_UNIX, AF_INET, AF_INET6, AF_NETLINK: what a network namespace confines."""
_X32 = 0x40000000
"""System calls of the x32 ABI have this bit."""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def seccomp_filter(machine: str | None = None) -> bytes | None:
    """The filter as classic BPF; None for machines whose system calls are not listed here.

    Args:
        machine: As ``platform.machine`` says it; by default this one.
    """
    known = _ARCHITECTURES.get(machine or platform.machine())
    if known is None:
        return None
    architecture, column = known
    refuse = _instruction(_RETURN, _ERRNO | errno.EPERM)
    program = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_EQUAL, architecture, then=1),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER),
        _instruction(_AT_LEAST, _X32, otherwise=1),
        refuse,
    ]
    for numbers in _REFUSED.values():
        program += [_instruction(_EQUAL, numbers[column], otherwise=1), refuse]
    program += _only_families(_SOCKET[column])
    program += [
        _instruction(_EQUAL, _PRCTL[column], otherwise=4),
        _instruction(_LOAD, _FIRST_ARGUMENT),
        _instruction(_EQUAL, _SET_DUMPABLE, otherwise=1),
        refuse,
        _instruction(_RETURN, _ALLOW),
        _instruction(_EQUAL, _CLONE3[column], otherwise=1),
        _instruction(_RETURN, _ERRNO | errno.ENOSYS),
        _instruction(_EQUAL, _CLONE[column], otherwise=3),
        _instruction(_LOAD, _FIRST_ARGUMENT),
        _instruction(_ANY_BIT, _NEW_NAMESPACES, otherwise=1),
        refuse,
        _instruction(_RETURN, _ALLOW),
    ]
    return b"".join(program)


def _only_families(number: int) -> list[bytes]:
    """Let ``socket`` pass for the families listed, and other calls go on."""
    program = [
        _instruction(_EQUAL, number, otherwise=len(_FAMILIES) + 3),
        _instruction(_LOAD, _FIRST_ARGUMENT),
    ]
    for left, family in zip(range(len(_FAMILIES), 0, -1), _FAMILIES, strict=True):
        program.append(_instruction(_EQUAL, family, then=left))
    return [
        *program,
        _instruction(_RETURN, _ERRNO | errno.EAFNOSUPPORT),
        _instruction(_RETURN, _ALLOW),
    ]


def _instruction(code: int, value: int, *, then: int = 0, otherwise: int = 0) -> bytes:
    """One ``sock_filter``; jumps count instructions that are skipped."""
    return struct.pack("=HBBI", code, then, otherwise, value)
