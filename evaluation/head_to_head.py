"""Two models' answers against each other: judgments by people or a model, texts, the page."""
from __future__ import annotations

import html
from collections import defaultdict
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

from evaluation.statistics import mean, prefer
from formats import BadRow
from formats.parsers import get_preference
from formats.rows import get, get_optional, parse_row, read_rows


def with_interval(name: str, numbers: Mapping[str, Any]) -> str:
    """Write a share of a contest with its interval."""
    low, high = numbers["intervals"][name]
    return f"{100 * numbers[name]:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def results_text(numbers: Mapping[str, Any]) -> str:
    return f"wins {with_interval('win', numbers)}, ties {with_interval('tie', numbers)}, losses {with_interval('loss', numbers)}"


def contest_text(name: str, numbers: Mapping[str, Any]) -> str:
    """Write a contest's numbers as lines; a rate is followed by its 95 % interval."""
    return "\n".join([
        f"{name} (n={numbers['n']}): {results_text(numbers)}",
        f"  win rate, ties half         {with_interval('win_rate', numbers)}",
        f"  the same at equal length    {with_interval('length_controlled', numbers)}; "
        f"mean difference in length {numbers['longer_by']:+.0f} characters"])


class Pair(NamedTuple):
    """Two answers to one prompt and the preference for the first, in [0, 1]."""
    prompt: str
    first: str
    second: str
    preference: float
    notes: tuple[str, str] = ("", "")   # what the judge says of each answer
    truth: str = ""
    group: str = "prompts"


def read_judgments(path: Path, first: str, second: str) -> tuple[list[Pair], str]:
    """Read judgments of two generators' answers in AlpacaEval's form, and return the pairs and a line about the judge.

    A row: {instruction, output_1, generator_1, output_2, generator_2, preference}, with `preference` as in
    get_preference. A pair judged in both orders counts once, with the mean of both preferences, so that a judge who
    always prefers the first place gives ties.
    """
    found: dict[tuple[str, str, str], list[tuple[int, float | None]]] = defaultdict(list)
    generators: set[str] = set()
    for source, raw in read_rows(path):
        try:
            row = parse_row(raw)
            names = get(row, "generator_1"), get(row, "generator_2")
            texts, preference = (get(row, "output_1"), get(row, "output_2")), get_preference(row)
            key = "\n\n".join(filter(None, (get(row, "instruction"), get_optional(row, "input"))))
        except BadRow as fault:
            raise ValueError(f"{source}: {fault}") from None
        generators |= set(names)
        if set(names) == {first, second}:
            place = names.index(second)  # 1: our first stands first, and preferences speak of output 2
            found[key, texts[1 - place], texts[place]].append((place, None if preference is None else abs(place - (preference - 1))))
    votes = {key: [(place, vote) for place, vote in rows if vote is not None] for key, rows in found.items()}
    pairs = [Pair(*key, mean(vote for _, vote in rows)) for key, rows in votes.items() if rows]
    if not pairs:
        names = ", ".join(sorted(generators)) or "none"
        raise ValueError(f"{path}: no judged row compares {first} and {second}" + (f"; its generators are {names}" if not found else
                         ": set every \"preference\" to 1 or 2 (the better output) or 1.5 (a tie)"))
    both = [rows for rows in votes.values() if len({place for place, _ in rows}) == 2]
    said = f"judged by {path}: {len(pairs)} pairs, {len(found) - len(pairs)} not annotated"
    if both:
        agreed = mean(len({prefer(vote, 0.5) for _, vote in rows}) == 1 for rows in both)
        said += f", {len(both)} in both orders with the same verdict in {100 * agreed:.0f} %"
    return pairs, said


def to_judge(first: str, second: str, pairs: Sequence[Pair]) -> Iterator[dict[str, Any]]:
    """Yield the rows that people or a model are to judge: each pair in both orders, far apart; equal answers are ties already."""
    for turn in (0, 1):
        for i, pair in enumerate(pairs):
            sides = [(first, pair.first), (second, pair.second)]
            (name_1, text_1), (name_2, text_2) = sides if (i + turn) % 2 == 0 else sides[::-1]
            yield {"instruction": pair.prompt, "output_1": text_1, "generator_1": name_1, "output_2": text_2, "generator_2": name_2,
                   "preference": 1.5 if text_1 == text_2 else None}


PAGE = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.45 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222 }}
section {{ border-top: 1px solid #ccc; padding: .6em 0; display: grid; grid-template-columns: 1fr 1fr; gap: .3em 2em }}
p {{ margin: 0; white-space: pre-wrap; overflow-wrap: anywhere }} .prompt, .truth {{ grid-column: 1 / 3 }} .prompt {{ font-weight: bold }}
.truth, small {{ color: #777 }} .better {{ background: #e4f3e4 }} pre {{ background: #f5f5f5; padding: 1em; white-space: pre-wrap }}
</style><h1>{title}</h1><pre>{summary}</pre><nav>{links}</nav>
{body}</html>
"""


def write_page(path: Path, first: str, second: str, summary: str, pairs: Sequence[Pair]) -> None:
    """Write one HTML file with all answers side by side: what the first lost, then won, then ties."""
    def side(name: str, text: str, note: str, is_better: bool) -> str:
        return f"<p{' class=better' if is_better else ''}><small>{html.escape(' '.join((name, note)))}</small>\n{html.escape(text)}</p>"

    def section(pair: Pair) -> str:
        sides = side(first, pair.first, pair.notes[0], pair.preference > 0.5) + side(second, pair.second, pair.notes[1], pair.preference < 0.5)
        truth = f"<p class=truth><small>truth</small> {html.escape(pair.truth)}</p>" if pair.truth else ""
        return f"<section><p class=prompt>{html.escape(pair.prompt)}</p>{sides}{truth}</section>"
    links, body = [], []
    for name, sign in (("losses", 0.0), ("wins", 1.0), ("ties", 0.5)):
        chosen = [pair for pair in pairs if prefer(pair.preference, 0.5) == sign]
        links.append(f"<a href=#{name}>{name}: {len(chosen)}</a>")
        body += [f"<h2 id={name}>{html.escape(first)}, {name}: {len(chosen)}</h2>", *map(section, chosen)]
    title = html.escape(f"{first} against {second}")
    path.write_text(PAGE.format(title=title, summary=html.escape(summary), links=" &middot; ".join(links), body="\n".join(body)), encoding="utf-8")
