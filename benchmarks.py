"""Public benchmarks with the numbers of lm-evaluation-harness, on one process or under torchrun.

    python eval.py run MODEL_DIR [MODEL_DIR ...] --tasks=arc_easy,general12 --data=FOLDER
    torchrun --nproc_per_node=8 eval.py run MODEL_DIR --tasks=all --data=FOLDER --limit=200 --out=results.json

    files -> rows -> Item -> Question (demonstrations before it) -> token ids -> Outcome -> metrics -> table

Every rank holds the model, reads the same questions and takes its share of them. The choices of one question are branches
of one tree: what they share is computed once, and an attention mask keeps each branch from seeing the others. Nothing is
left out of a mean in silence: a row that cannot be read stops the program, a question that cannot be asked is counted.
"""
from __future__ import annotations

import argparse
import csv
import io
import json
import math
import random
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Iterable, Iterator, NamedTuple, Sequence

import numpy
import torch
from torch import Tensor
from tqdm import tqdm

import chat
import data
import microcosm
import parallel
import sandbox
from compare import change_interval, draw_tasks, mean
from data import Tokenizer
from model import Grid, Transformer, generate, load_pretrained, rope_table
from tasks import GENERIC, GROUPS, TASKS, Item, Outcome, Task

SHOT_SEED = 1234            # of drawn demonstrations, as in the harness
LOGITS_ROWS = 1024          # positions whose logits over the vocabulary are held at once
READ_ERRORS = (KeyError, TypeError, ValueError, IndexError, AttributeError)


class Unavailable(ValueError):
    """A task that cannot run here: it is left out of a group, and refused when asked for by name."""


# ---------------------------------------------------------------------------------------------
# Files to questions

@dataclass(frozen=True)
class Question:
    """An item and all text before its query; or with a chat template, the item as what a user says."""
    item: Item
    part: str = ""
    prefix: str = ""
    template: str = ""


def read_csv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (source, row) of a CSV file with a header, or without one and the columns of Hendrycks' MMLU."""
    try:
        reader = csv.reader(io.StringIO(data.read_bytes(path).decode("utf-8"), newline=""), strict=True)
        header: list[str] = []
        for fields in reader:
            if not header:
                header = fields if "Question" in fields else ["Question", "A", "B", "C", "D", "Answer"]
                if header is fields:
                    continue
            if len(fields) != len(header):
                raise ValueError(f"{path}:{reader.line_num}: {len(fields)} columns instead of {len(header)}; is a text with commas without quotes?")
            yield f"{path}:{reader.line_num}", dict(zip(header, fields))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start + 1}); convert it with iconv") from None
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: broken CSV ({error}); was the file cut off?") from None


def check_item(item: Item) -> None:
    """Raise BadRow for a question without a right answer, or with a choice that cannot be scored."""
    texts = (item.query, *item.queries, *item.choices, *item.answers)
    if not all(isinstance(text, str) for text in texts):
        raise data.BadRow("query, choices and answers must be strings", f"got {texts}")
    if item.choices:
        for n, choice in enumerate(item.choices, 1):
            if not choice.strip():
                raise data.BadRow("an empty choice", f"choice {n} of {len(item.choices)}")
        if not item.gold or not all(isinstance(i, int) and 0 <= i < len(item.choices) for i in item.gold):
            raise data.BadRow("no right answer among the choices", f"gold {list(item.gold)}, {len(item.choices)} choices")
    elif not item.checks and not any(item.answers):
        raise data.BadRow("no right answer")


def read_item(task: Task, raw: Any, stem: str) -> tuple[Item, str] | None:
    """Turn a row into an item and the name of its part; None if the row is not of the test split; BadRow says what is wrong."""
    row = {**data.parse_row(raw), "file": stem}
    try:
        item = task.read(row)
        part = task.part(row)
    except KeyError as error:
        raise data.BadRow(f"no field {error}", f"keys: {', '.join(key for key in row if key != 'file')}") from None
    except READ_ERRORS as error:
        raise data.BadRow("a field has the wrong type or value", error) from None
    if item is not None:
        check_item(item)
    return item and (item, part)


def read_items(task: Task, patterns: Sequence[str], folder: Path) -> dict[str, list[Item]]:
    """Read the files of the first pattern that matches; return the items of every part. ValueError names file, line and remedy."""
    paths = next(filter(None, (sorted(folder.glob(pattern)) for pattern in patterns)), [])
    if not paths:
        raise Unavailable(f"{folder / patterns[0]}: no such file; put it there, or give another --data")
    parts: dict[str, list[Item]] = {}
    for path in paths:
        stem = re.sub(r"\.(jsonl|json|csv)(\.gz)?$", "", path.name)
        for source, raw in read_csv(path) if path.suffix == ".csv" else data.read_rows(path):
            try:
                found = read_item(task, raw, stem)
            except data.BadRow as error:
                raise ValueError(f"{source}: {error}; correct this row or take it out") from None
            if found:
                parts.setdefault(found[1], []).append(found[0])
    if not parts:
        raise ValueError(f"{paths[0]}: holds no question; fetch it again")
    return parts


def choose_shots(task: Task, pool: Sequence[Item], count: int, item: Item, rng: random.Random) -> Sequence[Item]:
    """Return a question's demonstrations by the harness's rule; with a spare one, the question itself is never among them."""
    if not count or not task.draw_shots:
        return pool[:count]
    if not task.spare_shot:
        return rng.sample(pool, count)
    others = [shot for shot in rng.sample(pool, count + 1) if shot != item]
    return others[:count] if len(others) >= count else rng.sample([shot for shot in pool if shot != item], count)


def read_questions(name: str, task: Task, folder: Path, limit: int | None, seed: int) -> list[Question]:
    """Read a task's questions and put demonstrations before them; of every part at most `limit`, drawn from `seed`."""
    parts, count = read_items(task, task.files, folder), task.shots if task.shot_files else 0
    pools = read_items(task, task.shot_files, folder) if count else {}
    questions = []
    for part, items in parts.items():
        if limit is not None and limit < len(items):
            chosen = random.Random(f"{seed} {name} {part}").sample(range(len(items)), limit)
            items = [items[i] for i in sorted(chosen)]
        try:
            description = task.describe(part, folder)
        except READ_ERRORS as error:
            raise ValueError(f"{folder}: no description of the part {part!r} of {name} ({error})") from None
        pool = pools.get("" if "" in pools else part, [])
        least = count + (task.spare_shot and count > 0)
        if len(pool) < least:
            raise ValueError(f"{folder / task.shot_files[0]}: {len(pool)} demonstrations of {part or name}, it takes {least}; add rows")
        rng = random.Random(SHOT_SEED)
        for item in items:
            shots = choose_shots(task, pool, count, item, rng)
            shown = [shot.demonstrate(task.delimiter) + task.shot_delimiter for shot in shots]
            questions.append(Question(item, part, description + "".join(shown)))
    return questions


def microcosm_strict(item: Item, outcome: Outcome) -> float:
    return float(microcosm.grade(microcosm.Item("", item.query, item.answers[0], {}), outcome.text).strict)


MICROCOSM = Task(lambda row: None, (), {"strict": microcosm_strict}, max_new_tokens=32)


def microcosm_questions(limit: int | None, seed: int) -> list[Question]:
    """Draw the embedded world's 12 general tasks, 60 questions or `limit` of each, in the template its models are trained on."""
    items = microcosm.items("eval", len(microcosm.TASKS) * (60 if limit is None else limit), seed, in_domain_share=0.0)
    return [Question(Item(item.prompt, answers=(item.answer,)), item.task, template="plain") for item in items]


# ---------------------------------------------------------------------------------------------
# Questions to token ids

class Request(NamedTuple):
    """A continuation to score after a context, token ids."""
    context: tuple[int, ...]
    continuation: tuple[int, ...]


def texts_to_score(question: Question, delimiter: str) -> list[tuple[str, str]]:
    """Return (context, continuation) of every choice."""
    item = question.item
    queries = item.queries or (item.query,) * len(item.choices)
    return [(question.prefix + query, delimiter + choice) for query, choice in zip(queries, item.choices)]


def encode_request(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Encode both together and cut by the length of the context: encoded alone, a continuation gets other ids.

    Spaces at the context's end belong to the continuation. An empty context is the bos alone.
    """
    if not context:
        return Request((tokenizer.bos_id,), tuple(tokenizer.encode(continuation)))
    stripped = context.rstrip()
    before = tokenizer.encode(stripped)
    return Request((tokenizer.bos_id, *before), tuple(tokenizer.encode(context + continuation)[len(before):]))


class Tree(NamedTuple):
    """Several inputs with one beginning, as one row: the beginning (branch 0), then the rest of each (branches 1, 2, ...)."""
    tokens: list[int]
    positions: list[int]
    branches: list[int]
    reads: list[tuple[int, int]]        # slot whose logits predict a token, and that token, request after request
    owners: list[tuple[int, int]]       # (index of a request, how many of the reads are its)


def grow_trees(requests: Sequence[Request], first: int, context_size: int) -> list[Tree]:
    """Lay the requests of one question out as one tree, or one each where they have too little in common.

    first: index of the first request.   An input longer than the model's context loses tokens on the left.
    """
    inputs = [(*r.context, *r.continuation)[-(context_size + 1):][:-1] for r in requests]
    common = next((i for i, column in enumerate(zip(*inputs)) if len(set(column)) > 1), min(map(len, inputs)))
    if len(inputs) > 1 and 2 * common < min(map(len, inputs)):
        return [tree for i, request in enumerate(requests) for tree in grow_trees([request], first + i, context_size)]
    tree = Tree(list(inputs[0][:common]), list(range(common)), [0] * common, [], [])
    for i, (ids, request) in enumerate(zip(inputs, requests)):
        shift = len(tree.tokens) - common
        tree.tokens.extend(ids[common:])
        tree.positions.extend(range(common, len(ids)))
        tree.branches.extend([i + 1] * (len(ids) - common))
        start = len(ids) - len(request.continuation)
        tree.reads.extend((slot if slot < common else slot + shift, token) for slot, token in enumerate(request.continuation, start))
        tree.owners.append((first + i, len(request.continuation)))
    return [tree]


# ---------------------------------------------------------------------------------------------
# The model's answers

@torch.inference_mode()
def read_trees(model: Transformer, trees: Sequence[Tree]) -> list[tuple[float, bool]]:
    """Return for every read of the trees the token's log-probability [nats] and whether it is the most probable one."""
    device, rows, time = model.lm_head.weight.device, len(trees), max(len(tree.tokens) for tree in trees)

    def grid(values: Sequence[list[int]]) -> Tensor:  # (B, T) int64
        return torch.tensor([row + [0] * (time - len(row)) for row in values], device=device)
    valid = torch.tensor([row * time + t for row, tree in enumerate(trees) for t in range(len(tree.tokens))], device=device)
    branches, mask = grid([tree.branches for tree in trees]), None
    if branches.any():  # a token sees the beginning and what precedes it in its own branch
        same = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])  # (B, query, key)
        mask = (same & torch.ones(time, time, dtype=torch.bool, device=device).tril())[:, None]
    rope = rope_table(grid([tree.positions for tree in trees]), model.config)
    flat = grid([tree.tokens for tree in trees]).flatten()[valid]
    hidden = model.model.run(flat, rope, Grid(rows, time, valid, mask))
    starts = numpy.cumsum([0, *(len(tree.tokens) for tree in trees)])
    slots = torch.tensor([start + slot for start, tree in zip(starts.tolist(), trees) for slot, _ in tree.reads], device=device)
    targets = torch.tensor([token for tree in trees for _, token in tree.reads], device=device)
    results = []
    for slot, target in zip(slots.split(LOGITS_ROWS), targets.split(LOGITS_ROWS)):
        slot, row = slot.unique(return_inverse=True)  # the first tokens of all choices are predicted by one position
        logits = model.lm_head(hidden[slot]).float()
        chosen = logits[row, target] - logits.logsumexp(1)[row]
        results += zip(chosen.tolist(), (logits.argmax(1)[row] == target).tolist())
    return results


@dataclass(frozen=True)
class Engine:
    """A model and how it is asked."""
    model: Transformer
    tokenizer: Tokenizer
    machine: parallel.Machine
    batch_tokens: int                   # slots of a batch, padding included
    samples: int = 1                    # generations per code problem: one is greedy, several are drawn at temperature 0.8, top_p 0.95
    seed: int = 0

    @property
    def context_size(self) -> int:
        return self.model.config.max_seq_len

    def batches(self, lengths: Sequence[int], name: str) -> Iterator[list[int]]:
        """Yield this rank's share of things by index, similar lengths together, as many as fit into a batch; shows progress."""
        mine = sorted(range(len(lengths)), key=lambda i: -lengths[i])[self.machine.rank::self.machine.world]
        with tqdm(total=len(mine), desc=name, disable=not self.machine.is_main, leave=False) as bar:
            while mine:
                size = max(self.batch_tokens // lengths[mine[0]], 1)
                yield mine[:size]
                bar.update(len(mine[:size]))
                mine = mine[size:]

    def score(self, questions: Sequence[Sequence[Request]], name: str) -> list[list[tuple[float, bool]]]:
        """Return for every question and request its log-likelihood [nats] and whether greedy decoding would produce it."""
        firsts = numpy.cumsum([0, *map(len, questions)]).tolist()
        trees = [tree for first, requests in zip(firsts, questions) for tree in grow_trees(requests, first, self.context_size)]
        found = {}
        for batch in self.batches([len(tree.tokens) for tree in trees], name):
            reads = iter(read_trees(self.model, [trees[i] for i in batch]))
            for index, count in (owner for i in batch for owner in trees[i].owners):
                logprobs, greedy = zip(*(next(reads) for _ in range(count)))
                found[index] = sum(logprobs), all(greedy)
        scores = {index: score for part in parallel.gather_objects(found) for index, score in part.items()}
        if any(math.isnan(logprob) for logprob, _ in scores.values()):
            raise ValueError(f"{name}: the model answers NaN; its weights are damaged, or it overflows: try --dtype=float32")
        return [[scores[i] for i in range(first, first + len(requests))] for first, requests in zip(firsts, questions)]

    def write(self, prompts: Sequence[Sequence[int]], task: Task, name: str) -> list[list[str]]:
        """Return `samples` continuations of every prompt, cut at the first stop string; the harness stops at the text of EOS, too."""
        until = (*task.until, "</s>")
        window = max(len(stop.encode()) for stop in until) + 1  # tokens: none is shorter than a byte, and one may lose its space
        rows = [prompt for prompt in prompts for _ in range(self.samples)]

        def stopped(ids: list[int]) -> bool:
            text = self.tokenizer.decode(ids[-window:])
            return any(stop in text for stop in until)
        found = {}
        for batch in self.batches([len(row) + task.max_new_tokens for row in rows], name):
            temperature, top_p = (0.0, 1.0) if self.samples == 1 else (0.8, 0.95)
            written = generate(self.model, [list(rows[i]) for i in batch], task.max_new_tokens, temperature, top_p=top_p,
                               eos_id=self.tokenizer.eos_id, seed=self.seed, rows=batch, stop=stopped)
            found.update(zip(batch, map(self.tokenizer.decode, written.tokens)))
        texts = {index: text for part in parallel.gather_objects(found) for index, text in part.items()}
        cut = [cut_text(texts[i], until) for i in range(len(rows))]
        return [cut[i:i + self.samples] for i in range(0, len(cut), self.samples)]

    def check(self, programs: Sequence[str], name: str) -> list[bool]:
        """Run generated programs, each rank its share; return which of them pass."""
        mine = self.machine.slice(list(programs))

        def bar(verdicts: Iterable[bool]) -> Iterable[bool]:
            return tqdm(verdicts, name, len(mine), leave=False, disable=not self.machine.is_main)
        return [verdict for part in parallel.gather_objects(sandbox.check_all(mine, bar)) for verdict in part]


def cut_text(text: str, until: Sequence[str]) -> str:
    """Cut a text at whichever stop string comes first."""
    for stop in until:
        text = text.split(stop)[0]
    return text


# ---------------------------------------------------------------------------------------------
# Answers to numbers

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


class Asked(NamedTuple):
    """A question's token ids: requests to score, or a prompt to continue; why it is skipped, if it is; whether it was cut."""
    requests: list[Request]
    prompt: Sequence[int]
    reason: str = ""
    cut: bool = False


def encode_question(question: Question, task: Task, tokenizer: Tokenizer, context_size: int) -> Asked:
    """Encode a question, or say why the model cannot be asked it."""
    if question.item.choices:
        requests = [encode_request(tokenizer, *pair) for pair in texts_to_score(question, task.delimiter)]
        longest = max(len(r.continuation) for r in requests)
        reason = f"a choice is longer than the model's context of {context_size} tokens" if longest > context_size else ""
        reason = reason or ("a choice adds no token to the text before it" if not all(r.continuation for r in requests) else "")
        return Asked(requests, (), reason, any(len(r.context) + len(r.continuation) > context_size + 1 for r in requests))
    room = context_size - task.max_new_tokens
    if room < 1:
        return Asked([], (), f"{task.max_new_tokens} new tokens leave no room in the model's context of {context_size}")
    if question.template:
        prompt = data.encode_prompt(tokenizer, (data.Message("user", question.item.query),), question.template)
    else:
        prompt = [tokenizer.bos_id, *tokenizer.encode(question.prefix + question.item.query)]
    return Asked([], prompt[-room:], cut=len(prompt) > room)


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


# ---------------------------------------------------------------------------------------------
# One model against another

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


# ---------------------------------------------------------------------------------------------
# Command

def number(x: float, sign: str = "") -> str:
    return f"{x:{sign}10.4f}" if abs(x) < 1e4 else f"{x:{sign}10.3g}" if math.isfinite(x) else f"{'-':>10}"


def numbers_text(columns: Sequence[Number | None], changed: Change | None) -> str:
    """Write the value and error of one model, or the values of several and what changed."""
    if len(columns) == 1:
        return number(columns[0].value) + number(columns[0].error)
    text = "".join(f"{number(x.value if x else math.nan):>12}" for x in columns)
    if changed:
        text += number(changed.value, "+") + f"{number(changed.low, '+')} to {number(changed.high, '+').strip():10}"
        text += "noise" * (changed.low <= 0 <= changed.high)
    return text.rstrip()


def table(results: Results, groups: Sequence[str]) -> str:
    """Lay out results for a terminal: one line per task and metric, one per group, then what was left out."""
    tables, changed = list(results.values()), changes(results)
    head = f"{'value':>10}{'stderr':>10}" if len(tables) == 1 else "".join(f"{name[-11:]:>12}" for name in results) + f"{'change':>10}   95 % interval"
    lines, notes = [f"{'task':24}{'shots':>5}  {'metric':30}{'n':>7}{'skipped':>9}{head}"], []
    for name, result in tables[-1].items():
        for metric in dict.fromkeys(metric for one in tables for metric in one[name].metrics):
            columns = [one[name].metrics.get(metric) for one in tables]
            n = columns[-1].n if columns[-1] else 0
            lines.append(f"{name:24}{result.shots:>5}  {metric:30}{n:>7}{result.skipped.total():>9}{numbers_text(columns, changed.get(name, {}).get(metric))}")
        if not any(one[name].metrics for one in tables):
            lines.append(f"{name:24}{'-':>5}  {'-':30}{0:>7}{result.skipped.total():>9}")
    for group in groups:
        names = members(group, results)
        if names:
            label, columns = f"mean over {len(names)} of {len(GROUPS[group])} tasks", [group_mean(names, one) for one in tables]
            lines.append(f"{group:31}{label:46}{numbers_text(columns, group_change(names, results))}")
    for model, one in results.items():
        for name, result in one.items():
            who = f"{model}, {name}" if len(tables) > 1 else name
            notes += [f"{who}: {count} skipped: {reason}" if count else f"{name}: not run: {reason}" for reason, count in result.skipped.items()]
            if result.truncated:
                notes.append(f"{who}: {result.truncated} prompts longer than the model's context lost their beginning")
    return "\n".join([*lines, *dict.fromkeys(notes)])


def to_json(results: Results, groups: Sequence[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Return results as plain JSON; what is undefined is null."""
    def plain(x: NamedTuple | None) -> dict[str, Any] | None:
        return x and {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in x._asdict().items()}

    def model(results: dict[str, Result]) -> dict[str, Any]:
        return {"groups": {group: plain(group_mean(names, results)) for group, names in grouped.items()}, "tasks": {
            name: {"metrics": {metric: plain(x) for metric, x in result.metrics.items()}, "shots": result.shots,
                   "skipped": dict(result.skipped), "truncated": result.truncated,
                   "parts": {metric: {part: plain(x) for part, x in parts.items()} for metric, parts in result.parts.items() if len(parts) > 1}}
            for name, result in results.items()}}
    grouped = {group: members(group, results) for group in groups}
    written = {"settings": settings, "models": {name: model(one) for name, one in results.items()}}
    if len(results) > 1:
        written["changes"] = {"groups": {group: plain(group_change(names, results)) for group, names in grouped.items()},
                              "tasks": {name: {metric: plain(x) for metric, x in row.items()} for name, row in changes(results).items()}}
    return written


READING = """Values and standard errors as lm-evaluation-harness gives them. **change** is the last model less the one before it, question by
question, with the 95 % interval of Agresti and Min (2005); **noise** marks an interval that holds 0. One interval in twenty misses the truth.
Every question and answer is in answers.jsonl."""


def write(folder: Path, results: Results, groups: Sequence[str], settings: dict[str, Any]) -> None:
    """Write results.json, answers.jsonl and report.md, with a plot if matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(to_json(results, groups, settings), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with open(folder / "answers.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"model": model, "task": name, **answer}, ensure_ascii=False) + "\n"
                        for model, one in results.items() for name, result in one.items() for answer in result.answers)
    lines = ["# Benchmarks", "", "```", table(results, groups), "```", "", READING, ""]
    shares = {model: {name: next(iter(result.metrics.values())).value for name, result in one.items() if result.metrics}
              for model, one in results.items()}
    changed = {name: next(iter(row.values())) for name, row in changes(results).items() if row}
    figure = draw_tasks(shares, {name: (x.value, (x.low, x.high)) for name, x in changed.items() if x})
    if figure:
        figure.savefig(folder / "tasks.png", dpi=110)
        lines += ["![tasks](tasks.png)", ""]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")


def plan(names: str) -> tuple[dict[str, bool], list[str]]:
    """Expand --tasks; return task -> whether it was asked for by its own name, and the groups among the names."""
    asked: dict[str, bool] = {}
    for name in filter(None, names.split(",")):
        if name in TASKS or re.search(r"\.(jsonl|json)(\.gz)?$", name):
            asked[name] = True
        elif name in GROUPS:
            for member in GROUPS[name]:
                asked.setdefault(member, name == member)
        else:
            raise ValueError(f"--tasks: no task {name!r}; there are {', '.join([*TASKS, *GROUPS])}, and files of your own ending in .jsonl or .json")
    if not asked:
        raise ValueError(f"--tasks names no task; there are {', '.join([*TASKS, *GROUPS])}")
    return asked, [name for name in names.split(",") if len(GROUPS.get(name, ())) > 1]


def prepare(name: str, options: argparse.Namespace) -> tuple[Task, list[Question]]:
    """Return a task and its questions; Unavailable if it cannot run with these options."""
    own = replace(GENERIC, files=(Path(name).name,))
    task, folder = {"microcosm": MICROCOSM, **TASKS}.get(name, own), options.data if name in TASKS else Path(name).parent
    if options.shots is not None:
        if not task.shot_files:
            raise Unavailable(f"{name} has {f'{task.shots} fixed' if task.shots else 'no'} demonstrations: leave out --shots")
        task = replace(task, shots=options.shots)
    if task is MICROCOSM:
        return task, microcosm_questions(options.limit, options.seed)
    if folder is None:
        raise Unavailable(f"{name} reads files: give --data=FOLDER")
    questions = read_questions(name, task, folder, options.limit, options.seed)
    if any(question.item.checks for question in questions):
        if not options.allow_code_execution:
            raise Unavailable(f"{name} runs programs that the model writes: allow it with --allow-code-execution")
        sandbox.passes("")  # whether programs can be confined shows before the model has written them
    return task, questions


def parse_options(args: Sequence[str]) -> argparse.Namespace:
    """Read the command line; an error exits with status 2."""
    def count(text: str) -> int:
        if int(text) < 0:
            raise ValueError
        return int(text)

    def positive(text: str) -> int:
        if int(text) < 1:
            raise ValueError
        return int(text)
    parser = argparse.ArgumentParser("eval.py run", description="Public benchmarks with the prompts and metrics of lm-evaluation-harness.",
                                     epilog=f"tasks: {', '.join(TASKS)}; groups: {', '.join(GROUPS)}; or a file.jsonl of "
                                            "{query, choices, gold}, {context, continuation} or {context, answer, aliases}")
    parser.add_argument("models", type=Path, nargs="+", metavar="DIR",
                        help="model folders with their tokenizer.model; of several, the last is compared with the one before it")
    parser.add_argument("--tasks", required=True, help="names of tasks, groups and files, separated by commas")
    parser.add_argument("--data", type=Path, help="folder with the benchmarks' files")
    parser.add_argument("--shots", type=count, help="demonstrations before a question, from the task's train.jsonl (the harness's number)")
    parser.add_argument("--limit", type=positive, help="at most so many questions of every part of a task, drawn from the seed")
    parser.add_argument("--seed", type=int, default=0, help="of the questions drawn and of samples (0)")
    parser.add_argument("--batch_tokens", type=positive, help="tokens of a batch, padding included (16384 on a GPU, 2048 on a CPU)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the model (auto: bfloat16 on a GPU)")
    parser.add_argument("--samples", type=positive, default=1, help="programs per code problem, for pass@10 and pass@100 (1, greedy)")
    parser.add_argument("--allow-code-execution", action="store_true", help="run the programs that the model writes, confined")
    parser.add_argument("--out", type=Path, help="new folder for report.md, results.json and all answers")
    return parser.parse_args(args)


def run(options: argparse.Namespace) -> None:
    """Evaluate models; ValueError says in one line what cannot be done."""
    asked, groups = plan(options.tasks)
    machine = parallel.start(options.dtype)
    if options.out and options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ValueError(f"--out={options.out} holds something already; name a new folder")
    if len(set(options.models)) < len(options.models):
        raise ValueError("a model folder is named twice; nothing can change between them")
    names = [folder.name for folder in options.models]
    models = dict(zip(names if len(set(names)) == len(names) else map(str, options.models), options.models))
    tokenizers = {name: chat.open_tokenizer(folder) for name, folder in models.items()}
    ready: dict[str, tuple[Task, list[Question]] | Result] = {}
    for name, by_name in asked.items():  # all files are read before the first question is asked: a bad row shows at once
        try:
            ready[name] = prepare(name, options)
        except Unavailable as error:
            if by_name:
                raise
            ready[name] = Result({}, {}, Counter({str(error): 0}))
    results: Results = {}
    for model, folder in models.items():
        engine = Engine(load_pretrained(folder, machine.device, machine.dtype), tokenizers[model], machine,
                        options.batch_tokens or (16384 if machine.device.type == "cuda" else 2048), options.samples, options.seed)
        results[model] = {name: one if isinstance(one, Result) else evaluate(f"{model} {name}", *one, engine) for name, one in ready.items()}
        del engine  # before the next model is loaded
    if machine.is_main:
        print(table(results, groups))
        if options.out:
            write(options.out, results, groups, {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()
                                                 if key != "models"} | {"models": list(map(str, options.models))})
    parallel.stop()


def main(args: Sequence[str]) -> None:
    """Be the command `eval.py run`; what cannot be done ends the program with one line and status 2."""
    options = parse_options(args)
    try:
        run(options)
    except (ValueError, OSError, sandbox.NotConfined) as error:
        parallel.fail(f"eval.py run: error: {error}")
