"""Signs of spam in a text message: what they are, how answers name them, how answers are read.

    Spam. Prize: won a prize. Price: £350. Phone number: 02073162414.
    Not spam.

A sign is a kind and the words of the message that show it. The kinds are found by regular
expressions: a truth that everybody can check, if not the last word on spam.
"""
from __future__ import annotations

import re
from typing import NamedTuple

PATTERNS = {
    "Prize": r"\b(?:prize|winner|won|award(?:ed)?|claim)\b",
    "Free offer": r"\bfree\b(?: \w+)?",
    "Price": r"£ ?\d[\d,.]*\d|£ ?\d|\b\d+ ?p(?:pm|/min|er \w+)?\b",
    "Phone number": r"\b0\d{9,10}\b",
    "Short code": r"\b\d{5}\b",
    "Link": r"\b(?:www\.|https?://|wap\.)[^\s,]*\w",
    "Pressure": r"\b(?:urgent|now|today|expires?|last chance|final|immediately)\b",
    "Reply bait": r"\b(?:text|txt|reply|call|send)\b(?: \w+)?",
}
KINDS = {kind: re.compile(pattern, re.IGNORECASE) for kind, pattern in PATTERNS.items()}
NAMED = re.compile(rf"({'|'.join(KINDS)}): (.+?)(?=\.(?:\s|$)|$)", re.MULTILINE)


class Verdict(NamedTuple):
    """What an answer says; is_spam None: it gives no verdict."""
    is_spam: bool | None
    signs: frozenset[tuple[str, str]]   # (kind, words in lower case)


def signs_of(message: str) -> dict[str, str]:
    """Return kind -> the first words in a message that show it."""
    found = {kind: pattern.search(message) for kind, pattern in KINDS.items()}
    return {kind: match[0] for kind, match in found.items() if match}


def write_answer(is_spam: bool, signs: dict[str, str]) -> str:
    """Write an answer; a message that is no spam has no signs of it."""
    if not is_spam:
        return "Not spam."
    return " ".join(["Spam."] + [f"{kind}: {words}." for kind, words in signs.items()])


def read_answer(text: str) -> Verdict:
    """Read an answer; what is neither verdict nor sign does not count."""
    start = text.strip().lower()
    is_spam = False if start.startswith("not spam") else True if start.startswith("spam") else None
    signs = frozenset((kind, words.strip().lower()) for kind, words in NAMED.findall(text))
    return Verdict(is_spam, signs)


def agreement(said: frozenset, true: frozenset) -> float:
    """Return F1 of the signs; 1 where there are none and none are named."""
    if not said and not true:
        return 1.0
    return 2 * len(said & true) / (len(said) + len(true))
