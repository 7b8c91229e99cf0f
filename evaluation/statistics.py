"""Who wins and how sure that is: intervals, head to head, length control, a reward model's calibration."""
from __future__ import annotations

import math
from statistics import fmean
from typing import Any, Iterable, Sequence

import numpy as np

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


BUCKETS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, math.inf)  # edges of the margin |s_i - s_j| [nats: the log-odds the model gives]


def calibration(margins: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Compare the probabilities a reward model gives with how often it is right.

    margins: for every prompt, the scores of all its pairs, better less worse as people rank them.
    Of a pair with scores s_i > s_j the model claims that i is better with probability sigmoid(s_i - s_j) (Bradley-Terry).
    Returns: accuracy over all pairs (equal scores half), loss = mean -log sigmoid(margin) [nats], error = mean distance
        between predicted and actual over the buckets, weighted by pairs; pairs; prompts; interval; rows, one per bucket.
        Intervals count prompts, not pairs, since pairs of one prompt are not independent.
    """
    def judge(kept: list[tuple[int, float]]) -> dict[str, Any]:
        prompts, right = len({n for n, _ in kept}), mean(prefer(m, 0.0) for _, m in kept)
        return {"pairs": len(kept), "prompts": prompts, "actual": right, "interval": share_interval(right, prompts),
                "predicted": mean(sigmoid(abs(m)) for _, m in kept)}
    pairs = [(n, margin) for n, row in enumerate(margins) for margin in row]
    rows = [{"from": low, "to": high, **judge([(n, m) for n, m in pairs if low <= abs(m) < high])} for low, high in zip(BUCKETS, BUCKETS[1:])]
    overall = judge(pairs)
    return {"accuracy": overall.pop("actual"), **overall, "loss": mean(math.log1p(math.exp(-abs(m))) + max(-m, 0.0) for _, m in pairs),
            "error": sum(row["pairs"] * abs(row["predicted"] - row["actual"]) for row in rows) / max(len(pairs), 1),
            "rows": [row for row in rows if row["pairs"]]}
