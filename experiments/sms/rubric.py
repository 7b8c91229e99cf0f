"""What a good answer is: 0.4 for the verdict, 0.6 for its signs. A reward function of train.py."""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # loaded as a file, it imports its neighbour

from signs import agreement, read_answer


def score(prompt: str, response: str, answer: str) -> float:
    """Score a response from 0 to 1 by the true answer; signs count with the right verdict alone."""
    said, true = read_answer(response), read_answer(answer)
    if said.is_spam != true.is_spam:
        return 0.0
    return 0.4 + 0.6 * agreement(said.signs, true.signs)


def metrics(prompt: str, response: str, answer: str) -> dict[str, float]:
    """Return what the evaluation shows beside the score."""
    said, true = read_answer(response), read_answer(answer)
    found = {"rubric": score(prompt, response, answer),
             "verdict": float(said.is_spam == true.is_spam), "strict": float(said == true)}
    if true.signs:  # of spam alone
        found["signs found"] = len(said.signs & true.signs) / len(true.signs)
    if said.signs:
        found["signs right"] = len(said.signs & true.signs) / len(said.signs)
    return found
