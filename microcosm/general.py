"""Twelve general tasks that must not get worse: lists, numbers, words, small deductions.

Every prompt carries enough content that whole combinations can be held out while every word is
seen, and that no prompt need be asked twice: here and there a word stands in it that means nothing.
Each task is one that two layers of attention can do: find a word by the one before it, count,
remember a small table. A new task is a function that draws a question, and a line in GENERATORS.
"""
from __future__ import annotations

import random
from typing import Callable, NamedTuple

CLASSES = {
    "animal": ("cat", "dog", "cow", "hen", "fox", "owl"),
    "fruit": ("plum", "fig", "pear", "lime", "date", "kiwi"),
    "tool": ("saw", "axe", "drill", "file", "rake", "hook"),
    "color": ("red", "blue", "green", "pink", "gray", "gold"),
}
WORDS = tuple(word for words in CLASSES.values() for word in words)
OPPOSITES = {
    "hot": "cold", "big": "small", "old": "young", "fast": "slow", "dark": "bright", "wet": "dry",
}
OPPOSITES |= {b: a for a, b in OPPOSITES.items()}  # and back
LOOKS = tuple(OPPOSITES)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


class Question(NamedTuple):
    """A prompt, its right answer, and a plausible wrong one."""
    prompt: str
    answer: str
    slip: str


def swapped(words: list[str], rng: random.Random) -> str:
    """Get a list wrong as people do: drop its last item, or swap two neighbours."""
    if rng.random() < 0.4:
        return " ".join(words[:-1])
    i = rng.randrange(len(words) - 1)
    words = list(words)
    words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words)


def near(number: int, rng: random.Random) -> int:
    """Get a number wrong as people do: one off, and never below 0."""
    return number + 1 if number == 0 or rng.random() < 0.5 else number - 1


def copy(rng: random.Random) -> Question:
    """Repeat a list."""
    words = rng.sample(WORDS, rng.choice((2, 3, 4)))
    return Question(f"Copy: {' '.join(words)}", " ".join(words), swapped(words, rng))


def reverse(rng: random.Random) -> Question:
    """Turn a list around."""
    words = rng.sample(WORDS, rng.choice((2, 3)))
    turned = words[::-1]
    return Question(f"Reverse: {' '.join(words)}", " ".join(turned), swapped(turned, rng))


def sort(rng: random.Random) -> Question:
    """Put digits in order."""
    numbers = rng.sample(range(10), 3)
    ordered = [str(n) for n in sorted(numbers)]
    prompt = f"Sort {rng.choice(WORDS)}: {' '.join(map(str, numbers))}"
    return Question(prompt, " ".join(ordered), swapped(ordered, rng))


def add(rng: random.Random) -> Question:
    """Add two digits that count the same thing."""
    a = rng.randrange(10)
    b = rng.randrange(10)
    word = rng.choice(WORDS)
    prompt = f"Add: {a} {word} and {b} {word}"
    return Question(prompt, f"{a + b} {word}", f"{near(a + b, rng)} {word}")


def larger(rng: random.Random) -> Question:
    """Choose the larger of two numbers."""
    a, b = rng.sample(range(20), 2)
    prompt = f"Larger {rng.choice(WORDS)}: {a} or {b}"
    return Question(prompt, str(max(a, b)), str(min(a, b)))


def count(rng: random.Random) -> Question:
    """Count the words of a list."""
    words = rng.sample(WORDS, rng.randrange(1, 7))
    number = len(words)
    return Question(f"Count: {' '.join(words)}", str(number), str(near(number, rng)))


def logic(rng: random.Random) -> Question:
    """Join two truth values."""
    a = rng.random() < 0.5
    b = rng.random() < 0.5
    operator = rng.choice(("and", "or", "but not"))
    truth = {"and": a and b, "or": a or b, "but not": a and not b}[operator]
    say = {True: "yes", False: "no"}
    prompt = f"Logic {rng.choice(LOOKS)} {rng.choice(WORDS)}: {say[a]} {operator} {say[b]}"
    return Question(prompt, say[truth], say[not truth])


def next_number(rng: random.Random) -> Question:
    """Continue a row of equal steps."""
    start = rng.randrange(6)
    step = rng.choice((1, 2, 3))
    word = rng.choice(WORDS)
    row = " ".join(str(start + i * step) for i in range(3))
    answer = start + 3 * step
    prompt = f"Next {rng.choice(LOOKS)} {word}: {row}"
    return Question(prompt, f"{answer} {word}", f"{near(answer, rng)} {word}")


def kind(rng: random.Random) -> Question:
    """Say to which of three classes a word belongs."""
    classes = rng.sample(tuple(CLASSES), 3)
    right, wrong = rng.sample(classes, 2)
    word = rng.choice(CLASSES[right])
    return Question(f"Kind of {rng.choice(LOOKS)} {word}: {' or '.join(classes)}", right, wrong)


def antonym(rng: random.Random) -> Question:
    """Replace two adjectives by their opposites."""
    a, b = rng.sample(LOOKS, 2)
    noun = rng.choice(WORDS)
    right = f"{OPPOSITES[a]} and {OPPOSITES[b]} {noun}"
    return Question(f"Opposite: {a} and {b} {noun}", right, f"{OPPOSITES[a]} and {b} {noun}")


def odd(rng: random.Random) -> Question:
    """Find the word of another class."""
    common, rare = rng.sample(tuple(CLASSES), 2)
    row = rng.sample(CLASSES[common], 3)
    answer = rng.choice(CLASSES[rare])
    slip = row[0]
    row.insert(rng.randrange(4), answer)
    return Question(f"Odd: {' '.join(row)}", answer, slip)


def weekday(rng: random.Random) -> Question:
    """Count days onward from a weekday."""
    day = rng.randrange(7)
    days = rng.randrange(1, 5)
    noun = rng.choice(WORDS)
    right = DAYS[(day + days) % 7]
    wrong = DAYS[(day + near(days, rng)) % 7]
    thing = f"{rng.choice(LOOKS)} {noun}"
    return Question(f"Day: The {thing} comes {days} days after {DAYS[day]}", right, wrong)


# The tasks by name. Their order and number decide what a seed draws.
GENERATORS: dict[str, Callable[[random.Random], Question]] = {
    "copy": copy,
    "reverse": reverse,
    "sort": sort,
    "add": add,
    "larger": larger,
    "count": count,
    "logic": logic,
    "next": next_number,
    "kind": kind,
    "antonym": antonym,
    "odd-one-out": odd,
    "weekday": weekday,
}
