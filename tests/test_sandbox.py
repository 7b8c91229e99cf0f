"""Programs that a model wrote: right ones pass, hostile ones fail, and nothing is harmed."""
import gzip
import json
import os
import tempfile
import time
from pathlib import Path

import pytest

from benchmarks import sandbox
from benchmarks.metrics import pass_at_k
from benchmarks.sandbox import Program
from benchmarks.tasks import TASKS

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not (SHARED / "eval" / "humaneval").is_dir(),
    reason="needs ../shared/data, real benchmark files")

try:
    sandbox.require_confinement()
    confined = True
except sandbox.NotConfined:
    confined = False
pytestmark = pytest.mark.skipif(not confined, reason="needs Linux with seccomp")


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------------------------
# What passes

def programs(problems: list[dict], completions: list[str]) -> list[Program]:
    items = [TASKS["humaneval"].read({"canonical_solution": "", **problem}) for problem in problems]
    return [
        Program(completion, item.checks, item.opening, item.asked)
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

    rows = [{**row, "task_id": 11} for row in read_jsonl(SHARED / "eval" / "mbpp" / "mbpp.jsonl")]
    items = [TASKS["mbpp"].read(row) for row in rows]
    assert all(sandbox.check_all([
        Program(row["code"], item.checks, asked=item.asked) for row, item in zip(rows, items)
    ]))


@needs_shared
def test_the_official_smoke_file_scores_one_half():
    folder = SHARED / "eval" / "humaneval"
    samples = [sample["completion"] for sample in read_jsonl(folder / "example_samples.jsonl")]
    right = sandbox.check_all(programs(read_jsonl(folder / "example_problem.jsonl") * 6, samples))
    assert pass_at_k(len(samples), sum(right), 1) == 0.5


def test_harmless_programs_pass():
    file = tempfile.NamedTemporaryFile("w")
    file.write("text")
    file.flush()
    path = file.name
    os.chmod(path, 0o644)  # pytest's own folders are closed to nobody
    assert all(sandbox.check_all([Program(text) for text in [
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
    ]]))


VALUES = [
    "[1, (2, 3.5), {'a': None}]", "{1, frozenset({2})}", "10**5000", "-1", "1j", "b'\\0'", "True",
    "float('inf')", "'\\ud800 \\n'", "{(1, 2): [True]}", "int",
]


@pytest.mark.parametrize("program, checks", [
    # plain data of every kind goes there and back
    *[("def same(x): return x", f"x = {value}\ny = same(x)\nassert y == x and type(y) is type(x)")
      for value in VALUES],
    ("def f(*xs, **named): return xs, named", "assert f(1, a=2) == ((1,), {'a': 2})"),
    ("def f(n): yield from range(n)", "assert list(f(3)) == [0, 1, 2]"),
    ("import collections\ndef f(s): return collections.Counter(s)",
     "assert f('aab') == dict(a=2, b=1)"),
    ("import numpy\ndef f(x): return numpy.int64(x), numpy.bool_(True)",
     "assert f(3) == (3, True)"),
    # an object stays where it is, and is used from here
    ("class Node:\n def __init__(self, v): self.v = v\ndef f(n): return n.next.v",
     "n = Node(1)\nn.next = Node(2)\nassert f(n) == 2 and n.v == 1"),
    # errors come through; the standard library is the tests' own; Python's names can be asked for
    ("def f(): raise KeyError", "try: f()\nexcept KeyError: pass\nelse: assert False"),
    ("import math\nmath.isclose = None\ndef f(): return 0.3", "assert math.isclose(f(), 0.3)"),
    ("def sum(a, b): return 6", "assert sum(10, 15) == 6"),
])
def test_tests_in_another_process_see_the_values_of_the_program(program, checks):
    assert sandbox.passes(Program(program, checks, asked=("sum",)))


def test_checks_have_the_helpers_of_the_question_not_the_programs():
    opening = "def double(x): return 2 * x\n\ndef add(a, b):\n"
    checks = "assert double(add(2, 3)) == 10"
    for text, verdict in [
        ("    return a + b", True),
        ("    return 0\n\ndef double(x): return 10", False),
    ]:
        program = Program(text, checks, opening + '    """Add."""\n', ("add",))
        assert sandbox.passes(program) == verdict


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


@pytest.fixture
def folder():
    """A folder that whoever runs the programs may do anything to."""
    with tempfile.TemporaryDirectory() as name:
        yield given_away(Path(name))


def given_away(path: Path) -> Path:
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
    return path


def harms(program: str, folder: Path) -> bool:
    """Run a program that knows of a file; return whether it passes, or anything has changed."""
    victim = folder / "victim"
    victim.write_text("whole")
    given_away(victim)
    mode = victim.stat().st_mode
    names = f"FOLDER, VICTIM = {str(folder)!r}, {str(victim)!r}"
    if sandbox.passes(Program(f"{names}\n{program}")):
        return True
    return (
        os.listdir(folder) != ["victim"]
        or victim.read_text() != "whole"
        or victim.stat().st_mode != mode
    )


@pytest.mark.parametrize("program", HOSTILE)
def test_a_hostile_program_fails_and_harms_nothing(program, folder, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    assert not harms(program, folder)


WRONG = "def add(a, b): return 0\n"
DESCRIPTORS = "[int(name) for name in os.listdir('/proc/self/fd')]"
# Programs that would be told right without being right: `add(2, 3)` is never 5 in any of them.
FORGERS = {
    "the_end_of_the_process": "import os\ndef add(a, b): os._exit(0)",
    "the_code_of_a_pass": "import os\nos._exit(10)",
    "exit_beside_python": "import ctypes\ndef add(a, b): ctypes.CDLL(None)._exit(10)",
    "system_exit": "def add(a, b): raise SystemExit(0)",
    "locals_of_every_frame": WRONG + """
import ctypes, sys
frame = sys._getframe()
while frame := frame.f_back:
    for name in list(frame.f_locals):
        frame.f_locals[name] = 'PASSED'
        ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))""",
    "globals_of_every_frame": WRONG + """
import sys
frame = sys._getframe()
while frame := frame.f_back:
    for name in list(frame.f_globals):
        if name.isupper(): frame.f_globals[name] = 10""",
    "the_memory_of_this_process": WRONG + """
import gc
for found in gc.get_objects():
    if isinstance(found, dict) and 'checks' in found: found['checks'] = ''
    if isinstance(found, list) and 'assert' in str(found): found.clear()""",
    "output_written_over": WRONG + """
import os
for descriptor in (0, 1, 2):
    try: os.lseek(descriptor, 0, 0); os.write(descriptor, b'confined ' * 9)
    except OSError: pass""",
    "every_descriptor_closed": "import os\ndef add(a, b): os.closerange(0, 64)",
    "every_descriptor_written_to": WRONG + f"""
import os
for descriptor in {DESCRIPTORS}:
    try: os.write(descriptor, b'10 passed true secret')
    except OSError: pass""",
    "an_endless_message": "import os\ndef add(a, b):\n  while True: os.write(3, b'[' * 10**6)",
    "messages_without_end": WRONG + """
import os, threading
def flood():
    while True: os.write(3, b'["returned", null]\\n' * 1000)
threading.Thread(target=flood, daemon=True).start()""",
    "a_message_nested_deep":
        "def add(a, b):\n  x = []\n  for _ in range(900): x = [x]\n  return x",
    "another_error_than_there_is": WRONG + """import os\ndef add(a, b):
  os.write(3, b'["raised", "KeyboardInterrupt"]\\n')""",
    "a_value_equal_to_all": """
class Equal:
    def __eq__(self, other): return True
    def __bool__(self): return True
    __hash__ = object.__hash__
def add(a, b): return Equal()""",
    "a_number_equal_to_all": """
class Equal(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def add(a, b): return Equal(0)""",
    "a_class_of_truths": "class add:\n  def __new__(cls, a, b): return cls\n  __eq__ = print",
    "builtins_replaced": WRONG + """
import builtins, json, operator
builtins.AssertionError = type('Fine', (BaseException,), {})
builtins.__build_class__ = builtins.compile = builtins.exec = lambda *a, **k: None
json.loads = lambda *a, **k: [0, [], {}]
operator.eq = lambda a, b: True""",
    "trace_and_hooks": WRONG + """
import atexit, os, sys
sys.settrace(lambda *a: os._exit(10)); sys.setprofile(lambda *a: os._exit(10))
sys.excepthook = lambda *a: os._exit(10); atexit.register(os._exit, 10)""",
    "signals": WRONG + """
import os, signal
for number in range(1, 32):
    try: signal.signal(number, lambda *a: os._exit(10))
    except (OSError, ValueError): pass
signal.setitimer(signal.ITIMER_REAL, 0.01)""",
    "modules_replaced": WRONG + """
import sys
for name in list(sys.modules): sys.modules[name] = sys.modules['builtins']""",
    "stack_overflow": "import sys\nsys.setrecursionlimit(10**9)\ndef add(a, b): return add(a, b)",
    "a_loop_ended_early": "def add(a, b): raise StopIteration",
    "an_iterator_without_end": "import itertools\ndef add(a, b): return itertools.repeat(5)",
    "a_child": "import os\ndef add(a, b): return 5 if os.fork() else 0",
    "another_program":
        "import subprocess\ndef add(a, b): return subprocess.call(['true']) + 5",
}
CHECKS = "assert all(map(lambda x: add(x, 3) == 5, [2]))"


@pytest.mark.parametrize("name", FORGERS)
def test_no_program_forges_a_pass(name, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    assert not sandbox.passes(Program(FORGERS[name], CHECKS))


def test_what_one_program_does_is_one_program_that_fails(monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    right = "def add(a, b): return a + b"
    texts = [text for name in sorted(FORGERS)[:6] for text in (FORGERS[name], right)]
    assert sandbox.check_all([Program(text, CHECKS) for text in texts]) == 6 * [False, True]


def test_a_program_cannot_look_into_this_process_or_its_tests(monkeypatch):
    """What would tell it the answers, and what this process keeps in its environment."""
    program = """
import os
def seen():
    found = []
    for name in filter(str.isdigit, os.listdir('/proc')):
        for file in ('mem', 'environ', 'maps', 'fd/0'):
            try: open(f'/proc/{name}/{file}', 'rb').close()
            except OSError: continue
            found += [int(name)]
    return set(found) - {os.getpid()}"""
    mine = f"{os.getpid()}, {os.getpid()}"
    assert sandbox.passes(Program(program, f"assert not seen() & {{os.getpid(), {mine}}}"))


@pytest.mark.skipif(os.geteuid() != 0, reason="tells what root gives up")
def test_root_runs_programs_as_nobody():
    program = "import os\ndef who(): return os.getuid(), os.geteuid(), os.getgid(), os.getegid()"
    assert sandbox.passes(Program(program, f"assert who() == {(65534,) * 4}"))
    assert not sandbox.passes(Program("open('/etc/shadow')"))


@pytest.mark.parametrize("flags", ["O_TRUNC", "O_CREAT", "O_CREAT | O_EXCL", "O_CREAT | O_TRUNC"])
def test_reading_neither_empties_nor_creates_a_file(flags, folder):
    """With O_RDONLY the kernel truncates and creates all the same."""
    flags = " | ".join(f"os.{name}" for name in ["O_RDONLY", *flags.split(" | ")])
    for path in ("VICTIM", "VICTIM + '2'"):
        assert not harms(f"import os\nos.open({path}, {flags})", folder)


# open and creat are calls of their own on x86-64, which no function of Python's uses; openat2 takes
# its flags from memory. Linux numbers them 2, 85 and 437; 0o1000 is O_TRUNC, 0o100 O_CREAT.
@pytest.mark.parametrize("call", [
    "2, path, 0o1000", "2, path, 0o100, 0o600", "85, path, 0o600",
    "437, -100, path, struct.pack('QQQ', 0o1000, 0, 0), 24",
    "437, -100, path, struct.pack('QQQ', 0o100, 0o600, 0), 24",
])
def test_no_other_call_opens_files_for_more_than_reading(call, folder):
    for path in ("VICTIM", "VICTIM + '2'"):
        program = (
            "import ctypes, struct\n"
            f"path = ({path}).encode()\n"
            f"if ctypes.CDLL(None).syscall({call}) < 0: raise OSError"
        )
        assert not harms(program, folder)


def test_sleepers_and_spinners_are_killed_at_the_deadline():
    began = time.perf_counter()
    verdicts = sandbox.check_all(list(map(Program, ["import time; time.sleep(60)",
                                                    "while True: pass"])))
    assert verdicts == [False, False]
    assert time.perf_counter() - began < 2 * sandbox.DEADLINE
