"""Checkpoints are written while training goes on, and hold what was there when they were begun."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import parallel
from parallel import Machine
from run import checkpoints, stopping
from run.folder import Saving

MACHINE = Machine(0, 1, torch.device("cpu"), torch.float32)


def learner() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    optimizer = parallel.adamw(model, 0.1)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(1, 8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    return deepcopy({"weights": model.state_dict(), "adam": optimizer.state_dict()["state"]})


def equal(a: dict, b: dict) -> bool:
    return json.dumps(a, default=lambda x: x.tolist()) == json.dumps(b, default=lambda x: x.tolist())


def test_an_optimizer_step_waits_until_all_is_copied(tmp_path, monkeypatch):
    """The checkpoint holds weights, moments and state of its step, however slow the copying is."""
    pair, state = learner(), {"moments": {"mean": 1.0}}
    expected = contents(*pair)
    write = checkpoints.write_shards

    def slow(*args):
        time.sleep(0.2)
        return write(*args)

    monkeypatch.setattr(checkpoints, "write_shards", slow)
    with ThreadPoolExecutor(1) as writer:
        writing = checkpoints.begin(tmp_path / "1", {"model": pair}, state, MACHINE, writer)
        step(*pair)
        state["moments"]["mean"] = 2.0
        writing.finish()
    assert not equal(contents(*pair), expected)
    other = learner()
    step(*other)
    assert checkpoints.load_checkpoint(tmp_path / "1", {"model": other})["moments"] == {"mean": 1.0}
    assert equal(contents(*other), expected)


def test_no_step_waits_for_the_disk(tmp_path, monkeypatch):
    pair, disk = learner(), threading.Event()
    write = checkpoints.write_safetensors

    def stuck(*args):
        assert disk.wait(20)
        return write(*args)

    monkeypatch.setattr(checkpoints, "write_safetensors", stuck)
    with ThreadPoolExecutor(1) as writer:
        writing = checkpoints.begin(tmp_path / "1", {"model": pair}, {}, MACHINE, writer)
        for _ in range(3):
            step(*pair)
        assert not writing.files.done() and not (tmp_path / "1").exists()
        disk.set()
        writing.finish()
    checkpoints.check_checkpoint(tmp_path / "1", MACHINE)
    step(*pair)  # no hook is left behind
    assert not pair[1]._optimizer_step_pre_hooks


class Run:
    """As much of a run as `keep` asks for."""
    machine = MACHINE

    def __init__(self, out, minutes: float = 0.0) -> None:
        self.out, self.saving = out, Saving()
        self.config = SimpleNamespace(checkpoint_minutes=minutes, checkpoint_keep=9)


def names(out) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints" / "sft").iterdir())


def test_a_checkpoint_gets_its_name_in_a_later_step(tmp_path, monkeypatch):
    """Once it is written; the next one, and the stage's end, wait for it."""
    pair, run, disk = learner(), Run(tmp_path), threading.Event()
    write = checkpoints.write_safetensors
    monkeypatch.setattr(checkpoints, "write_safetensors", lambda *args: disk.wait(20) and write(*args))
    keep = lambda number: checkpoints.keep(run, "sft", number, 8, 3, {"model": pair}, {})  # noqa: E731
    for number in range(1, 6):
        keep(number)
    assert names(tmp_path) == ["000003.partial"]
    disk.set()
    run.saving.under_way.files.result()
    keep(5)
    assert names(tmp_path) == ["000003"]
    disk.clear()
    keep(6)
    keep(7)
    assert names(tmp_path) == ["000003", "000006.partial"]
    threading.Timer(0.1, disk.set).start()
    keep(8)
    assert names(tmp_path) == ["000003", "000006"]


def test_what_the_disk_says_is_told_in_the_step_after(tmp_path, monkeypatch):
    pair, run = learner(), Run(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device", "some/file")

    monkeypatch.setattr(checkpoints, "write_safetensors", full)
    checkpoints.keep(run, "sft", 1, 9, 1, {"model": pair}, {})
    with pytest.raises(OSError, match="No space left on device: 'some/file'"):
        checkpoints.keep(run, "sft", 2, 9, 1, {"model": pair}, {})


def test_asked_to_stop_it_saves_before_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "received", [15])
    with pytest.raises(stopping.Stopped, match="after step 2 of 9"):
        checkpoints.keep(Run(tmp_path), "sft", 2, 9, 0, {"model": learner()}, {})
    assert names(tmp_path) == ["000002"]


@pytest.mark.parametrize("minutes,saved", [(1e-9, ["000001", "000002", "000003"]), (0.0, []), (10.0, [])])
def test_a_checkpoint_after_so_many_minutes(tmp_path, minutes, saved):
    pair, run = learner(), Run(tmp_path, minutes)
    for number in (1, 2, 3, 4):
        checkpoints.keep(run, "sft", number, 4, 0, {"model": pair}, {})
    assert (names(tmp_path) if saved else [*tmp_path.iterdir()]) == saved


def test_minutes_count_from_the_last_checkpoint(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: clock[0])
    pair, run = learner(), Run(tmp_path, minutes=10.0)
    run.saving.since = 0.0
    for number in range(1, 9):
        clock[0] += 240  # 4 minutes a step
        checkpoints.keep(run, "sft", number, 8, 0, {"model": pair}, {})
    assert names(tmp_path) == ["000003", "000006"]
