"""What the documents say is so: commands, flags, lines of code, tests, and the numbers of the walk-through."""
import ast
import contextlib
import io
import re
import runpy
import sys
from pathlib import Path
from typing import Iterator

import pytest

import eval as evaluation
from formats import Message, Prompt
from formats.files import read_json
from reward import RewardFunction
from run import settings

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": ROOT / "README.md"}
PAGES |= {f"docs/{path.name}": path for path in sorted((ROOT / "docs").glob("*.md"))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}

# Flags of other programs that the documents call.
TORCHRUN = {"nproc_per_node", "nnodes", "node-rank", "master-addr", "master-port", "rdzv-id",
            "rdzv-backend", "rdzv-endpoint", "max-restarts"}
SLURM = {"nodes", "ntasks-per-node", "gpus-per-node"}


def known_flags() -> set[str]:
    """Return the flags of train.py, eval.py and the commands in rooms."""
    commands = evaluation.parser()._subparsers._group_actions[0].choices.values()
    known = set(settings.flag_types()) | {"help", "model", "config"} | TORCHRUN | SLURM
    known |= {flag.removeprefix("--") for command in commands
              for flag in command._option_string_actions}
    for file in ("benchmarks/command.py", "docs/walkthrough.py", "tests/kill.py", "tests/fuzz.py"):
        text = (ROOT / file).read_text(encoding="utf-8")
        known |= set(re.findall(r'add_argument\("--([\w-]+)"', text))
    return known


@pytest.mark.parametrize("name", TEXTS)
def test_flags_exist(name):
    flags = set(re.findall(r"--([a-z_-]+(?:\.[a-z_0-9]+)?)(?==|\b)", TEXTS[name]))
    assert flags <= known_flags(), sorted(flags - known_flags())


def switches() -> Iterator[tuple[str, str, str]]:
    """Yield page, flag and value of every --section.name=value that one could type as it stands."""
    for name, text in TEXTS.items():
        for flag, value in re.findall(r"--([a-z_]+\.[a-z_]+)=([\w.,-]*\w)", text):
            yield name, flag, value


@pytest.mark.parametrize("name,flag,value", sorted(set(switches())))
def test_switches_can_be_set(name, flag, value):
    """A value in a document is one that the flag accepts; FILE, DIR and N stand for some."""
    if value.partition(".")[0].isupper():
        return
    settings.parse_value(value, settings.flag_types()[flag], flag)
    if flag in settings.CHOICES:
        assert value in settings.CHOICES[flag]


@pytest.mark.parametrize("name", TEXTS)
def test_files_and_headings_that_are_named_exist(name):
    folder = PAGES[name].parent
    without_code = re.sub(r"`[^`\n]*`", "", TEXTS[name])
    for target in re.findall(r"\]\(([^)]+)\)", without_code):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        page = folder / path if path else PAGES[name]
        assert page.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, target
    rooms = [path.name for path in ROOT.iterdir() if path.is_dir()]
    for path in re.findall(rf"`((?:{'|'.join(rooms)})/[\w./]*\w\.\w+|\w+\.py)`", TEXTS[name]):
        assert (ROOT / path).exists() or path == "my_reward.py", path


@pytest.mark.parametrize("name", TEXTS)
def test_functions_that_are_named_exist(name):
    """`ppo.shape_rewards` and `ppo.ADVANTAGES` are names of that module."""
    modules = "|".join(path.stem for path in ROOT.glob("*.py"))
    for module, attribute in re.findall(rf"`({modules})\.(\w+)`", TEXTS[name]):
        if attribute in ("py", "json", "model"):
            continue
        body = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8")).body
        names = {getattr(node, "name", None) for node in body}
        names |= {getattr(target, "id", None) for node in body if isinstance(node, (ast.Assign, ast.AnnAssign))
                  for target in (node.targets if isinstance(node, ast.Assign) else [node.target])}
        assert attribute in names, f"{module}.{attribute}"


def test_the_algorithm_is_as_long_as_said():
    found = re.search(r"then ((?:`\w+\.py`(?:, )?)+): (\d+) lines that are the algorithm", TEXTS["README.md"])
    names, claimed = re.findall(r"`(\w+\.py)`", found[1]), int(found[2])
    actual = sum(len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in names)
    assert names == ["sft.py", "reward.py", "rollout.py", "ppo.py"]
    assert abs(actual - claimed) <= 0.05 * actual, f"{actual} lines, the README says {claimed}"


def test_no_text_stands_twice():
    """No sentence of 60 characters or more is in two places, tables, commands and output aside."""
    seen: dict[str, str] = {}
    for name, text in TEXTS.items():
        prose = [block for block in text.split("\n\n") if not block.startswith(("    ", "|", "Line: "))]
        for sentence in re.split(r"(?<=[.:!?]) ", " ".join(" ".join(prose).split())):
            if len(sentence) < 60:
                continue
            assert sentence not in seen, f"{name} and {seen[sentence]}: {sentence}"
            seen[sentence] = name


# ---------------------------------------------------------------------------------------------
# Implementation details

DETAILS = TEXTS["docs/details.md"]
QUOTES = re.findall(r"^Line: `([\w/]+\.py): (.+)`$", DETAILS, re.M)


def all_tests() -> set[str]:
    files = (ROOT / "tests").glob("test_*.py")
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    return {node.name for tree in trees for node in tree.body if hasattr(node, "name")}


def test_details_are_numbered_and_whole():
    """Every detail has a number, the line it stands in, and a test."""
    items = re.split(r"^(?=\*\*\d+\.)", DETAILS, flags=re.M)[1:]
    numbers = [int(re.match(r"\*\*(\d+)\.", item)[1]) for item in items]
    assert numbers == list(range(1, len(items) + 1)) and len(items) >= 35
    for item in items:
        assert len(re.findall(r"^Line: `", item, re.M)) == 1, item[:60]
        assert re.search(r"^Tests: `test_\w+`(, `test_\w+`)*$", item, re.M), item[:60]


@pytest.mark.parametrize("file,code", QUOTES)
def test_quoted_lines_stand_in_their_files(file, code):
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    assert len(code) >= 20 and sum(code in line for line in lines) == 1


@pytest.mark.parametrize("name", TEXTS)
def test_tests_that_are_named_exist(name):
    assert set(re.findall(r"`(test_\w+)`", TEXTS[name])) <= all_tests()


# ---------------------------------------------------------------------------------------------
# The walk-through

NUMBER = re.compile(r"-?\d+\.\d+|-?\d+")


def assert_same(said: list[str], printed: list[str]) -> None:
    """Compare lines: texts and whole numbers equal, others up to their last digit."""
    assert len(said) == len(printed)
    for a, b in zip(said, printed):
        assert NUMBER.sub("#", a).split() == NUMBER.sub("#", b).split(), f"{a!r} is printed as {b!r}"
        for x, y in zip(NUMBER.findall(a), NUMBER.findall(b), strict=True):
            digits = len(x.partition(".")[2])
            tolerance = 1.5 * 10 ** -digits if digits else 0
            assert abs(float(x) - float(y)) <= tolerance, f"{a!r} is printed as {b!r}"


def test_the_command_is_short_enough_to_be_read():
    text = (ROOT / "docs" / "walkthrough.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150 and max(map(len, text.splitlines())) <= 100
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            assert ast.get_docstring(node) and node.returns and node.end_lineno - node.lineno < 50
            assert all(argument.annotation for argument in node.args.args)


def walkthrough(monkeypatch: pytest.MonkeyPatch, *args: str) -> list[str]:
    """Return what the command prints; in this process, which has torch already."""
    path = str(ROOT / "docs" / "walkthrough.py")
    monkeypatch.setattr(sys, "argv", [path, *args])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(path, run_name="__main__")
    return printed.getvalue().splitlines()


def blocks(text: str) -> list[str]:
    """Return the lines of the indented blocks of a text, without their indent."""
    return [line[4:] for line in text.splitlines() if line.startswith("    ")]


def test_the_walkthrough_is_what_its_command_prints(monkeypatch):
    """The blocks from step 0 on are the output, in order and whole; of the groups' a part is shown."""
    text = TEXTS["docs/walkthrough.md"]
    one, groups = text[text.index("## 0, 1:"):].split("## Groups")
    assert_same(blocks(one), walkthrough(monkeypatch))
    command, *said = blocks(groups)
    printed = walkthrough(monkeypatch, *command.partition("walkthrough.py ")[2].split())
    start = [line.split() for line in printed].index(said[0].split())
    assert len(said) > 8
    assert_same(said, printed[start:start + len(said)])


def test_the_walkthrough_of_a_run(finished, monkeypatch):
    """The models of a run: its scores are calibrated, its actor is close to the reference."""
    out, _ = finished
    lines = walkthrough(monkeypatch, f"--run={out}", "--advantage=leave_one_out")
    assert lines[0].startswith("0  prompt    Review: ") and not any("value_loss" in line for line in lines)
    rows = lines[lines.index("2 to 5  the first response, token by token") + 2:]
    tokens = [row.split() for row in rows[:rows.index("6  the losses before and after one optimizer step")]]
    assert tokens and len({token[-2] for token in tokens}) == 1, "every token has the same advantage"


# ---------------------------------------------------------------------------------------------
# Reward functions

PROMPT = Prompt((Message("user", "Copy: cat dog"),), "", "cat dog")
BAD = {
    "score raised": "def score(p, r, a):\n    raise KeyError('x')",
    "gave nan": "def score(p, r, a):\n    return float('nan')",
    "score_batch must": "def score_batch(p, r, a):\n    return [1.0]",
    "defines neither": "",
}


@pytest.mark.parametrize("start", BAD)
def test_answers_to_bad_functions_are_as_shown(tmp_path, monkeypatch, start):
    monkeypatch.chdir(tmp_path)
    Path("my_reward.py").write_text(BAD[start] + "\n")
    n = 8 if start == "score_batch must" else 1
    with pytest.raises(ValueError) as error:
        RewardFunction("my_reward.py")([PROMPT] * n, ["cat"] * n)
    shown = [line for line in blocks(TEXTS["docs/data.md"]) if line.startswith(f"my_reward.py: {start}")]
    assert shown == [str(error.value)]


def test_the_readmes_reward_function(tmp_path):
    code = re.search(r"echo '(.*)' > my_reward.py", TEXTS["README.md"])[1]
    path = tmp_path / "my_reward.py"
    path.write_text(code + "\n")
    prompts = [Prompt((Message("user", "2 + 2?"),), "", "2 + 2 = 4\n#### 4")] * 2
    assert RewardFunction(path)(prompts, ["It is 4.", "It is 5."]) == [1.0, 0.0]


# ---------------------------------------------------------------------------------------------
# What a run leaves

def test_files_that_a_run_is_said_to_leave(finished):
    out, _ = finished
    text = TEXTS["README.md"]
    said = text[text.index("All of it stays in"):].split("\n\n")[0]
    names = set(re.findall(r"`(\w+\.(?:md|json|jsonl))`", said))
    assert len(names) >= 6 and all((out / name).exists() for name in names)
    values = read_json(out / "eval.json")
    assert f"{len(values['models']['ppo']['general']['tasks'])} general tasks" in text
