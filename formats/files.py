"""JSON files as this project reads and writes them."""
from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Iterable

from formats.rows import read_bytes


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


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write one object per line; the file is replaced whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

        # The content goes to the disk before the name does. Without this, a power cut just after
        # the rename can leave the new name on an empty file, and the old one is gone.
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
