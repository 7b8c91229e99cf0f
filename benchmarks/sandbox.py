"""Runs programs that a model wrote, confined by the kernel.

A program gets a process group, an empty working directory and an end-of-file as input. Limits hold for processor time,
memory and the size of files; a seccomp filter lets through only the system calls that computing needs, so it can neither
open a file for writing, nor make a process, nor reach the network, nor send a signal, nor change an attribute of any file.
At the deadline the whole group is killed. What it can do: read files, use a processor until the deadline, start some hundred
threads, whose stacks use up its memory.

The verdict is a secret that the runner prints once the program has come to its end, so no way of exiting early passes.
Confinement needs Linux on x86-64 or ARM64; elsewhere nothing is run.
"""
from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Iterable, Sequence

class NotConfined(RuntimeError):
    """Programs cannot be confined on this machine, so none is run."""


SECONDS = 3             # of processor time per program; HumanEval's own checker means wall clock, which a busy machine distorts
DEADLINE = 6.0          # seconds of wall clock, for programs that wait
MEMORY = 4 * 2**30      # bytes of address space
FILE_SIZE = 2**20       # bytes that may be written to the one file it holds, its output

# Runs inside the new process. Program and secret come through standard input, which is then at its end.
RUNNER = r'''
import ctypes, json, os, platform, resource, struct, sys

CALLS = {  # name -> number on x86-64, on ARM64 (-1: none); a filtered argument: index, mask, wanted value
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226),
    "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "pread64": (17, 67), "readv": (19, 65), "access": (21, -1), "select": (23, -1), "sched_yield": (24, 124),
    "mremap": (25, 216), "mincore": (27, 232), "madvise": (28, 233), "dup": (32, 23), "nanosleep": (35, 101), "getpid": (39, 172),
    "setitimer": (38, 103), "exit": (60, 93), "uname": (63, 160), "getcwd": (79, 17), "readlink": (89, -1),
    "gettimeofday": (96, 169), "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174),
    "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177), "getppid": (110, 173), "sigaltstack": (131, 132),
    "arch_prctl": (158, -1), "gettid": (186, 178), "time": (201, -1), "futex": (202, 98), "sched_getaffinity": (204, 123),
    "getdents64": (217, 61), "set_tid_address": (218, 96), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "set_robust_list": (273, 99), "newfstatat": (262, 79), "readlinkat": (267, 78),
    "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73), "poll": (7, -1), "stat": (4, -1), "lstat": (6, -1),
    "getrandom": (318, 278), "membarrier": (324, 283), "statx": (332, 291), "rseq": (334, 293), "faccessat2": (439, 439),
    "open": (2, -1, 1, 0o1103, 0), "openat": (257, 56, 2, 0o1103, 0),   # no writing, creating, truncating
    "clone": (56, 220, 0, 0x10000, 0x10000),                             # a thread, never a process
    "ioctl": (16, 29, 1, 0xffffffff, 0x5401),                            # isatty
    "fcntl": (72, 25, 1, 8, 0),                                          # not F_SETOWN and F_SETSIG, which end in signals
}
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

def instruction(code, yes, no, value):
    return struct.pack("HBBI", code, yes, no, value)

def load(offset):
    return instruction(0x20, 0, 0, offset)

def give(action):
    return instruction(0x06, 0, 0, action)

ALLOW, KILL, REFUSE, UNKNOWN = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026  # EPERM; ENOSYS makes glibc fall back to what is filtered

def confine(memory, file_size, seconds):
    column, machine = ARCHITECTURES[platform.machine()]
    limits = {"CPU": seconds, "AS": memory, "FSIZE": file_size, "NOFILE": 64, "CORE": 0}  # NPROC would count all that its user runs
    for name, limit in limits.items():
        kind = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))
    code = load(4) + instruction(0x15, 1, 0, machine) + give(KILL) + load(0)
    code += instruction(0x35, 0, 1, 0x40000000) + give(KILL)  # x32 has numbers of its own
    for number in (435, 437):  # clone3 and openat2 hide their flags behind a pointer
        code += instruction(0x15, 0, 1, number) + give(UNKNOWN)
    for entry in CALLS.values():
        number, argument = entry[column], entry[2:]
        if number < 0:
            continue
        if not argument:
            code += instruction(0x15, 0, 1, number) + give(ALLOW)
            continue
        index, mask, wanted = argument
        code += instruction(0x15, 0, 5, number) + load(16 + 8 * index) + instruction(0x54, 0, 0, mask)
        code += instruction(0x15, 0, 1, wanted) + give(ALLOW) + give(REFUSE)
    code += give(REFUSE)

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]
    libc = ctypes.CDLL(None, use_errno=True)
    program = Program(len(code) // 8, code)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "no seccomp filter")

class Silence:
    def write(self, text): return len(text)
    def flush(self): pass
    def isatty(self): return False

def run():
    task = json.load(sys.stdin)
    verdict = task.pop("secret").encode()
    program = task.pop("program")
    confine(**task)
    os.write(1, b"confined ")
    sys.stdout = sys.stderr = Silence()
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    os.write(1, verdict)

try:
    run()
except BaseException:
    pass
os._exit(0)
'''


def passes(program: str) -> bool:
    """Run a program; True if it comes to its end in time and without raising. NotConfined if that takes more than this machine has."""
    secret = secrets.token_hex(16)
    task = json.dumps({"program": program, "secret": secret, "memory": MEMORY, "file_size": FILE_SIZE, "seconds": SECONDS})
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        process = subprocess.Popen([sys.executable, "-I", "-c", RUNNER], stdin=subprocess.PIPE, stdout=output, stderr=output, cwd=folder,
                                   env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}, start_new_session=True, text=True)
        try:
            process.communicate(task, timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            pass
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        output.seek(0)
        said = output.read()
    if not said.startswith(b"confined "):
        raise NotConfined("programs cannot be confined on this machine: it takes Linux on x86-64 or ARM64 with seccomp")
    return said.endswith(secret.encode())


def check_all(programs: Sequence[str], progress: Callable[[Iterable[bool]], Iterable[bool]] = iter) -> list[bool]:
    """Run programs, as many at a time as there are processor cores; `progress` may wrap the verdicts as they come."""
    if programs:
        passes("")  # whether confinement works at all is found out once, before threads run
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(progress(pool.map(passes, programs)))
