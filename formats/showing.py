"""Text of any origin, as it may be shown: in a terminal, in Markdown, in HTML."""
from __future__ import annotations

import html
import re

# What a terminal obeys rather than shows: control characters but tab and end of line, with which a
# text could hide or forge lines, rename the window or make the terminal answer; and those that turn
# around the direction of what follows, so that a line reads as another than it is.
CONTROLS = (*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0))
DIRECTIONS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
ESCAPES = {code: f"\\u{code:04x}" for code in (*CONTROLS, *DIRECTIONS)}


def harmless(text: str) -> str:
    """Return a text with its control characters as escapes; JSON stays the same JSON.

    Every character by itself, so a text may come in pieces, cut anywhere.
    """
    return text.translate(ESCAPES)


def fenced(text: str) -> str:
    """Return a text as a code block of Markdown that nothing in the text can end."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{harmless(text)}\n{fence}"


def escaped(text: str) -> str:
    """Return a text for a page in HTML, where it is text and nothing else."""
    return html.escape(harmless(text))
