"""Changes that people make, as patches: each is applied to a copy of the project, run and counted.

    python experiments/forks.py                 all of them, as a table; status 1 if one fails
    python experiments/forks.py dpo template    only these

A fork is a diff, forks/NAME.patch, and an entry in FORKS: how many lines and files it may take, the
smallest run that uses it, and what that run leaves that it could not without the patch.
"""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence

ROOT = Path(__file__).parents[1]
PATCHES = Path(__file__).with_suffix("")

# The run that all forks build on: 48 steps of SFT, and rankings of what that model says.
SMALLEST = (
    "--model.dim=32", "--model.n_layers=1", "--model.n_heads=2", "--model.n_kv_heads=1",
    "--model.ffn_dim=32", "--sft.examples=512", "--sft.batch_size=32", "--sft.epochs=3",
    "--sft.lr=0.01", "--reward.sampled_prompts=24", "--reward.batch_size=8", "--ppo.iterations=2",
    "--ppo.batch_size=8", "--ppo.minibatch_size=8", "--ppo.epochs=1", "--ppo.lr=0.01",
    "--eval.in_domain=4", "--eval.general=13", "--data.max_response_tokens=12",
)


# ---------------------------------------------------------------------------------------------
# The forks

@dataclass(frozen=True)
class Fork:
    """What a fork may take, and how it is run.

    lines, files: at most so many are changed.
    command: of the patched copy; {base} is the run of SMALLEST, {out} a folder for its results,
        {data} one with the files of DATA.
    left: the file in {out} whose last object shows the change.
    shows: (that object) -> what shows it; an error, or nothing, if the change had no effect.
    """
    lines: int
    command: str
    left: str
    shows: Callable[[dict[str, Any]], str | bool]
    files: int = 1


def other_penalty(row: dict[str, Any]) -> str:
    """Compare what the rewards lost to the KL with k1, which is logged whatever is subtracted."""
    # what a response was paid is its score, less eos_penalty = 1 where it was cut off, less the KL
    penalty = row["score_mean"] - row["cut_off"] - row["reward_mean"]
    by_k1 = row["kl_coef"] * row["kl"]
    assert abs(penalty - by_k1) > 1e-5, f"the KL penalty {penalty:.4f} is that of k1"
    return f"KL penalty {penalty:.3f} a response, by k1 {by_k1:.3f}"


# Files that forks read, by name, and their rows.
DATA = {
    "squad.jsonl": [{"context": "The hen has a red saw.", "question": "What has the hen?",
                     "answers": {"text": ["a red saw"], "answer_start": [12]}}] * 8,
    "logiqa/test.jsonl": [{"context": "Copy: owl axe", "right": right,
                           "options": ["owl", "axe", "fig", "saw"]} for right in "abcd"],
}

TRAIN = "train.py --base={base} --out={out} "
ANEW = "train.py --config={base}/config.json --out={out} "
# the embedded world's rubric pays, so no reward model is needed
PPO = TRAIN + "--ppo.reward=function --stages=ppo "

FORKS = {
    "dpo": Fork(
        60, TRAIN + "--stages=dpo,eval", "eval.json", files=2,
        shows=lambda it: f"column dpo: gold {it['models']['dpo']['in_domain']['gold']:.2f}"),
    "kl_estimator": Fork(5, PPO + "--ppo.kl_kind=mean", "metrics.jsonl", other_penalty),
    "advantage": Fork(
        10, PPO + "--ppo.advantage=batch_mean", "metrics.jsonl",
        lambda row: "value_loss" not in row and f"no critic; std {row['advantage_std']:.3f}"),
    "template": Fork(
        10, PPO + "--data.template=ask", "samples.jsonl",
        lambda row: row["prompt"].startswith("Ask: ") and f"read {row['prompt'][:20]!r} ..."),
    "data_format": Fork(
        15, ANEW + "--model={base}/sft --stages=sft --sft.data={data}/squad.jsonl",
        "metrics.jsonl", lambda row: f"SFT on it: loss {row['loss']:.3f}"),
    "general_task": Fork(
        12, ANEW + "--stages=sft,eval", "eval.json",
        lambda it: f"task last: {it['models']['sft']['general']['tasks']['last']:.2f}"),
    "benchmark": Fork(
        8, "eval.py run {base}/sft --tasks=logiqa --data={data} --out={out}", "results.json",
        lambda it: f"measured {', '.join(it['models']['sft']['tasks']['logiqa']['metrics'])}"),
}


# ---------------------------------------------------------------------------------------------
# Running and counting

class Measured(NamedTuple):
    """A fork that ran."""
    files: list[str]
    lines: int
    seconds: float
    shown: str


def call(command: Sequence[str | Path], folder: Path) -> str:
    """Run a command and return what it prints; ValueError with the end of that if it fails."""
    # One thread: the models are too small for more. And git must find no repository around the
    # copy, else it would take the paths of a patch as that one's, and apply nothing.
    settings = {"OMP_NUM_THREADS": "1", "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    done = subprocess.run(command, cwd=folder, env={**os.environ, **settings}, text=True,
                          capture_output=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise ValueError(f"{' '.join(map(str, command))} failed: {' | '.join(said[-2:])}")
    return done.stdout


def prepare(place: Path) -> None:
    """Make what all forks use: the run they build on, and their data."""
    for name, rows in DATA.items():
        path = place / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    call([sys.executable, "train.py", *SMALLEST, "--stages=sft,sample,annotate",
          f"--out={place / 'base'}"], ROOT)


def sources() -> list[Path]:
    """Return the files of the code: those at the top, and those of the rooms."""
    return sorted((*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("text/chat/*.jinja")))


def copy_code(copy: Path) -> None:
    """Copy the code into a folder, for a patch to change it there."""
    for path in sources():
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def apply(patch: Path, copy: Path) -> dict[str, int]:
    """Apply a patch to a copy of the code; return the changed files, and the lines in each."""
    changed = {}
    for line in call(["git", "apply", "--numstat", patch], copy).splitlines():
        added, removed, file = line.split("\t")
        changed[file] = int(added) + int(removed)
    call(["git", "apply", patch], copy)
    return changed


def run_fork(name: str, place: Path) -> Measured:
    """Patch a copy of the project, run it, look for the change; ValueError where one fails."""
    began = time.perf_counter()
    fork = FORKS[name]
    copy = place / name / "copy"
    copy_code(copy)
    changed = apply(PATCHES / f"{name}.patch", copy)
    lines = sum(changed.values())
    if lines > fork.lines or len(changed) > fork.files:
        raise ValueError(f"{lines} lines in {len(changed)} files; "
                         f"limit {fork.lines} in {fork.files}")

    # The run, and what it left.
    out = place / name / "out"
    command = fork.command.format(base=place / "base", data=place / "data", out=out)
    call([sys.executable, *command.split()], copy)
    try:
        text = (out / fork.left).read_text(encoding="utf-8")
        last = text.splitlines()[-1] if fork.left.endswith(".jsonl") else text
        shown = fork.shows(json.loads(last))
        assert shown, "nothing to see"
    except (AssertionError, LookupError, OSError) as error:
        raise ValueError(f"the run does not show the change: {error!r}") from None
    return Measured(list(changed), lines, time.perf_counter() - began, shown)


def main(names: Sequence[str]) -> None:
    """Run the forks and print a line for each; ValueError at the end if any failed."""
    unknown = sorted(set(names) - FORKS.keys())
    if unknown:
        raise ValueError(f"there is no fork {unknown[0]!r}, but {', '.join(FORKS)}")
    failed = []
    row = "{:13} {:23} {:>5} {:>5} {:>7}  {}"
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place))
        print(row.format("fork", "touched files", "lines", "limit", "seconds", "its run shows"))
        for name in names or FORKS:
            try:
                one = run_fork(name, Path(place))
            except ValueError as error:
                failed.append(name)
                print(f"{name:13} FAILED: {error}")
                continue
            print(row.format(name, ", ".join(one.files), one.lines, FORKS[name].lines,
                             f"{one.seconds:.1f}", one.shown), flush=True)
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"forks.py: error: {error}")
