"""Plots, with matplotlib where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, Sequence

from evaluation.statistics import SHARES, Interval
from formats.files import read_log, whole_file

# Okabe and Ito's colours, which people with any kind of colour blindness tell apart. The models of
# every run keep theirs; others take the rest in turn. Grey is for what does not matter.
COLOURS = {"base": "#BBBBBB", "sft": "#0072B2", "top": "#009E73", "ppo": "#D55E00"}
MORE_COLOURS = ("#56B4E9", "#CC79A7", "#E69F00", "#F0E442")
NOISE = "#999999"


def pyplot() -> Any:
    """Return matplotlib's pyplot, for files alone; None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    # before pyplot is imported, which would look for a screen
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for every model, the same in every plot."""
    others = [name for name in names if name not in COLOURS]
    extra = {name: MORE_COLOURS[i % len(MORE_COLOURS)] for i, name in enumerate(others)}
    return {name: COLOURS.get(name) or extra[name] for name in names}


# -------------------------------------------------------------------------------------------------
# Tasks: what each model can do, and what changed


def draw_tasks(
    models: Mapping[str, Mapping[str, float]],
    changed: Mapping[str, tuple[float, Interval]],
    reference: str = "",
) -> Any:
    """Draw a bar per task and model, and beside it the change of the last model with its interval.

    models: model -> task -> value in [0, 1].   changed: task -> change, interval.
    reference: the model that the last one is compared with; "": the one before it.
    Returns a figure; None without tasks or matplotlib.
    """
    plots = pyplot()
    tasks = list(dict.fromkeys(task for values in models.values() for task in values))
    if not tasks or not plots:
        return None
    row_height = 0.36 * max(len(models) / 3, 1.0)  # inches; more models, more room
    figure, (bars, intervals) = plots.subplots(
        1,
        2,
        figsize=(10, row_height * len(tasks) + 1.2),
        sharey=True,
        constrained_layout=True,
        gridspec_kw={"width_ratios": [3, 2]},
    )
    draw_bars(bars, models, tasks)
    figure.legend(loc="outside upper left", ncols=len(models), frameon=False)
    names = list(models)
    draw_changes(intervals, changed, tasks, colours_of(names)[names[-1]])
    if len(names) > 1:
        compared = f"{names[-1]} less {reference or names[-2]} [points]"
        intervals.set_xlabel(f"{compared}\n95 % intervals; grey and hollow: noise")
    return figure


def draw_bars(axis: Any, models: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> None:
    """Draw the models' bars below each other in the row of every task."""
    colours = colours_of(list(models))
    step = 0.81 / max(len(models), 3)  # of a row's height 1; the rest parts it from the next row
    for i, (name, values) in enumerate(models.items()):
        offset = step * (i - (len(models) - 1) / 2)
        places = [row + offset for row in range(len(tasks))]
        widths = [100 * values.get(task, 0.0) for task in tasks]
        axis.barh(places, widths, 0.93 * step, label=name, color=colours[name])
    axis.set(yticks=range(len(tasks)), yticklabels=tasks, ylim=(len(tasks) - 0.4, -0.6))
    axis.set(xlabel="value [%]", xlim=(0, 101))


def draw_changes(
    axis: Any, changed: Mapping[str, tuple[float, Interval]], tasks: Sequence[str], colour: str
) -> None:
    """Draw changes as points with intervals: hollow and grey where the interval holds 0."""
    # Not by colour alone: noise is hollow too.
    for row, task in enumerate(tasks):
        if task not in changed:
            continue
        value, (low, high) = changed[task]
        is_noise = low <= 0 <= high
        line = NOISE if is_noise else colour
        fill = "white" if is_noise else colour
        axis.plot([100 * low, 100 * high], [row, row], color=line, linewidth=2)
        axis.plot(100 * value, row, "o", color=line, markerfacecolor=fill, markersize=5)
    axis.axvline(0, color="0.3", linewidth=0.8, zorder=0)


def draw_results(results: Mapping[str, Any]) -> Any:
    """Draw the shares in-domain and the general tasks of all models; None where there are none."""
    models = {name: shares_of(model) for name, model in results["models"].items()}
    last = list(models)[-1]
    changes = results["changes"].get(last, {})
    # The same rows' names on both sides, or a change would stand in no row.
    changed = {
        f"in-domain: {metric}": change for metric, change in changes.get("in_domain", {}).items()
    }
    changed.update(changes.get("general", {}).get("tasks", {}))
    points = {task: (change["change"], change["interval"]) for task, change in changed.items()}
    return draw_tasks(models, points, results["reference"])


def shares_of(model: Mapping[str, Any]) -> dict[str, float]:
    """Return the rows of a model in the picture: what is known to be a share in [0, 1]."""
    rows = {
        f"in-domain: {metric}": model["in_domain"][metric]
        for metric in SHARES
        if metric in model["in_domain"]
    }
    return {**rows, **model.get("general", {}).get("tasks", {})}


# -------------------------------------------------------------------------------------------------
# Curves: what happened on the way

# stage -> statistics of its steps and their units
CURVES = {
    "sft": {"loss": "nats per token", "grad_norm": "gradient's norm"},
    "reward": {"loss": "nats per prompt", "accuracy": "share of pairs"},
    "ppo": {
        "score_mean": "mean score",
        "kl": "nats per response",
        "entropy": "nats per token",
        "response_length": "tokens",
        "explained_variance": "share of variance",  # not there without a critic
        "clip_fraction": "share of tokens",
    },
}


def write_plots(out: Path, results: Mapping[str, Any]) -> list[str]:
    """Draw the tasks, score against KL, and the curves of metrics.jsonl as PNG files.

    Returns the files' names, [] without matplotlib.
    """
    plots = pyplot()
    if not plots:
        return []
    rows = read_log(out / "metrics.jsonl")
    stages = {stage: [row for row in rows if row["stage"] == stage] for stage in CURVES}
    figures = {"tasks": draw_results(results), "score_against_kl": draw_path(plots, stages["ppo"])}
    figures |= {stage: draw_curves(plots, stage, steps) for stage, steps in stages.items()}
    names = []
    for name, figure in figures.items():
        if figure:
            with whole_file(out / f"{name}.png") as file:
                figure.savefig(file, format="png", dpi=110)
            plots.close(figure)
            names.append(f"{name}.png")
    return names


def draw_path(plots: Any, rows: Sequence[Mapping[str, float]]) -> Any:
    """Draw PPO's iterations as points: how far the policy went, and what it got for that.

    A score that rises while the judge's falls is the picture of over-optimisation.
    """
    if not rows:
        return None
    titles = {"score_mean": "score that pays", "judge_mean": "score of the judging function"}
    titles = {name: title for name, title in titles.items() if name in rows[0]}
    figure, axes = plots.subplots(
        1, len(titles), figsize=(4.6 * len(titles) + 0.8, 3.6), constrained_layout=True,
        squeeze=False)
    # Time runs along the colour, not along an axis: the two may move back and forth.
    kl = [row["kl"] for row in rows]
    steps = [row["step"] for row in rows]
    for axis, (name, title) in zip(axes.flat, titles.items()):
        points = axis.scatter(kl, [row[name] for row in rows], c=steps, s=18, cmap="viridis")
        axis.set(title=title, xlabel="KL to the start [nats per response]")
        axis.set(ylabel="mean over a rollout")
    figure.colorbar(points, label="iteration")
    return figure


def draw_curves(plots: Any, stage: str, rows: Sequence[Mapping[str, float]]) -> Any:
    """Draw a stage's statistics against its steps, those that it logged."""
    units = {name: unit for name, unit in CURVES[stage].items() if any(name in row for row in rows)}
    if not units:
        return None
    n_columns = min(len(units), 3)
    n_lines = -(-len(units) // n_columns)
    figure, axes = plots.subplots(
        n_lines,
        n_columns,
        figsize=(3.4 * n_columns, 2.6 * n_lines + 0.3),
        constrained_layout=True,
        squeeze=False,
    )
    for axis, (name, unit) in zip(axes.flat, units.items()):
        axis.plot([row["step"] for row in rows], [row.get(name) for row in rows], linewidth=0.8)
        axis.set(title=name, xlabel="iteration" if stage == "ppo" else "step", ylabel=unit)
    # The grid may have more places than there are curves.
    for axis in list(axes.flat)[len(units) :]:
        axis.set_axis_off()
    figure.suptitle(stage)
    return figure
