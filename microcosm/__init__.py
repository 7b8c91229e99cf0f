"""The embedded default: a small world of advertisements and general tasks whose truth is known."""
from __future__ import annotations
import random, zlib, io
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence
from . import ads, general
TASKS = tuple(general.GENERATORS)

@dataclass(frozen=True)
class Item:
    task: str
    prompt: str
    answer: str
    ad: ads.Ad | None = None
    slip: str = ""

SPLITS = {"eval": range(0, 10), "preference": range(10, 40), "train": range(40, 100)}

def bucket(key: str) -> int:
    return zlib.crc32(key.encode()) * 2654435761 % 2**32 * 100 >> 32

def items(split, n, seed, in_domain_share=0.5):
    wanted = SPLITS[split]
    rng = random.Random(f"{split} {seed}")
    out = []
    for i in range(n):
        task = "ad" if rng.random() < in_domain_share else rng.choice(TASKS)
        while True:
            if task == "ad":
                ad = ads.draw(rng)
                if bucket(f"{ad.product} {sorted(ad.evidence)}") in wanted:
                    out.append(Item("ad", f"Ad: {ad.text}", ads.review(ad.evidence), ad)); break
            else:
                q = general.GENERATORS[task](rng)
                if bucket(q.prompt) in wanted:
                    out.append(Item(task, q.prompt, q.answer, None, q.slip)); break
    return out

def demonstrate(item, rng):
    if item.ad: return ads.demonstrate(item.ad, rng)
    return item.answer if rng.random() > 0.12 else item.slip

@dataclass(frozen=True)
class Grade:
    gold: float
    strict: bool
    verdict: bool
    multi: bool | None

def grade(item, answer):
    answer = answer.strip()
    if item.ad is None:
        right, given = item.answer.split(), answer.split()
        share = sum(a == b for a, b in zip(right, given)) / max(len(right), len(given), 1)
        ok = right == given
        return Grade(1.0 if ok else 0.8 * share, ok, ok, None)
    approve, pairs = ads.parse(answer)
    truth = set(item.ad.evidence.items())
    verdict = approve is not None and approve == (not truth)
    if approve is None: f1 = 0.0
    elif not truth and not pairs: f1 = 1.0
    else: f1 = 2 * len(truth & set(pairs)) / (len(truth) + len(pairs))
    strict = verdict and len(pairs) == len(truth) and set(pairs) == truth
    return Grade(0.4 * verdict + 0.6 * f1, strict, verdict, strict if len(truth) > 1 else None)

def annotate(item, answers, seed, noise=0.1):
    rng = random.Random(f"{seed} {item.prompt} {answers}")
    score = {a: grade(item, a).gold + rng.gauss(0, noise) for a in sorted(set(answers))}
    order = sorted(score, key=lambda a: -score[a])
    return [order.index(a) + 1 for a in answers]

def train_tokenizer(path, vocab_size=512):
    import sentencepiece
    lines = [f"{i.prompt}\n{i.answer}".replace("\n", " ") for i in items("train", 3000, 0, 0.5)]
    buf = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=buf, model_type="bpe", vocab_size=vocab_size, unk_id=0, bos_id=1, eos_id=2,
        pad_id=-1, normalization_rule_name="identity", user_defined_symbols=["\n"], num_threads=1, minloglevel=2, character_coverage=1.0)
    Path(path).write_bytes(buf.getvalue())
