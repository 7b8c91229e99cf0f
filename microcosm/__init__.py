"""The embedded default: a small world whose truth is known.

The domain is advertisement review (ads.py), as in the paper; beside it stand 12 general tasks (general.py).
People's answers are imperfect *by construction*: most reviewers stop at the first reason, some are sloppy,
and one general answer in eight is a slip. So a model fine-tuned on them has something left to learn from
rankings, and an evaluation against the truth can show whether it did.

Everything is a pure function of a seed. The three splits share no prompt: whole combinations (what an
ad sells and the set of rules it breaks; a general question) belong to one split, by a hash, for every seed.
The gold rubric, `grade`, is for the annotator and the evaluation alone.
"""
from __future__ import annotations

import hashlib
import io
import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

from . import ads, general

TASKS = tuple(general.GENERATORS)
SPLITS = {"eval": range(0, 10), "preference": range(10, 40), "train": range(40, 100)}  # buckets of 100
SLIP = 0.12  # share of general answers that people get wrong


@dataclass(frozen=True)
class Item:
    """One prompt of the world: its task ("ad" or one of TASKS), its text, the true answer, and what the rubric knows."""
    task: str
    prompt: str
    answer: str
    evidence: dict[str, str]   # broken rule -> the word that shows it; empty for general tasks
    ad: ads.Ad | None = None
    slip: str = ""             # a plausible wrong answer to a general question


@dataclass(frozen=True)
class Grade:
    """The rubric's judgement of one answer."""
    gold: float                # [0, 1]
    strict: bool               # exactly right
    verdict: bool              # approved or rejected rightly; general tasks: exactly right
    multi: bool | None         # strict, for ads that break two rules or more; None for all else


def bucket(combination: str) -> int:
    """Hash a combination to 0..99, alike on every machine."""
    return int.from_bytes(hashlib.blake2s(combination.encode(), digest_size=4).digest(), "big") % 100


def items(split: str, n: int, seed: int, in_domain_share: float = 0.5) -> list[Item]:
    """Draw n prompts of a split ("train", "preference" or "eval"): ads in between, general tasks in turn.

    A longer list starts with the shorter one, so more training continues an experiment instead of changing it.
    """
    rng = random.Random(f"{split} {seed}")
    turn = itertools.cycle(rng.sample(TASKS, len(TASKS)))
    return [draw(rng, "ad" if rng.random() < in_domain_share else next(turn), split) for _ in range(n)]


def draw(rng: random.Random, task: str, split: str) -> Item:
    """Draw one prompt of a task; what belongs to another split is drawn again."""
    while True:
        if task == "ad":
            ad = ads.draw(rng)
            if bucket(f"{ad.look} {ad.product} {' '.join(ad.evidence)}") in SPLITS[split]:
                return Item(task, f"Review: {ad.text}", ads.review(ad.evidence, approve=not ad.evidence), ad.evidence, ad)
        else:
            question = general.GENERATORS[task](rng)
            words = " ".join(sorted(question.prompt.split()))  # another order of the same words is no new question
            if bucket(words) in SPLITS[split]:
                return Item(task, question.prompt, question.answer, {}, slip=question.slip)


def demonstrate(item: Item, rng: random.Random) -> str:
    """Answer as an imperfect person would."""
    if item.ad:
        return ads.demonstrate(item.ad, rng)
    return item.slip if rng.random() < SLIP else item.answer


def grade(item: Item, answer: str) -> Grade:
    """Judge an answer by the truth.

    Ads: gold = 0.4 * verdict + 0.6 * F1 over (rule, evidence) pairs; repeated and invented reasons cost precision.
    General tasks: 1 if exactly right, else 0.8 * share of words in the right place.
    """
    if item.ad is None:
        right, given = item.answer.split(), answer.split()
        share = sum(a == b for a, b in zip(right, given)) / max(len(right), len(given))
        exact = right == given
        return Grade(1.0 if exact else 0.8 * share, exact, exact, None)
    approved, reasons = ads.parse(answer)
    truth = set(item.evidence.items())
    verdict = approved == (not truth)  # None, no review at all, equals neither
    found = len(truth & set(reasons))
    f1 = 2 * found / (len(truth) + len(reasons)) if truth or reasons else float(approved is not None)
    strict = verdict and found == len(truth) == len(reasons)
    return Grade(0.4 * verdict + 0.6 * f1, strict, verdict, strict if len(truth) >= 2 else None)


def annotate(item: Item, answers: Sequence[str], seed: int, noise: float = 0.1) -> list[int]:
    """Rank answers as a person with the rubric in mind would: by gold plus an error of N(0, noise).

    Returns: one rank per answer, 1 is best; equal answers get equal ranks. The error belongs to the answer, so the
    order in which answers are shown does not matter.
    """
    def felt(answer: str) -> float:
        return grade(item, answer).gold + random.Random(f"annotator {seed} {item.prompt}\n{answer}").gauss(0, noise)
    values = [felt(answer) for answer in answers]
    order = sorted(set(values), reverse=True)
    return [order.index(value) + 1 for value in values]


def train_tokenizer(path: str | Path, vocab_size: int = 512) -> None:
    """Train the world's sentencepiece tokenizer (BPE) on 3,000 training prompts and answers, and write it to path."""
    import sentencepiece
    texts = (f"{item.prompt} {item.answer}" for item in items("train", 3000, seed=0))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=model, model_type="bpe", vocab_size=vocab_size, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        normalization_rule_name="identity", user_defined_symbols=["\n"], character_coverage=1.0, num_threads=1, minloglevel=2)
    Path(path).write_bytes(model.getvalue())
