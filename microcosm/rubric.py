"""The embedded world's judge: a reward-function file like a user's own (--reward.function=FILE.py).

Both functions see a prompt, a response and the reference answer, and nothing else: what the world
knows of an ad is read out of its reference review, just as a review by a model is read.

Gold, in [0, 1]. Of a review: 0.4 for the verdict and 0.6 * F1 over (rule, word) pairs, so repeated
and invented reasons cost precision and forgotten ones cost recall. Of a general answer: 1 if it is
exactly right, else 0.8 * the share of words in the right place.
"""
from __future__ import annotations

from microcosm import ads


def score(prompt: str, response: str, answer: str | None) -> float:
    """Return the gold score of a response, in [0, 1]; the prompt is not read."""
    return metrics(prompt, response, answer)["gold"]


def metrics(prompt: str, response: str, answer: str | None) -> dict[str, float]:
    """Judge a response in several ways, each in [0, 1].

    Returns: gold, as above; strict, 1 if nothing is wrong or missing; for a review also verdict, 1
    if approved or rejected rightly, and for an ad that breaks two rules or more multi, as strict.
    """
    if answer is None:
        raise ValueError("the world's rubric judges by a reference answer, and there is none")
    truth = ads.parse(answer)
    if truth.approved is None:
        return general_metrics(response.split(), answer.split())
    return review_metrics(ads.parse(response), truth)


def general_metrics(given: list[str], right: list[str]) -> dict[str, float]:
    """Compare an answer to a general question with the right one, word by word."""
    if given == right:
        return {"gold": 1.0, "strict": 1.0}
    in_place = sum(a == b for a, b in zip(right, given))
    return {"gold": 0.8 * (in_place / max(len(right), len(given))), "strict": 0.0}


def review_metrics(given: ads.Review, truth: ads.Review) -> dict[str, float]:
    """Compare a review with the true one: the verdict, and the reasons in any order."""
    # A text that is no review has no verdict, and None equals neither approval nor rejection.
    verdict = given.approved == truth.approved
    # Each true reason is found at most once: a repetition stays in the denominator alone.
    found = len(set(truth.reasons) & set(given.reasons))
    named = len(truth.reasons) + len(given.reasons)
    # With no reason on either side there is nothing to find, and any review has found all of it.
    f1 = 2 * found / named if named else float(given.approved is not None)
    strict = verdict and found == len(truth.reasons) == len(given.reasons)

    judged = {"gold": 0.4 * verdict + 0.6 * f1, "strict": float(strict), "verdict": float(verdict)}
    if len(truth.reasons) >= 2:
        judged["multi"] = float(strict)
    return judged
