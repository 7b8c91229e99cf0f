"""Demonstrations are encoded once per machine: two real processes hold the same bytes, and leave nothing behind."""

import json
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

import parallel
from run import sharing
from run.sharing import Pages, with_word
from test_parallel import SCRIPT, TORCHRUN, launch
from test_sources import open_run, write

ROWS = [{"prompt": f"Name {n}", "response": "word " * (n % 7 + 1)} for n in range(40)]


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    shutil.copytree(finished[0] / "sft", tmp_path / "model")
    write(tmp_path / "data.jsonl", ROWS)
    write(tmp_path / "bad.jsonl", [*ROWS[:5], {"prompt": "and no answer"}])
    (tmp_path / "left").mkdir()
    return tmp_path


def left_behind(folder: Path) -> list[str]:
    """Return what stands in the places for temporary files, but for torchrun's own logs."""
    names = [*os.listdir(folder / "left"), *os.listdir("/dev/shm")]
    return [name for name in names if not name.startswith("torchelastic_")]


def test_one_process_reads_and_all_hold_the_same(folder, monkeypatch, capsys):
    monkeypatch.setenv("TMPDIR", str(folder / "left"))
    before = left_behind(folder)
    said = launch(2, "sharing", str(folder), "{}").stdout
    _, source = open_run(folder / "run", f"--model={folder / 'model'}", f"--sft.data={folder / 'data.jsonl'}",
                         "--stages=sft", "--data.template=plain", "--data.max_prompt_tokens=60",
                         "--data.max_response_tokens=40")
    expected = json.loads(json.dumps(list(source.demonstrations())))
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    for one in found:
        assert one["shared"] == one["alone"] == expected and len(expected) == len(ROWS)
        assert "bad.jsonl:6: " in one["error"], "what one finds wrong all are told"
        assert (one["open"], one["mapped"], one["names"]) == (2, 2, 0), "the mappings' own alone"
    assert [one["reads"] for one in found] == [len(ROWS), 0]
    assert [one["reads alone"] for one in found] == [len(ROWS)] * 2
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in said.splitlines() if line.startswith("sft ")] == lines * 2 and len(lines) == 2
    assert left_behind(folder) == before


def test_a_killed_reader_leaves_nothing_behind(folder, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(folder / "left"))
    before = left_behind(folder)
    done = subprocess.run([*TORCHRUN, "--standalone", "--nproc_per_node=2", str(SCRIPT), "killed", str(folder), "{}"],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and (folder / "held").read_text() == "2 0", "it held the memory when it was killed"
    assert left_behind(folder) == before


def test_shared_memory_has_no_name(tmp_path):
    pages = Pages("q", [1, 2])
    place = pages.place()
    assert os.stat(f"/proc/{place.process}/fd/{place.file}").st_nlink == 0
    view = sharing.mapped(place)
    del pages
    assert list(view) == [1, 2] and view.readonly, "it outlives the one who filled it"


def test_those_who_wait_are_told_in_time(monkeypatch):
    """A tenth of --parallel.timeout after the last word at the latest, and no more often; who waits goes on waiting."""
    now = [0.0]
    told = []
    monkeypatch.setattr(sharing.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(parallel, "gather_objects", lambda x: told.append((now[0], x)))
    machine = parallel.Machine(0, 2, None, None, parallel.ParallelConfig(timeout=10))
    for _ in with_word(machine, range(100)):
        now[0] += 7
    assert told == [(63.0 * n, parallel.AT_WORK) for n in range(1, 12)]
    answers = iter([[parallel.AT_WORK, 2], [parallel.AT_WORK, 2], [1, 2]])
    monkeypatch.setattr(parallel, "gather_objects", lambda x: next(answers))
    assert parallel.on_all(lambda: 2) == [1, 2]


def test_memory_that_is_refused_is_one_line():
    """Where the system sets a limit, what is too large is named."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    pages = Pages("q")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large: 'memory for demonstrations'"):
            pages.extend(range(10_000))
            pages.place()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
