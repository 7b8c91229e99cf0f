"""Promises about the code itself: who imports whom, what is required, how long things are, what the README says (all documents: test_docs.py)."""

import ast
import re
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = (
    "text",
    "weights",
    "formats",
    "run",
    "evaluation",
    "benchmarks",
    "microcosm",
    "speed",
    "experiments",
)
FILES = {path.stem: path for path in ROOT.glob("*.py")}
FILES |= {f"{room}.{path.stem}": path for room in ROOMS for path in (ROOT / room).glob("*.py")}
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Imports point one way, from the top floor down; a room's name stands for all files in it.
FLOORS = (
    ("experiments", "speed"),
    ("train",),
    ("run",),
    ("eval",),
    ("benchmarks",),
    ("evaluation",),
    ("parallel",),
    ("ppo",),
    ("rollout", "reward", "sft"),
    ("data",),
    ("weights",),
    ("model", "text"),
    ("rotary", "logprobs", "sampling", "formats", "microcosm"),
)
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}
REQUIRED = {"torch", "numpy", "sentencepiece", "tqdm", "pytest"}
OPTIONAL = {
    ("evaluation.plots", "matplotlib"),
    ("text.tokenizer", "tokenizers"),
    ("text.chat_template", "jinja2"),
    ("speed.versus", "lm_eval"),
    ("speed.gpu", "transformers"),
    ("speed.versus", "transformers"),
    ("speed.iteration", "transformers"),
    ("speed.iteration", "tokenizers"),
    ("speed.iteration", "trl"),
}  # imported only where it is used, and asked for by name


def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def imports(name: str) -> set[str]:
    """Return the top-level names a file imports; relative imports stay inside its package."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


def functions(name: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree(name)) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("name", FILES)
def test_imports(name):
    room = name.split(".")[0]
    upward = {
        other for other in imports(name) & FLOOR.keys() - {room} if FLOOR[other] <= FLOOR[room]
    }
    assert not upward, f"{name} imports {upward}, which stands above it"
    foreign = {
        other
        for other in imports(name) - FLOOR.keys() - set(sys.stdlib_module_names)
        if (name, other) not in OPTIONAL
    }
    assert foreign <= REQUIRED


# What stands at the top reads like a paper: how long each file may be.
LINES = {
    "model": 450,
    "rotary": 60,
    "logprobs": 220,
    "sampling": 165,
    "data": 500,
    "sft": 80,
    "reward": 350,
    "rollout": 220,
    "ppo": 450,
    "parallel": 485,
    "train": 500,
    "eval": 350,
}


def test_the_top_floor_is_short():
    assert LINES.keys() == {path.stem for path in ROOT.glob("*.py")}
    for name, limit in LINES.items():
        length = len(FILES[name].read_text(encoding="utf-8").splitlines())
        assert length <= limit, f"{name}.py has {length} lines, {limit} are enough"


@pytest.mark.parametrize("name", LINES)
def test_the_top_floor_is_told_aloud(name):
    """One line in seven, at least, carries a comment; few repeat what the next line says, so not one in three."""
    with open(FILES[name], encoding="utf-8") as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    share = len(commented) / tokens[-1].start[0]
    assert 1 / 7 <= share <= 1 / 3, f"{name}.py: {100 * share:.0f} % of the lines have a comment"


WIDE = {
    "benchmarks.tasks": 120,
    "benchmarks.texts": 140,
}  # a table of records; the prompts of benchmarks, word for word


@pytest.mark.parametrize("name", FILES)
def test_lines_are_narrow(name):
    for number, line in enumerate(FILES[name].read_text(encoding="utf-8").splitlines(), 1):
        assert len(line) <= WIDE.get(name, 100), f"{name}:{number} has {len(line)} columns"


def test_five_packages_are_required():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert {line.split("==")[0] for line in lines} == REQUIRED and "torch==2.13.0" in lines


@pytest.mark.parametrize("name", FILES)
def test_only_the_machine_knows_of_processes(name):
    uses = "torch.distributed" in FILES[name].read_text(encoding="utf-8").replace(
        "torch.distributed.run", ""
    )
    assert not uses or name in ("parallel", "run.planner")


@pytest.mark.parametrize("name", FILES)
def test_functions_are_short_typed_and_explained(name):
    for function in functions(name):
        length = function.end_lineno - function.lineno + 1
        assert length <= 60, f"{name}.{function.name} has {length} lines"
        arguments = [
            a for a in function.args.args + function.args.kwonlyargs if a.arg not in ("self", "cls")
        ]
        untyped = [a.arg for a in arguments if a.annotation is None]
        assert not untyped, f"{name}.{function.name}: {untyped} without a type"
        assert function.returns is not None or function.name == "__init__", (
            f"{name}.{function.name}: no return type"
        )
        assert ast.get_docstring(function) or length <= 12, (
            f"{name}.{function.name} is long and has no docstring"
        )
    assert ast.get_docstring(tree(name)), f"{name} has no docstring"


def test_readme_commands_are_what_ci_runs():
    command = "pip install -r requirements.txt && python -m pytest"
    assert command in README and command in (ROOT / ".ci" / "run").read_text()
    assert "pip install -r requirements.txt && torchrun --nproc_per_node=2 train.py" in README


def test_readme_is_short():
    """Whoever opens the project reads it whole; the rest is in docs/ (test_docs.py)."""
    assert len(README.splitlines()) <= 220


def test_readme_counts_lines():
    counts = dict(re.findall(r"\| `([\w/.]+)` \| (\d+) \|", README))
    assert {f"{name}.py" for name in FLOOR if (ROOT / f"{name}.py").exists()} | set(
        ROOMS
    ) <= counts.keys()
    for name, claimed in counts.items():
        files = [ROOT / name] if name.endswith(".py") else (ROOT / name).glob("*.py")
        actual = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
        assert abs(actual - int(claimed)) <= 0.05 * actual, (
            f"{name} has {actual} lines, the README says {claimed}"
        )


def test_every_promise_about_numbers_has_its_tests():
    """NUMERICS.md names exactly the tests that are marked with its numbers."""
    marked: dict[int, set[str]] = {}
    for file in (ROOT / "tests").glob("test_*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            for mark in getattr(node, "decorator_list", []):
                if ast.unparse(mark).startswith("pytest.mark.line("):
                    for number in mark.args:
                        marked.setdefault(number.value, set()).add(node.name)
    rows = re.findall(
        r"^\| (\d+) \| .* \| (.*) \|$",
        (ROOT / "tests" / "NUMERICS.md").read_text(encoding="utf-8"),
        re.M,
    )
    assert [int(number) for number, _ in rows] == list(range(1, 26))
    assert {int(number): set(re.findall(r"`(\w+)`", tests)) for number, tests in rows} == marked
