"""Evaluation: greedy answers of the SFT and the PPO model to unseen prompts, compared.

On the embedded world the gold rubric judges, which training never sees: in-domain advertisement reviews
and 12 general tasks. On real prompts the reward model judges; since PPO was trained to please that very
model, such a result shows that PPO works, not that answers got better.
"""
from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Iterable, Sequence

import microcosm


@dataclass(frozen=True)
class EvalConfig:
    prompts: tuple[str, ...] = ()       # prompt files; none: prompts held out from ppo.prompts
    in_domain: int = 500                # unseen advertisements (embedded world)
    general: int = 720                  # unseen prompts over the 12 general tasks (embedded world)
    holdout: int = 64                   # prompts held out from ppo.prompts
    show: int = 3                       # prompts shown with all answers


# ---------------------------------------------------------------------------------------------
# Numbers

def grade_world(items: Sequence[microcosm.Item], answers: Sequence[str]) -> tuple[dict, list[float]]:
    """Judge answers by the gold rubric.

    Returns: {"in_domain": {...}, "general": {...}} as in eval.json, shares in [0, 1], and the gold score of every item.
    """
    grades = [microcosm.grade(item, answer) for item, answer in zip(items, answers, strict=True)]
    ads = [grade for item, grade in zip(items, grades) if item.task == "ad"]
    multi = [grade.multi for grade in ads if grade.multi is not None]
    tasks: dict[str, list[float]] = defaultdict(list)
    for item, grade in zip(items, grades):
        if item.task != "ad":
            tasks[item.task].append(float(grade.strict))
    return {
        "in_domain": {"gold": mean(g.gold for g in ads), "strict": mean(g.strict for g in ads), "multi": mean(multi),
                      "verdict": mean(g.verdict for g in ads), "n": len(ads)},
        "general": {"mean": mean(map(mean, tasks.values())), "tasks": {name: mean(tasks[name]) for name in sorted(tasks)},
                    "n": sum(map(len, tasks.values()))},
    }, [grade.gold for grade in grades]


def mean(values: Iterable[float]) -> float:
    """Return the mean, 0.0 of nothing."""
    values = [float(value) for value in values]
    return fmean(values) if values else 0.0


def head_to_head(challenger: Sequence[float], champion: Sequence[float]) -> dict[str, float]:
    """Return how often the challenger's score is higher, equal and lower, as shares in [0, 1]."""
    pairs = list(zip(challenger, champion, strict=True))
    return {"win": mean(a > b for a, b in pairs), "tie": mean(a == b for a, b in pairs), "loss": mean(a < b for a, b in pairs)}


# ---------------------------------------------------------------------------------------------
# What a person sees

def percent(value: float) -> str:
    return f"{100 * value:6.1f}"


def table(results: dict) -> str:
    """Lay out eval.json for a terminal."""
    models = list(results["models"])
    lines = ["", f"{'':26}" + "".join(f"{name.upper():>8}" for name in models) + ("  change" if len(models) == 2 else "")]

    def row(label: str, section: str, key: str, part: str | None = None, as_percent: bool = True) -> None:
        cells = [results["models"][name][section] for name in models]
        values = [(cell[part] if part else cell)[key] for cell in cells]
        text = percent if as_percent else "{:6.2f}".format
        change = f"{(values[1] - values[0]) * (100 if as_percent else 1):+8.1f}" if len(values) == 2 else ""
        lines.append(f"{label:26}" + "".join(f"{text(value):>8}" for value in values) + change)

    first = results["models"][models[0]]
    if "gold" in first["in_domain"]:
        lines.append(f"in-domain (n={first['in_domain']['n']}), %")
        for key, meaning in (("gold", "rubric score"), ("strict", "exactly right"), ("multi", "so on 2+ faults"), ("verdict", "verdict")):
            row(f"  {key:9}{meaning}", "in_domain", key)
        lines.append(f"general tasks (n={first['general']['n']}), % exactly right")
        for task in first["general"]["tasks"]:
            row(f"  {task}", "general", task, part="tasks")
        row("  mean", "general", "mean")
    else:
        row(f"reward score (n={first['in_domain']['n']})", "in_domain", "score", as_percent=False)
    for name, counts in results["head_to_head"].items():
        lines.append(f"{name.replace('_', ' ')}, in-domain: wins {percent(counts['win']).strip()} %, ties {percent(counts['tie']).strip()} %, "
                     f"losses {percent(counts['loss']).strip()} %")
    accuracy = results["reward_model"]
    if accuracy:
        lines.append("reward model orders " + ", ".join(f"{percent(value).strip()} % ({'all' if key == 'accuracy' else key.replace('_', '-')})"
                                                       for key, value in accuracy.items()) + " of held-out pairs as the annotator")
    lines.append("seconds: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in results["seconds"].items()))
    return "\n".join(lines)


def examples_text(examples: Sequence[dict[str, str]]) -> str:
    """Lay out prompts with all answers, one block each; long texts are cut."""
    width = max((len(key) for example in examples for key in example), default=0)

    def lines(key: str, value: str) -> str:
        shown = [line for line in value.splitlines() if line.strip()] or [""]
        shown = shown if len(shown) <= 12 else [*shown[:12], "..."]
        return f"{key:>{width}}  " + f"\n{'':{width + 2}}".join(line if len(line) <= 400 else line[:400] + " ..." for line in shown)
    return "\n\n".join("\n".join(lines(key, value) for key, value in example.items()) for example in examples)


def pick_examples(items: Sequence[Any], answers: dict[str, Sequence[str]], scores: dict[str, Sequence[float]], show: int) -> list[dict[str, str]]:
    """Choose prompts to show, without regard to who wins: the first in-domain ones, then a general one."""
    ads = [i for i, item in enumerate(items) if getattr(item, "task", "ad") == "ad"]
    others = [i for i in range(len(items)) if i not in set(ads)]
    chosen = ads[:max(show - 1, 1) if others else show] + others[:1]
    examples = []
    for i in chosen[:show]:
        example = {"prompt": items[i].prompt}
        example.update({f"{name} ({scores[name][i]:.2f})": texts[i] for name, texts in answers.items()})
        if items[i].answer:
            example["truth"] = items[i].answer
        examples.append(example)
    return examples


def write_report(out: Path, results: dict, examples: Sequence[dict[str, str]]) -> str:
    """Write report.md, with plots if matplotlib is installed; return a line about what was written."""
    plots = write_plots(out)
    lines = [f"# Run {out.name}", "", "```", table(results).strip("\n"), "```", "", "## Examples", "", "```", examples_text(examples), "```", ""]
    lines += [line for plot in plots for line in (f"![{plot}]({plot})", "")]
    if not plots:
        lines += ["No plots: matplotlib is not installed (`pip install matplotlib`, then run `--stages=eval` again)."]
    (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"report: {out / 'report.md'}" + ("" if plots else " (no plots: pip install matplotlib to get them)")


CURVES = {
    "sft": [("loss", "nats per token"), ("grad_norm", "")],
    "reward": [("loss", "nats per prompt"), ("accuracy", "share of pairs")],
    "ppo": [("score_mean", "reward (std of SFT)"), ("kl", "nats per response"), ("entropy", "nats per token"),
            ("response_length", "tokens"), ("explained_variance", ""), ("clip_fraction", "share of tokens")],
}


def write_plots(out: Path) -> list[str]:
    """Draw the curves of metrics.jsonl, one PNG per stage; [] without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot
    rows = read_jsonl(out / "metrics.jsonl") if (out / "metrics.jsonl").exists() else []
    written = []
    for stage, curves in CURVES.items():
        points = [row for row in rows if row["stage"] == stage]
        if not points:
            continue
        columns = min(len(curves), 3)
        figure, axes = pyplot.subplots(len(curves) // columns, columns, figsize=(3.4 * columns, 2.6 * (len(curves) // columns)),
                                       constrained_layout=True)
        for axis, (name, unit) in zip(axes.flat, curves):
            axis.plot([p["step"] for p in points], [p.get(name) for p in points], linewidth=0.8)
            axis.set(title=name, xlabel="iteration" if stage == "ppo" else "step", ylabel=unit)
        figure.suptitle(stage)
        figure.savefig(out / f"{stage}.png", dpi=110)
        pyplot.close(figure)
        written.append(f"{stage}.png")
    return written


# ---------------------------------------------------------------------------------------------
# Files

def read_jsonl(path: Path) -> list[dict]:
    """Read a file that `write_jsonl` wrote, possibly edited by people; ValueError names the line."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not valid JSON ({error})")
        if row is not None:
            rows.append(row)
    return rows


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write one object per line; the file is replaced whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(partial, path)
