"""Plots, with matplotlib where it is installed."""
from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, Sequence

from evaluation.statistics import Interval
from formats.files import read_jsonl


def pyplot() -> Any:
    """Return matplotlib's pyplot, for files alone; None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def draw_tasks(models: Mapping[str, Mapping[str, float]], changed: Mapping[str, tuple[float, Interval]]) -> Any:
    """Draw a bar per task and model, and beside it the change of the last model with its interval, grey where it is noise.

    models: model -> task -> value in [0, 1].   changed: task -> change, interval.   Returns a figure; None without tasks or matplotlib.
    """
    tasks, plots = list(dict.fromkeys(task for values in models.values() for task in values)), pyplot()
    if not tasks or not plots:
        return None
    figure, (bars, intervals) = plots.subplots(1, 2, figsize=(10, 0.36 * len(tasks) + 1), sharey=True, constrained_layout=True,
                                               gridspec_kw={"width_ratios": [3, 2]})
    for i, (name, values) in enumerate(models.items()):
        places = [row + 0.81 / max(len(models), 3) * (i - (len(models) - 1) / 2) for row in range(len(tasks))]
        bars.barh(places, [100 * values.get(task, 0.0) for task in tasks], 0.75 / max(len(models), 3), label=name,
                  color={"base": "0.75", "sft": "C0", "ppo": "C1"}.get(name, f"C{i + 2}"))
    bars.set(yticks=range(len(tasks)), yticklabels=tasks, ylim=(len(tasks) - 0.4, -0.6), xlabel="%", xlim=(0, 100))
    figure.legend(loc="outside upper left", ncols=3, frameon=False)
    for row, task in enumerate(tasks):
        if task in changed:
            value, (low, high) = changed[task]
            colour = "0.65" if low <= 0 <= high else "C1"
            intervals.plot([100 * low, 100 * high], [row, row], color=colour, linewidth=2)
            intervals.plot(100 * value, row, "o", color=colour, markersize=4)
    intervals.axvline(0, color="0.3", linewidth=0.8)
    before, last = list(models)[-2:] if len(models) > 1 else ("", "")
    intervals.set(xlabel=f"{last} less {before}, points; 95 % intervals, grey: noise" if last else "")
    return figure


CURVES = {
    "sft": [("loss", "nats per token"), ("grad_norm", "")],
    "reward": [("loss", "nats per prompt"), ("accuracy", "share of pairs")],
    "ppo": [("score_mean", "reward (std of SFT)"), ("kl", "nats per response"), ("entropy", "nats per token"),
            ("response_length", "tokens"), ("explained_variance", ""), ("clip_fraction", "share of tokens")],
}


def write_plots(out: Path, results: dict) -> list[str]:
    """Draw the tasks, score against KL, and the curves of metrics.jsonl as PNG files; return their names, [] without matplotlib."""
    plots = pyplot()
    if not plots:
        return []
    rows = read_jsonl(out / "metrics.jsonl") if (out / "metrics.jsonl").exists() else []
    figures = {"tasks": draw_rows(results), "score_against_kl": draw_path(plots, [row for row in rows if row["stage"] == "ppo"]),
               **{stage: draw_curves(plots, stage, [row for row in rows if row["stage"] == stage]) for stage in CURVES}}
    for name, figure in figures.items():
        if figure:
            figure.savefig(out / f"{name}.png", dpi=110)
            plots.close(figure)
    return [f"{name}.png" for name, figure in figures.items() if figure]


def draw_rows(results: dict) -> Any:
    """Draw the in-domain metrics and the general tasks of all models; None on prompts without a rubric."""
    models = {name: {**{f"ads: {key}": model["in_domain"][key] for key in ("gold", "strict", "multi", "verdict")}, **model["general"]["tasks"]}
              for name, model in results["models"].items() if "general" in model}
    changed = {f"ads: {key}": row for key, row in results["changes"].get("in_domain", {}).items()}
    changed.update(results["changes"].get("general", {}).get("tasks", {}))
    return draw_tasks(models, {task: (row["change"], row["interval"]) for task, row in changed.items()})


def draw_path(plots: Any, rows: Sequence[Mapping[str, float]]) -> Any:
    """Draw PPO's iterations as points: how far the policy went from SFT, and what score it got for that."""
    if not rows:
        return None
    figure, axis = plots.subplots(figsize=(5.2, 3.6), constrained_layout=True)
    points = axis.scatter([row["kl"] for row in rows], [row["score_mean"] for row in rows], c=[row["step"] for row in rows], s=18)
    axis.set(title="score against KL", xlabel="KL to SFT [nats per response]", ylabel="reward [std of SFT]")
    figure.colorbar(points, label="iteration")
    return figure


def draw_curves(plots: Any, stage: str, rows: Sequence[Mapping[str, float]]) -> Any:
    """Draw a stage's statistics against its steps."""
    if not rows:
        return None
    columns = min(len(CURVES[stage]), 3)
    lines = len(CURVES[stage]) // columns
    figure, axes = plots.subplots(lines, columns, figsize=(3.4 * columns, 2.6 * lines), constrained_layout=True)
    for axis, (name, unit) in zip(axes.flat, CURVES[stage]):
        axis.plot([row["step"] for row in rows], [row.get(name) for row in rows], linewidth=0.8)
        axis.set(title=name, xlabel="iteration" if stage == "ppo" else "step", ylabel=unit)
    figure.suptitle(stage)
    return figure
