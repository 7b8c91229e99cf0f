"""A task's questions through an engine.

    Question -> Asked (token ids) -> Outcome -> values by metric -> Result
"""
from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, Sequence

from benchmarks.engine import Engine
from benchmarks.items import Outcome
from benchmarks.metrics import pass_at_k
from benchmarks.questions import Asked, Question, encode_question
from benchmarks.results import Result, Values, summarize
from benchmarks.sandbox import Program
from benchmarks.tasks import Task

TRIES = (1, 10, 100)        # k of pass@k, as far as there are samples


def answer_questions(
    name: str, task: Task, questions: Sequence[Question], asked: Sequence[Asked], engine: Engine
) -> list[list[Outcome]]:
    """Return the model's outcomes, one per question and, for generated text, sample."""
    scored = [i for i, question in enumerate(questions) if question.item.choices]
    written = [i for i, question in enumerate(questions) if not question.item.choices]
    outcomes: dict[int, list[Outcome]] = {}
    if scored:
        likelihoods = engine.score([asked[i].requests for i in scored], name)
        for i, choices in zip(scored, likelihoods):
            logprobs = tuple(choice.logprob for choice in choices)
            greedy = tuple(choice.is_greedy for choice in choices)
            outcomes[i] = [Outcome(logprobs, greedy)]
    if written:
        texts = engine.write([asked[i].prompt for i in written], task, name)
        for i, samples in zip(written, texts):
            outcomes[i] = [Outcome(text=text) for text in samples]
    return [outcomes[i] for i in range(len(questions))]


def check_programs(
    name: str, questions: Sequence[Question], outcomes: Sequence[Sequence[Outcome]], engine: Engine
) -> dict[int, int]:
    """Run the programs of code problems; return index of a question -> right samples of it."""
    owners = []
    programs = []
    for i, (question, samples) in enumerate(zip(questions, outcomes)):
        item = question.item
        if item.checks:
            owners += [i] * len(samples)
            programs += [
                Program(outcome.text, item.checks, item.opening, item.asked) for outcome in samples
            ]
    right = dict.fromkeys(owners, 0)
    if programs:
        for i, passes in zip(owners, engine.check(programs, name)):
            right[i] += passes
    return right


def measure(
    name: str,
    task: Task,
    questions: Sequence[Question],
    outcomes: Sequence[Sequence[Outcome]],
    engine: Engine,
) -> dict[str, Values]:
    """Return metric -> index of a question -> its value."""
    values: dict[str, Values] = {}
    for i, right in check_programs(name, questions, outcomes, engine).items():
        n = len(outcomes[i])
        for k in TRIES:
            if k <= n:
                values.setdefault(f"pass@{k}", {})[i] = pass_at_k(n, right, k)
    for i, (question, samples) in enumerate(zip(questions, outcomes)):
        for metric, judge in task.metrics.items():
            value = judge(question.item, samples[0])
            if value is not None:
                values.setdefault(metric, {})[i] = value
    return values


def by_part(values: Values, questions: Sequence[Question]) -> dict[str, list[float]]:
    """Group a metric's values by the part of their questions."""
    parts: dict[str, list[float]] = {}
    for i, value in values.items():
        parts.setdefault(questions[i].part, []).append(value)
    return parts


def describe(
    i: int, question: Question, samples: Sequence[Outcome], values: dict[str, Values]
) -> dict[str, Any]:
    """Return a question, what the model said and what that earned, as plain JSON."""
    item = question.item
    if item.choices:
        said = {"choices": item.choices, "gold": item.gold, "logprobs": samples[0].logprobs}
    else:
        said = {"answers": item.answers, "texts": [outcome.text for outcome in samples]}
    earned = {metric: row[i] for metric, row in values.items() if i in row}
    query = item.queries or item.query      # without the demonstrations
    return {"part": question.part, "index": i, "query": query, **said, "values": earned}


def evaluate(name: str, task: Task, questions: Sequence[Question], engine: Engine) -> Result:
    """Ask a task's questions and count those that cannot be asked."""
    if not any(question.item.checks for question in questions):
        engine = replace(engine, samples=1)  # several samples are for programs alone

    # 1. Encode. What cannot be asked is left out, and the reasons are counted.
    asked = [
        encode_question(question, task, engine.tokenizer, engine.context_size, engine.template)
        for question in questions
    ]
    kept = [i for i, one in enumerate(asked) if not one.reason]
    kept_questions = [questions[i] for i in kept]
    kept_asked = [asked[i] for i in kept]

    # 2. Ask and judge. From here on index i means the i-th that was kept, ...
    outcomes = answer_questions(name, task, kept_questions, kept_asked, engine)
    measured = measure(name, task, kept_questions, outcomes, engine)

    # 3. ... and is turned back into the place among all questions, by which models are compared.
    values = {
        metric: {kept[i]: value for i, value in row.items()} for metric, row in measured.items()
    }
    result = Result(
        skipped=Counter(one.reason for one in asked if one.reason),
        truncated=sum(one.is_cut for one in kept_asked),
        shots=task.shots,
        values=values,
        answers=[describe(i, questions[i], samples, values) for i, samples in zip(kept, outcomes)],
    )
    for metric, row in values.items():
        summary = summarize(metric, by_part(row, questions))
        result.metrics[metric] = summary.total
        result.parts[metric] = summary.parts
    return result
