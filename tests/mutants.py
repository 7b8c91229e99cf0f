"""Deliberate bugs, most of them seen in real PPO code or in this one: does a test notice?

    python tests/mutants.py                 every mutant, two at a time; writes tests/MUTANTS.md
    python tests/mutants.py 3 17            only these; their rows in tests/MUTANTS.md are renewed
    python tests/mutants.py --workers=1     one at a time

Every mutant (bugs.py) is applied to a copy of the project. The test that should notice runs first;
only if it passes do all others, until one fails. A test that fails without the mutant as well
proves nothing and is left out. A mutant whose text is not found exactly once is an error, so the
list has to follow the code; so is one after which the tests cannot even be imported.
"""
import queue
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bugs import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_name("MUTANTS.md")
# The fast ones first; what judges the house and not its numbers is left out.
TESTS = ["update", "ppo", "oracle", "metamorphic", "reward", "model", "learning", "data", "sources",
         "flags", "settings", "continuing", "health", "rankings", "train", "switches", "parallel",
         "weights", "eval", "microcosm", "sandbox", "benchmarks", "plan", "closed_form", "reports",
         "checkpoints", "saving", "sharing", "folder", "damage", "stopping", "kill"]
LEFT_OUT = (".git", ".venv", "runs", "__pycache__", ".pytest_cache", ".ruff_cache")
FAILED, NOTHING_RAN = 1, 5  # pytest's exit statuses
LIMIT = 900  # seconds, after which a test file has hung, which is noticed too


class Project:
    """A copy of the project to break."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
        shared = ROOT.parent / "shared"  # the real files of some tests stand beside the project
        if shared.exists() and not (folder.parent / "shared").exists():
            (folder.parent / "shared").symlink_to(shared)

    def apply(self, mutant: Mutant) -> None:
        source = (ROOT / f"{mutant.file}.py").read_text(encoding="utf-8")
        count = source.count(mutant.old)
        if count != 1:
            raise SystemExit(f"mutants.py: {mutant.bug!r}: found {count} times in "
                             f"{mutant.file}.py, not once: {mutant.old}")
        broken = source.replace(mutant.old, mutant.new)
        compile(broken, mutant.file, "exec")
        (self.folder / f"{mutant.file}.py").write_text(broken, encoding="utf-8")

    def restore(self, mutant: Mutant) -> None:
        shutil.copy(ROOT / f"{mutant.file}.py", self.folder / f"{mutant.file}.py")

    def failure(self, test: str, skipped: set[str]) -> str:
        """Run a test, or a file of them, until one fails; return which, or "" if none does."""
        file, _, name = test.partition("::")
        command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "--no-header", "-p",
                   "no:cacheprovider", f"tests/test_{file}.py" + (f"::{name}" if name else "")]
        command += [f"--deselect=tests/{known}" for known in sorted(skipped)]
        try:
            done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True,
                                  timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return f"test_{file}.py does not end"
        if done.returncode in (0, NOTHING_RAN):
            return ""
        found = re.search(r"^(?:FAILED|ERROR) tests/(test_\w+\.py::.+?)(?: - .*)?$", done.stdout,
                          re.M)
        if done.returncode != FAILED or not found:
            raise SystemExit(f"mutants.py: {test} cannot be run: {done.stdout[-2000:]}")
        return found[1]


class Suite:
    """The tests, and which of them fail on the project as it is."""

    def __init__(self, clean: Project) -> None:
        self.clean = clean
        self.sound: set[str] = set()
        self.broken: set[str] = set()

    def kill(self, project: Project, mutant: Mutant) -> str:
        """Return the first test that fails with a mutant, and only with it; "" if none does."""
        others = [test for test in TESTS if test != mutant.test]
        for test in (mutant.test, *others):
            while failed := project.failure(test, self.broken):
                if self.is_sound(failed):
                    return failed
        return ""

    def is_sound(self, test: str) -> bool:
        """Return whether a test passes on the project as it is."""
        if " " not in test.split("[")[0] and test not in self.sound | self.broken:
            alone = test.removeprefix("test_").replace(".py::", "::", 1)
            passes = not self.clean.failure(alone, set())
            (self.sound if passes else self.broken).add(test)
        return test not in self.broken


def known_rows() -> dict[str, str]:
    """Return what the table says, by bug: the test that noticed."""
    if not TABLE.exists():
        return {}
    rows = re.findall(r"^\| \d+\*? \| (.+) \| `.+?` \| (.+?) \|$", TABLE.read_text(), re.M)
    return {bug: test.strip("`*") for bug, test in rows}


def write(found: dict[str, str]) -> None:
    """Write MUTANTS.md: every mutant's number, what it is, and the first test that fails."""
    caught = [m for m in MUTANTS if found.get(m.bug, "survived") not in ("survived", "not run")]
    lines = ["Written by `python tests/mutants.py`: "
             f"{len(caught)} of {len(MUTANTS)} deliberate bugs are caught. Those marked * survived "
             "the", "tests of the time; the test named was written, or sharpened, for them.", "",
             "| | bug | in | first test that fails |", "|---|---|---|---|"]
    for number, m in enumerate(MUTANTS, 1):
        test = found.get(m.bug, "not run")
        shown = f"`{test}`" if m in caught else f"**{test}**"
        lines.append(f"| {number}{'*' * m.survived} | {m.bug} | `{m.file}.py` | {shown} |")
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(chosen: list[int], workers: int) -> None:
    found = known_rows() if chosen else {}
    with tempfile.TemporaryDirectory() as name:
        clean, *projects = [Project(Path(name) / f"project{i}") for i in range(workers + 1)]
        for mutant in MUTANTS:  # all can be applied, before the long work begins
            clean.apply(mutant)
            clean.restore(mutant)
        suite = Suite(clean)
        free: queue.Queue[Project] = queue.Queue()
        for project in projects:
            free.put(project)

        def run(number: int) -> None:
            mutant, project = MUTANTS[number - 1], free.get()
            try:
                project.apply(mutant)
                test = suite.kill(project, mutant)
                project.restore(mutant)
            finally:
                free.put(project)
            found[mutant.bug] = test.partition("[")[0] or "survived"
            print(f"{number:3}  {mutant.bug}: {found[mutant.bug]}", flush=True)
            write(found)

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(run, chosen or range(1, len(MUTANTS) + 1)))
        for test in sorted(suite.broken):
            print(f"left out, because it fails anyway: {test}")


if __name__ == "__main__":
    flags = [arg for arg in sys.argv[1:] if arg.startswith("--workers=")]
    numbers = [int(arg) for arg in sys.argv[1:] if arg not in flags]
    main(numbers, int(flags[-1].partition("=")[2]) if flags else 2)
