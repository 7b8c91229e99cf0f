"""From outcomes to numbers: metrics, standard errors, changes between models."""
from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Sequence

import numpy

from benchmarks.engine import Engine
from benchmarks.questions import Asked, Question, encode_question
from benchmarks.tasks import GROUPS, Outcome, Task
from evaluation.statistics import change_interval, mean


def pass_at_k(n: int, right: int, k: int) -> float:
    """Estimate the chance that one of k samples is right from n samples of which `right` are (Chen et al. 2021)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def standard_error(values: Sequence[float]) -> float:
    """Return the sample deviation over sqrt(n); NaN for fewer than two values."""
    middle, n = mean(values), len(values)
    return math.sqrt(math.fsum((x - middle) ** 2 for x in values) / (n - 1) / n) if n > 1 else math.nan


def pooled_error(errors: Sequence[float], sizes: Sequence[int]) -> float:
    """Return the standard error of a mean over parts from those of the parts (pooled variance); NaN if one has none."""
    if any(map(math.isnan, errors)):
        return math.nan
    variance = sum((n - 1) * error**2 * n for n, error in zip(sizes, errors)) / (sum(sizes) - len(sizes))
    return math.sqrt(variance / sum(sizes))


def perplexity_error(logprobs: Sequence[float], draws: int = 100_000, chunk: int = 1000) -> float:
    """Return the deviation of the perplexity over bootstrap draws, the very draws of the harness.

    Its random.Random(i).choices is numpy's RandomState([i]) with the same bits, a thousand draws at once.
    """
    if len(logprobs) < 2:
        return math.nan
    values, found = numpy.array(logprobs), []
    for i in range(draws // chunk):
        uniforms = numpy.random.RandomState([i]).random_sample((chunk, len(values)))
        found.append(numpy.exp(-values[(uniforms * len(values)).astype(int)].mean(1)))
    return float(numpy.std(numpy.concatenate(found), ddof=1))


class Number(NamedTuple):
    """A metric over n questions and its standard error; NaN where it is undefined."""
    value: float
    error: float
    n: int


def summarize(metric: str, parts: dict[str, list[float]]) -> tuple[Number, dict[str, Number]]:
    """Return a metric over all questions, which weights parts by size, and over every part."""
    def one(values: list[float]) -> Number:
        if metric == "perplexity":
            return Number(math.exp(-mean(values)), perplexity_error(values), len(values))
        return Number(mean(values), standard_error(values), len(values))
    numbers = {part: one(values) for part, values in parts.items()}
    if len(numbers) == 1:
        return next(iter(numbers.values())), numbers
    n = sum(number.n for number in numbers.values())
    value = math.fsum(x for values in parts.values() for x in values) / n
    return Number(value, pooled_error([number.error for number in numbers.values()], [number.n for number in numbers.values()]), n), numbers


@dataclass
class Result:
    """What came of a task. Without `metrics` it was not run, or no question could be asked: `skipped` says why."""
    metrics: dict[str, Number]
    parts: dict[str, dict[str, Number]]     # metric -> part -> number
    skipped: Counter[str]                   # reason -> questions
    truncated: int = 0                      # questions that lost tokens on the left
    shots: int = 0
    values: dict[str, dict[int, float]] = field(default_factory=dict)   # metric -> index of a question -> its value
    answers: list[dict[str, Any]] = field(default_factory=list)         # every question and what the model said, for people to read


def answer_questions(name: str, task: Task, questions: Sequence[Question], asked: Sequence[Asked], engine: Engine) -> list[list[Outcome]]:
    """Return the model's outcomes, one per question and, for generated text, sample."""
    scored = [i for i, question in enumerate(questions) if question.item.choices]
    written = [i for i, question in enumerate(questions) if not question.item.choices]
    outcomes: dict[int, list[Outcome]] = {}
    for i, pairs in zip(scored, engine.score([asked[i].requests for i in scored], name) if scored else []):
        logprobs, greedy = zip(*pairs)
        outcomes[i] = [Outcome(logprobs, greedy)]
    for i, texts in zip(written, engine.write([asked[i].prompt for i in written], task, name) if written else []):
        outcomes[i] = [Outcome(text=text) for text in texts]
    return [outcomes[i] for i in range(len(questions))]


def measure(name: str, task: Task, questions: Sequence[Question], outcomes: Sequence[Sequence[Outcome]], engine: Engine) -> dict[str, dict[int, float]]:
    """Return metric -> index of a question -> its value."""
    values: dict[str, dict[int, float]] = {}
    programs = [f"{q.item.opening}{outcome.text}\n{q.item.checks}" for q, given in zip(questions, outcomes) for outcome in given if q.item.checks]
    verdicts = iter(engine.check(programs, name) if programs else ())
    for i, (question, given) in enumerate(zip(questions, outcomes)):
        if question.item.checks:
            right = sum(next(verdicts) for _ in given)
            for k in (1, 10, 100):
                if k <= len(given):
                    values.setdefault(f"pass@{k}", {})[i] = pass_at_k(len(given), right, k)
        for metric, judge in task.metrics.items():
            value = judge(question.item, given[0])
            if value is not None:
                values.setdefault(metric, {})[i] = value
    return values


def by_part(values: dict[int, float], questions: Sequence[Question]) -> dict[str, list[float]]:
    parts: dict[str, list[float]] = {}
    for i, value in values.items():
        parts.setdefault(questions[i].part, []).append(value)
    return parts


def describe(i: int, question: Question, given: Sequence[Outcome], values: dict[str, dict[int, float]]) -> dict[str, Any]:
    """Return a question without its demonstrations, what the model said and what that earned."""
    item = question.item
    said = {"choices": item.choices, "gold": item.gold, "logprobs": given[0].logprobs} if item.choices else \
        {"answers": item.answers, "texts": [outcome.text for outcome in given]}
    return {"part": question.part, "index": i, "query": item.queries or item.query, **said,
            "values": {metric: row[i] for metric, row in values.items() if i in row}}


def evaluate(name: str, task: Task, questions: Sequence[Question], engine: Engine) -> Result:
    """Ask a task's questions and count those that cannot be asked."""
    if not any(question.item.checks for question in questions):
        engine = replace(engine, samples=1)
    asked = [encode_question(question, task, engine.tokenizer, engine.context_size) for question in questions]
    kept = [i for i, one in enumerate(asked) if not one.reason]
    outcomes = answer_questions(name, task, [questions[i] for i in kept], [asked[i] for i in kept], engine)
    measured = measure(name, task, [questions[i] for i in kept], outcomes, engine)
    values = {metric: {kept[i]: value for i, value in row.items()} for metric, row in measured.items()}
    result = Result({}, {}, Counter(one.reason for one in asked if one.reason), sum(asked[i].cut for i in kept), task.shots, values,
                    [describe(i, questions[i], given, values) for i, given in zip(kept, outcomes)])
    for metric, row in values.items():
        result.metrics[metric], result.parts[metric] = summarize(metric, by_part(row, questions))
    return result


class Change(NamedTuple):
    """By how much a metric changed over the n questions both models were asked, and its 95 % interval."""
    value: float
    low: float
    high: float
    n: int


def differences(after: dict[int, float], before: dict[int, float]) -> list[float]:
    return [after[i] - before[i] for i in after if i in before]


def change(metric: str, after: dict[int, float], before: dict[int, float]) -> Change | None:
    """Compare values of the same questions; None for fewer than two. A perplexity's interval is that of the ratio of both."""
    gained = differences(after, before)
    if len(gained) < 2:
        return None
    if metric == "perplexity":
        old = math.exp(-mean(before[i] for i in after if i in before))
        value, high, low = (old * math.expm1(-x) for x in (mean(gained), *change_interval([gained], 0.0)))
        return Change(value, low, high, len(gained))
    return Change(mean(gained), *change_interval([gained]), len(gained))


Results = dict[str, dict[str, Result]]  # model -> task -> result; changes are those of the last model against the one before it


def changes(results: Results) -> dict[str, dict[str, Change | None]]:
    """Return task -> metric -> change; nothing for one model."""
    if len(results) < 2:
        return {}
    before, after = [*results.values()][-2:]
    return {name: {metric: change(metric, row, before[name].values.get(metric, {})) for metric, row in result.values.items()}
            for name, result in after.items()}


def members(group: str, results: Results) -> list[str]:
    """Return the tasks of a group that every model was asked: a mean over other tasks could not be compared."""
    return [name for name in GROUPS[group] if all(one[name].metrics for one in results.values())]


def group_mean(names: Sequence[str], results: dict[str, Result]) -> Number | None:
    """Return the plain mean over tasks of each one's first metric, and the error that independent tasks give it."""
    firsts = [next(iter(results[name].metrics.values())) for name in names]
    return Number(mean(x.value for x in firsts), math.sqrt(math.fsum(x.error**2 for x in firsts)) / len(firsts), len(firsts)) if firsts else None


def group_change(names: Sequence[str], results: Results) -> Change | None:
    """Return the change of that mean, over what both models were asked."""
    if len(results) < 2:
        return None
    before, after = [*results.values()][-2:]
    metrics = {name: next(iter(after[name].metrics)) for name in names}
    strata = [differences(after[name].values[metric], before[name].values[metric]) for name, metric in metrics.items()]
    strata = [gained for gained in strata if gained]
    return Change(mean(map(mean, strata)), *change_interval(strata), len(strata)) if strata else None
