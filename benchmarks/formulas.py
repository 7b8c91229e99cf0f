r"""Answers that are formulas, compared as AGIEval and the harness compare them.

Nothing is computed: two formulas are equal if their texts are, once what does not change a value is
taken off (\left, \tfrac, degrees, blanks) and short forms are written out (\frac12, \sqrt3).
Source: Hendrycks et al. 2021, whose order of steps decides in odd cases.
"""
from __future__ import annotations

import re

NUMBER = r"(?:\$)?\d+(?:\.\d+)?(?![\w\d])"
BOX = "\\boxed"
REPLACED = (
    ("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"),
    ("\\left", ""), ("\\right", ""),
    ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""),
)


def after_equals(text: str) -> str:
    return text.split("=")[-1].lstrip(" ")


def boxed_answer(text: str) -> str | None:
    r"""Return what the last \boxed{} holds; None if its brace is never closed."""
    start = text.rfind(BOX)
    depth = 0
    for end in range(start, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if text[end] == "}" and depth == 0:
            is_braced = text[start:].startswith(BOX + "{")
            return after_equals(text[start + len(BOX) + 1:end]) if is_braced else None
    return None


def math_answer(text: str) -> str | None:
    r"""Find the answer in a solution: the last \boxed{}, $...$, what follows =, or a number."""
    if BOX in text:
        return boxed_answer(text)
    dollars = re.findall(r"\$(.*)\$", text)
    if dollars and dollars[-1]:
        return after_equals(dollars[-1]) if "=" in dollars[-1] else dollars[-1]
    if "=" in text:
        return after_equals(text).rstrip(".").split("\\n")[0]
    found = re.findall(NUMBER, text)
    return found[-1] if found else None


def brace_arguments(text: str, command: str, count: int) -> str:
    r"""Write \sqrt3 as \sqrt{3}, \frac12 as \frac{1}{2}; IndexError where nothing follows.

    count: arguments that the command takes, 1 or 2.
    """
    head, *parts = text.split(command)
    for part in parts:
        if part[0] == "{":
            head += command + part
            continue
        if count == 2 and len(part) < 2:
            return text
        first, rest = part[0], part[1:]
        if count == 2 and rest[0] != "{":
            rest = "{" + rest[0] + "}" + rest[1:]
        head += command + "{" + first + "}" + rest
    return head


def plain_math(text: str) -> str:
    """Strip what does not change a formula's value; ValueError, IndexError if it is no formula."""
    # 1. spellings that mean the same, and units that follow in words
    for old, new in REPLACED:
        text = text.replace(old, new)
    if "\\text{ " in text:
        text, _unit = text.split("\\text{ ")

    # 2. numbers: no percent sign, a zero before a bare point
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text

    # 3. "x = 3" is 3, where what stands on the left is short
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]

    # 4. arguments in braces, fractions as \frac
    if text:
        text = brace_arguments(text, "\\sqrt", 1)
    text = brace_arguments(text.replace(" ", ""), "\\frac", 2)
    if text == "0.5":
        text = "\\frac{1}{2}"
    fraction = re.fullmatch(r"(0|-?[1-9]\d*)/(0|-?[1-9]\d*)", text)
    return "\\frac{%s}{%s}" % fraction.groups() if fraction else text


def math_equal(text: str, truth: str) -> bool:
    """Compare the answers in two texts as formulas."""
    mine = math_answer(text)
    right = math_answer(truth)
    try:
        return plain_math(mine) == plain_math(right)
    except (AttributeError, ValueError, IndexError):  # no answer, or no formula: compare as texts
        return mine == right
