"""What a person sees of a run: the table, examples, the report.

Results are the content of eval.json: what eval.assess returns, and of the run itself
"reward_model" (accuracies on held-out pairs) and "seconds" (of each stage).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, NamedTuple, Sequence

from evaluation.head_to_head import results_text, share_text
from evaluation.plots import write_plots
from evaluation.statistics import SHARES, mean, share_interval
from formats import Prompt
from formats.files import write_text
from formats.showing import fenced, harmless

# -------------------------------------------------------------------------------------------------
# The table


class Line(NamedTuple):
    """A line of a table: one value per model, None where a model has none; a heading has ()."""

    label: str
    values: Sequence[float | None] = ()
    change: Mapping[str, Any] | None = None  # {"change", "interval"}
    unit: float = 100.0  # 100 shows a share in percent, 1 a number as it is


def change_text(change: Mapping[str, Any], unit: float, digits: int) -> str:
    """Write a change, its 95 % interval, and whether that is noise: it holds 0."""
    low, high = (unit * bound for bound in change["interval"])
    # A change that might as well be none is marked, so that nobody reads a story into it.
    between = f"{low:+9.{digits}f} to {high:+.{digits}f}"
    noise = "noise" if low <= 0 <= high else ""
    return f"{unit * change['change']:+8.{digits}f}{between:20}{noise}"


def table_row(line: Line, label_width: int, widths: Sequence[int]) -> str:
    """Write one line: a column per model, then the change."""
    digits = 1 if line.unit == 100 else 2
    text = f"{line.label:{label_width}}" if line.values else line.label
    for value, width in zip(line.values, widths):
        shown = "-" if value is None else f"{line.unit * value:.{digits}f}"
        text += f"{shown:>{width}}"
    if line.change:
        text += change_text(line.change, line.unit, digits)
    return text.rstrip()


def domain_lines(models: Sequence[Mapping[str, Any]], changed: Mapping[str, Any]) -> list[Line]:
    """Return the lines of the domain: shares in percent, then a reward function's own metrics."""
    n = models[0]["n"]
    names = list(dict.fromkeys(name for model in models for name in model if name != "n"))
    shares = [name for name in SHARES if name in names]
    others = [name for name in names if name not in SHARES]

    def line(label: str, name: str, unit: float) -> Line:
        return Line(label, [model.get(name) for model in models], changed.get(name), unit)

    # Without a rubric there is one number, in the unit of whoever judges.
    if names == ["score"]:
        return [line(f"reward score (n={n})", "score", 1.0)]
    lines = []
    if shares:
        lines.append(Line(f"in-domain (n={n}), %"))
        lines += [line(f"  {name:9}{SHARES[name]}", name, 100.0) for name in shares]
    if others:
        lines.append(Line(f"in-domain (n={n}), the reward function's own metrics"))
        lines += [line(f"  {name}", name, 1.0) for name in others]
    return lines


def general_lines(models: Sequence[Mapping[str, Any]], changed: Mapping[str, Any]) -> list[Line]:
    """Return the lines of the general tasks, and their mean."""
    lines = [Line(f"general tasks (n={models[0]['n']}), % exactly right")]
    tasks = changed.get("tasks", {})
    for task in models[0]["tasks"]:
        values = [model["tasks"][task] for model in models]
        lines.append(Line(f"  {task}", values, tasks.get(task)))
    lines.append(Line("  mean", [model["mean"] for model in models], changed.get("mean")))
    return lines


def sampled_lines(results: Mapping[str, Any], names: Sequence[str], compared: str) -> list[Line]:
    """Return the lines of answers drawn at T = 1: what a model does, and not only most often."""
    models = results["sampled"]["models"]
    changed = results["sampled"]["changes"].get(compared, {})
    asked = [models.get(name, {}) for name in names]
    # a few of the rows above, where they are there; best-of-n has no answers of this kind
    rows = {name: [model.get("in_domain", {}).get(name) for model in asked]
            for name in ("gold", "strict", "score")}
    lines = [Line(f"  {name:9}{SHARES.get(name, '')}".rstrip(), values,
                  changed.get("in_domain", {}).get(name), 100.0 if name in SHARES else 1.0)
             for name, values in rows.items() if any(value is not None for value in values)]
    general = [model.get("general", {}).get("mean") for model in asked]
    if any(value is not None for value in general):
        lines.append(Line("  general tasks", general, changed.get("general", {}).get("mean")))
    return [Line("the same, answers drawn at T = 1"), *lines]


def columns(results: Mapping[str, Any], names: Sequence[str], compared: str) -> list[str]:
    """Lay out a column per named model, and the change of the compared one ("": of none)."""
    models = [results["models"][name] for name in names]
    changed = results["changes"].get(compared, {})
    lines = domain_lines([model["in_domain"] for model in models], changed.get("in_domain", {}))
    if "general" in models[0]:
        general = [model["general"] for model in models]
        lines += general_lines(general, changed.get("general", {}))
    if "sampled" in results:
        lines += sampled_lines(results, names, compared)

    # As narrow as the names allow: usually the table fits a terminal.
    widths = [max(8, len(name) + 2) for name in names]
    label_width = max([26, *(len(line.label) for line in lines if line.values)])
    head = "".join(f"{name.upper():>{width}}" for name, width in zip(names, widths))
    if changed:
        head += "  change   95 % interval"
    return [f"{'':{label_width}}{head}", *(table_row(line, label_width, widths) for line in lines)]


def ahead_lines(results: Mapping[str, Any]) -> list[str]:
    """Say how far the last model is ahead of every other one, on the same prompts."""
    last = list(results["models"])[-1]
    lines = []
    for name, changed in results["ahead"].items():
        contest = results["head_to_head"].get(f"{last}_vs_{name}")
        if contest is None:
            continue
        said = []
        if "strict" in changed["in_domain"]:
            said.append(f"strict {points_text(changed['in_domain']['strict'])}")
        if "general" in changed:
            said.append(f"general {points_text(changed['general']['mean'])}")
        if said:
            said.append(f"wins {100 * contest['win']:.0f} %, losses {100 * contest['loss']:.0f} %")
        else:
            said.append(results_text(contest))
        lines.append(f"{last} less {name:10} {', '.join(said)}")
    return lines


def points_text(change: Mapping[str, Any]) -> str:
    """Write a change of a share with its 95 % interval, in points."""
    low, high = change["interval"]
    return f"{100 * change['change']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def table(results: Mapping[str, Any]) -> str:
    """Lay out eval.json for a terminal; the change is that of the last model."""
    names = list(results["models"])
    lines = ["", *columns(results, names, names[-1])]
    lines += ahead_lines(results)
    if results.get("reward_model"):
        # "accuracy" is over all pairs, the others over a part of them.
        shares = [
            f"{100 * value:.1f} % ({'all' if name == 'accuracy' else name.replace('_', '-')})"
            for name, value in results["reward_model"].items()
        ]
        pairs = "of held-out pairs as the annotator"
        lines.append(f"reward model orders {', '.join(shares)} {pairs}")
    if results.get("seconds"):
        seconds = [f"{stage} {value:.0f}" for stage, value in results["seconds"].items()]
        lines.append(f"seconds: {', '.join(seconds)}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------
# A reward model's calibration


def calibration_text(numbers: Mapping[str, Any], is_best: Sequence[bool]) -> str:
    """Lay out the numbers of `statistics.calibration`.

    is_best: for every ranking of 3 or more, whether the model's favourite is people's.
    """
    accuracy = share_text(numbers["accuracy"], numbers["interval"])
    pairs = f"{numbers['pairs']} pairs from {numbers['prompts']} prompts"
    loss = f"loss {numbers['loss']:.3f} nats, a coin's is 0.693"
    lines = [f"orders {accuracy} of {pairs} as people do; {loss}"]
    if is_best:
        n = len(is_best)
        share = share_text(mean(is_best), share_interval(mean(is_best), n))
        lines.append(f"its favourite is ranked first in {share} of {n} rankings of 3 or more")
    error = f"{100 * numbers['error']:.1f} points apart on average"
    lines += [f"what it claims and how often it is right are {error}", ""]
    lines.append(f"{'margin [nats]':16}{'pairs':>7}{'claims':>9}   is right")
    for row in numbers["rows"]:
        margin = f"{row['from']:<4g}to {row['to']:<9g}"
        claims = f"{100 * row['predicted']:7.1f} %"
        actual = share_text(row["actual"], row["interval"])
        lines.append(f"{margin}{row['pairs']:7}{claims}   {actual}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------
# Examples


def shortened(text: str) -> list[str]:
    """Return the lines of a text as an example shows them: few, and none too long."""
    lines = [line for line in text.splitlines() if line.strip()] or [""]
    if len(lines) > 12:
        lines = [*lines[:12], "..."]
    return [line if len(line) <= 400 else line[:400] + " ..." for line in lines]


def examples_text(examples: Sequence[Mapping[str, str]]) -> str:
    """Lay out prompts with all answers, one block each; long texts are cut."""
    width = max((len(key) for example in examples for key in example), default=0)
    margin = "\n" + " " * (width + 2)
    # The names stand right-aligned, and further lines of a text below its first.
    blocks = []
    for example in examples:
        texts = [f"{key:>{width}}  {margin.join(shortened(text))}" for key, text in example.items()]
        blocks.append("\n".join(texts))
    return "\n\n".join(blocks)


def pick_examples(
    prompts: Sequence[Prompt],
    answers: Mapping[str, Sequence[str]],
    values: Mapping[str, Sequence[Mapping[str, float]]],
    show: int,
) -> list[dict[str, str]]:
    """Choose prompts to show, without regard to who wins: the first in-domain ones, a general one.

    answers, values: as in eval.assess; the models shown are those of `answers`.
    """
    domain = [i for i, prompt in enumerate(prompts) if prompt.task == ""]
    general = [i for i, prompt in enumerate(prompts) if prompt.task != ""]
    # The first ones, not the best: chosen examples prove nothing.
    chosen = domain[:show]
    if general:
        chosen = domain[: max(show - 1, 1)] + general[:1]
    examples = []
    for i in chosen[:show]:
        example = {"prompt": prompts[i].text}
        for name, texts in answers.items():
            example[f"{name} ({values[name][i]['score']:.2f})"] = texts[i]
        if prompts[i].answer:
            example["truth"] = prompts[i].answer
        examples.append(example)
    return examples


# -------------------------------------------------------------------------------------------------
# The report

BASE = "**base** is the model before any training (on the embedded world: random weights)."
CHANGE = (
    "**change** is {compared} less {reference} on the same prompts; **noise** marks a change whose "
    "95 % interval holds 0. One interval in twenty misses the truth."
)
DRAWN = (
    "The same prompts, each answer drawn at T = 1. A greedy answer holds what the model says more "
    "often than not: it turns a habit of six times in ten into always, and one of four in ten into "
    "never."
)


def write_report(
    out: Path,
    results: Mapping[str, Any],
    examples: Sequence[dict[str, str]],
    drawn: Sequence[dict[str, str]],
) -> str:
    """Write report.md, with plots where matplotlib is; return a line about what was written.

    examples: prompts with the models' answers; drawn: the same prompts, answers at T = 1.
    """
    plots = write_plots(out, results)
    last = list(results["models"])[-1]
    reference = results["reference"]
    lines = [f"# Run {harmless(out.name)}", "", fenced(table(results).strip("\n")), ""]
    reading = [BASE] if "base" in results["models"] else []
    if last in results["changes"]:
        reading.append(CHANGE.format(compared=last, reference=reference))
    lines += [" ".join(reading), ""]
    for plot in plots:
        lines += [f"![{plot}]({plot})", ""]
    # The table at the top has room for one change, the last model's. Here are the others.
    for name in results["changes"]:
        if name != last:
            lines += [f"## {name} against {reference}", ""]
            lines += [fenced("\n".join(columns(results, [reference, name], name))), ""]
    lines += ["## Examples", "", fenced(examples_text(examples)), ""]
    lines += ["## The same, drawn", "", DRAWN, "", fenced(examples_text(drawn)), ""]
    hint = ""
    if not plots:
        advice = "`pip install matplotlib`, then run `--stages=eval` again"
        lines.append(f"No plots: matplotlib is not installed ({advice}).")
        hint = " (no plots: pip install matplotlib to get them)"
    write_text(out / "report.md", "\n".join(lines) + "\n")
    return f"report: {out / 'report.md'}{hint}"
