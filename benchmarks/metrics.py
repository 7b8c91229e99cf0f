"""What an answer is worth: metrics and filters of the harness."""
from __future__ import annotations

import math
import re
import string
from typing import Callable, Sequence

from benchmarks.items import Item, Outcome

Metric = Callable[[Item, Outcome], float | None]  # None: the metric does not apply to this item


# ---------------------------------------------------------------------------------------------
# Choices

def argmax(values: Sequence[float]) -> int:
    """Return the index of the largest value, the first of equal ones."""
    return max(range(len(values)), key=values.__getitem__)


def acc(item: Item, outcome: Outcome) -> float:
    """Return 1.0 if the likeliest choice is a right one."""
    return float(argmax(outcome.logprobs) in item.gold)


def acc_norm(item: Item, outcome: Outcome) -> float | None:
    """Return 1.0 if the choice likeliest per character is a right one; None without choices.

    A long choice is less likely than a short one for its length alone. The harness divides by
    characters: not by tokens, which would depend on the tokenizer, and not by bytes, though its
    paper says so. The delimiter before the choice is not counted.
    """
    if not item.choices:
        return None
    per_character = [x / len(choice) for x, choice in zip(outcome.logprobs, item.choices)]
    return float(argmax(per_character) in item.gold)


def mc2(item: Item, outcome: Outcome) -> float:
    """Return the probability mass on the true answers (Lin et al. 2022)."""
    # Against the largest one: the likelihood of a long answer alone would underflow to 0.
    top = max(outcome.logprobs)
    mass = [math.exp(x - top) for x in outcome.logprobs]
    return sum(mass[i] for i in item.gold) / sum(mass)


def log_likelihood(item: Item, outcome: Outcome) -> float:
    """Return the only choice's log-likelihood [nats]; their mean becomes a perplexity."""
    return outcome.logprobs[0]


def is_greedy(item: Item, outcome: Outcome) -> float:
    """Return 1.0 if greedy decoding would write the only choice."""
    return float(outcome.greedy[0])


# ---------------------------------------------------------------------------------------------
# Texts

def extract(pattern: str, which: int = 0) -> Callable[[str], str]:
    """Make a filter: the which-th match of a pattern, of several groups the first not empty."""
    def apply(text: str) -> str:
        found = re.findall(pattern, text)
        if not found:
            return "[invalid]"
        match = found[which]
        if not isinstance(match, str):  # a pattern of several groups: a tuple of their texts
            match = next(filter(None, match), "[invalid]")
        return match.strip()
    return apply


def exact_match(
    filter_text: Callable[[str], str],
    ignored: Sequence[str] = (),
    case: bool = True,
    punctuation: bool = True,
) -> Metric:
    """Make a metric: 1.0 if the filtered text equals any answer.

    ignored: patterns removed on both sides before.   case, punctuation: whether they matter.
    """
    def normal(text: str) -> str:
        for pattern in ignored:
            text = re.sub(pattern, "", text)
        if not case:
            text = text.lower()
        if not punctuation:
            text = text.translate(str.maketrans("", "", string.punctuation))
        return text

    def metric(item: Item, outcome: Outcome) -> float:
        return float(normal(filter_text(outcome.text)) in map(normal, item.answers))
    return metric


# ---------------------------------------------------------------------------------------------
# Programs

def pass_at_k(n: int, right: int, k: int) -> float:
    """Estimate the chance that one of k samples is right from n samples of which `right` are.

    One less the share of the k-subsets without a right one: no bias, unlike 1 - (1 - right / n)^k.
    Source: Chen et al. 2021.
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
