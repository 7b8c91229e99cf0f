"""Runs programs that a model wrote, confined by the kernel, and tells which pass their tests.

Two processes check a program (checking.py). One holds it, the other its tests, and the verdict is
how the second one ends: no code of the program ever runs there, and nothing of it gets there but
plain data, the values that its functions return. Whatever a program does is one program that fails.

Both get a process group and an empty working directory. Limits hold for processor time, memory and
the size of files; a seccomp filter (confined.py) lets through only the system calls that computing
needs, so they can neither open a file for writing, nor make a process, nor reach the network, nor
send a signal, nor change an attribute of any file. At the deadline the whole groups are killed. A
program of root's runs as nobody; one of another user's cannot look into this process.

What it does not keep a program from: reading what its user may read, task files with their answers
and this user's other processes included; using a processor until the deadline; starting some
hundred threads, whose stacks use up its memory; passing, where tests have gaps, without being
right. What differs from running both in one process: a test does not see what a program does to
the list it is given, and an object of a class of its own is compared by what it is alone.

Confinement needs Linux on x86-64 or ARM64; elsewhere nothing is run.
"""
from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple, Sequence

from benchmarks.checking import NOT_CONFINED, PASSED
from benchmarks.confined import hide

SECONDS = 3             # of processor time per program: wall clock, as HumanEval's own checker has
                        # it, is distorted by a busy machine
DEADLINE = 6.0          # seconds of wall clock, for programs that wait
MEMORY = 4 * 2**30      # bytes of address space
FILE_SIZE = 2**20       # bytes that may be written to a file

CHECKING = Path(__file__).with_name("checking.py")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class NotConfined(RuntimeError):
    """Programs cannot be confined on this machine, so none is run."""


class Program(NamedTuple):
    """What a model wrote, after the opening it was given, and what it has to pass."""
    text: str
    checks: str = ""                # raise unless it is right
    opening: str = ""               # helpers that it was given; the checks have their own copy
    asked: tuple[str, ...] = ()     # names that it defines, even where Python has such a one


def passes(program: Program) -> bool:
    """Run a program; True if it comes to its end, and all of its checks do, in time."""
    limits = {"memory": MEMORY, "file_size": FILE_SIZE, "seconds": SECONDS}
    code = {"program": f"{program.opening}{program.text}\n", "limits": limits}
    test = {"checks": program.checks, "opening": program.opening, "asked": program.asked}
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)     # nobody may look into it, too
        ours, theirs = socket.socketpair()
        with ours, theirs:
            processes = [
                start("tests", {**test, "limits": limits}, ours, folder),
                start("program", code, theirs, folder),
            ]
        try:
            verdict = processes[0].wait(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            return False
        finally:
            for process in processes:
                kill_group(process)
    if verdict == NOT_CONFINED:
        raise NotConfined(
            "programs cannot be confined on this machine: "
            "it takes Linux on x86-64 or ARM64 with seccomp"
        )
    return verdict == PASSED


def start(role: str, task: dict[str, Any], channel: socket.socket, folder: str) -> subprocess.Popen:
    """Start one of the two processes; its task is a file, so that nobody waits for its reader."""
    with tempfile.TemporaryFile("w+") as file:
        json.dump(task, file)
        file.seek(0)
        return subprocess.Popen(
            [sys.executable, "-I", str(CHECKING), role, str(channel.fileno())],
            stdin=file, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            cwd=folder, env=ONE_THREAD, start_new_session=True, pass_fds=[channel.fileno()],
        )


def kill_group(process: subprocess.Popen) -> None:
    """Kill a process with all that it has started, and wait for its end."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # nothing is left of it
        pass
    process.wait()


def require_confinement() -> None:
    """Raise NotConfined unless a program that does nothing wrong passes; hide this process."""
    # decimal is in a file of its own: nobody must be able to read Python's
    if not passes(Program("import decimal\ndef answer(): return decimal.Decimal(1) == 1",
                          "assert answer() is True")):
        raise NotConfined(
            "no program passes on this machine, not even a right one: can the user 65534 (nobody), "
            f"as whom root runs them, read Python in {sys.base_prefix}?"
        )
    if os.geteuid():
        hide()


def check_all(
    programs: Sequence[Program], progress: Callable[[Iterable[bool]], Iterable[bool]] = iter
) -> list[bool]:
    """Run programs, as many at once as there are cores; `progress` may wrap the verdicts."""
    if programs:
        require_confinement()  # found out once, before threads run
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(progress(pool.map(passes, programs)))
