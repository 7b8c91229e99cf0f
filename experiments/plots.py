"""Pictures of an ablation, with matplotlib where it is installed."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Mapping, Sequence

from evaluation.plots import pyplot
from experiments.factors import Factor
from experiments.summary import Outcome, general, in_domain, over_seeds

# Okabe and Ito's colours, which people with any kind of colour blindness tell apart; marks differ
# as well, for print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKS = "osD^vPX*"
Found = Mapping[str, Sequence[Outcome]]


def draw_factor(name: str, factor: Factor, found: Found, out: Path) -> list[str]:
    """Draw a factor's pictures; return the files' names, [] without matplotlib."""
    plots = pyplot()
    if not plots:
        return []
    figures = {name: draw_variants(plots, found)}
    if factor.plot:
        figures[f"{name}_curve"] = CURVES[factor.plot](plots, found)
    for title, figure in figures.items():
        figure.savefig(out / f"{title}.png", dpi=110)
        plots.close(figure)
    return [f"{title}.png" for title in figures]


def draw_variants(plots: Any, found: Found) -> Any:
    """Draw strict and general of every variant: the mean over seeds, its interval, the seeds."""
    height = 0.36 * len(found) + 1.3
    figure, axes = plots.subplots(1, 2, figsize=(10, height), sharey=True, constrained_layout=True)
    rows = range(len(found))
    for axis, label, values_of in (
            (axes[0], "strict in-domain [%]", lambda one: in_domain(one, one.strict)),
            (axes[1], "general tasks [%]", general)):
        for row, ones in zip(rows, found.values()):
            values = [values_of(one) for one in ones]
            mean, low, high = (100 * x for x in over_seeds(values))
            axis.plot([100 * value for value in values], [row] * len(values), "|", color="#999999",
                      markersize=10)
            if not math.isnan(low):
                # an interval of three seeds can be wider than all that is possible
                ends = [max(low, 0.0), min(high, 100.0)]
                axis.plot(ends, [row, row], color=COLOURS[0], linewidth=2)
            axis.plot(mean, row, "o", color=COLOURS[0], markersize=6)
        axis.set(xlabel=f"{label}\nmean, 95 % interval over seeds; bars: single seeds")
        axis.grid(axis="x", color="0.9")
    axes[0].set(yticks=list(rows), yticklabels=list(found), ylim=(len(found) - 0.5, -0.5))
    return figure


def draw_kl(plots: Any, found: Found) -> Any:
    """Draw proxy and gold against the square root of the KL (Gao et al. 2022)."""
    figure, axes = plots.subplots(1, 2, figsize=(10, 4.2), sharex=True, constrained_layout=True)
    titles = (("score_mean", "score of the reward model (proxy)"),
              ("judge_mean", "gold score of the same answers"))
    for axis, (metric, title) in zip(axes, titles):
        for i, (label, ones) in enumerate(found.items()):
            # the seeds' mean at every iteration, every third one marked
            steps = list(zip(*(one.path for one in ones)))
            x = [math.sqrt(max(sum(row["kl"] for row in step) / len(step), 0)) for step in steps]
            y = [sum(row[metric] for row in step) / len(step) for step in steps]
            axis.plot(x, y, color=COLOURS[i], marker=MARKS[i], markersize=4, linewidth=0.8,
                      markevery=3, label=label)
            axis.plot(x[-1], y[-1], MARKS[i], color=COLOURS[i], markersize=11,
                      markerfacecolor="white")
        axis.set(title=title, xlabel="square root of the KL to the SFT model [nats ** 0.5]")
        axis.set(ylabel="mean over a rollout")
        axis.grid(color="0.9")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5,
                  title="kl_coef (a large hollow mark is where training ended)", frameon=False)
    return figure


def draw_budget(plots: Any, found: Found) -> Any:
    """Draw strict against the number of rankings, a line per method."""
    figure, axis = plots.subplots(figsize=(7, 4.2), constrained_layout=True)
    methods: dict[str, list[tuple[float, Sequence[Outcome]]]] = {}
    for label, ones in found.items():
        points = methods.setdefault(label.rpartition(",")[0], [])
        points.append((ones[0].rankings, ones))
    for i, (method, points) in enumerate(methods.items()):
        points.sort(key=lambda point: point[0])
        # a little apart, so that intervals do not hide each other
        x = [n * 1.05 ** (i - 1.5) for n, _ in points]
        stats = [over_seeds([100 * in_domain(one, one.strict) for one in ones])
                 for _, ones in points]
        below = [mean - max(low, 0.0) if low == low else 0.0 for mean, low, _ in stats]
        above = [min(high, 100.0) - mean if high == high else 0.0 for mean, _, high in stats]
        axis.errorbar(x, [mean for mean, _, _ in stats], [below, above], color=COLOURS[i],
                      marker=MARKS[i], capsize=3, linewidth=1.2, label=method)
    axis.set(xscale="log", xlabel="ranked prompts, five answers each",
             ylabel="strict in-domain [%], 95 % intervals over seeds")
    axis.grid(color="0.9")
    axis.legend(frameon=False)
    return figure


def spread(values: dict[str, float], apart: float = 5.0) -> dict[str, float]:
    """Move values that are closer than `apart` away from each other, so that no point hides one."""
    moved: dict[str, float] = {}
    last = -apart
    for label, value in sorted(values.items(), key=lambda item: item[1]):
        last = moved[label] = max(value, last + apart)
    return moved


def draw_methods(plots: Any, found: Found) -> Any:
    """Draw strict against the seconds that a method takes."""
    figure, axis = plots.subplots(figsize=(7.5, 4.2), constrained_layout=True)
    taken = {label: sum(one.seconds for one in ones) / len(ones) for label, ones in found.items()}
    at = spread(taken)
    for i, (label, ones) in enumerate(found.items()):
        mean, low, high = over_seeds([100 * in_domain(one, one.strict) for one in ones])
        ends = [[mean - max(low, 0.0)], [min(high, 100.0) - mean]] if low == low else None
        axis.errorbar(at[label], mean, ends, color=COLOURS[i], marker=MARKS[i], capsize=3,
                      linestyle="", markersize=7, label=label)
    axis.set(xlabel="seconds of one core, all that the method needs (drawn 5 s apart)",
             ylabel="strict in-domain [%], 95 % intervals over seeds", xlim=(0, None))
    axis.grid(color="0.9")
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


CURVES = {"kl": draw_kl, "budget": draw_budget, "methods": draw_methods}
