"""Who wins and how sure that is: intervals, head to head, length control, calibration.

Every number of an evaluation is an estimate from a few hundred prompts. Each therefore comes with
a 95 % interval, and a change whose interval holds 0 is called noise. All models answer the same
prompts, so changes are those of pairs: how hard a prompt is cancels out.
"""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any, Iterable, NamedTuple, Sequence

import numpy as np

Z = 1.959964  # 95 % of the normal distribution lie within so many standard deviations
Interval = tuple[float, float]

# Metrics that are known to be shares in [0, 1]: what they mean, in the order in which tables show
# them. Tables give them in percent, and the bounds make their intervals safer (change_interval).
# Any other name is a user's own metric; nothing is known of its unit, so it is shown as it is.
SHARES = {
    "gold": "rubric score",
    "strict": "exactly right",
    "multi": "so on 2+ faults",
    "verdict": "verdict",
}


def mean(values: Iterable[float]) -> float:
    """Return the mean, 0.0 of nothing."""
    values = [float(value) for value in values]
    return fmean(values) if values else 0.0


# -------------------------------------------------------------------------------------------------
# Intervals


def share_interval(share: float, n: int) -> Interval:
    """Return the 95 % interval of a share in [0, 1] of n independent cases.

    The textbook's share +- 1.96 sqrt(share (1 - share) / n) has width 0 when all n cases are alike:
    10 right of 10 would prove that nothing ever goes wrong. Wilson asks the question the other way
    round, which true shares p would not be surprised by what was seen:

        |share - p| <= 1.96 sqrt(p (1 - p) / n)

    and solves that for p. The interval stays within [0, 1]; for 10 of 10 it is 0.72 to 1.
    Source: Wilson 1927.
    """
    if not n:
        return 0.0, 1.0
    z2 = Z * Z / n
    centre = (share + z2 / 2) / (1 + z2)
    half = Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n)) / (1 + z2)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def change_interval(strata: Sequence[Sequence[float]], pseudo: float = 2.0) -> Interval:
    """Return the 95 % interval of the mean over strata of their mean paired differences.

    strata: differences on the same prompts; one stratum, or one per task, each of equal weight.
    pseudo: pairs added, shared evenly by the strata; a quarter of them won (+1), a quarter lost
        (-1), half tied. Without them two models that agree on 60 prompts would differ by 0 +- 0, as
        if no prompt on earth could tell them apart; with them it is 0 +- 3 points. They pull the
        centre a little towards 0, so there are as many in all as in one stratum: 2 in each of 12
        would pull large changes out of their interval. They presume differences in [-1, 1]: 0 for
        numbers without bounds.
    Source: Agresti and Min 2005 (2 pairs).
    """
    found = mean(mean(differences) for differences in strata)
    means = []
    variances = []  # of each stratum's mean
    added = pseudo / len(strata)
    for differences in strata:
        n = len(differences) + added
        centre = sum(differences) / n
        squares = sum(d * d for d in differences) + added / 2  # half of the pseudo-pairs are +-1
        means.append(centre)
        variances.append((squares / n - centre**2) / n)
    # Strata are independent: variances add up, and the mean of k strata divides the deviation by k.
    half = Z * math.sqrt(max(sum(variances), 0.0)) / len(strata)
    # Where nearly all pairs went one way the pull would leave what was found outside: not here.
    low = min(mean(means) - half, found)
    high = max(mean(means) + half, found)
    return (max(low, -1.0), min(high, 1.0)) if pseudo else (low, high)


# -------------------------------------------------------------------------------------------------
# Head to head


def prefer(a: float, b: float) -> float:
    """Return the preference for the first of two scores: 1 higher, 0.5 equal, 0 lower."""
    return 0.5 + 0.5 * ((a > b) - (a < b))


def contest(preferences: Sequence[float], lengths: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Sum up judged pairs of answers.

    preferences: for the first of each pair, in [0, 1]; 0.5 is a tie.
    lengths: of both answers [characters].
    Returns: shares win, tie, loss; win_rate = mean preference (ties half); length_controlled;
        longer_by, the mean difference in length; n; intervals of them all.
    """
    n = len(preferences)
    gaps = [first - second for first, second in lengths]
    shares = {
        "win": mean(p > 0.5 for p in preferences),
        "tie": mean(p == 0.5 for p in preferences),
        "loss": mean(p < 0.5 for p in preferences),
    }
    # A preference p in [0, 1] is a difference 2p - 1 in [-1, 1] between the two sides.
    low, high = change_interval([[2 * p - 1 for p in preferences]])
    controlled, controlled_interval = length_controlled(preferences, gaps)
    intervals = {name: share_interval(share, n) for name, share in shares.items()}
    intervals["win_rate"] = ((1 + low) / 2, (1 + high) / 2)
    intervals["length_controlled"] = controlled_interval
    return {
        **shares,
        "win_rate": mean(preferences),
        "length_controlled": controlled,
        "longer_by": mean(gaps),
        "n": n,
        "intervals": intervals,
    }


def length_controlled(
    preferences: Sequence[float], gaps: Sequence[float]
) -> tuple[float, Interval]:
    """Return the win rate had both answers been equally long, and its 95 % interval.

    Judges, people and models alike, like long answers, and PPO finds that out: a win rate can rise
    because answers grew. So a preference is explained by two terms,

        preference = sigmoid(theta + phi tanh(gap / deviation of the gaps))

    one for quality (theta) and one for the gap in length, and sigmoid(theta), what remains at gap
    0, is returned. This takes away all that goes with length, deserved or not: where completeness
    is what people want, length is part of quality. Where one side is nearly always the longer one,
    equal length is an extrapolation, which the interval shows by its width.

    preferences: (n,) in [0, 1].   gaps: (n,) length of the first less the second [characters].
    Source: Dubois et al. 2024 (AlpacaEval 2), without the term for an instruction's difficulty,
    which takes the results of many models, and with a ridge of 0.01 where they choose a lasso, so
    that separable data have a finite fit. The interval is that of theta with the pseudo-pairs of
    `change_interval`, robust to preferences being shares (Papke and Wooldridge 1996).
    """
    p = np.array(preferences)
    gap = np.array(gaps, dtype=float)
    weights = np.ones_like(gap)
    deviation = gap.std(ddof=1) if len(gap) > 1 else 0.0
    taste = np.tanh(gap / deviation) if deviation else np.zeros_like(gap)
    x = np.stack([np.ones_like(gap), taste], axis=1)  # (n, 2): a constant, and the gap
    rate = sigmoid(fit_logistic(x, p, weights).theta)

    # The pseudo-pairs: one win and one loss of weight 1/2, a tie of weight 1, equally long.
    x = np.vstack([x, [[1, 0], [1, 0], [1, 0]]])
    p = np.append(p, [1, 0, 0.5])
    fit = fit_logistic(x, p, np.append(weights, [0.5, 0.5, 1]))
    low = sigmoid(fit.theta - fit.half_width)
    high = sigmoid(fit.theta + fit.half_width)
    return rate, (min(low, rate), max(high, rate))


class Fit(NamedTuple):
    theta: float
    half_width: float  # of its 95 % interval


def fit_logistic(x: np.ndarray, p: np.ndarray, weights: np.ndarray, ridge: float = 0.01) -> Fit:
    """Fit shares p (n,) by sigmoid(x beta), x (n, 2); return beta[0] and how sure that is.

    Newton's method on the weighted log-likelihood less ridge / 2 |beta|^2.
    """
    beta = np.zeros(2)
    for _ in range(100):
        fitted = 1 / (1 + np.exp(-x @ beta))
        hessian = (x.T * (weights * fitted * (1 - fitted))) @ x + ridge * np.eye(2)
        step = np.linalg.solve(hessian, x.T @ (weights * (p - fitted)) - ridge * beta)
        # A whole step can overshoot where the curve is flat, so none is longer than 2.
        beta += step * min(1.0, 2 / max(np.abs(step).max(), 1e-12))
    # The sandwich: each row's own pull on beta, (2, n), instead of the variance that a coin with
    # chance `fitted` would have. Ties vary less than that.
    pulls = np.linalg.solve(hessian, x.T * np.sqrt(weights) * (p - fitted))
    return Fit(float(beta[0]), Z * float(np.sqrt((pulls[0] ** 2).sum())))


def sigmoid(x: float) -> float:
    return 0.5 * (1 + math.tanh(x / 2))


# -------------------------------------------------------------------------------------------------
# A reward model's calibration

# Edges of the margin |s_i - s_j| [nats: the log-odds that the model gives].
BUCKETS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, math.inf)


class Margin(NamedTuple):
    """A pair's score of the better response less that of the worse, and the prompt it is of."""

    prompt: int
    value: float


def calibration(margins: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Compare the probabilities that a reward model gives with how often it is right.

    margins: for every prompt, the scores of all its pairs, better less worse as people rank them.
    Of a pair with scores s_i > s_j the model claims that i is better with probability
    sigmoid(s_i - s_j) (Bradley-Terry). Is it right as often as that?
    Returns: accuracy over all pairs (equal scores half); pairs; prompts; interval; predicted, what
        it claims on average; loss = mean -log sigmoid(margin) [nats]; error = mean distance between
        predicted and actual over the buckets, weighted by pairs; rows, one per bucket.
    """
    pairs = [Margin(prompt, value) for prompt, row in enumerate(margins) for value in row]
    rows = []
    for low, high in zip(BUCKETS, BUCKETS[1:]):
        inside = [pair for pair in pairs if low <= abs(pair.value) < high]
        if inside:
            rows.append({"from": low, "to": high, **judge_margins(inside)})
    overall = judge_margins(pairs)
    distances = [row["pairs"] * abs(row["predicted"] - row["actual"]) for row in rows]
    # -log sigmoid(m) = log(1 + exp(-|m|)) + max(-m, 0), which does not overflow
    losses = [math.log1p(math.exp(-abs(m))) + max(-m, 0.0) for _, m in pairs]
    return {
        "accuracy": overall.pop("actual"),
        **overall,
        "loss": mean(losses),
        "error": sum(distances) / max(len(pairs), 1),
        "rows": rows,
    }


def judge_margins(pairs: Sequence[Margin]) -> dict[str, Any]:
    """Return how often a reward model is right on some pairs, and how often it claims to be.

    The interval counts prompts, not pairs, since the pairs of one prompt are not independent.
    """
    prompts = len({pair.prompt for pair in pairs})
    actual = mean(prefer(pair.value, 0.0) for pair in pairs)
    return {
        "pairs": len(pairs),
        "prompts": prompts,
        "actual": actual,
        "interval": share_interval(actual, prompts),
        "predicted": mean(sigmoid(abs(pair.value)) for pair in pairs),
    }
