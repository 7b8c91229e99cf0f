"""From finished runs to a page: means and intervals over seeds, paired differences, plots."""
from __future__ import annotations

import math
import platform
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Mapping, NamedTuple, Sequence

import torch

from evaluation.statistics import Interval, change_interval
from experiments.factors import Factor
from experiments.jobs import STEPS, Job
from formats.files import read_json, read_jsonl

# The 97.5 % quantile of Student's t, by degrees of freedom.
T = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Outcome(NamedTuple):
    """What one variant came to with one seed; lists have an entry per prompt."""
    prompts: list[str]
    tasks: list[str]             # "": the domain
    gold: list[float]
    strict: list[float]
    sampled: list[float]         # strict, of answers drawn at T = 1; [] for best-of-n
    rankings: int                # ranked prompts that it was given
    seconds: float               # of one core, of all stages it needs
    path: list[dict[str, Any]]   # PPO's iterations
    accuracy: float | None       # of the reward model, in-domain, on held-out pairs


def outcome(job: Job, runs: Path) -> Outcome:
    """Read a finished job, and those it builds on."""
    out = runs / job.name
    model = job.step.removesuffix("2")
    rows = [row for row in read_jsonl(out / "answers.jsonl") if row["model"] == model]
    rankings = 0
    seconds = 0.0
    accuracy = None
    for one in job.chain:
        folder = runs / one.name
        if not STEPS[one.step]:
            continue
        timed = read_json(folder / "seconds.json")
        # best-of-5 is an evaluation; of all others that is no part of the method
        seconds += sum(time for stage, time in timed.items()
                       if stage != "eval" or one.step == "best-of-5")
        if "annotate" in STEPS[one.step]:
            rankings += sum(1 for _ in read_jsonl(folder / "ranked.jsonl"))
        if one.step == "reward":
            held = read_json(folder / "reward" / "config.json")["holdout_accuracy"]
            accuracy = held.get("in_domain")
    path = read_jsonl(out / "metrics.jsonl") if job.step == "ppo" else []
    return Outcome(
        [row["prompt"] for row in rows], [row["task"] for row in rows],
        [row["values"]["gold"] for row in rows], [row["values"]["strict"] for row in rows],
        [row["sampled"]["values"]["strict"] for row in rows if "sampled" in row],
        rankings, seconds, path, accuracy)


# ---------------------------------------------------------------------------------------------
# Numbers

class Estimate(NamedTuple):
    """A mean over seeds and its 95 % interval; NaN bounds where there is one seed."""
    mean: float
    low: float
    high: float


def over_seeds(values: Sequence[float]) -> Estimate:
    """Return mean and t-interval: another seed is another model, other data, other prompts."""
    centre = fmean(values)
    if len(values) < 2:
        return Estimate(centre, math.nan, math.nan)
    half = T[len(values) - 1] * stdev(values) / math.sqrt(len(values))
    return Estimate(centre, centre - half, centre + half)


def in_domain(one: Outcome, values: Sequence[float]) -> float:
    """Return the mean over the domain's prompts."""
    return fmean(value for value, task in zip(values, one.tasks) if task == "")


def general(one: Outcome) -> float:
    """Return the mean of the general tasks' shares of exactly right answers."""
    tasks = sorted(set(one.tasks) - {""})
    return fmean(fmean(v for v, t in zip(one.strict, one.tasks) if t == task) for task in tasks)


def over_prompts(ours: Sequence[Outcome], theirs: Sequence[Outcome], metric: str) -> Interval:
    """Return the interval of a difference in-domain over prompts, all seeds' together."""
    strata = []
    for a, b in zip(ours, theirs, strict=True):
        assert a.prompts == b.prompts, "answers to other prompts cannot be paired"
        pairs = zip(getattr(a, metric), getattr(b, metric), a.tasks)
        strata.append([x - y for x, y, task in pairs if task == ""])
    return change_interval(strata)


def at_the_end(one: Outcome, name: str, n: int = 5) -> float:
    """Return the mean of a statistic over PPO's last iterations; NaN without PPO."""
    values = [row[name] for row in one.path[-n:] if name in row]
    return fmean(values) if values else math.nan


def peaks_of(ones: Sequence[Outcome], n: int = 5) -> list[float]:
    """Return every seed's mean gold over the n iterations in which the other seeds are at best.

    Not over its own best ones: the largest of noisy numbers lies above the truth, and any end below
    it. With one seed there are no others.
    """
    gold = [[row["judge_mean"] for row in one.path] for one in ones]
    found = []
    for i, own in enumerate(gold):
        others = gold[:i] + gold[i + 1:] or [own]
        starts = range(max(len(own) - n + 1, 1))
        best = max(starts, key=lambda k: sum(fmean(other[k:k + n]) for other in others))
        found.append(fmean(own[best:best + n]))
    return found


# ---------------------------------------------------------------------------------------------
# Tables

def percent(estimate: Estimate, sign: str = "") -> str:
    """Write an estimate in percent or points, with its interval."""
    mean, low, high = (100 * x for x in estimate)
    text = f"{mean:{sign}.1f}"
    return text if math.isnan(low) else f"{text} ({low:{sign}.1f} to {high:{sign}.1f})"


def number(values: Sequence[float], digits: int = 2) -> str:
    """Write a mean; "" if there is none."""
    found = [value for value in values if value is not None and not math.isnan(value)]
    return f"{fmean(found):.{digits}f}" if found else ""


def rows_of(factor: Factor, found: Mapping[str, Sequence[Outcome]]) -> list[list[str]]:
    """Return the table: heads, then a row per variant, compared with the first."""
    first = next(iter(found.values()))
    rows = [["variant", "strict, %", "gold, %", "general, %", "strict less the first's",
             "over prompts", "general less the first's", "strict at T = 1, %", "KL", "score",
             "reward model, %", "rankings", "seconds"]]
    for label, ones in found.items():
        strict = [in_domain(one, one.strict) for one in ones]
        cells = [label, percent(over_seeds(strict)),
                 percent(over_seeds([in_domain(one, one.gold) for one in ones])),
                 percent(over_seeds([general(one) for one in ones]))]
        if ones is first:
            cells += ["", "", ""]
        else:
            ahead = [a - in_domain(b, b.strict) for a, b in zip(strict, first)]
            low, high = over_prompts(ones, first, "strict")
            kept = [general(a) - general(b) for a, b in zip(ones, first)]
            cells += [percent(over_seeds(ahead), "+"), f"{100 * low:+.1f} to {100 * high:+.1f}",
                      percent(over_seeds(kept), "+")]
        drawn = [100 * in_domain(one, one.sampled) for one in ones if one.sampled]
        cells += [number(drawn, 1), number([at_the_end(one, "kl") for one in ones]),
                  number([at_the_end(one, "score_mean") for one in ones]),
                  number([100 * one.accuracy for one in ones if one.accuracy is not None], 1),
                  f"{fmean(one.rankings for one in ones):.0f}",
                  f"{fmean(one.seconds for one in ones):.0f}"]
        rows.append(cells)
    return rows


def seed_rows(found: Mapping[str, Sequence[Outcome]], seeds: Sequence[int]) -> list[list[str]]:
    """Return the table of every seed's strict and general share."""
    rows = [["strict / general, %", *(f"seed {seed}" for seed in seeds)]]
    for label, ones in found.items():
        rows.append([label, *(f"{100 * in_domain(one, one.strict):.1f} / {100 * general(one):.1f}"
                              for one in ones)])
    return rows


def peak_rows(found: Mapping[str, Sequence[Outcome]]) -> list[list[str]]:
    """Return the table of over-optimisation: what the rollouts were worth, at best and at last."""
    rows = [["variant", "score at the end", "gold of rollouts: peak, %", "end, %",
             "end less peak, points"]]
    for label, ones in found.items():
        ends = [at_the_end(one, "judge_mean") for one in ones]
        peaks = peaks_of(ones)
        rows.append([label, number([at_the_end(one, "score_mean") for one in ones]),
                     percent(over_seeds(peaks)), percent(over_seeds(ends)),
                     percent(over_seeds([end - top for end, top in zip(ends, peaks)]), "+")])
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *rest = [f"| {' | '.join(row)} |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *rest, ""]


READING = """Means over seeds, in brackets 95 % t-intervals over seeds (another seed is another
world's prompts, data and weights). *over prompts*: 95 % interval of the same difference over
prompts, the seeds' together. *strict*: verdict right and all reasons exactly right; *general*:
mean of 12 tasks; greedy answers unless said. *KL*: nats per response, mean of the last five
iterations, as *score*, what PPO is paid. *reward model*: held-out pairs of ads that it orders as
the annotator. *rankings*: prompts with five ranked answers. *seconds*: of one core, all stages
that the method needs, without the evaluation."""


def write_factor(name: str, factor: Factor, jobs: Mapping[str, Sequence[Job]], runs: Path,
                 out: Path, command: str) -> Path:
    """Write NAME.md and its plots; return its path."""
    from experiments.plots import draw_factor

    out.mkdir(parents=True, exist_ok=True)
    found = {label: [outcome(job, runs) for job in ones] for label, ones in jobs.items()}
    seeds = [job.seed for job in next(iter(jobs.values()))]
    machine = (f"{processor()}, Python {platform.python_version()}, torch {torch.__version__}; "
               f"seeds {', '.join(map(str, seeds))}; one process of one thread a run.")
    lines = [f"# {name}: {factor.question}", "", f"    {command}", "", machine, "",
             *markdown(rows_of(factor, found))]
    for picture in draw_factor(name, factor, found, out):
        lines += [f"![{picture}]({picture})", ""]
    if factor.plot == "kl":
        lines += ["## Over-optimisation", "", *markdown(peak_rows(found))]
    lines += ["## Every seed", "", *markdown(seed_rows(found, seeds)), "## Switches", ""]
    switches = [["variant", "switches", "patches"]]
    for label, variant in factor.variants.items():
        switches.append([label, f"`{variant.switches}`" if variant.switches else "",
                         ", ".join(variant.patches)])
    lines += [*markdown(switches), READING]
    path = out / f"{name}.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def processor() -> str:
    """Return the processor's name where the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()
