"""Files to items: every row of the first pattern that matches, or one line that says what is wrong.

    file -> rows -> Task.read -> Item, checked -> items by part (a subject, a language)
"""
from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Sequence

from benchmarks.items import Item
from benchmarks.tasks import Task
from formats import BadRow
from formats.rows import parse_row, read_bytes, read_rows

# What a reader of rows may raise on a row that is not as it expects.
READ_ERRORS = (KeyError, TypeError, ValueError, IndexError, AttributeError)
MMLU_COLUMNS = ["Question", "A", "B", "C", "D", "Answer"]


class Unavailable(ValueError):
    """A task that cannot run here: left out of a group, and refused when asked for by name."""


class Read(NamedTuple):
    """What came of a row."""
    item: Item
    part: str


def read_csv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (source, row) of a CSV file with a header, or without one as Hendrycks' MMLU is."""
    text = decode(path)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    try:
        for fields in reader:
            where = f"{path}:{reader.line_num}"
            if not header and "Question" in fields:
                header = fields
                continue
            header = header or MMLU_COLUMNS
            if len(fields) != len(header):
                raise ValueError(
                    f"{where}: {len(fields)} columns instead of {len(header)}; "
                    "is a text with commas without quotes?"
                )
            yield where, dict(zip(header, fields))
    except csv.Error as error:
        where = f"{path}:{reader.line_num}"
        raise ValueError(f"{where}: broken CSV ({error}); was the file cut off?") from None


def decode(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1}"
        raise ValueError(f"{path}: not UTF-8 ({where}); convert it with iconv") from None


class NotText:
    """A value that no text may be made of: "Q: None" and "Q: ['x']" would be asked unnoticed."""

    def __format__(self, spec: str) -> str:
        raise TypeError("a text is expected")


class List(NotText, list):
    pass


class Object(NotText, dict):
    pass


class Integer(NotText, int):
    pass


class Real(NotText, float):
    pass


class Empty(NotText, str):
    pass


class Null(NotText):
    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return ""


def guarded(value: Any) -> Any:
    """Return a value of JSON in which everything but strings with something in them is NotText."""
    if isinstance(value, str):
        return value or Empty()
    if isinstance(value, list):
        return List(map(guarded, value))
    if isinstance(value, dict):
        return Object({key: guarded(part) for key, part in value.items()})
    if value is None:
        return Null()
    return Real(value) if isinstance(value, float) else Integer(value)


def check_item(item: Item) -> None:
    """Raise BadRow for a question with no right answer, or with a choice that cannot be scored."""
    texts = (item.query, *item.queries, *item.choices, *item.answers)
    if not all(isinstance(text, str) for text in texts):
        raise BadRow("query, choices and answers must be strings", f"got {texts}")

    if not item.choices:
        if not item.checks and not any(item.answers):
            raise BadRow("no right answer")
        return

    for n, choice in enumerate(item.choices, 1):
        if not choice.strip():
            raise BadRow("an empty choice", f"choice {n} of {len(item.choices)}")
    valid = range(len(item.choices))  # a negative index would name a choice from the end
    if not item.gold or not all(isinstance(i, int) and i in valid for i in item.gold):
        raise BadRow(
            "no right answer among the choices",
            f"gold {list(item.gold)}, {len(item.choices)} choices",
        )


def read_item(task: Task, raw: Any, stem: str) -> Read | None:
    """Turn a row into an item and its part; BadRow says what is wrong; None: not of the test split.

    stem: name of the file without its ending, which a task finds as row["file"].
    """
    row = guarded({**parse_row(raw), "file": stem})
    try:
        item = task.read(row)
        part = task.part(row)
    except KeyError as error:
        keys = ", ".join(key for key in row if key != "file")
        raise BadRow(f"no field {error}", f"keys: {keys}") from None
    except READ_ERRORS as error:
        raise BadRow("a field has the wrong type or value", error) from None
    if item is None:
        return None
    check_item(item)
    if not isinstance(part, str):
        raise BadRow("the part that a row belongs to must be a string", f"got {part!r}")
    return Read(item, part)


def find_files(patterns: Sequence[str], folder: Path) -> list[Path]:
    """Return the files of the first pattern that matches any."""
    for pattern in patterns:
        paths = sorted(folder.glob(pattern))
        if paths:
            return paths
    raise Unavailable(f"{folder / patterns[0]}: no such file; put it there, or give another --data")


def read_items(task: Task, patterns: Sequence[str], folder: Path) -> dict[str, list[Item]]:
    """Return the items of every part. ValueError names file, line and remedy."""
    paths = find_files(patterns, folder)
    parts: dict[str, list[Item]] = {}
    for path in paths:
        stem = re.sub(r"\.(jsonl|json|csv)(\.gz)?$", "", path.name)
        rows = read_csv(path) if path.suffix == ".csv" else read_rows(path)
        for source, raw in rows:
            try:
                read = read_item(task, raw, stem)
            except BadRow as error:
                raise ValueError(f"{source}: {error}; correct this row or take it out") from None
            if read:
                parts.setdefault(read.part, []).append(read.item)
    if not parts:
        raise ValueError(f"{paths[0]}: holds no question; fetch it again")
    return parts
