"""Files to questions, questions to token ids."""
from __future__ import annotations

import csv
import io
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Sequence

import data
import microcosm
from benchmarks.tasks import Item, Outcome, Task
from data import Tokenizer
from formats import BadRow
from formats.rows import parse_row, read_bytes, read_rows

SHOT_SEED = 1234            # of drawn demonstrations, as in the harness
READ_ERRORS = (KeyError, TypeError, ValueError, IndexError, AttributeError)


class Unavailable(ValueError):
    """A task that cannot run here: it is left out of a group, and refused when asked for by name."""


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
        reader = csv.reader(io.StringIO(read_bytes(path).decode("utf-8"), newline=""), strict=True)
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
        raise BadRow("query, choices and answers must be strings", f"got {texts}")
    if item.choices:
        for n, choice in enumerate(item.choices, 1):
            if not choice.strip():
                raise BadRow("an empty choice", f"choice {n} of {len(item.choices)}")
        if not item.gold or not all(isinstance(i, int) and 0 <= i < len(item.choices) for i in item.gold):
            raise BadRow("no right answer among the choices", f"gold {list(item.gold)}, {len(item.choices)} choices")
    elif not item.checks and not any(item.answers):
        raise BadRow("no right answer")


def read_item(task: Task, raw: Any, stem: str) -> tuple[Item, str] | None:
    """Turn a row into an item and the name of its part; None if the row is not of the test split; BadRow says what is wrong."""
    row = {**parse_row(raw), "file": stem}
    try:
        item = task.read(row)
        part = task.part(row)
    except KeyError as error:
        raise BadRow(f"no field {error}", f"keys: {', '.join(key for key in row if key != 'file')}") from None
    except READ_ERRORS as error:
        raise BadRow("a field has the wrong type or value", error) from None
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
        for source, raw in read_csv(path) if path.suffix == ".csv" else read_rows(path):
            try:
                found = read_item(task, raw, stem)
            except BadRow as error:
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
    return microcosm.rubric.metrics(item.query, outcome.text, item.answers[0])["strict"]


MICROCOSM = Task(lambda row: None, (), {"strict": microcosm_strict}, max_new_tokens=32)


def microcosm_questions(limit: int | None, seed: int) -> list[Question]:
    """Draw the embedded world's 12 general tasks, 60 questions or `limit` of each, in the template its models are trained on."""
    items = microcosm.items("eval", len(microcosm.TASKS) * (60 if limit is None else limit), seed, in_domain_share=0.0)
    return [Question(Item(item.prompt, answers=(item.answer,)), item.task, template="plain") for item in items]


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
