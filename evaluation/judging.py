"""Judges: what says which of two answers is better, and how far to trust that.

A judge sees a prompt and one answer at a time and returns a number, higher is better: a reward
model, or a reward function in a Python file. (People's judgments are files: head_to_head.py.)
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import data
import reward
from evaluation.head_to_head import Pair
from evaluation.speaking import Answer, Speaker, answers, encode, load
from evaluation.statistics import prefer
from formats import Messages, Prompt
from formats.files import read_json
from model import ScalarModel

# (prompts, an answer to each) -> a score of each
Judge = Callable[[Sequence[Prompt], Sequence[Answer]], list[float]]


def load_judge(path: str | Path, flags: Mapping[str, Any]) -> Judge:
    """Return what scores an answer to each prompt: a reward function (.py) or a reward model."""
    if str(path).endswith(".py"):
        # A function sees texts, and of the prompt also the reference answer.
        function = reward.RewardFunction(path)
        return lambda prompts, given: function(prompts, [answer.text for answer in given])
    speaker = load(path, flags, ScalarModel)
    return lambda prompts, given: judged(speaker, prompts, given)


def scores(judge: Speaker, rows: list[list[int]]) -> list[float]:
    """Return a reward model's scores of rows of ids, prompt and response, in its run's scale.

    Mean 0 and deviation 1 on samples of the run's SFT model, which is what PPO is shown.
    """
    # A reward model from elsewhere has no scale of a run: its scores are raw.
    config = read_json(judge.path / "config.json")
    mean = config.get("score_mean", 0.0)
    std = config.get("score_std", 1.0)
    return [(score - mean) / std for score in raw_scores(judge, rows)]


def raw_scores(judge: Speaker, rows: list[list[int]]) -> list[float]:
    """Return what a reward model says of rows of ids, in micro-batches of its run's size."""
    # a model without a run may be large: it reads few at once
    size = judge.settings.get("ppo.microbatch_size", 4)
    tokens = judge.settings.get("ppo.microbatch_tokens", 0)
    return reward.model_scores(judge.model, rows, size, tokens)


def judged(judge: Speaker, prompts: Sequence[Prompt], given: Sequence[Answer]) -> list[float]:
    """Return a reward model's score of an answer to each prompt.

    The texts are encoded anew: the judge's tokenizer and template may be others than the speaker's.
    """
    context = judge.model.config.max_seq_len
    rows = []  # prompt and answer as ids, ragged
    for prompt, answer in zip(prompts, given, strict=True):
        row = data.encode_prompt(judge.tokenizer, prompt.messages, judge.data.template)
        row += response_ids(judge, prompt.messages, answer)
        # Not cut: a judge that has not read the end would judge something else.
        if len(row) > context:
            raise ValueError(
                f"{prompt.source}: prompt and answer have {len(row)} tokens, "
                f"the context of the judge {judge.path} is {context}"
            )
        rows.append(row)
    return scores(judge, rows)


def response_ids(judge: Speaker, messages: Messages, answer: Answer) -> list[int]:
    """Return an answer's ids.

    One that was cut off gets neither an EOS, which the model did not draw, nor what the template
    puts between an answer and its EOS.
    """
    template = judge.data.template
    if answer.finished:
        return data.encode_response(judge.tokenizer, answer.text, template, messages)
    before = data.template_for(template, messages).before
    return judge.tokenizer.encode_segment(before + answer.text if answer.text else "")


def answer_pairs(
    prompts: Sequence[Prompt], first: Speaker, second: Speaker, judge: Judge | None
) -> list[Pair]:
    """Have two models answer, greedily, and prefer what the judge gives the higher score.

    The judge sees every answer by itself, so there is no order that could matter. Without one (it
    is people's turn) nobody is preferred yet.
    """
    given = []  # of each speaker, an answer to every prompt
    noted = []  # of each speaker, the score of every answer
    for speaker in (first, second):
        drawn = list(answers(speaker, encode(speaker, prompts)))
        given.append([only for (only,) in drawn])
        noted.append(judge(prompts, given[-1]) if judge else [math.nan] * len(prompts))

    # Where some prompts have a task there is a domain to tell them from.
    has_tasks = any(prompt.task for prompt in prompts)
    pairs = []
    for prompt, a, b, score_a, score_b in zip(prompts, *given, *noted):
        group = "general" if prompt.task else "in-domain" if has_tasks else "prompts"
        notes = (f"{score_a:.2f}", f"{score_b:.2f}")
        preference = prefer(score_a, score_b)
        truth = prompt.answer or ""
        pairs.append(Pair(prompt.text, a.text, b.text, preference, notes, truth, group))
    return pairs


def judge_rankings(
    judge: Speaker, ranked: Sequence[data.TokenizedRanking]
) -> tuple[list[list[float]], list[bool]]:
    """Hold a reward model against people's rankings.

    Returns: for every ranking the margins of its pairs, the raw score of the response that people
        prefer less the other's; and for every ranking of 3 or more, whether the model's favourite
        is people's.
    """
    rows = []  # prompt and response, of all rankings one after the other
    groups = []  # of every ranking, its responses' ranks; equal responses count once
    for example in ranked:
        group = {tuple(ids): rank for ids, rank in zip(example.responses, example.ranks)}
        groups.append(list(group.values()))
        rows += [example.prompt + list(response) for response in group]
    raw = iter(raw_scores(judge, rows))

    # The scores come back in the order in which the rows were laid out.
    margins = []
    is_best = []
    for ranks in groups:
        given = [(next(raw), rank) for rank in ranks]
        # Every pair once, the better one first; ties are no pair.
        margins.append([a - b for a, rank in given for b, other in given if rank < other])
        if len(given) > 2:
            favourite = max(given)
            is_best.append(favourite[1] == min(ranks))
    return margins, is_best
