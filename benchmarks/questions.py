"""Items to questions with demonstrations before them, questions to token ids."""
from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Sequence

import microcosm
from benchmarks.items import Item, Outcome
from benchmarks.reading import READ_ERRORS, read_items
from benchmarks.tasks import Task
from data import Message, Tokenizer, encode_prompt
from microcosm import rubric

SHOT_SEED = 1234            # of drawn demonstrations, as in the harness
WORLD_QUESTIONS = 60        # of each of the embedded world's general tasks, without --limit


@dataclass(frozen=True)
class Question:
    """An item, and all text before its query: a description, then demonstrations."""
    item: Item
    part: str = ""
    prefix: str = ""


# ---------------------------------------------------------------------------------------------
# Demonstrations

# The harness keeps one stream of random numbers per part, seeded with 1234, and draws from it once
# per question, in the order of the file. So a question's demonstrations depend on its place: the
# draws go through all questions, in this order, or the prompts are not the harness's and neither
# are the numbers.

def choose_shots(
    task: Task, pool: Sequence[Item], count: int, item: Item, rng: random.Random
) -> Sequence[Item]:
    """Return a question's demonstrations by the harness's rule."""
    if not count or not task.draw_shots:
        return pool[:count]
    if not task.spare_shot:
        return rng.sample(pool, count)

    # The pool may hold the question itself, which would show its answer: one more is drawn, so that
    # there are enough without it.
    others = [shot for shot in rng.sample(pool, count + 1) if shot != item]
    if len(others) >= count:
        return others[:count]
    # The pool holds the question twice, or more often: draw from what is left.
    return rng.sample([shot for shot in pool if shot != item], count)


def draw_limited(items: Sequence[Item], limit: int | None, stream: str) -> Sequence[Item]:
    """Draw at most `limit` items, in the order of the file. stream: names the random numbers."""
    if limit is None or limit >= len(items):
        return items
    chosen = random.Random(stream).sample(range(len(items)), limit)
    return [items[i] for i in sorted(chosen)]


def read_questions(
    name: str, task: Task, folder: Path, limit: int | None, seed: int
) -> list[Question]:
    """Read a task's questions and put demonstrations before them.

    limit: at most so many of every part, drawn from `seed`.
    """
    parts = read_items(task, task.files, folder)
    count = task.shots if task.shot_files else 0    # without shot_files the description holds them
    pools = read_items(task, task.shot_files, folder) if count else {}
    least = count + 1 if count and task.spare_shot else count

    questions = []
    for part, items in parts.items():
        pool = pools.get("" if "" in pools else part, [])
        if len(pool) < least:
            raise ValueError(
                f"{folder / task.shot_files[0]}: {len(pool)} demonstrations of {part or name}, "
                f"it takes {least}; add rows"
            )
        description = describe_part(name, task, part, folder)
        rng = random.Random(SHOT_SEED)
        for item in draw_limited(items, limit, f"{seed} {name} {part}"):
            shots = choose_shots(task, pool, count, item, rng)
            shown = [shot.demonstrate(task.delimiter) + task.shot_delimiter for shot in shots]
            questions.append(Question(item, part, description + "".join(shown)))
    return questions


def describe_part(name: str, task: Task, part: str, folder: Path) -> str:
    try:
        return task.describe(part, folder)
    except READ_ERRORS as error:
        raise ValueError(
            f"{folder}: no description of the part {part!r} of {name} ({error})"
        ) from None


# ---------------------------------------------------------------------------------------------
# The embedded world

def microcosm_strict(item: Item, outcome: Outcome) -> float:
    """Return 1.0 if the answer is exactly right."""
    return rubric.metrics(item.query, outcome.text, item.answers[0])["strict"]


MICROCOSM = Task(
    lambda row: None, (), {"strict": microcosm_strict}, max_new_tokens=32, is_dialogue=True
)


def microcosm_questions(limit: int | None, seed: int) -> list[Question]:
    """Draw questions of the embedded world's 12 general tasks, `limit` of each or 60."""
    each = WORLD_QUESTIONS if limit is None else limit
    items = microcosm.evaluation_items(0, len(microcosm.TASKS) * each, seed)
    return [Question(Item(item.prompt, answers=(item.answer,)), item.task) for item in items]


# ---------------------------------------------------------------------------------------------
# Token ids

class Request(NamedTuple):
    """A continuation to score after a context, token ids."""
    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Asked(NamedTuple):
    """A question's token ids: requests to score, or a prompt to continue."""
    requests: Sequence[Request] = ()
    prompt: Sequence[int] = ()
    reason: str = ""                    # why the model cannot be asked it
    is_cut: bool = False                # it lost tokens on the left


def texts_to_score(question: Question, delimiter: str) -> list[tuple[str, str]]:
    """Return (context, continuation) of every choice."""
    item = question.item
    queries = item.queries or (item.query,) * len(item.choices)
    return [
        (question.prefix + query, delimiter + choice)
        for query, choice in zip(queries, item.choices)
    ]


def encode_request(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Encode both together and cut by the length of the context.

    Encoded alone, a continuation gets other ids. Spaces at the context's end belong to the
    continuation: in the pieces of LLaMA a space opens a word. An empty context is the bos alone.
    """
    if not context:
        return Request((tokenizer.prefix_id,), tuple(tokenizer.encode(continuation)))
    before = tokenizer.encode(context.rstrip())
    whole = tokenizer.encode(context + continuation)
    return Request((*tokenizer.opening, *before), tuple(whole[len(before):]))


def encode_question(
    question: Question, task: Task, tokenizer: Tokenizer, context_size: int, template: str = "plain"
) -> Asked:
    """Encode a question, or say why the model cannot be asked it. template: of a dialogue."""
    if question.item.choices:
        pairs = texts_to_score(question, task.delimiter)
        requests = [encode_request(tokenizer, before, after) for before, after in pairs]
        return check_requests(requests, context_size)

    room = context_size - task.max_new_tokens
    if room < 1:
        return Asked(
            reason=f"{task.max_new_tokens} new tokens leave no room "
            f"in the model's context of {context_size}"
        )
    if task.is_dialogue:
        prompt = encode_prompt(tokenizer, (Message("user", question.item.query),), template)
    else:
        prompt = [*tokenizer.opening, *tokenizer.encode(question.prefix + question.item.query)]
    # What is too long loses demonstrations, never the question itself, which stands at the end.
    return Asked(prompt=prompt[-room:], is_cut=len(prompt) > room)


def check_requests(requests: Sequence[Request], context_size: int) -> Asked:
    """Say whether these requests can be scored with so large a context."""
    if any(len(request.continuation) > context_size for request in requests):
        reason = f"a choice is longer than the model's context of {context_size} tokens"
        return Asked(requests, reason=reason)
    if not all(request.continuation for request in requests):
        return Asked(requests, reason="a choice adds no token to the text before it")
    # one more than the context holds, because the last token is only predicted
    longest = max(len(request.context) + len(request.continuation) for request in requests)
    return Asked(requests, is_cut=longest > context_size + 1)
