"""What an answer is worth: metrics and filters of the harness."""
from __future__ import annotations

import math
import re
import string
from dataclasses import dataclass
from typing import Callable, Sequence


@dataclass(frozen=True)
class Item:
    """One question. `gold` holds the indices of the right choices, `answers` the texts that count as right."""
    query: str = ""
    choices: tuple[str, ...] = ()
    gold: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()       # partial scoring: one text per option, and `choices` repeat what follows
    shown: str = ""                     # the answer in a demonstration, where it is not the first right choice or answer
    checks: str = ""                    # program text that raises unless the code before it is right
    opening: str = ""                   # program text before the generated code

    def demonstrate(self, delimiter: str) -> str:
        """Return query and answer as a demonstration shows them."""
        query = self.queries[self.gold[0]] if self.queries else self.query
        return query + delimiter + (self.shown or (self.choices[self.gold[0]] if self.choices else self.answers[0]))


@dataclass(frozen=True)
class Outcome:
    """What the model said to an item: log-likelihoods [nats] and greediness of every choice, or generated texts."""
    logprobs: tuple[float, ...] = ()
    greedy: tuple[bool, ...] = ()
    text: str = ""


Metric = Callable[[Item, Outcome], float | None]  # None: the metric does not apply to this item


def argmax(values: Sequence[float]) -> int:
    """Return the index of the largest value, the first of equal ones."""
    return max(range(len(values)), key=values.__getitem__)


def acc(item: Item, outcome: Outcome) -> float:
    return float(argmax(outcome.logprobs) in item.gold)


def acc_norm(item: Item, outcome: Outcome) -> float | None:
    """Judge log-likelihoods per character (not byte) of the choice, its delimiter not counted; None without choices."""
    return float(argmax([x / len(choice) for x, choice in zip(outcome.logprobs, item.choices)]) in item.gold) if item.choices else None


def mc2(item: Item, outcome: Outcome) -> float:
    """Return the probability mass on the true answers (Lin et al. 2022)."""
    top = max(outcome.logprobs)
    mass = [math.exp(x - top) for x in outcome.logprobs]
    return sum(mass[i] for i in item.gold) / sum(mass)


def log_likelihood(item: Item, outcome: Outcome) -> float:
    return outcome.logprobs[0]


def is_greedy(item: Item, outcome: Outcome) -> float:
    return float(outcome.greedy[0])


def extract(pattern: str, which: int = 0) -> Callable[[str], str]:
    """Make a filter that takes the which-th match of a pattern, of several groups the first that is not empty."""
    def apply(text: str) -> str:
        found = re.findall(pattern, text)
        if not found:
            return "[invalid]"
        match = found[which]
        return (match if isinstance(match, str) else next(filter(None, match), "[invalid]")).strip()
    return apply


def exact_match(filter_text: Callable[[str], str], ignored: Sequence[str] = (), case: bool = True, punctuation: bool = True) -> Metric:
    """Make a metric: 1.0 if the filtered text equals any answer, after removing `ignored` patterns (and case, punctuation) on both sides."""
    def normal(text: str) -> str:
        for pattern in ignored:
            text = re.sub(pattern, "", text)
        text = text if case else text.lower()
        return text if punctuation else text.translate(str.maketrans("", "", string.punctuation))
    return lambda item, outcome: float(normal(filter_text(outcome.text)) in map(normal, item.answers))


def math_answer(text: str) -> str | None:
    """Find the answer in a solution: the last \\boxed{}, or the last $...$, or what follows the last =, or the last number (AGIEval)."""
    if "\\boxed" in text:
        start = text.rfind("\\boxed")
        depth = 0
        for end in range(start, len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if text[end] == "}" and depth == 0:
                inner = text[start + len("\\boxed{"):end]
                return inner.split("=")[-1].lstrip(" ") if text[start:].startswith("\\boxed{") else None
        return None
    dollars = re.findall(r"\$(.*)\$", text)
    if dollars and dollars[-1]:
        return dollars[-1].split("=")[-1].lstrip(" ") if "=" in dollars[-1] else dollars[-1]
    if "=" in text:
        return text.split("=")[-1].lstrip(" ").rstrip(".").split("\\n")[0]
    numbers = re.findall(r"(?:\$)?\d+(?:\.\d+)?(?![\w\d])", text)
    return numbers[-1] if numbers else None


def brace_arguments(text: str, command: str, count: int) -> str:
    r"""Write \sqrt3 as \sqrt{3} and \frac12 as \frac{1}{2}; IndexError where there is nothing after the command."""
    head, *parts = text.split(command)
    for part in parts:
        if part[0] != "{":
            if count == 2:
                if len(part) < 2:
                    return text
                part = "{" + part[0] + "}" + (part[1:] if part[1] == "{" else "{" + part[1] + "}" + part[2:])
            else:
                part = "{" + part[0] + "}" + part[1:]
        head += command + part
    return head


def plain_math(text: str) -> str:
    """Strip what does not change a formula's value, in the order of Hendrycks et al. 2021; ValueError or IndexError if it is no formula."""
    for old, new in (("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", ""),
                     ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", "")):
        text = text.replace(old, new)
    if "\\text{ " in text:
        text, _ = text.split("\\text{ ")
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    text = "0" + text if text.startswith(".") else text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = brace_arguments(text, "\\sqrt", 1) if text else text
    text = brace_arguments(text.replace(" ", ""), "\\frac", 2)
    text = "\\frac{1}{2}" if text == "0.5" else text
    fraction = re.fullmatch(r"(0|-?[1-9]\d*)/(0|-?[1-9]\d*)", text)
    return "\\frac{%s}{%s}" % fraction.groups() if fraction else text


def math_equal(text: str, truth: str) -> bool:
    """Compare two answers as formulas."""
    mine, right = math_answer(text), math_answer(truth)
    try:
        return plain_math(mine) == plain_math(right)
    except (AttributeError, ValueError, IndexError):  # no answer in it, or no formula: the raw texts decide
        return mine == right
