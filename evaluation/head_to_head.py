"""Two models' answers against each other: judgments by people or a model, texts, the page."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

from evaluation.statistics import Interval, mean, prefer
from formats import BadRow
from formats.files import write_text
from formats.parsers import get_preference
from formats.rows import get, get_optional, parse_row, read_rows
from formats.showing import escaped

# -------------------------------------------------------------------------------------------------
# Texts


def share_text(share: float, interval: Interval) -> str:
    """Write a share with its 95 % interval."""
    low, high = interval
    return f"{100 * share:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def with_interval(name: str, numbers: Mapping[str, Any]) -> str:
    """Write a share of a contest with its interval."""
    return share_text(numbers[name], numbers["intervals"][name])


def results_text(numbers: Mapping[str, Any]) -> str:
    win = with_interval("win", numbers)
    tie = with_interval("tie", numbers)
    loss = with_interval("loss", numbers)
    return f"wins {win}, ties {tie}, losses {loss}"


def contest_text(name: str, numbers: Mapping[str, Any]) -> str:
    """Write a contest's numbers as lines; a rate is followed by its 95 % interval."""
    longer_by = f"mean difference in length {numbers['longer_by']:+.0f} characters"
    lines = [
        f"{name} (n={numbers['n']}): {results_text(numbers)}",
        f"  win rate, ties half         {with_interval('win_rate', numbers)}",
        f"  the same at equal length    {with_interval('length_controlled', numbers)}; {longer_by}",
    ]
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------
# Judgments


class Pair(NamedTuple):
    """Two answers to one prompt and the preference for the first, in [0, 1]."""

    prompt: str
    first: str
    second: str
    preference: float
    notes: tuple[str, str] = ("", "")  # what the judge says of each answer
    truth: str = ""
    group: str = "prompts"


class Compared(NamedTuple):
    """What a judgment is about: the prompt, and both models' answers."""

    prompt: str
    first: str
    second: str


class Vote(NamedTuple):
    """One judgment.

    place: of our first model in the row, 1 or 2.
    preference: for our first model, in [0, 1]; None: nobody has judged this row yet.
    """

    place: int
    preference: float | None


class Judgment(NamedTuple):
    """A row of a file of judgments. preference: for output 2, in [1, 2]; None is not annotated."""

    instruction: str
    generators: tuple[str, str]
    outputs: tuple[str, str]
    preference: float | None


def parse_judgment(source: str, raw: Any) -> Judgment:
    """Read a row; ValueError names file and line of one that cannot be read."""
    try:
        row = parse_row(raw)
        generators = (get(row, "generator_1"), get(row, "generator_2"))
        outputs = (get(row, "output_1"), get(row, "output_2"))
        preference = get_preference(row)
        # Older files keep what an instruction is about in a field of its own.
        parts = (get(row, "instruction"), get_optional(row, "input"))
    except BadRow as fault:
        raise ValueError(f"{source}: {fault}") from None
    return Judgment("\n\n".join(filter(None, parts)), generators, outputs, preference)


def vote_of(judgment: Judgment, first: str) -> tuple[Compared, Vote]:
    """Turn a judgment around so that it speaks of our first model, wherever that stands."""
    stands_first = judgment.generators[0] == first
    output_1, output_2 = judgment.outputs
    if judgment.preference is None:
        preference = None
    elif stands_first:
        preference = 2 - judgment.preference  # 1, output 1 is better, becomes 1
    else:
        preference = judgment.preference - 1  # 2, output 2 is better, becomes 1
    ours, theirs = (output_1, output_2) if stands_first else (output_2, output_1)
    compared = Compared(judgment.instruction, ours, theirs)
    return compared, Vote(1 if stands_first else 2, preference)


def read_judgments(path: Path, first: str, second: str) -> tuple[list[Pair], str]:
    """Read judgments of two generators' answers in AlpacaEval's form; return pairs and a summary.

    A row: {instruction, output_1, generator_1, output_2, generator_2, preference}, with
    `preference` as in get_preference. A pair judged in both orders counts once, with the mean of
    both preferences, so that a judge who always prefers the first place gives ties.
    """
    found: dict[Compared, list[Vote]] = defaultdict(list)
    generators: set[str] = set()
    for source, raw in read_rows(path):
        judgment = parse_judgment(source, raw)
        generators |= set(judgment.generators)
        if set(judgment.generators) == {first, second}:
            # Both orders of a pair come together here, since each is turned our way around.
            compared, vote = vote_of(judgment, first)
            found[compared].append(vote)

    # Rows that nobody has judged yet count as found, not as ties.
    votes = {key: [v for v in rows if v.preference is not None] for key, rows in found.items()}
    votes = {key: rows for key, rows in votes.items() if rows}
    if not votes:
        names = ", ".join(sorted(generators)) or "none"
        advice = f"; its generators are {names}"
        if found:
            advice = ': set every "preference" to 1 or 2 (the better output) or 1.5 (a tie)'
        raise ValueError(f"{path}: no judged row compares {first} and {second}{advice}")
    pairs = [Pair(*key, mean(vote.preference for vote in rows)) for key, rows in votes.items()]
    said = f"judged by {path}: {len(pairs)} pairs, {len(found) - len(pairs)} not annotated"
    return pairs, said + agreement_text(list(votes.values()))


def agreement_text(votes: Sequence[Sequence[Vote]]) -> str:
    """Say how often a judge who saw a pair in both orders said the same; "" if that never was."""
    # Without both orders nothing tells a judge's opinion from a taste for the first place.
    both = [rows for rows in votes if len({vote.place for vote in rows}) == 2]
    if not both:
        return ""
    same = mean(len({prefer(vote.preference, 0.5) for vote in rows}) == 1 for rows in both)
    return f", {len(both)} in both orders with the same verdict in {100 * same:.0f} %"


def to_judge(first: str, second: str, pairs: Sequence[Pair]) -> Iterator[dict[str, Any]]:
    """Yield the rows that people or a model are to judge.

    Each pair comes in both orders, far apart, so that a taste for the first place shows and
    cancels out. Equal answers are ties already.
    """
    for turn in (0, 1):
        for i, pair in enumerate(pairs):
            sides = [(first, pair.first), (second, pair.second)]
            # Every other pair is turned around in the first half, the others in the second.
            if (i + turn) % 2 == 1:
                sides.reverse()
            (generator_1, output_1), (generator_2, output_2) = sides
            yield {
                "instruction": pair.prompt,
                "output_1": output_1,
                "generator_1": generator_1,
                "output_2": output_2,
                "generator_2": generator_2,
                "preference": 1.5 if output_1 == output_2 else None,
            }


# -------------------------------------------------------------------------------------------------
# The page

# One file without scripts, fonts or links to elsewhere: it can be mailed and kept.
PAGE = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.45 sans-serif; color: #222 }}
body {{ max-width: 70em; margin: 2em auto; padding: 0 1em }}
section {{ border-top: 1px solid #ccc; padding: .6em 0 }}
section {{ display: grid; grid-template-columns: 1fr 1fr; gap: .3em 2em }}
p {{ margin: 0; white-space: pre-wrap; overflow-wrap: anywhere }}
.prompt, .truth {{ grid-column: 1 / 3 }} .prompt {{ font-weight: bold }}
.truth, small {{ color: #777 }} .better {{ background: #e4f3e4 }}
pre {{ background: #f5f5f5; padding: 1em; white-space: pre-wrap }}
</style><h1>{title}</h1><pre>{summary}</pre><nav>{links}</nav>
{body}</html>
"""


def side_html(name: str, text: str, note: str, is_better: bool) -> str:
    label = escaped(" ".join((name, note)))
    style = " class=better" if is_better else ""
    return f"<p{style}><small>{label}</small>\n{escaped(text)}</p>"


def section_html(first: str, second: str, pair: Pair) -> str:
    """Lay out one pair: the prompt, both answers side by side, the truth if there is one."""
    parts = [
        f"<p class=prompt>{escaped(pair.prompt)}</p>",
        side_html(first, pair.first, pair.notes[0], pair.preference > 0.5),
        side_html(second, pair.second, pair.notes[1], pair.preference < 0.5),
    ]
    if pair.truth:
        parts.append(f"<p class=truth><small>truth</small> {escaped(pair.truth)}</p>")
    return f"<section>{''.join(parts)}</section>"


def write_page(path: Path, first: str, second: str, summary: str, pairs: Sequence[Pair]) -> None:
    """Write one HTML file with all answers side by side: what the first lost, then won, then ties.

    The file stands alone, and all text in it is escaped: answers may hold anything.
    """
    links = []
    body = []
    # Losses come first: there is most to learn from them.
    for name, sign in (("losses", 0.0), ("wins", 1.0), ("ties", 0.5)):
        chosen = [pair for pair in pairs if prefer(pair.preference, 0.5) == sign]
        links.append(f"<a href=#{name}>{name}: {len(chosen)}</a>")
        body.append(f"<h2 id={name}>{escaped(first)}, {name}: {len(chosen)}</h2>")
        body += [section_html(first, second, pair) for pair in chosen]
    page = PAGE.format(
        title=escaped(f"{first} against {second}"),
        summary=escaped(summary),
        links=" &middot; ".join(links),
        body="\n".join(body),
    )
    write_text(path, page)
