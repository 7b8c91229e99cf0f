"""From values to numbers: means, standard errors, changes between models."""
from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Sequence

import numpy

from benchmarks.tasks import GROUPS
from evaluation.statistics import change_interval, mean

Values = dict[int, float]               # index of a question -> its value

BOOTSTRAP_DRAWS = 100_000               # the harness's number
BOOTSTRAP_CHUNK = 1000                  # draws from one seed, as the harness's workers make them


class Number(NamedTuple):
    """A metric over n questions and its standard error; NaN where it is undefined."""
    value: float
    error: float
    n: int


class Summary(NamedTuple):
    """A metric over all questions of a task, and over every part of it."""
    total: Number
    parts: dict[str, Number]


class Change(NamedTuple):
    """By how much a metric changed over the n questions both were asked, and its 95 % interval."""
    value: float
    low: float
    high: float
    n: int


@dataclass
class Result:
    """What came of a task. Without `metrics` it was not run, or no question could be asked."""
    metrics: dict[str, Number] = field(default_factory=dict)
    parts: dict[str, dict[str, Number]] = field(default_factory=dict)   # metric -> part -> number
    skipped: Counter[str] = field(default_factory=Counter)  # reason -> questions; 0: it was not run
    truncated: int = 0                                      # questions that lost tokens on the left
    shots: int = 0
    values: dict[str, Values] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)     # see asking.describe

    @property
    def first(self) -> str:
        """Return the name of the metric that counts in a mean over tasks."""
        return next(iter(self.metrics))


Results = dict[str, dict[str, Result]]  # model -> task -> result


# ---------------------------------------------------------------------------------------------
# Standard errors

def standard_error(values: Sequence[float]) -> float:
    """Return the sample deviation over sqrt(n); NaN for fewer than two values."""
    n = len(values)
    if n < 2:
        return math.nan
    middle = mean(values)
    variance = math.fsum((x - middle) ** 2 for x in values) / (n - 1)
    return math.sqrt(variance / n)


def pooled_error(parts: Sequence[Number]) -> float:
    """Return the standard error of the mean over all questions of parts; NaN if one has none.

    The variance within the parts, pooled, over the number of questions: what sets the parts apart
    is not an error.
    """
    if any(math.isnan(part.error) for part in parts):
        return math.nan
    n = sum(part.n for part in parts)
    squares = sum((part.n - 1) * part.error**2 * part.n for part in parts)
    return math.sqrt(squares / (n - len(parts)) / n)


def perplexity_error(logprobs: Sequence[float], draws: int = BOOTSTRAP_DRAWS) -> float:
    """Return the deviation of the perplexity over bootstrap draws, the very draws of the harness.

    Its random.Random(i).choices is numpy's RandomState([i]) with the same bits, a thousand draws at
    once.
    """
    if len(logprobs) < 2:
        return math.nan
    values = numpy.array(logprobs)
    found = []
    for i in range(draws // BOOTSTRAP_CHUNK):
        uniforms = numpy.random.RandomState([i]).random_sample((BOOTSTRAP_CHUNK, len(values)))
        drawn = (uniforms * len(values)).astype(int)
        found.append(numpy.exp(-values[drawn].mean(1)))
    return float(numpy.std(numpy.concatenate(found), ddof=1))


def number_of(metric: str, values: Sequence[float]) -> Number:
    """Return the mean of values, or the perplexity that mean log-likelihoods give."""
    if metric == "perplexity":
        return Number(math.exp(-mean(values)), perplexity_error(values), len(values))
    return Number(mean(values), standard_error(values), len(values))


def summarize(metric: str, parts: dict[str, list[float]]) -> Summary:
    """Return a metric over all questions, which weights parts by size, and over every part."""
    numbers = {part: number_of(metric, values) for part, values in parts.items()}
    every = list(numbers.values())
    if len(every) == 1:
        return Summary(every[0], numbers)
    n = sum(number.n for number in every)
    value = math.fsum(x for values in parts.values() for x in values) / n
    return Summary(Number(value, pooled_error(every), n), numbers)


# ---------------------------------------------------------------------------------------------
# Changes: of the last model against the one before it, question by question

def differences(after: Values, before: Values) -> list[float]:
    """Return the differences on the questions that both models were asked."""
    return [after[i] - before[i] for i in after if i in before]


def change(metric: str, after: Values, before: Values) -> Change | None:
    """Compare values of the same questions; None for fewer than two.

    A perplexity is exp(-mean log-likelihood), so its interval is that of the ratio of both.
    """
    gained = differences(after, before)
    if len(gained) < 2:
        return None
    if metric != "perplexity":
        low, high = change_interval([gained])
        return Change(mean(gained), low, high, len(gained))

    old = math.exp(-mean(before[i] for i in after if i in before))

    def perplexity_change(gain: float) -> float:
        return old * math.expm1(-gain)
    low_gain, high_gain = change_interval([gained], 0.0)
    return Change(  # the larger the gain in log-likelihood, the lower the perplexity
        perplexity_change(mean(gained)),
        perplexity_change(high_gain),
        perplexity_change(low_gain),
        len(gained),
    )


class Compared(NamedTuple):
    """The two models whose change is shown: task -> result."""
    before: dict[str, Result]
    after: dict[str, Result]


def last_two(results: Results) -> Compared | None:
    """Return the last model and the one before it; None for one model."""
    return Compared(*[*results.values()][-2:]) if len(results) > 1 else None


def changes(results: Results) -> dict[str, dict[str, Change | None]]:
    """Return task -> metric -> change; nothing for one model."""
    compared = last_two(results)
    if not compared:
        return {}
    return {
        name: {
            metric: change(metric, row, compared.before[name].values.get(metric, {}))
            for metric, row in result.values.items()
        }
        for name, result in compared.after.items()
    }


# ---------------------------------------------------------------------------------------------
# Means over tasks

def members(group: str, results: Results) -> list[str]:
    """Return the tasks of a group that every model was asked: means over others do not compare."""
    return [name for name in GROUPS[group] if all(one[name].metrics for one in results.values())]


def group_mean(names: Sequence[str], results: dict[str, Result]) -> Number | None:
    """Return the plain mean of each task's first metric, with the error of independent tasks."""
    if not names:
        return None
    firsts = [results[name].metrics[results[name].first] for name in names]
    n = len(firsts)
    error = math.sqrt(math.fsum(first.error**2 for first in firsts)) / n
    return Number(mean(first.value for first in firsts), error, n)


def group_change(names: Sequence[str], results: Results) -> Change | None:
    """Return the change of that mean, over what both models were asked."""
    compared = last_two(results)
    if not compared:
        return None
    strata = []
    for name in names:
        before, after = compared.before[name], compared.after[name]
        gained = differences(after.values[after.first], before.values[after.first])
        if gained:
            strata.append(gained)
    if not strata:
        return None
    low, high = change_interval(strata)
    return Change(mean(map(mean, strata)), low, high, len(strata))
