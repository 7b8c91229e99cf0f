"""The program that runs another one, confined; sandbox.py starts it in a process of its own.

What to run, its limits and the secret come through standard input, which is then at its end. It
prints "confined " once the kernel's filter is in place, and the secret once the program has come to
its end. It uses the standard library alone and nothing of this project: `python -I` finds neither.
"""
from __future__ import annotations

import ctypes
import json
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


class Program(ctypes.Structure):
    """The kernel's struct sock_fprog."""
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


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

    libc = ctypes.CDLL(None, use_errno=True)
    # Without the first, the second takes root: a filter could mislead programs of another user.
    no_new_privileges, set_seccomp, mode_filter = 38, 22, 2
    program = Program(len(code) // 8, code)
    if (libc.prctl(no_new_privileges, 1, 0, 0, 0)
            or libc.prctl(set_seccomp, mode_filter, ctypes.byref(program), 0, 0)):
        raise OSError(ctypes.get_errno(), "no seccomp filter")


class Silence:
    """Takes what the program prints: nobody reads it, and much would exceed the limit on files."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


def run() -> None:
    """Read a task, confine this process, run the program, and if it comes to its end say so."""
    task = json.load(sys.stdin)
    confine(task["memory"], task["file_size"], task["seconds"])
    os.write(1, b"confined ")
    sys.stdout = sys.stderr = Silence()
    exec(compile(task["program"], "program", "exec"), {"__name__": "__main__"})
    os.write(1, task["secret"].encode())


if __name__ == "__main__":
    try:
        run()
    except BaseException:  # whatever it raises, SystemExit too: it did not come to its end
        pass
    os._exit(0)  # at once: no handler that the program has registered runs
