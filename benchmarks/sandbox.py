"""Runs programs that a model wrote, confined by the kernel.

A program gets a process group, an empty working directory and an end-of-file as input. Limits hold
for processor time, memory and the size of files; a seccomp filter (confined.py) lets through only
the system calls that computing needs, so it can neither open a file for writing, nor make a
process, nor reach the network, nor send a signal, nor change an attribute of any file. At the
deadline the whole group is killed. What it can do: read files, use a processor until the deadline,
start some hundred threads, whose stacks use up its memory.

The verdict is a secret that confined.py prints once the program has come to its end, so no way of
exiting early passes. Confinement needs Linux on x86-64 or ARM64; elsewhere nothing is run.
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
from pathlib import Path
from typing import Callable, Iterable, Sequence

SECONDS = 3             # of processor time per program: wall clock, as HumanEval's own checker has
                        # it, is distorted by a busy machine
DEADLINE = 6.0          # seconds of wall clock, for programs that wait
MEMORY = 4 * 2**30      # bytes of address space
FILE_SIZE = 2**20       # bytes that may be written to the one file it holds, its output

CONFINED = Path(__file__).with_name("confined.py")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class NotConfined(RuntimeError):
    """Programs cannot be confined on this machine, so none is run."""


def passes(program: str) -> bool:
    """Run a program; True if it comes to its end in time and without raising.

    NotConfined if confining it takes more than this machine has.
    """
    secret = secrets.token_hex(16)
    task = {
        "program": program, "secret": secret,
        "memory": MEMORY, "file_size": FILE_SIZE, "seconds": SECONDS,
    }
    # The output goes to a file: a program that prints without end runs into the limit on its size,
    # where a pipe would have to be read, and kept, by us.
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-I", str(CONFINED)],
            stdin=subprocess.PIPE, stdout=output, stderr=output,
            cwd=folder, env=ONE_THREAD, start_new_session=True, text=True,
        )
        try:
            process.communicate(json.dumps(task), timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            pass
        finally:
            kill_group(process)
        output.seek(0)
        said = output.read()
    if not said.startswith(b"confined "):
        raise NotConfined(
            "programs cannot be confined on this machine: "
            "it takes Linux on x86-64 or ARM64 with seccomp"
        )
    return said.endswith(secret.encode())


def kill_group(process: subprocess.Popen) -> None:
    """Kill a process with all that it has started, and wait for its end."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # nothing is left of it
        pass
    process.wait()


def check_all(
    programs: Sequence[str], progress: Callable[[Iterable[bool]], Iterable[bool]] = iter
) -> list[bool]:
    """Run programs, as many at once as there are cores; `progress` may wrap the verdicts."""
    if programs:
        passes("")  # whether confinement works at all is found out once, before threads run
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(progress(pool.map(passes, programs)))
