"""What annotators give back: rows that people may have edited, against what they were given."""
from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, Sequence

Row = Mapping[str, Any]


def check_rows(rows: Sequence[Row], path: Path, count: int) -> None:
    """Refuse a file that does not hold each of `count` prompts once, in whatever order."""
    lines: dict[int, int] = {}  # id -> its line
    for number, row in enumerate(rows, 1):
        place, own = f"{path}:{number}", row.get("id")
        if type(own) is not int or not 0 <= own < count:
            raise ValueError(f"{place}: \"id\" is {own!r:.80}, and this run sampled for prompts 0 "
                             f"to {count - 1}: take out what is not of this run")
        if own in lines:
            raise ValueError(f"{place}: prompt {own} stands in line {lines[own]} already: keep one")
        lines[own] = number
    if len(lines) < count:
        first = next(i for i in range(count) if i not in lines)
        raise ValueError(f"{path}: holds {len(lines)} of {count} prompts, and lacks number {first} "
                         "first: put the others back; to rank fewer, sample fewer "
                         "(--reward.sampled_prompts)")


def check_drawn(row: Row, place: str) -> None:
    """Refuse a row that has lost the ids behind its texts, or a response."""
    ids, texts = row.get("response_ids"), row.get("responses")
    if not is_list_of(row.get("prompt_ids"), int) or not isinstance(ids, list) or not all(
            is_list_of(one, int) for one in ids):
        raise ValueError(f"{place}: \"prompt_ids\" and \"response_ids\" must stay as they were "
                         "written: the reward model learns from them")
    if not is_list_of(texts, str) or len(texts) != len(ids):
        raise ValueError(f"{place}: \"responses\" must stay the {len(ids)} texts that were drawn, "
                         "in any order")


def is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def check_ranks(row: Row, place: str) -> None:
    """Refuse ranks that are missing or no numbers."""
    ranks, size = row.get("ranks"), len(row["response_ids"])
    # type, not isinstance: true is no rank; NaN and infinity are none either
    is_list = isinstance(ranks, list) and len(ranks) == size
    if not is_list or not all(type(x) in (int, float) and -1e9 < x < 1e9 for x in ranks):
        raise ValueError(f"{place}: \"ranks\" must be a list of {size} numbers, 1 is best: rank "
                         "this prompt first")


def order_of(texts: Sequence[str], drawn: Sequence[str], place: str) -> list[int]:
    """Return for each text which drawn response it is: people may put them in another order.

    A text that was never drawn is refused. Encoded anew it would be other tokens than the policy
    writes, so its score would speak of something that never occurs.
    """
    left = list(range(len(drawn)))
    order = []
    for n, text in enumerate(texts):
        # of equal texts the one that stood here
        found = sorted((i for i in left if drawn[i] == text), key=lambda i: i != n)
        if not found:
            raise ValueError(f"{place}: response {n + 1} is none of those that were drawn "
                             f"({text!r:.80}): put its text back; texts of one's own are data for "
                             "--reward.data")
        order.append(found[0])
        left.remove(found[0])
    return order
