"""Whether what stages left is still what they wrote: checksums of what has none of its own.

    checksums.json   {"heldout.jsonl": "0f3a11c2", "metrics.jsonl of sft": "...", ...}

Model folders, checkpoints and config.json carry theirs. to_rank.jsonl is people's to edit; on
eval.json, answers.jsonl and what else the evaluation leaves nothing hangs.
"""
from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, Mapping

from formats.files import LOGS, json_line, log_to_disk, read_json, read_log, write_json

NAME = "checksums.json"
FILES = ("tokenizer.model", "heldout.jsonl", "ranked.jsonl")


def note_written(out: Path) -> None:
    """Write down what finished stages have left."""
    log_to_disk(out)
    write_json(out / NAME, sums_of(out))


def check_written(out: Path) -> None:
    """Raise ValueError if a file is not what was written; forget those that were taken away."""
    noted = read_json(out / NAME) if (out / NAME).exists() else {}
    found = sums_of(out) if noted else {}
    for name, checksum in noted.items():
        if is_there(out, name) and found.get(name) != checksum:
            log, _, stage = name.partition(" of ")
            file = out / stage if (out / stage).is_file() else out / log
            raise ValueError(f"{file}: {'is not what was written' if file.exists() else 'is gone'}:"
                             " put it back from a copy; if it is meant to be so, delete "
                             f"{out / NAME}")
    if not all(is_there(out, name) for name in noted):
        # to be made anew, maybe by other settings
        write_json(out / NAME, found)


def is_there(out: Path, name: str) -> bool:
    """Return whether the result that a checksum belongs to is in the folder."""
    file, _, stage = name.partition(" of ")
    return (out / (stage or file)).exists()


def sums_of(out: Path) -> dict[str, str]:
    """Return the checksums of all that finished stages have left."""
    sums: dict[str, int] = {}
    for log in LOGS:
        for row in read_log(out / log):
            stage = str(row.get("stage"))
            if (out / stage).is_dir():
                name = f"{log} of {stage}"
                sums[name] = zlib.crc32(json_line(row), sums.get(name, 0))
    for name in FILES:
        if (out / name).is_file():
            sums[name] = zlib.crc32((out / name).read_bytes())
    return {name: f"{checksum:08x}" for name, checksum in sums.items()}


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object with a checksum of its own."""
    return {**content, "crc32": f"{zlib.crc32(json.dumps(content).encode()):08x}"}


def is_whole(content: Mapping[str, Any]) -> bool:
    """Return whether an object is what was sealed."""
    return content == sealed({name: value for name, value in content.items() if name != "crc32"})
