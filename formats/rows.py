"""Files to rows: JSON arrays and JSON lines, plain or gzipped, checked for JSON's own traps."""
from __future__ import annotations

import codecs
import gzip
import json
import math
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, Iterator

from formats.records import BadRow

Row = dict[str, Any]

KINDS = {
    str: "a string",
    list: "a list",
    dict: "an object",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def kind_of(value: Any) -> str:
    return KINDS[type(value)]


# ------------------------------------------------------------------------------------------
# Files

class DuplicateKey(str):
    """Stands for an object that names this key twice, until its row is checked.

    json alone keeps the last value and says nothing.
    """


def unique_keys(pairs: list[tuple[str, Any]]) -> Row | DuplicateKey:
    counts = Counter(key for key, _ in pairs)
    if len(counts) == len(pairs):
        return dict(pairs)
    most_common_key, _ = counts.most_common(1)[0]
    return DuplicateKey(most_common_key)


def load_json(content: bytes) -> Any:
    return json.loads(content.decode("utf-8"), object_pairs_hook=unique_keys)


def read_bytes(path: str | Path) -> bytes:
    """Return a file's content, unzipped, without byte order mark; ValueError names the file."""
    try:
        content = Path(path).read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; check the path") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        advice = "convert it with: iconv -f UTF-16 -t UTF-8"
        raise ValueError(f"{path}:1: UTF-16, not UTF-8; {advice}")
    return content.removeprefix(codecs.BOM_UTF8)


def load_whole(path: str | Path, content: bytes) -> Any:
    """Return a file's content as one JSON value; None if it is none, as JSON lines are.

    A broken array has no rows to tell apart, so that is a ValueError with the line.
    """
    try:
        return load_json(content)
    except (ValueError, RecursionError) as error:
        # JSON lines come here too, with "Extra data" right after their first row.
        is_array = content.lstrip().startswith(b"[") and getattr(error, "msg", "") != "Extra data"
        if not is_array:
            return None
        before = content[:error.start] if isinstance(error, UnicodeDecodeError) else b""
        line = getattr(error, "lineno", before.count(b"\n") + 1)
        problem = f"broken JSON array ({error}); was the file cut off?"
        raise ValueError(f"{path}:{line}: {problem}") from None


def read_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield (source, row) of an array, of {"data": [...]} or {"examples": [...]}, or of JSON lines.

    A line stays bytes until `parse_row`, so that a broken line is one bad row and not a bad file.
    """
    content = read_bytes(path)
    whole = load_whole(path, content)
    if isinstance(whole, dict):
        whole = whole.get("data", whole.get("examples"))
    if isinstance(whole, list):
        for number, row in enumerate(whole, 1):
            yield f"{path}:row {number}", row
        return

    # At "\n" alone: other separators that Python knows (U+2028, form feed) may stand in a text.
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line


# ------------------------------------------------------------------------------------------
# Rows

def check_values(value: Any) -> None:
    """Raise BadRow for what json lets through and what would surface far from here.

    A lone surrogate is an error in sentencepiece, a NaN score a NaN loss.
    """
    if isinstance(value, DuplicateKey):
        raise BadRow("duplicate key", repr(str(value)))
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRow("lone surrogate escape in a string") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow("NaN or Infinity")

    parts: list[Any] = []
    if isinstance(value, dict):
        parts = [*value, *value.values()]
    elif isinstance(value, list):
        parts = value
    for part in parts:
        check_values(part)


def parse_row(raw: Any) -> Row:
    """Return a row as an object whose values are all sound; raw: bytes of a line, or a value."""
    if isinstance(raw, bytes):
        try:
            raw = load_json(raw)
        except UnicodeDecodeError as error:
            raise BadRow("not UTF-8", f"byte {error.start + 1} of the line") from None
        except json.JSONDecodeError as error:
            raise BadRow("broken JSON", f"column {error.colno}: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise BadRow("broken JSON", error) from None
    check_values(raw)
    if not isinstance(raw, dict):
        raise BadRow("not a JSON object", f"got {kind_of(raw)}")
    return raw


# ------------------------------------------------------------------------------------------
# Fields

def get(row: Row, name: str, kind: type = str) -> Any:
    """Return a field that must be there and of one type."""
    if name not in row:
        raise BadRow(f"no field '{name}'", f"keys: {', '.join(row)}")
    if not isinstance(row[name], kind):
        raise BadRow(f"field '{name}' must be {KINDS[kind]}, got {kind_of(row[name])}")
    return row[name]


def get_optional(row: Row, name: str) -> str:
    """Return a string field; "" if it is missing or null."""
    return "" if row.get(name) is None else get(row, name)


def get_list(row: Row, name: str, kind: type) -> list[Any]:
    """Return a field that must be a list of one type."""
    items = get(row, name, list)
    for item in items:
        if not isinstance(item, kind):
            raise BadRow(f"field '{name}' must hold {KINDS[kind]} each, got {kind_of(item)}")
    return items


def get_numbers(row: Row, name: str) -> list[float]:
    """Return a field that must be a list of finite numbers."""
    numbers = get(row, name, list)
    for number in numbers:
        # By type(), not isinstance: True is an int, but no score.
        if type(number) not in (int, float) or abs(number) >= 1e300:
            raise BadRow(f"field '{name}' must hold finite numbers only")
    return [float(number) for number in numbers]
