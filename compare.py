"""Who wins, and how sure that is: intervals, head to head, length control, judgments by people, the page a person reads."""
from __future__ import annotations

import html
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any, Iterable, Iterator, Mapping, NamedTuple, Sequence

import numpy as np

import data


# ---------------------------------------------------------------------------------------------
# How sure: 95 % intervals

Z = 1.959964  # of the normal distribution
Interval = tuple[float, float]


def mean(values: Iterable[float]) -> float:
    """Return the mean, 0.0 of nothing."""
    values = [float(value) for value in values]
    return fmean(values) if values else 0.0


def share_interval(share: float, n: int) -> Interval:
    """Return the 95 % interval of a share in [0, 1] of n independent cases. Source: Wilson 1927."""
    if not n:
        return 0.0, 1.0
    centre, half = share + Z * Z / (2 * n), Z * math.sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2)
    return max((centre - half) / (1 + Z * Z / n), 0.0), min((centre + half) / (1 + Z * Z / n), 1.0)


def change_interval(strata: Sequence[Sequence[float]], pseudo: float = 2.0) -> Interval:
    """Return the 95 % interval of the mean over strata of their mean paired differences.

    strata: differences on the same prompts, in [-1, 1].   pseudo: pairs added to each stratum, a quarter of them won, a
        quarter lost, half tied: without them no difference in 60 prompts would have an interval of width 0. 0 for
        differences without bounds. Source: Agresti and Min 2005 (2 pairs).
    """
    means, variances = [], []
    for differences in strata:
        n = len(differences) + pseudo
        means.append(sum(differences) / n)
        variances.append(((sum(d * d for d in differences) + pseudo / 2) / n - means[-1] ** 2) / n)
    half = Z * math.sqrt(sum(variances)) / len(strata)
    low, high = mean(means) - half, mean(means) + half
    return (max(low, -1.0), min(high, 1.0)) if pseudo else (low, high)


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


# ---------------------------------------------------------------------------------------------
# Head to head

def prefer(a: float, b: float) -> float:
    """Return the preference for the first of two scores: 1 higher, 0.5 equal, 0 lower."""
    return 0.5 + 0.5 * ((a > b) - (a < b))


def contest(preferences: Sequence[float], lengths: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Sum up judged pairs of answers.

    preferences: for the first of each pair, in [0, 1]; 0.5 is a tie.   lengths: of both answers [characters].
    Returns: shares win, tie, loss; win_rate = mean preference (ties half); length_controlled; longer_by, the mean
        difference in length; n; intervals of them all.
    """
    n, rate = len(preferences), mean(preferences)
    gaps = [a - b for a, b in lengths]
    shares = {"win": mean(p > 0.5 for p in preferences), "tie": mean(p == 0.5 for p in preferences), "loss": mean(p < 0.5 for p in preferences)}
    low, high = change_interval([[2 * p - 1 for p in preferences]])
    controlled, between = length_controlled(preferences, gaps)
    return {**shares, "win_rate": rate, "length_controlled": controlled, "longer_by": mean(gaps), "n": n,
            "intervals": {**{name: share_interval(share, n) for name, share in shares.items()},
                          "win_rate": ((1 + low) / 2, (1 + high) / 2), "length_controlled": between}}


def length_controlled(preferences: Sequence[float], gaps: Sequence[float]) -> tuple[float, Interval]:
    """Return the win rate had both answers been equally long, and its 95 % interval.

    Fits preference = sigmoid(theta + phi tanh(gap / std of gaps)) and returns sigmoid(theta). preferences: (n,) in [0, 1].
    gaps: (n,) length of the first answer less that of the second [characters]. The interval is that of theta with the
    pseudo-pairs of `change_interval`, robust to preferences being shares (Papke and Wooldridge 1996).
    Source: Dubois et al. 2024 (AlpacaEval 2), without the term for an instruction's difficulty, which takes the results
    of many models, and with a ridge of 0.01 where they choose a lasso, so that separable data have a finite fit. Where one
    side is nearly always longer, equal length is an extrapolation, which the interval shows. Where completeness is what
    people want, length is part of quality, and controlling for it takes that away.
    """
    p, gap = np.array(preferences), np.array(gaps, dtype=float)
    deviation = gap.std(ddof=1) if len(gap) > 1 else 0.0
    x = np.stack([np.ones_like(gap), np.tanh(gap / deviation) if deviation else np.zeros_like(gap)], axis=1)
    theta, _ = fit_logistic(x, p, np.ones_like(p))
    x, p = np.vstack([x, [[1, 0]] * 3]), np.append(p, [1, 0, 0.5])
    centre, half = fit_logistic(x, p, np.append(np.ones_like(gap), [0.5, 0.5, 1]))
    rate = sigmoid(theta)
    return rate, (min(sigmoid(centre - half), rate), max(sigmoid(centre + half), rate))


def fit_logistic(x: np.ndarray, p: np.ndarray, weights: np.ndarray, ridge: float = 0.01) -> tuple[float, float]:
    """Fit shares p (n,) by sigmoid(x beta), x (n, 2), by Newton's method; return beta[0] and the half width of its 95 % interval."""
    beta = np.zeros(2)
    for _ in range(100):
        fitted = 1 / (1 + np.exp(-x @ beta))
        hessian = (x.T * (weights * fitted * (1 - fitted))) @ x + ridge * np.eye(2)
        step = np.linalg.solve(hessian, x.T @ (weights * (p - fitted)) - ridge * beta)
        beta += step * min(1.0, 2 / max(np.abs(step).max(), 1e-12))  # a whole step can overshoot where the curve is flat
    spread = np.linalg.solve(hessian, (x.T * np.sqrt(weights) * (p - fitted)))
    return float(beta[0]), Z * float(np.sqrt((spread[0] ** 2).sum()))


def sigmoid(x: float) -> float:
    return 0.5 * (1 + math.tanh(x / 2))


def with_interval(name: str, numbers: Mapping[str, Any]) -> str:
    """Write a share of a contest with its interval."""
    low, high = numbers["intervals"][name]
    return f"{100 * numbers[name]:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def results_text(numbers: Mapping[str, Any]) -> str:
    return f"wins {with_interval('win', numbers)}, ties {with_interval('tie', numbers)}, losses {with_interval('loss', numbers)}"


def contest_text(name: str, numbers: Mapping[str, Any]) -> str:
    """Write a contest's numbers as lines; a rate is followed by its 95 % interval."""
    return "\n".join([
        f"{name} (n={numbers['n']}): {results_text(numbers)}",
        f"  win rate, ties half         {with_interval('win_rate', numbers)}",
        f"  the same at equal length    {with_interval('length_controlled', numbers)}; "
        f"mean difference in length {numbers['longer_by']:+.0f} characters"])


# ---------------------------------------------------------------------------------------------
# Judgments by people, or by a model that is asked

class Pair(NamedTuple):
    """Two answers to one prompt and the preference for the first, in [0, 1]."""
    prompt: str
    first: str
    second: str
    preference: float
    notes: tuple[str, str] = ("", "")   # what the judge says of each answer
    truth: str = ""
    group: str = "prompts"


def read_judgments(path: Path, first: str, second: str) -> tuple[list[Pair], str]:
    """Read judgments of two generators' answers in AlpacaEval's form, and return the pairs and a line about the judge.

    A row: {instruction, output_1, generator_1, output_2, generator_2, preference}, with `preference` as in
    data.get_preference. A pair judged in both orders counts once, with the mean of both preferences, so that a judge who
    always prefers the first place gives ties.
    """
    found: dict[tuple[str, str, str], list[tuple[int, float | None]]] = defaultdict(list)
    generators: set[str] = set()
    for source, raw in data.read_rows(path):
        try:
            row = data.parse_row(raw)
            names = data.get(row, "generator_1"), data.get(row, "generator_2")
            texts, preference = (data.get(row, "output_1"), data.get(row, "output_2")), data.get_preference(row)
            key = "\n\n".join(filter(None, (data.get(row, "instruction"), data.get_optional(row, "input"))))
        except data.BadRow as fault:
            raise ValueError(f"{source}: {fault}") from None
        generators |= set(names)
        if set(names) == {first, second}:
            place = names.index(second)  # 1: our first stands first, and preferences speak of output 2
            found[key, texts[1 - place], texts[place]].append((place, None if preference is None else abs(place - (preference - 1))))
    votes = {key: [(place, vote) for place, vote in rows if vote is not None] for key, rows in found.items()}
    pairs = [Pair(*key, mean(vote for _, vote in rows)) for key, rows in votes.items() if rows]
    if not pairs:
        names = ", ".join(sorted(generators)) or "none"
        raise ValueError(f"{path}: no judged row compares {first} and {second}" + (f"; its generators are {names}" if not found else
                         ": set every \"preference\" to 1 or 2 (the better output) or 1.5 (a tie)"))
    both = [rows for rows in votes.values() if len({place for place, _ in rows}) == 2]
    said = f"judged by {path}: {len(pairs)} pairs, {len(found) - len(pairs)} not annotated"
    if both:
        agreed = mean(len({prefer(vote, 0.5) for _, vote in rows}) == 1 for rows in both)
        said += f", {len(both)} in both orders with the same verdict in {100 * agreed:.0f} %"
    return pairs, said


def to_judge(first: str, second: str, pairs: Sequence[Pair]) -> Iterator[dict[str, Any]]:
    """Yield the rows that people or a model are to judge: each pair in both orders, far apart; equal answers are ties already."""
    for turn in (0, 1):
        for i, pair in enumerate(pairs):
            sides = [(first, pair.first), (second, pair.second)]
            (name_1, text_1), (name_2, text_2) = sides if (i + turn) % 2 == 0 else sides[::-1]
            yield {"instruction": pair.prompt, "output_1": text_1, "generator_1": name_1, "output_2": text_2, "generator_2": name_2,
                   "preference": 1.5 if text_1 == text_2 else None}


# ---------------------------------------------------------------------------------------------
# The page

PAGE = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.45 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222 }}
section {{ border-top: 1px solid #ccc; padding: .6em 0; display: grid; grid-template-columns: 1fr 1fr; gap: .3em 2em }}
p {{ margin: 0; white-space: pre-wrap; overflow-wrap: anywhere }} .prompt, .truth {{ grid-column: 1 / 3 }} .prompt {{ font-weight: bold }}
.truth, small {{ color: #777 }} .better {{ background: #e4f3e4 }} pre {{ background: #f5f5f5; padding: 1em; white-space: pre-wrap }}
</style><h1>{title}</h1><pre>{summary}</pre><nav>{links}</nav>
{body}</html>
"""


def write_page(path: Path, first: str, second: str, summary: str, pairs: Sequence[Pair]) -> None:
    """Write one HTML file with all answers side by side: what the first lost, then won, then ties."""
    def side(name: str, text: str, note: str, is_better: bool) -> str:
        return f"<p{' class=better' if is_better else ''}><small>{html.escape(' '.join((name, note)))}</small>\n{html.escape(text)}</p>"

    def section(pair: Pair) -> str:
        sides = side(first, pair.first, pair.notes[0], pair.preference > 0.5) + side(second, pair.second, pair.notes[1], pair.preference < 0.5)
        truth = f"<p class=truth><small>truth</small> {html.escape(pair.truth)}</p>" if pair.truth else ""
        return f"<section><p class=prompt>{html.escape(pair.prompt)}</p>{sides}{truth}</section>"
    links, body = [], []
    for name, sign in (("losses", 0.0), ("wins", 1.0), ("ties", 0.5)):
        chosen = [pair for pair in pairs if prefer(pair.preference, 0.5) == sign]
        links.append(f"<a href=#{name}>{name}: {len(chosen)}</a>")
        body += [f"<h2 id={name}>{html.escape(first)}, {name}: {len(chosen)}</h2>", *map(section, chosen)]
    title = html.escape(f"{first} against {second}")
    path.write_text(PAGE.format(title=title, summary=html.escape(summary), links=" &middot; ".join(links), body="\n".join(body)), encoding="utf-8")
