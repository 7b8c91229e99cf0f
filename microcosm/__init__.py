"""The embedded default: a small world whose truth is known.

The domain is advertisement review (ads.py), as in the paper; beside it stand 12 general tasks
(general.py). People's answers are imperfect *by construction*: reviewers are hasty and notice three
reasons in ten, and one general answer in eight is a slip. So full analyses are rare in what a model
is fine-tuned on and among its samples, rankings tell which of two answers says more, and an
evaluation against the truth can show who learnt from that.

Everything is a pure function of a seed. The three splits share no prompt: whole combinations (what
an ad sells and the set of rules it breaks; a general question) belong to one split, by a hash, for
every seed. The gold rubric (rubric.py) is for the annotator and the evaluation alone.
"""
from __future__ import annotations

import hashlib
import io
import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Collection, Sequence

from . import ads, general, rubric

TASKS = tuple(general.GENERATORS)
# Buckets of 100 that a combination's hash may fall into, by split.
SPLITS = {"eval": range(0, 10), "preference": range(10, 40), "train": range(40, 100)}
ATTEMPTS = 5_000  # at drawing a prompt; the smallest split holds one in ten
SLIP = 0.12  # share of general answers that people get wrong


@dataclass(frozen=True)
class Item:
    """One prompt of the world, its true answer, and what people are made to get wrong about it."""
    task: str                # one of TASKS; "": the domain itself, an advertisement
    prompt: str
    answer: str
    ad: ads.Ad | None = None  # of an advertisement
    slip: str = ""           # of a general question: a plausible wrong answer


def bucket(combination: str) -> int:
    """Hash a combination to 0..99, alike on every machine."""
    digest = hashlib.blake2s(combination.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 100


def items(split: str, n: int, seed: int, in_domain_share: float = 0.5) -> list[Item]:
    """Draw n different prompts of a split ("train", "preference", "eval"): ads, and general tasks
    in turn.

    Without replacement: a prompt that comes again tells nothing new, and would count as one more
    that agrees.
    """
    # One stream of random numbers, item after item: a longer list starts with the shorter one, so
    # more training continues an experiment instead of changing it.
    rng = random.Random(f"{split} {seed}")
    turn = itertools.cycle(rng.sample(TASKS, len(TASKS)))
    drawn: dict[str, Item] = {}  # by prompt, in the order drawn
    for _ in range(n):
        task = "" if rng.random() < in_domain_share else next(turn)
        item = draw(rng, task, split, drawn)
        drawn[item.prompt] = item
    return list(drawn.values())


def evaluation_items(in_domain: int, general: int, seed: int) -> list[Item]:
    """Draw the items of an evaluation: so many ads, and so many general questions."""
    return items("eval", in_domain, seed, 1.0) + items("eval", general, seed, 0.0)


def draw(rng: random.Random, task: str, split: str, drawn: Collection[str]) -> Item:
    """Draw one prompt of a task; another split's, or one that is drawn already, is drawn again.

    ValueError if after many attempts there is none.
    """
    for _ in range(ATTEMPTS):
        item, combination = draw_question(rng, task) if task else draw_ad(rng)
        if bucket(combination) in SPLITS[split] and item.prompt not in drawn:
            return item
    raise ValueError(f"the embedded world has too few different prompts of {task or 'the domain'} "
                     f"(split {split}): ask for fewer, or for another in_domain_share")


def draw_ad(rng: random.Random) -> tuple[Item, str]:
    """Draw an ad of any split; also return the combination that decides on its split."""
    ad = ads.draw(rng)
    answer = ads.review(ad.evidence, approve=not ad.evidence)
    combination = f"{ad.look} {ad.product} {' '.join(ad.evidence)}"
    return Item("", f"Review: {ad.text}", answer, ad=ad), combination


def draw_question(rng: random.Random, task: str) -> tuple[Item, str]:
    """Draw a question of any split; also return the combination that decides on its split."""
    question = general.GENERATORS[task](rng)
    # Another order of the same words is no new question.
    combination = " ".join(sorted(question.prompt.split()))
    return Item(task, question.prompt, question.answer, slip=question.slip), combination


def demonstrate(item: Item, rng: random.Random) -> str:
    """Answer as an imperfect person would."""
    if item.ad:
        return ads.demonstrate(item.ad, rng)
    return item.slip if rng.random() < SLIP else item.answer


def train_tokenizer(path: str | Path, vocab_size: int = 512) -> None:
    """Train the world's sentencepiece tokenizer (BPE) on 3,000 training prompts and answers."""
    import sentencepiece

    texts = (f"{item.prompt} {item.answer}" for item in items("train", 3000, seed=0))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        # the ids of LLaMA's own tokenizer, which has no padding either
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        # text comes back exactly as it went in, line breaks included
        normalization_rule_name="identity",
        user_defined_symbols=["\n"],
        character_coverage=1.0,
        # several threads would make the pieces depend on chance
        num_threads=1,
        minloglevel=2,
    )
    Path(path).write_bytes(model.getvalue())
