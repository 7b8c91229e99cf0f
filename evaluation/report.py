"""What a person sees of a run: the table, examples, the report."""
from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, Sequence

from evaluation.head_to_head import results_text
from evaluation.plots import write_plots


def percent(value: float) -> str:
    return f"{100 * value:6.1f}"


def table_row(label: str, values: Sequence[float], change: Mapping[str, Any] | None, unit: float = 100.0) -> str:
    """Write one line: a column per model, the change with its 95 % interval, and whether that is noise."""
    digits = 1 if unit == 100 else 2
    text = f"{label:26}" + "".join(f"{unit * value:8.{digits}f}" for value in values)
    if change:
        low, high = (unit * bound for bound in change["interval"])
        text += f"{unit * change['change']:+8.{digits}f}" + f"{low:+9.{digits}f} to {high:+.{digits}f}".ljust(20) + "noise" * (low <= 0 <= high)
    return text.rstrip()


def table(results: dict) -> str:
    """Lay out eval.json for a terminal; the change is that from SFT to PPO."""
    models, changed = results["models"], results["changes"]
    lines = ["", f"{'':26}" + "".join(f"{name.upper():>8}" for name in models) + ("  change   95 % interval" if changed else "")]
    first = next(iter(models.values()))
    if "general" not in first:
        lines.append(table_row(f"reward score (n={first['in_domain']['n']})", [model["in_domain"]["score"] for model in models.values()],
                               changed and changed["in_domain"]["score"], unit=1.0))
    else:
        lines.append(f"in-domain (n={first['in_domain']['n']}), %")
        for key, meaning in (("gold", "rubric score"), ("strict", "exactly right"), ("multi", "so on 2+ faults"), ("verdict", "verdict")):
            values = [model["in_domain"][key] for model in models.values()]
            lines.append(table_row(f"  {key:9}{meaning}", values, changed and changed["in_domain"][key]))
        general = changed.get("general", {"tasks": {}})
        lines.append(f"general tasks (n={first['general']['n']}), % exactly right")
        for task in first["general"]["tasks"]:
            lines.append(table_row(f"  {task}", [model["general"]["tasks"][task] for model in models.values()], general["tasks"].get(task)))
        lines.append(table_row("  mean", [model["general"]["mean"] for model in models.values()], general.get("mean")))
    for name, numbers in results["head_to_head"].items():
        lines.append(f"{name.replace('_', ' ')}, in-domain: {results_text(numbers)}")
    if results["reward_model"]:
        lines.append("reward model orders " + ", ".join(f"{percent(value).strip()} % ({'all' if key == 'accuracy' else key.replace('_', '-')})"
                                                       for key, value in results["reward_model"].items()) + " of held-out pairs as the annotator")
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
    ads = [i for i, item in enumerate(items) if not getattr(item, "task", "")]
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


READING = ("**base** is the model before any training (on the embedded world: random weights). **change** is PPO less SFT on the same prompts; "
           "**noise** marks a change whose 95 % interval holds 0. One interval in twenty misses the truth.")


def write_report(out: Path, results: dict, examples: Sequence[dict[str, str]]) -> str:
    """Write report.md, with plots if matplotlib is installed; return a line about what was written."""
    plots = write_plots(out, results)
    lines = [f"# Run {out.name}", "", "```", table(results).strip("\n"), "```", "", READING, ""]
    lines += [line for plot in plots for line in (f"![{plot}]({plot})", "")]
    lines += ["## Examples", "", "```", examples_text(examples), "```", ""]
    if not plots:
        lines += ["No plots: matplotlib is not installed (`pip install matplotlib`, then run `--stages=eval` again)."]
    (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"report: {out / 'report.md'}" + ("" if plots else " (no plots: pip install matplotlib to get them)")
