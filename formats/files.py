"""JSON files as this project reads and writes them."""
from __future__ import annotations

import errno
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Iterable, Iterator, Mapping

from formats.rows import read_bytes

# What grows line by line in a run's folder; every other file there is written whole.
LOGS = ("metrics.jsonl", "samples.jsonl")


def print_any_text() -> None:
    """Let a terminal, or a pipe, that is not UTF-8 show what it has no letter for as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def read_json(path: Path) -> dict:
    """Read a JSON object; ValueError naming the file when it is missing or is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, expected an object")
    return content


def read_jsonl(path: Path) -> list[dict]:
    """Read a file that `write_jsonl` wrote, possibly edited by people; ValueError names the line.

    A line ends at "\\n" alone: JSON lets U+2028, U+2029 and U+0085 stand in a string as they are,
    and str.splitlines would cut a prompt in two there.
    """
    rows = []
    for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: holds {type(row).__name__}, expected an object")
        rows.append(row)
    return rows


def read_log(path: Path) -> list[dict]:
    """Read a file of JSON lines that a run appends to; [] if it is not there."""
    return read_jsonl(path) if path.exists() else []


def cut_torn_line(path: Path) -> bool:
    """Cut a log's last line off if a kill or a full disk tore it; return whether that was so."""
    content = path.read_bytes() if path.exists() else b""
    if not content:
        return False
    start = content.rfind(b"\n", 0, len(content) - 1) + 1
    try:
        is_torn = not isinstance(json.loads(content[start:]), dict) or content[-1:] != b"\n"
    except ValueError:
        is_torn = True
    if is_torn:
        os.truncate(path, start)
    return is_torn


@contextmanager
def naming(path: Path, size: int = 0) -> Iterator[None]:
    """Have an error of the disk say which file it is about, and how many bytes were to go there."""
    try:
        yield
    except OSError as error:
        if error.filename or not error.errno:
            raise
        amount = f" ({size / 1e6:.1f} MB were to be written)" if size else ""
        raise OSError(error.errno, f"{error.strerror}{amount}", str(path)) from None


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to be written: it appears under its name whole, or the old one stays."""
    partial = path.with_name(path.name + ".partial")
    with naming(path), open(partial, "wb") as file:
        yield file
        to_disk(file)
    put_in_place(partial, path)


def to_disk(file: BinaryIO) -> None:
    """Have the disk hold what was written.

    The content goes there before the name does. Without this, a power cut just after a rename can
    leave the new name on an empty file, and the old one is gone.
    """
    file.flush()
    os.fsync(file.fileno())


def put_in_place(partial: Path, path: Path) -> None:
    """Give what is on the disk, a file or a folder, its name, and have the disk hold that too."""
    with naming(path):
        os.replace(partial, path)
        names_to_disk(path.parent)


def names_to_disk(folder: Path) -> None:
    """Have the disk hold which files there are in a folder."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    with whole_file(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a file of text, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write one object per line; the file is replaced whole or not at all."""
    with whole_file(path) as file:
        for row in rows:
            file.write(json_line(row))


def log_to_disk(folder: Path) -> None:
    """Have the disk hold all lines of a run's logs."""
    for name in LOGS:
        if (folder / name).exists():
            with open(folder / name, "ab") as file:
                to_disk(file)


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one object to a file of JSON lines."""
    line = json_line(row)
    # in one piece and unbuffered: a kill leaves a whole line, or a torn last one
    with naming(path, len(line)), open(path, "ab", buffering=0) as file:
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def json_line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
