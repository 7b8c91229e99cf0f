"""Programs that a model wrote: right ones pass, hostile ones fail, and nothing is harmed."""
import gzip
import json
import os
import time
from pathlib import Path

import pytest

from benchmarks import sandbox
from benchmarks.metrics import pass_at_k
from benchmarks.tasks import TASKS

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not (SHARED / "eval" / "humaneval").is_dir(),
    reason="needs ../shared/data, real benchmark files")

try:
    sandbox.passes("")
    confined = True
except sandbox.NotConfined:
    confined = False
pytestmark = pytest.mark.skipif(not confined, reason="needs Linux with seccomp")


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------------------------
# What passes

def programs(problems: list[dict], completions: list[str]) -> list[str]:
    items = [TASKS["humaneval"].read({"canonical_solution": "", **problem}) for problem in problems]
    return [
        f"{item.opening}{completion}\n{item.checks}"
        for item, completion in zip(items, completions, strict=True)
    ]


@needs_shared
def test_official_solutions_pass(monkeypatch):
    # One of MBPP's takes nearly the three seconds of processor time: more on a busy machine.
    monkeypatch.setattr(sandbox, "SECONDS", 20)
    monkeypatch.setattr(sandbox, "DEADLINE", 60.0)
    with gzip.open(SHARED / "eval" / "humaneval" / "HumanEval.jsonl.gz", "rt") as file:
        problems = [json.loads(line) for line in file]
    solutions = [problem["canonical_solution"] for problem in problems]
    assert sum(sandbox.check_all(programs(problems, solutions))) == len(problems) == 110

    rows = read_jsonl(SHARED / "eval" / "mbpp" / "mbpp.jsonl")
    assert all(sandbox.check_all([
        "\n".join([row["code"], row["test_setup_code"], *row["test_list"]]) for row in rows
    ]))


@needs_shared
def test_the_official_smoke_file_scores_one_half():
    folder = SHARED / "eval" / "humaneval"
    samples = [sample["completion"] for sample in read_jsonl(folder / "example_samples.jsonl")]
    right = sandbox.check_all(programs(read_jsonl(folder / "example_problem.jsonl") * 6, samples))
    assert pass_at_k(len(samples), sum(right), 1) == 0.5


def test_harmless_programs_pass(tmp_path):
    (tmp_path / "file").write_text("text")
    path = str(tmp_path / "file")
    assert all(sandbox.check_all([
        "",
        "print('x' * 10**6)",
        "import os; assert os.listdir('.') == []",
        "assert __name__ == '__main__'",
        "import time; time.sleep(0.1)",
        "import math, re, heapq, hashlib, random, datetime, collections, itertools, decimal",
        "import typing",
        "import threading; thread = threading.Thread(target=print); thread.start(); thread.join()",
        f"assert open({path!r}).read() == 'text'",
        f"import os; assert os.read(os.open({path!r}, os.O_RDONLY), 9) == b'text'",
    ]))


# ---------------------------------------------------------------------------------------------
# What does not

HOSTILE = [
    # it ends before its end
    "assert False",
    "1 +",
    "import sys; sys.exit(0)",
    "import os; os._exit(0)",
    # it reads the secret, which came through the input
    "input()",
    "import sys; sys.stdin.buffer.raw.read(1)[0]",
    # processes and signals
    "import os; os.fork()",
    "import subprocess; subprocess.run(['true'])",
    "import multiprocessing; multiprocessing.Pool(2)",
    "import os, sys; os.execv(sys.executable, ['python'])",
    "import ctypes\nif ctypes.CDLL(None).fork() < 0: raise OSError",
    "import os; os.kill(-1, 9)",
    "import os; os.kill(os.getppid(), 9)",
    # the network
    "import socket; socket.socket()",
    # files
    "open('inside', 'w')",
    "open(VICTIM, 'w')",
    "open(VICTIM, 'r+')",
    "import os; os.remove(VICTIM)",
    "import os; os.truncate(VICTIM, 0)",
    "import os; os.chmod(VICTIM, 0)",
    "import os; os.rename(VICTIM, 'x')",
    "import os; os.mkdir('x')",
    "import shutil; shutil.rmtree(FOLDER)",
    "import os; os.link(VICTIM, VICTIM + '2')",
    # more than its share
    "import threading, time\n"
    "while True: threading.Thread(target=time.sleep, args=(60,)).start()",
    "import os\nwhile True: os.write(1, b'x' * 10**6)",
    "x = bytearray(10**11)",
    "import resource; resource.setrlimit(resource.RLIMIT_CPU, (999, 999))",
]


def harms(program: str, folder: Path) -> bool:
    """Run a program that knows of a file; return whether it passes, or anything has changed."""
    victim = folder / "victim"
    victim.write_text("whole")
    mode = victim.stat().st_mode
    names = f"FOLDER, VICTIM = {str(folder)!r}, {str(victim)!r}"
    if sandbox.passes(f"{names}\n{program}"):
        return True
    return (
        os.listdir(folder) != ["victim"]
        or victim.read_text() != "whole"
        or victim.stat().st_mode != mode
    )


@pytest.mark.parametrize("program", HOSTILE)
def test_a_hostile_program_fails_and_harms_nothing(program, tmp_path):
    assert not harms(program, tmp_path)


@pytest.mark.parametrize("flags", ["O_TRUNC", "O_CREAT", "O_CREAT | O_EXCL", "O_CREAT | O_TRUNC"])
def test_reading_neither_empties_nor_creates_a_file(flags, tmp_path):
    """With O_RDONLY the kernel truncates and creates all the same."""
    flags = " | ".join(f"os.{name}" for name in ["O_RDONLY", *flags.split(" | ")])
    for path in ("VICTIM", "VICTIM + '2'"):
        assert not harms(f"import os\nos.open({path}, {flags})", tmp_path)


# open and creat are calls of their own on x86-64, which no function of Python's uses; openat2 takes
# its flags from memory. Linux numbers them 2, 85 and 437; 0o1000 is O_TRUNC, 0o100 O_CREAT.
@pytest.mark.parametrize("call", [
    "2, path, 0o1000", "2, path, 0o100, 0o600", "85, path, 0o600",
    "437, -100, path, struct.pack('QQQ', 0o1000, 0, 0), 24",
    "437, -100, path, struct.pack('QQQ', 0o100, 0o600, 0), 24",
])
def test_no_other_call_opens_files_for_more_than_reading(call, tmp_path):
    for path in ("VICTIM", "VICTIM + '2'"):
        program = (
            "import ctypes, struct\n"
            f"path = ({path}).encode()\n"
            f"if ctypes.CDLL(None).syscall({call}) < 0: raise OSError"
        )
        assert not harms(program, tmp_path)


def test_sleepers_and_spinners_are_killed_at_the_deadline():
    began = time.perf_counter()
    verdicts = sandbox.check_all(["import time; time.sleep(60)", "while True: pass"])
    assert verdicts == [False, False]
    assert time.perf_counter() - began < 2 * sandbox.DEADLINE
