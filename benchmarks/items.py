"""One question in the form that all tasks share, and what a model said to it."""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Item:
    """One question. gold: indices of the right choices; answers: the texts that count as right."""
    query: str = ""
    choices: tuple[str, ...] = ()
    gold: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()       # partial scoring: one text per option, `choices` repeat
    shown: str = ""                     # the answer in a demonstration, if not the first right one
    checks: str = ""                    # program text that raises unless the code before is right
    opening: str = ""                   # program text before the generated code
    asked: tuple[str, ...] = ()         # names that the generated code defines

    @property
    def right_answer(self) -> str:
        """Return the answer that a demonstration shows."""
        if self.shown:
            return self.shown
        return self.choices[self.gold[0]] if self.choices else self.answers[0]

    def demonstrate(self, delimiter: str) -> str:
        """Return query and answer as a demonstration shows them."""
        query = self.queries[self.gold[0]] if self.queries else self.query
        return query + delimiter + self.right_answer


class Likelihood(NamedTuple):
    """How likely a model finds a continuation."""
    logprob: float                      # of all its tokens together [nats]
    is_greedy: bool                     # every token is the most probable one


@dataclass(frozen=True)
class Outcome:
    """What the model said to an item: the likelihood of every choice, or a generated text."""
    logprobs: tuple[float, ...] = ()    # [nats]
    greedy: tuple[bool, ...] = ()
    text: str = ""
