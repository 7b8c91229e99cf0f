"""Files to rows: JSON arrays, JSON lines and CSV, plain or packed, checked for JSON's own traps."""
from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import math
import re
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Iterator

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


class NotOneFile(Exception):
    """An archive that is whole, and does not hold one file to be read."""


def unzip(content: bytes) -> bytes:
    """Return the one file in a zip archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        if len(names) != 1:
            raise NotOneFile(f"holds {len(names)} files; unpack it, give those you want")
        if archive.getinfo(names[0]).flag_bits & 1:
            raise NotOneFile("needs a password; unpack it")
        return archive.read(names[0])


# How a packed file begins -> its kind, and what unpacks it.
PACKED: dict[bytes, tuple[str, Callable[[bytes], bytes]]] = {
    b"\x1f\x8b": ("gzip", gzip.decompress),
    b"\xfd7zXZ\x00": ("xz", lzma.decompress),
    b"BZh": ("bzip2", bz2.decompress),
    b"PK\x03\x04": ("zip", unzip),
}


def unpack(path: str | Path, content: bytes) -> bytes:
    """Return a file's content as it was before it was packed; ValueError names the file."""
    for start, (kind, unpacked) in PACKED.items():
        if content.startswith(start):
            try:
                return unpacked(content)
            except NotOneFile as error:
                raise ValueError(f"{path}: a {kind} file that {error}") from None
            except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError,
                    zipfile.BadZipFile) as error:
                raise ValueError(f"{path}: damaged {kind} file ({error}); fetch it again") from None
    if content.startswith(b"PAR1"):
        raise ValueError(f"{path}: a Parquet file; convert it to JSON lines, with pandas: pandas."
                         "read_parquet(FILE).to_json(NEW, orient='records', lines=True)")
    return content


def read_bytes(path: str | Path) -> bytes:
    """Return a file's content, unpacked, without byte order mark; ValueError names the file."""
    try:
        content = unpack(path, Path(path).read_bytes())
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


def numbered_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a plain file of JSON lines as they are read; none of any other file.

    Such a file begins with an object on a line of its own, and goes on.
    """
    try:
        file = open(path, "rb")
    except OSError:
        return  # `read_bytes` says what is wrong
    with file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        number, first = next(lines, (0, b""))
        second = next(lines, None)
        first = first.removeprefix(codecs.BOM_UTF8)
        if second is None or not is_object(first):
            return
        yield number, first
        yield second
        yield from lines


def is_object(line: bytes) -> bool:
    """Whether a line is a whole JSON object, and not the beginning of one."""
    try:
        return line.lstrip().startswith(b"{") and load_json(line) is not None
    except (ValueError, RecursionError):
        return False


def read_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield (source, row) of an array, of {"data": [...]} or {"examples": [...]}, of lines or CSV.

    A line stays bytes until `parse_row`, so that a broken line is one bad row and not a bad file.
    Plain JSON lines are read one by one; any other file stands in memory as long as it is read.
    """
    number = 0
    for number, line in numbered_lines(path):
        yield f"{path}:{number}", line.removesuffix(b"\n")
    if number:
        return
    content = read_bytes(path)
    whole = load_whole(path, content)
    if isinstance(whole, dict):
        whole = whole.get("data", whole.get("examples"))
    if isinstance(whole, list):
        for number, row in enumerate(whole, 1):
            yield f"{path}:row {number}", row
        return

    delimiter = csv_delimiter(content)
    if delimiter:
        yield from csv_rows(path, content, delimiter)
        return

    # At "\n" alone: other separators that Python knows (U+2028, form feed) may stand in a text.
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line


class Cells(list):
    """A row of CSV that has more or fewer cells than the header."""


def csv_delimiter(content: bytes) -> str:
    """Return what parts the columns, if the first line names them as CSV does; "" if it is JSON."""
    csv.field_size_limit(2 ** 31 - 1)
    header = content.lstrip().split(b"\n")[0].decode("utf-8", "replace").strip()
    for delimiter in (",", "\t"):
        try:
            names = next(csv.reader([header], delimiter=delimiter), [])
        except csv.Error:
            continue
        if len(names) > 1 and all(re.fullmatch(r"[A-Za-z_][\w .-]*", name) for name in names):
            return delimiter
    return ""


def csv_rows(path: str | Path, content: bytes, delimiter: str) -> Iterator[tuple[str, Any]]:
    """Yield (source, row) of CSV with a header; a row of other than its columns is a bad one."""
    lines = io.StringIO(content.decode("utf-8", "surrogateescape"), newline="")
    reader = csv.reader(lines, delimiter=delimiter)
    header = next(reader)
    try:
        for cells in reader:
            whole = dict(zip(header, cells)) if len(cells) == len(header) else Cells(cells)
            if cells:
                yield f"{path}:{reader.line_num}", whole
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: broken CSV ({error})") from None


# ------------------------------------------------------------------------------------------
# Rows

class Watched(dict):
    """A row that remembers which of its fields were read."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    @property
    def unread_texts(self) -> list[str]:
        """The fields with text in them that nobody asked for."""
        return [name for name, value in self.items()
                if name not in self.read and isinstance(value, str) and value.strip()]


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


# Encoding -> what a text that was written in it consists of, beside ASCII. In order: single letters
# between ASCII ones, words of Cyrillic, Chinese with its punctuation.
ENCODINGS = {
    "CP1252": r"(?:[\x00-\x7f]|(?<![^\x00-\x7f])[\u00c0-\u00ff])+",
    "CP1251": r"[\x00-\x7f\u0401\u0410-\u044f\u0451\u00ab\u00bb\u2014]+",
    "GB18030": r"[\x00-\x7f\u4e00-\u9fff\u3000-\u303f\uff00-\uffef\u2014\u201c\u201d]+",
}


def guess_encoding(line: bytes) -> str:
    """Return advice if a line reads well in an encoding of old; "" if in none."""
    for name, letters in ENCODINGS.items():
        try:
            text = line.decode(name)
        except UnicodeDecodeError:
            continue
        if re.fullmatch(letters, text):
            return (f"; it reads as {name}, so if the whole file is: "
                    f"iconv -f {name} -t UTF-8 FILE > NEW")
    return ""


def parse_row(raw: Any) -> Row:
    """Return a row as an object whose values are all sound; raw: bytes of a line, or a value."""
    if isinstance(raw, bytes):
        try:
            raw = load_json(raw)
        except UnicodeDecodeError as error:
            raise BadRow("not UTF-8", f"byte {error.start + 1} of the line"
                         f"{guess_encoding(raw)}") from None
        except json.JSONDecodeError as error:
            raise BadRow("broken JSON", f"column {error.colno}: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise BadRow("broken JSON", error) from None
    check_values(raw)
    if isinstance(raw, Cells):
        raise BadRow("not as many cells as the header has columns", f"got {len(raw)}")
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
        if type(number) not in (int, float) or not abs(number) < 1e300:
            raise BadRow(f"field '{name}' must hold finite numbers only")
    return [float(number) for number in numbers]
