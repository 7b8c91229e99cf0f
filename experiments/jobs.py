"""From variants and seeds to runs of train.py: what is shared, what waits for what, two at a time.

A run is a chain of steps, each a folder that builds on the one before (--base). A folder's name is
a hash of all that can matter to it, so variants that part late share what comes before.
"""
from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Sequence

from tqdm import tqdm

from experiments.factors import Variant
from experiments.forks import ROOT, apply, copy_code, sources

# Step -> its stages. A policy is evaluated where it was made; the answers of different runs to the
# same prompts are paired later.
STEPS = {
    "sft": ("sft", "eval"),
    "rank": ("sample", "annotate"),
    "top": ("top", "eval"),
    "dpo": ("dpo", "eval"),
    "reward": ("reward",),
    "ppo": ("ppo", "eval"),
    "best-of-5": ("eval",),
    # the model that top-ranked SFT made takes the place of SFT's, and all begins anew
    "again": (),
    "rank2": ("sample", "annotate"),
    "top2": ("top", "eval"),
}
# The steps to a model's answers.
PATHS = {
    "sft": ("sft",),
    "top": ("sft", "rank", "top"),
    "top2": ("sft", "rank", "top", "again", "rank2", "top2"),
    "dpo": ("sft", "rank", "dpo"),
    "best-of-5": ("sft", "rank", "reward", "best-of-5"),
    "ppo": ("sft", "rank", "reward", "ppo"),
}
# Flags, or sections of flags -> the steps that they concern, of which the first in a path counts.
# What is not here concerns everything.
CONCERNS = {
    "ppo": ("ppo",),
    "top": ("top",),
    "reward": ("reward", "dpo"),
    **{f"reward.{name}": ("rank",) for name in (
        "sampled_prompts", "in_domain_share", "temperatures", "top_p", "generation_batch", "noise",
        "function", "holdout")},
}
# Patch -> the first step that it concerns, and its file.
PATCHES = {
    "dpo": ("dpo", "forks/dpo.patch"),
    "sgd": ("ppo", "patches/sgd.patch"),
    "scores10": ("reward", "patches/scores10.patch"),
}


@dataclass(frozen=True)
class Job:
    """One step of a run; equal jobs are one."""
    step: str
    seed: int
    switches: tuple[str, ...]
    patches: tuple[str, ...]
    processes: int
    before: Job | None

    @property
    def name(self) -> str:
        """The folder's name."""
        chain = f"{self.before.name if self.before else ''} {self.switches} {self.patches}"
        text = f"{self.seed} {self.step} {chain} {self.processes}"
        return f"{self.seed}-{self.step}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    @property
    def chain(self) -> list[Job]:
        """All steps up to this one, in order."""
        return [*(self.before.chain if self.before else []), self]


def flag_of(switch: str) -> str:
    return switch.removeprefix("--").split("=")[0]


def place(flag: str, path: Sequence[str]) -> int | None:
    """Return the first step of a path that a flag concerns; None if it concerns none of them."""
    concerned = CONCERNS.get(flag) or CONCERNS.get(flag.split(".")[0]) or (path[0],)
    return min((path.index(step) for step in concerned if step in path), default=None)


def job_of(variant: Variant, seed: int, common: Sequence[str] = ()) -> Job:
    """Return the last job of a variant."""
    path = PATHS[variant.model]
    given = {flag_of(switch): switch for switch in (*common, *variant.switches.split())}
    places = {switch: place(flag, path) for flag, switch in given.items()}
    job = None
    for i, step in enumerate(path):
        switches = tuple(s for s, first in places.items() if first is not None and first <= i)
        patches = tuple(p for p in variant.patches if path.index(PATCHES[p][0]) <= i)
        processes = variant.processes if i == len(path) - 1 else 1
        job = Job(step, seed, switches, patches, processes, job)
    return job


# ---------------------------------------------------------------------------------------------
# Running

def is_done(job: Job, runs: Path) -> bool:
    """Whether all stages of a job have finished."""
    if not STEPS[job.step]:
        return (runs / job.name / "config.json").exists()
    path = runs / job.name / "seconds.json"
    finished = json.loads(path.read_text()) if path.exists() else {}
    return all(stage in finished for stage in STEPS[job.step])


def code_for(patches: Sequence[str], runs: Path) -> Path:
    """Return a folder with the code, patched where there are patches."""
    if not patches:
        return ROOT
    copy = runs / f"code-{'-'.join(patches)}"
    shutil.rmtree(copy, ignore_errors=True)
    copy_code(copy)
    for patch in patches:
        apply(Path(__file__).parent / PATCHES[patch][1], copy)
    return copy


def begin_again(job: Job, runs: Path) -> None:
    """Make a run whose SFT model is the one that the last step left."""
    earlier = runs / job.before.name
    out = runs / job.name
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(earlier / "top", out / "sft")
    shutil.copy(earlier / "tokenizer.model", out)
    content = json.loads((earlier / "config.json").read_text())
    content["config"]["base"] = ""  # last, and at once: it says that the folder is whole
    (out / "partial.json").write_text(json.dumps(content))
    os.rename(out / "partial.json", out / "config.json")


def command(job: Job, runs: Path, code: Path) -> list[str]:
    """Return the command of a job."""
    out = runs / job.name
    start = [sys.executable]
    if job.processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone",
                  f"--nproc_per_node={job.processes}"]
    switches = [*job.switches, f"--stages={','.join(STEPS[job.step])}", f"--seed={job.seed}",
                f"--out={out}", "--checkpoint_every=0"]
    if "eval" in STEPS[job.step]:
        switches.append(f"--eval.models={job.step.removesuffix('2')}")
    if job.before:
        switches.append(f"--base={runs / job.before.name}")
    if (out / "config.json").exists():
        switches.append("--resume")
    return [*start, str(code / "train.py"), *switches]


def code_digest() -> str:
    """Return a hash of the code that runs consist of."""
    digest = hashlib.sha256()
    for path in sources():
        if path.parts[-2] not in ("tests", "docs", "speed", "benchmarks", "experiments"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def of_other_code(last: Iterable[Job], runs: Path) -> list[str]:
    """Return the folders of finished jobs that were run by code, or defaults, that have changed."""
    now = code_digest()
    names = {job.name for end in last for job in end.chain if STEPS[job.step]}
    marks = {name: runs / f"{name}.code" for name in sorted(names)}
    return [name for name, mark in marks.items() if mark.exists() and mark.read_text() != now]


def run_all(last: Iterable[Job], runs: Path, at_once: int) -> list[str]:
    """Run jobs and those before them, several at a time; return a line for each that failed.

    What is done is not done again, and what follows a failed job is left.
    """
    runs.mkdir(parents=True, exist_ok=True)
    # in the order given, so that the first factors are finished first
    waiting = list(dict.fromkeys(job for end in last for job in end.chain))
    waiting = [job for job in waiting if not is_done(job, runs)]
    codes = {patches: code_for(patches, runs) for patches in {job.patches for job in waiting}}
    failed: dict[Job, str] = {}
    running: dict[Job, subprocess.Popen] = {}
    bar = tqdm(total=len(waiting), desc="runs", dynamic_ncols=True, smoothing=0)
    try:
        while waiting or running:
            for job in [job for job, process in running.items() if process.poll() is not None]:
                if running.pop(job).returncode:
                    failed[job] = f"{runs / job.name}.log"
                    bar.write(f"failed: {failed[job]}")
                bar.update()
            lost = [job for job in waiting if failed.keys() & set(job.chain)]
            if lost:
                bar.update(len(lost))
                waiting = [job for job in waiting if job not in lost]
            free = at_once - sum(min(job.processes, at_once) for job in running)
            ready = [job for job in waiting if min(job.processes, at_once) <= free
                     and (job.before is None or is_done(job.before, runs))]
            if not ready:
                time.sleep(0.2)
                continue
            job = ready[0]
            waiting.remove(job)
            running[job] = start(job, runs, codes[job.patches])
    finally:
        for process in running.values():
            process.terminate()
        bar.close()
    return list(failed.values())


def start(job: Job, runs: Path, code: Path) -> subprocess.Popen:
    """Start a job; what it says goes into a file beside its folder."""
    if not STEPS[job.step]:
        begin_again(job, runs)
        return subprocess.Popen([sys.executable, "-c", ""])
    # one thread each: several runs on as many cores do not wait for each other
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    (runs / f"{job.name}.code").write_text(code_digest())
    with open(runs / f"{job.name}.log", "a", encoding="utf-8") as log:
        return subprocess.Popen(command(job, runs, code), cwd=code, env=environment, stdout=log,
                                stderr=subprocess.STDOUT)
