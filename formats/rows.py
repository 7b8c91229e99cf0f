"""Files to rows: JSON arrays and JSON lines, plain or gzipped, checked for what JSON lets through."""
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


class DuplicateKey(str):
    """Stands for an object that names this key twice (json alone keeps the last), until its row is checked."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any] | DuplicateKey:
    counts = Counter(key for key, _ in pairs)
    return dict(pairs) if len(counts) == len(pairs) else DuplicateKey(counts.most_common(1)[0][0])


def load_json(content: bytes) -> Any:
    return json.loads(content.decode("utf-8"), object_pairs_hook=unique_keys)


def read_bytes(path: str | Path) -> bytes:
    """Return a file's content, unzipped, without byte order mark."""
    try:
        content = Path(path).read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; check the path") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path}:1: UTF-16, not UTF-8; convert it with: iconv -f UTF-16 -t UTF-8")
    return content.removeprefix(codecs.BOM_UTF8)


def read_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield (source, row) of a JSON array, of {"data": [...]} or {"examples": [...]}, or of JSON lines.

    A line stays bytes, so that a broken line is one bad row. A broken array has no rows to tell apart: ValueError.
    """
    content = read_bytes(path)
    try:
        whole = load_json(content)
    except (ValueError, RecursionError) as error:  # JSON lines come here with "Extra data", right after their first row
        whole = None
        if content.lstrip().startswith(b"[") and getattr(error, "msg", "") != "Extra data":
            before = content[:error.start] if isinstance(error, UnicodeDecodeError) else b""
            line = getattr(error, "lineno", before.count(b"\n") + 1)
            raise ValueError(f"{path}:{line}: broken JSON array ({error}); was the file cut off?") from None
    if isinstance(whole, dict):
        whole = whole.get("data", whole.get("examples"))
    if isinstance(whole, list):
        yield from ((f"{path}:row {n}", row) for n, row in enumerate(whole, 1))
    else:
        yield from ((f"{path}:{n}", line) for n, line in enumerate(content.split(b"\n"), 1) if line.strip())


def check_values(value: Any) -> None:
    """Reject what json lets through and what would surface far from here: an error in sentencepiece, a NaN loss."""
    if isinstance(value, DuplicateKey):
        raise BadRow("duplicate key", repr(str(value)))
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRow("lone surrogate escape in a string")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow("NaN or Infinity")
    for item in [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ():
        check_values(item)


def parse_row(raw: Any) -> dict[str, Any]:
    """Return a row as an object whose values are all sound."""
    if isinstance(raw, bytes):
        try:
            raw = load_json(raw)
        except UnicodeDecodeError as error:
            raise BadRow("not UTF-8", f"byte {error.start + 1} of the line")
        except json.JSONDecodeError as error:
            raise BadRow("broken JSON", f"column {error.colno}: {error.msg}")
        except (ValueError, RecursionError) as error:
            raise BadRow("broken JSON", error)
    check_values(raw)
    if not isinstance(raw, dict):
        raise BadRow("not a JSON object", f"got {kind_of(raw)}")
    return raw


Row = dict[str, Any]
KINDS = {str: "a string", list: "a list", dict: "an object", bool: "a boolean", int: "a number", float: "a number",
         type(None): "null"}


def kind_of(value: Any) -> str:
    return KINDS[type(value)]


def get(row: Row, name: str, kind: type = str) -> Any:
    """Return a field that must be there and of one type."""
    if name not in row:
        raise BadRow(f"no field '{name}'", f"keys: {', '.join(row)}")
    if not isinstance(row[name], kind):
        raise BadRow(f"field '{name}' must be {KINDS[kind]}, got {kind_of(row[name])}")
    return row[name]


def get_optional(row: Row, name: str) -> str:
    return "" if row.get(name) is None else get(row, name)


def get_list(row: Row, name: str, kind: type) -> list[Any]:
    """Return a field that must be a list of one type."""
    items = get(row, name, list)
    for item in items:
        if not isinstance(item, kind):
            raise BadRow(f"field '{name}' must hold {KINDS[kind]} each, got {kind_of(item)}")
    return items


def get_numbers(row: Row, name: str) -> list[float]:
    numbers = get(row, name, list)
    if not all(type(x) in (int, float) and abs(x) < 1e300 for x in numbers):  # type(): True is an int, but no score
        raise BadRow(f"field '{name}' must hold finite numbers only")
    return [float(x) for x in numbers]
