"""Confines a process for good: limits, a filter of system calls, and no more root.

checking.py, a process of its own, puts it on itself before it runs anything. It uses the standard
library alone and nothing of this project: `python -I` finds neither.
"""
from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys
from typing import NamedTuple

# ---------------------------------------------------------------------------------------------
# What is let through


class Call(NamedTuple):
    """A system call. Let through if (argument & mask) == wanted; without an argument, always."""
    x86_64: int                         # its number there
    aarch64: int                        # and on ARM64; -1: there is none
    argument: int | None = None         # index of the one that is looked at
    mask: int = 0
    wanted: int = 0


# O_WRONLY | O_RDWR, O_CREAT and O_TRUNC: with O_RDONLY alone a file can still be created, or
# emptied.
CHANGES_FILES = 0o3 | 0o100 | 0o1000
CLONE_THREAD = 0x10000
TCGETS = 0x5401                         # what isatty asks
OWN_SIGNALS = 8                         # bit of F_SETOWN and F_SETSIG, which end in signals

CALLS = {
    "read": Call(0, 63), "write": Call(1, 64), "close": Call(3, 57), "lseek": Call(8, 62),
    "pread64": Call(17, 67), "readv": Call(19, 65), "dup": Call(32, 23),
    "getdents64": Call(217, 61),
    "stat": Call(4, -1), "fstat": Call(5, 80), "lstat": Call(6, -1), "newfstatat": Call(262, 79),
    "statx": Call(332, 291), "access": Call(21, -1), "faccessat": Call(269, 48),
    "faccessat2": Call(439, 439), "readlink": Call(89, -1), "readlinkat": Call(267, 78),
    "getcwd": Call(79, 17), "select": Call(23, -1), "pselect6": Call(270, 72), "poll": Call(7, -1),
    "ppoll": Call(271, 73),

    "mmap": Call(9, 222), "mprotect": Call(10, 226), "munmap": Call(11, 215), "brk": Call(12, 214),
    "mremap": Call(25, 216), "mincore": Call(27, 232), "madvise": Call(28, 233),

    "rt_sigaction": Call(13, 134), "rt_sigprocmask": Call(14, 135), "rt_sigreturn": Call(15, 139),
    "sigaltstack": Call(131, 132), "setitimer": Call(38, 103),

    "sched_yield": Call(24, 124), "sched_getaffinity": Call(204, 123), "futex": Call(202, 98),
    "set_tid_address": Call(218, 96), "set_robust_list": Call(273, 99),
    "membarrier": Call(324, 283), "rseq": Call(334, 293), "arch_prctl": Call(158, -1),
    "exit": Call(60, 93), "exit_group": Call(231, 94),

    "getpid": Call(39, 172), "gettid": Call(186, 178), "getppid": Call(110, 173),
    "getuid": Call(102, 174), "getgid": Call(104, 176), "geteuid": Call(107, 175),
    "getegid": Call(108, 177), "uname": Call(63, 160), "getrusage": Call(98, 165),
    "sysinfo": Call(99, 179), "times": Call(100, 153), "getrandom": Call(318, 278),
    "time": Call(201, -1), "gettimeofday": Call(96, 169), "clock_gettime": Call(228, 113),
    "clock_getres": Call(229, 114), "nanosleep": Call(35, 101), "clock_nanosleep": Call(230, 115),

    "open": Call(2, -1, argument=1, mask=CHANGES_FILES, wanted=0),
    "openat": Call(257, 56, argument=2, mask=CHANGES_FILES, wanted=0),
    # a thread, never a process
    "clone": Call(56, 220, argument=0, mask=CLONE_THREAD, wanted=CLONE_THREAD),
    "ioctl": Call(16, 29, argument=1, mask=0xFFFFFFFF, wanted=TCGETS),
    "fcntl": Call(72, 25, argument=1, mask=OWN_SIGNALS, wanted=0),
}
# These two hide their flags behind a pointer, where no filter can look.
CLONE3 = 435
OPENAT2 = 437
X32 = 0x40000000                        # bit of the numbers of x86-64's second set of calls
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}   # as the kernel names them

# ---------------------------------------------------------------------------------------------
# The filter, in the bytecode of the Berkeley packet filter: it reads struct seccomp_data and gives
# a verdict

NUMBER = 0                              # offsets in that struct
MACHINE = 4
ARGUMENTS = 16                          # eight bytes each, the low half first

ALLOW = 0x7FFF0000
KILL = 0x80000000
REFUSE = 0x00050001                     # EPERM
UNKNOWN = 0x00050026                    # ENOSYS: glibc falls back to clone and openat


def instruction(code: int, if_true: int, if_false: int, value: int) -> bytes:
    """Pack an instruction; the two jumps are counted in instructions to skip."""
    return struct.pack("HBBI", code, if_true, if_false, value)


def load(offset: int) -> bytes:
    return instruction(0x20, 0, 0, offset)


def bitwise_and(mask: int) -> bytes:
    return instruction(0x54, 0, 0, mask)


def equals(value: int, if_true: int, if_false: int) -> bytes:
    return instruction(0x15, if_true, if_false, value)


def at_least(value: int, if_true: int, if_false: int) -> bytes:
    return instruction(0x35, if_true, if_false, value)


def give(verdict: int) -> bytes:
    return instruction(0x06, 0, 0, verdict)


def filter_code(machine: str) -> bytes:
    """Return the filter for x86_64 or aarch64: what is not let through is refused."""
    # 1. only this machine's calls: the numbers of another set mean other things
    code = load(MACHINE) + equals(MACHINES[machine], 1, 0) + give(KILL)
    code += load(NUMBER)
    code += at_least(X32, 0, 1) + give(KILL)

    # 2. calls whose flags cannot be seen do not exist
    for number in (CLONE3, OPENAT2):
        code += equals(number, 0, 1) + give(UNKNOWN)

    # 3. what is let through, some calls by one of their arguments
    for call in CALLS.values():
        number = call.x86_64 if machine == "x86_64" else call.aarch64
        if number < 0:
            continue
        if call.argument is None:
            code += equals(number, 0, 1) + give(ALLOW)
            continue
        code += equals(number, 0, 5)    # to the next call: over the five instructions that follow
        code += load(ARGUMENTS + 8 * call.argument) + bitwise_and(call.mask)
        code += equals(call.wanted, 0, 1) + give(ALLOW) + give(REFUSE)

    # 4. and nothing else
    return code + give(REFUSE)


# ---------------------------------------------------------------------------------------------
# Put on this process

NOBODY = 65534                          # the user, and the group, that own nothing
LIBC = ctypes.CDLL(None, use_errno=True)
DUMPABLE, NO_NEW_PRIVILEGES, SECCOMP, MODE_FILTER = 4, 38, 22, 2    # as prctl numbers them


class Program(ctypes.Structure):
    """The kernel's struct sock_fprog."""
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def hide(hidden: bool = True) -> None:
    """Close this process's memory and environment to other processes of its user, or open them."""
    LIBC.prctl(DUMPABLE, int(not hidden), 0, 0, 0)


def give_up_root() -> None:
    """Become nobody, in no group; OSError if that is not allowed."""
    # Python's own folders may be closed to that user, below /root for instance: what is held open
    # stays within reach, and is now looked for there.
    held = {
        path: f"/proc/self/fd/{os.open(path, os.O_RDONLY)}"
        for path in sys.path if os.path.isdir(path)
    }
    for module in list(sys.modules.values()):
        for path in held:
            places = getattr(module, "__path__", ())
            if any(place.startswith(path + "/") for place in places):
                module.__path__ = [place.replace(path, held[path], 1) for place in places]
                break
    sys.path[:] = held.values()
    sys.path_importer_cache.clear()

    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    hide(False)                         # the change has hidden it, from itself too: /proc/self/fd


def confine(memory: int, file_size: int, seconds: int) -> None:
    """Put limits and filter on this process, for good; OSError if that cannot be done.

    memory, file_size: bytes.   seconds: of processor time.
    """
    code = filter_code(platform.machine())
    # No limit on processes: it would count all that this user runs, and there are none to limit.
    limits = {
        resource.RLIMIT_CPU: seconds, resource.RLIMIT_AS: memory, resource.RLIMIT_FSIZE: file_size,
        resource.RLIMIT_NOFILE: 64, resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        _soft, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:  # it can be lowered only
            limit = min(limit, hard)
        resource.setrlimit(kind, (limit, limit))

    # Without the first, the second takes root: a filter could mislead programs of another user.
    program = Program(len(code) // 8, code)
    if (LIBC.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
            or LIBC.prctl(SECCOMP, MODE_FILTER, ctypes.byref(program), 0, 0)):
        raise OSError(ctypes.get_errno(), "no seccomp filter")
