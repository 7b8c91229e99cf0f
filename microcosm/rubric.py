"""The embedded world's judge as a reward-function file: general tasks alone, until the whole one is here."""
from __future__ import annotations


def metrics(prompt: str, response: str, answer: str | None) -> dict[str, float]:
    """Judge an answer to a general question: strict is 1.0 if it is exactly right."""
    return {"strict": float(response.split() == (answer or "").split())}
