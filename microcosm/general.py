"""Twelve general tasks that must not get worse: lists, numbers, words, small deductions.

Every prompt carries enough content that whole combinations can be held out while every word is seen. Each
task is one that two layers of attention can do: find a word by the one before it, count, remember a small table.
"""
from __future__ import annotations

import random
from typing import Callable, NamedTuple

CLASSES = {
    "animal": ("cat", "dog", "cow", "hen", "fox", "owl"), "fruit": ("plum", "fig", "pear", "lime", "date", "kiwi"),
    "tool": ("saw", "axe", "drill", "file", "rake", "hook"), "color": ("red", "blue", "green", "pink", "gray", "gold"),
}
WORDS = tuple(word for words in CLASSES.values() for word in words)
OPPOSITES = {"hot": "cold", "big": "small", "old": "young", "fast": "slow", "dark": "bright", "wet": "dry"}
OPPOSITES |= {b: a for a, b in OPPOSITES.items()}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


class Question(NamedTuple):
    """A prompt, its right answer, and a plausible wrong one."""
    prompt: str
    answer: str
    slip: str


def swapped(words: list[str], rng: random.Random) -> str:
    """Return the list with two neighbours swapped, or its last item dropped: how people get lists wrong."""
    if rng.random() < 0.4:
        return " ".join(words[:-1])
    i = rng.randrange(len(words) - 1)
    return " ".join(words[:i] + [words[i + 1], words[i]] + words[i + 2:])


def near(number: int, rng: random.Random) -> int:
    """Return a number one off: how people get sums wrong."""
    return number + 1 if number == 0 or rng.random() < 0.5 else number - 1


def copy(rng: random.Random) -> Question:
    """Repeat a list."""
    words = rng.sample(WORDS, rng.choice((2, 3, 4)))
    return Question(f"Copy: {' '.join(words)}", " ".join(words), swapped(words, rng))


def reverse(rng: random.Random) -> Question:
    """Turn a list around."""
    words = rng.sample(WORDS, rng.choice((2, 3)))
    return Question(f"Reverse: {' '.join(words)}", " ".join(words[::-1]), swapped(words[::-1], rng))


def sort(rng: random.Random) -> Question:
    """Put digits in order."""
    numbers = rng.sample(range(10), 3)
    ordered = [str(n) for n in sorted(numbers)]
    return Question(f"Sort: {' '.join(map(str, numbers))}", " ".join(ordered), swapped(ordered, rng))


def add(rng: random.Random) -> Question:
    """Add two digits that count the same thing."""
    a, b, word = rng.randrange(10), rng.randrange(10), rng.choice(WORDS)
    return Question(f"Add: {a} {word} and {b} {word}", f"{a + b} {word}", f"{near(a + b, rng)} {word}")


def larger(rng: random.Random) -> Question:
    """Choose the larger of two numbers."""
    a, b = rng.sample(range(20), 2)
    return Question(f"Larger: {a} or {b}", str(max(a, b)), str(min(a, b)))


def count(rng: random.Random) -> Question:
    """Count the words of a list."""
    words = rng.sample(WORDS, rng.randrange(1, 7))
    return Question(f"Count: {' '.join(words)}", str(len(words)), str(near(len(words), rng)))


def logic(rng: random.Random) -> Question:
    """Join two truth values."""
    a, b, operator = rng.random() < 0.5, rng.random() < 0.5, rng.choice(("and", "or", "but not"))
    truth = {"and": a and b, "or": a or b, "but not": a and not b}[operator]
    say = {True: "yes", False: "no"}
    return Question(f"Logic {rng.choice(WORDS)}: {say[a]} {operator} {say[b]}", say[truth], say[not truth])


def next_number(rng: random.Random) -> Question:
    """Continue a row of equal steps."""
    start, step, word = rng.randrange(6), rng.choice((1, 2, 3)), rng.choice(WORDS)
    row, answer = [str(start + i * step) for i in range(3)], start + 3 * step
    return Question(f"Next {word}: {' '.join(row)}", f"{answer} {word}", f"{near(answer, rng)} {word}")


def kind(rng: random.Random) -> Question:
    """Say to which of two classes a word belongs."""
    right, wrong = rng.sample(tuple(CLASSES), 2)
    first, second = rng.sample((right, wrong), 2)
    return Question(f"Kind of {rng.choice(tuple(OPPOSITES))} {rng.choice(CLASSES[right])}: {first} or {second}", right, wrong)


def antonym(rng: random.Random) -> Question:
    """Replace an adjective by its opposite."""
    word, noun = rng.choice(tuple(OPPOSITES)), rng.choice(WORDS)
    return Question(f"Opposite: {word} {noun}", f"{OPPOSITES[word]} {noun}", f"{word} {noun}")


def odd(rng: random.Random) -> Question:
    """Find the word of another class."""
    common, rare = rng.sample(tuple(CLASSES), 2)
    row, answer = rng.sample(CLASSES[common], 3), rng.choice(CLASSES[rare])
    slip = row[0]
    row.insert(rng.randrange(4), answer)
    return Question(f"Odd: {' '.join(row)}", answer, slip)


def weekday(rng: random.Random) -> Question:
    """Count days onward from a weekday."""
    day, days, noun = rng.randrange(7), rng.randrange(1, 5), rng.choice(WORDS)
    right, wrong = DAYS[(day + days) % 7], DAYS[(day + near(days, rng)) % 7]
    return Question(f"Day: The {noun} comes {days} days after {DAYS[day]}", right, wrong)


GENERATORS: dict[str, Callable[[random.Random], Question]] = {
    "copy": copy, "reverse": reverse, "sort": sort, "add": add, "larger": larger, "count": count, "logic": logic, "next": next_number,
    "kind": kind, "antonym": antonym, "odd-one-out": odd, "weekday": weekday,
}
