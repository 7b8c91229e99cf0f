"""JSON files as this project reads and writes them."""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Iterable


def read_json(path: Path) -> dict:
    """Read a JSON object; ValueError naming the file when it is missing or is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file")
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, expected an object")
    return content


def read_jsonl(path: Path) -> list[dict]:
    """Read a file that `write_jsonl` wrote, possibly edited by people; ValueError names the line."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not valid JSON ({error})")
        if row is not None:
            rows.append(row)
    return rows


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write one object per line; the file is replaced whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(partial, path)
