"""What people see of results: the table, and the files of --out."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Sequence

from benchmarks.results import (
    Change, Number, Result, Results, changes, group_change, group_mean, members
)
from benchmarks.tasks import GROUPS
from evaluation.plots import draw_tasks
from formats.files import whole_file, write_json, write_jsonl, write_text
from formats.showing import fenced

READING = """Values and standard errors as lm-evaluation-harness gives them. **change** is the last
model less the one before it, question by question, with the 95 % interval of Agresti and Min
(2005); **noise** marks an interval that holds 0. One interval in twenty misses the truth. Every
question and answer is in answers.jsonl."""


# ---------------------------------------------------------------------------------------------
# The table

def number(x: float, sign: str = "") -> str:
    """Write a number in ten columns; what is undefined is a dash."""
    if abs(x) < 1e4:
        return f"{x:{sign}10.4f}"
    return f"{x:{sign}10.3g}" if math.isfinite(x) else f"{'-':>10}"


def numbers_text(columns: Sequence[Number | None], changed: Change | None) -> str:
    """Write the value and error of one model, or the values of several and what changed."""
    if len(columns) == 1:
        (only,) = columns
        return number(only.value) + number(only.error)
    text = "".join(f"{number(column.value if column else math.nan):>12}" for column in columns)
    if changed:
        text += number(changed.value, "+")
        text += f"{number(changed.low, '+')} to {number(changed.high, '+').strip():10}"
        if changed.low <= 0 <= changed.high:
            text += "noise"
    return text.rstrip()


def row_text(
    task: str, shots: object, metric: str, n: object, skipped: object, numbers: str
) -> str:
    """Lay out one line of the table."""
    return f"{task:24}{shots:>5}  {metric:30}{n:>7}{skipped:>9}{numbers}"


def heading(results: Results) -> str:
    """Return the first line of the table."""
    if len(results) == 1:
        numbers = f"{'value':>10}{'stderr':>10}"
    else:
        models = "".join(f"{name[-11:]:>12}" for name in results)
        numbers = f"{models}{'change':>10}   95 % interval"
    return row_text("task", "shots", "metric", "n", "skipped", numbers)


def task_lines(results: Results) -> Iterator[str]:
    """Yield a line per task and metric that any model has."""
    models = list(results.values())
    changed = changes(results)
    for name, result in models[-1].items():
        skipped = result.skipped.total()
        metrics = dict.fromkeys(metric for model in models for metric in model[name].metrics)
        for metric in metrics:
            columns = [model[name].metrics.get(metric) for model in models]
            n = columns[-1].n if columns[-1] else 0
            gained = changed.get(name, {}).get(metric)
            yield row_text(name, result.shots, metric, n, skipped, numbers_text(columns, gained))
        if not metrics:
            yield row_text(name, "-", "-", 0, skipped, "")


def group_lines(results: Results, groups: Sequence[str]) -> Iterator[str]:
    """Yield a line per group: the mean over those of its tasks that every model was asked."""
    for group in groups:
        names = members(group, results)
        if names:
            label = f"mean over {len(names)} of {len(GROUPS[group])} tasks"
            columns = [group_mean(names, model) for model in results.values()]
            yield f"{group:31}{label:46}{numbers_text(columns, group_change(names, results))}"


def note_lines(results: Results) -> Iterator[str]:
    """Yield what was left out or cut, by model; of a task that was not run, the same for all."""
    for model, tasks in results.items():
        for name, result in tasks.items():
            who = f"{model}, {name}" if len(results) > 1 else name
            for reason, count in result.skipped.items():
                yield f"{who}: {count} skipped: {reason}" if count else f"{name}: not run: {reason}"
            if result.truncated:
                yield (
                    f"{who}: {result.truncated} prompts longer than the model's context "
                    "lost their beginning"
                )


def table(results: Results, groups: Sequence[str]) -> str:
    """Lay out results for a terminal: a line per task and metric, one per group, then notes."""
    notes = dict.fromkeys(note_lines(results))  # each once
    lines = [heading(results), *task_lines(results), *group_lines(results, groups)]
    return "\n".join([*lines, *notes])


# ---------------------------------------------------------------------------------------------
# The files

def plain(x: NamedTuple | None) -> dict[str, Any] | None:
    """Return a named tuple as plain JSON; what is undefined is null."""
    if x is None:
        return None
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in x._asdict().items()
    }


def plain_all(named: dict[str, Any]) -> dict[str, Any]:
    return {name: plain(x) for name, x in named.items()}


def result_json(result: Result) -> dict[str, Any]:
    """Return the result of one task."""
    parts = {metric: plain_all(parts) for metric, parts in result.parts.items() if len(parts) > 1}
    return {
        "metrics": plain_all(result.metrics),
        "shots": result.shots,
        "skipped": dict(result.skipped),
        "truncated": result.truncated,
        "parts": parts,
    }


def to_json(results: Results, groups: Sequence[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Return results as plain JSON: settings, models, and the changes if there are several."""
    grouped = {group: members(group, results) for group in groups}
    models = {
        model: {
            "groups": plain_all({
                group: group_mean(some, tasks) for group, some in grouped.items()
            }),
            "tasks": {name: result_json(result) for name, result in tasks.items()},
        }
        for model, tasks in results.items()
    }
    written = {"settings": settings, "models": models}
    if len(results) > 1:
        written["changes"] = {
            "groups": plain_all({
                group: group_change(some, results) for group, some in grouped.items()
            }),
            "tasks": {name: plain_all(row) for name, row in changes(results).items()},
        }
    return written


def answer_rows(results: Results) -> Iterator[dict[str, Any]]:
    """Yield every answer of every model."""
    for model, tasks in results.items():
        for name, result in tasks.items():
            for answer in result.answers:
                yield {"model": model, "task": name, **answer}


def draw(results: Results) -> Any:
    """Draw the first metric of every task; None without matplotlib."""
    values = {
        model: {
            name: result.metrics[result.first].value
            for name, result in tasks.items()
            if result.metrics
        }
        for model, tasks in results.items()
    }
    changed = {}
    for name, row in changes(results).items():
        first = next(iter(row.values()), None)
        if first:
            changed[name] = first.value, (first.low, first.high)
    return draw_tasks(values, changed)


def write(folder: Path, results: Results, groups: Sequence[str], settings: dict[str, Any]) -> None:
    """Write results.json, answers.jsonl and report.md, with a plot if matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", to_json(results, groups, settings))
    write_jsonl(folder / "answers.jsonl", answer_rows(results))

    lines = ["# Benchmarks", "", fenced(table(results, groups)), "", READING, ""]
    figure = draw(results)
    if figure:
        with whole_file(folder / "tasks.png") as file:
            figure.savefig(file, format="png", dpi=110)
        lines += ["![tasks](tasks.png)", ""]
    write_text(folder / "report.md", "\n".join(lines))
