"""What may happen to the files of a run between two calls: it is told in one line that names the file, or changes nothing."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

import golden
import kill
import train
from formats.files import write_jsonl
from run import written

STAGES = list(train.STAGES)


def flip(file: Path) -> None:
    """Flip a bit of the letter in the middle: JSON stays JSON."""
    content = bytearray(file.read_bytes())
    place = next(i for i in range(len(content) // 2, len(content)) if chr(content[i]).isalpha())
    content[place] ^= 1
    file.write_bytes(content)


KINDS = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: os.truncate(file, 0),
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "a flipped bit": flip,
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a list": lambda file: file.write_text("[1]\n"),
    "an object": lambda file: file.write_text('{"a": 1}\n'),
    "not UTF-8": lambda file: file.write_bytes(b"\xe9\n" + file.read_bytes()),
    "a link to nothing": lambda file: (file.unlink(), file.symlink_to("/nowhere/at/all")),
    "not readable": lambda file: (file.unlink(), file.symlink_to(file.name)),  # root may read all, but not a link to itself
    "gone, and its folder": lambda file: shutil.rmtree(file.parent),
    "a file for its folder": lambda file: (shutil.rmtree(file.parent), file.parent.write_text("")),
}
FILES = [*KINDS][:10]
SOME = ["missing", "empty", "a flipped bit", "a folder"]
# the stage that comes next, the file, what happens to it
CASES = [(stage, file, kind) for stage, file, kinds in [
    ("eval", "config.json", FILES), ("eval", "metrics.jsonl", FILES), ("eval", "samples.jsonl", SOME), ("eval", "heldout.jsonl", FILES),
    ("eval", "tokenizer.model", SOME), ("eval", "checksums.json", FILES), ("eval", "seconds.json", FILES), ("eval", "lock", FILES[1:]),
    ("eval", "top/config.json", FILES), ("eval", "ppo/model.safetensors", FILES), ("eval", "sft/tokenizer.json", SOME),
    ("eval", "reward/tokenizer_config.json", SOME), ("eval", "checkpoints/eval/sft.json", FILES),
    ("eval", "top/config.json", ["gone, and its folder", "a file for its folder"]),
    ("sample", "checkpoints/sample/rank00000.jsonl", [*KINDS]), ("annotate", "to_rank.jsonl", FILES), ("top", "ranked.jsonl", FILES),
    ("done", "eval.json", SOME), ("done", "answers.jsonl", SOME),
] for kind in kinds]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Folders of one run by the stage that comes next; "done": none."""
    work = tmp_path_factory.mktemp("runs")
    train.main([*kill.FLAGS, f"--out={work / 'done'}"])
    for number, stage in enumerate(STAGES):
        out = work / stage
        shutil.copytree(work / "done", out)
        for name in [train.STAGES[later].result for later in STAGES[number:]] + ["answers.jsonl", "report.md"]:
            shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
        for log in ("metrics.jsonl", "samples.jsonl"):
            write_jsonl(out / log, [row for row in golden.lines(out / log) if row["stage"] in STAGES[:number]])
        written.note_written(out)
        if stage in ("sample", "eval"):
            flags = [*kill.FLAGS, f"--out={out}", "--resume"]
            assert not kill.forked(f"stop {stage} {signal.SIGTERM}", 2, flags, work / "log"), (work / "log").read_text()
    return work


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stage,name,kind", CASES)
def test_a_damaged_file_is_named_or_changes_nothing(runs, tmp_path, stage, name, kind):
    out, file = tmp_path / "run", tmp_path / "run" / name
    shutil.copytree(runs / stage, out)
    if name == "lock":
        file.write_text(json.dumps({"host": "elsewhere", "process": 1} if kind == "a flipped bit" else {"process": 1}))
    KINDS[kind](file)
    before = contents(out)
    try:
        train.main([f"--out={out}", "--resume"])
    except (ValueError, OSError) as error:
        named = file if file.parent == out and "is no run" not in str(error) else file.parent
        assert "\n" not in str(error) and str(named) in str(error)
        after = contents(out)
        changed = {path for path in before if before[path] != after.get(path) and not path.startswith("checkpoints")}
        assert changed <= {name, "lock", "config.json"}, "what was whole stays as it is"
    else:
        expected = kill.bytes_of(runs / "done")
        if stage == "done":
            expected.pop(name)
        allowed = {name} & {"lock", "eval.json", "answers.jsonl"}
        if kind == "gone, and its folder" and stage == "eval":
            allowed = {"metrics.jsonl"}  # the stage is run again, later than it was
        if file.parent.name in ("sft", "top", "reward"):
            allowed |= {name}  # nobody read it; whoever does checks it
        assert set(kill.differences(out, expected)) <= allowed
