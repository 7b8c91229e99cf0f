"""Checkpoints: what a resumed run goes on from, and whether it is whole.

    checkpoints/STAGE/STEP/rank00000.safetensors ...  each rank's rows of weights and Adam's moments
    checkpoints/STAGE/STEP/state.json                 the rest, size and checksum of every file

They are written while training goes on. Models and moments change in an optimizer step alone: so
the first one that comes waits until a thread has copied them, and none waits for the disk.
"""
from __future__ import annotations

import shutil
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import parallel
from formats.files import (LOGS, log_to_disk, names_to_disk, put_in_place, read_json, read_log,
                           write_json, write_jsonl)
from parallel import Machine, local_part, reshard, split_like
from run import stopping
from run.folder import Run
from run.written import is_whole, sealed
from weights import check_sum, read_safetensors, stored_sum, write_safetensors

# What a stage trains, by the names under which a checkpoint keeps it: models and their optimizers.
Trained = Mapping[str, tuple[nn.Module, torch.optim.Optimizer]]

# Adam's, under torch's names; each is as large as its parameter and sharded like it.
MOMENTS = ("exp_avg", "exp_avg_sq")


# ---------------------------------------------------------------------------------------------
# In a run

def keep(run: Run, stage: str, step: int, steps: int, every: int, trained: Trained,
         state: Mapping[str, Any]) -> None:
    """Begin a resumable checkpoint if one is due, and save and stop if that was asked for.

    every: so many steps, 0: never; besides, every --checkpoint_minutes.
    """
    saving = run.saving
    minutes = run.config.checkpoint_minutes
    is_late = 0 < minutes <= (time.monotonic() - saving.since) / 60
    is_writing = saving.under_way is not None and not saving.under_way.files.done()
    # ranks may hear of a signal, or be ready, at different times: they decide together
    flags = torch.tensor([bool(stopping.received), is_late, is_writing], dtype=torch.float32)
    is_last, is_late, is_writing = parallel.all_max(flags).bool().tolist()
    is_due = (is_late or every and step % every == 0) and step < steps
    if is_last or is_due or step == steps or not is_writing:
        settle(run)  # one at a time, and none is under way when the stage ends
    if is_last or is_due:
        if run.machine.is_main:
            # its lines up to this step will not be written again
            log_to_disk(run.out)
        path = run.out / "checkpoints" / stage / f"{step:06d}"
        saving.under_way = begin(path, trained, {**state, "step": step}, run.machine,
                                 saving.writer, run.config.checkpoint_keep)
        saving.since = time.monotonic()
    if is_last:
        settle(run)
        raise stopping.Stopped(f"after step {step} of {steps} of stage {stage}")


def settle(run: Run) -> None:
    """Wait for the checkpoint that is being written, if any, and give it its name."""
    writing, run.saving.under_way = run.saving.under_way, None
    if writing:
        writing.finish()


def restore(run: Run, stage: str, trained: Trained) -> dict[str, Any]:
    """Load the newest whole checkpoint of a stage when resuming; {} if there is none.

    Log lines written after it are dropped: the steps will be taken, and logged, again.
    """
    run.saving.since = time.monotonic()
    if not run.config.resume:
        return {}
    path = newest_whole(run, stage)
    state = load_checkpoint(path, trained) if path else {}
    if run.machine.is_main:
        for name in LOGS:
            rows = read_log(run.out / name)
            kept = [row for row in rows
                    if row["stage"] != stage or row["step"] <= state.get("step", 0)]
            if len(kept) < len(rows):
                write_jsonl(run.out / name, kept)
    return state


def newest_whole(run: Run, stage: str) -> Path | None:
    """Return the newest checkpoint of a stage that is whole, naming those that are not."""
    folder = run.out / "checkpoints" / stage
    found = parallel.from_main(partial(checkpoints_in, folder))
    for path in reversed(found):
        try:
            check_checkpoint(path, run.machine)
        except (ValueError, OSError) as error:
            run.say(f"{stage:<9}: the checkpoint of step {int(path.name)} is damaged and is left "
                    f"aside: {error}")
        else:
            run.say(f"{stage:<9}: continues after step {int(path.name)}")
            return path
    if found:
        run.say(f"{stage:<9}: NO CHECKPOINT IS WHOLE: the stage begins anew, at its first step")
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """Return a stage's checkpoints, the newest last; what else lies there is not looked at."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if path.name.isdecimal()), key=lambda x: int(x.name))


# ---------------------------------------------------------------------------------------------
# Written

class Writing(NamedTuple):
    """A checkpoint that is being written."""
    path: Path
    state: dict[str, Any]           # what state.json will hold, but for the files
    kept: int
    files: Future[dict[str, Any]]   # of this rank: name -> size and checksum
    hooks: Sequence[RemovableHandle]

    def finish(self) -> None:
        """Once all ranks have written, give the folder its name; the oldest have served."""
        for hook in self.hooks:
            hook.remove()
        written = parallel.on_all(self.files.result)
        files = {name: entry for part in written for name, entry in part.items()}
        parallel.from_main(partial(put_checkpoint_in_place, self.path,
                                   {**self.state, "files": files}, self.kept))


def begin(path: Path, trained: Trained, state: Mapping[str, Any], machine: Machine,
          writer: Executor, kept: int = 2) -> Writing:
    """Begin to write models, optimizers and `state` (plain JSON) into a folder that appears whole.

    writer: a thread.   kept: so many checkpoints stay, this one and the newest before it.
    """
    # 1. A folder under another name: a kill at any moment leaves the checkpoints as they were.
    parallel.from_main(partial(empty_folder, partial_name(path)))

    # 2. Every rank writes its shards. All replicas hold the same ones, so the first writes for all.
    tensors, steps = shards_of(trained)
    copied = Event()

    def wait(*_: Any) -> None:
        copied.wait()

    files = writer.submit(write_shards, partial_name(path), tensors, machine, copied)
    hooks = [optimizer.register_step_pre_hook(wait) for _, optimizer in trained.values()]
    content = {**deepcopy(dict(state)), "shards": machine.shards, "optimizer_steps": steps}
    return Writing(path, content, kept, files, hooks)


def save_checkpoint(path: Path, trained: Trained, state: Mapping[str, Any],
                    machine: Machine) -> None:
    """Write a checkpoint, and wait for it."""
    with ThreadPoolExecutor(1) as writer:
        begin(path, trained, state, machine, writer).finish()


def partial_name(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def empty_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def shards_of(trained: Trained) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return this rank's rows of all weights and moments, and the optimizers' steps."""
    tensors: dict[str, Tensor] = {}
    steps: dict[str, float] = {}
    for key, (model, optimizer) in trained.items():
        for name, parameter in reshard(model).named_parameters():
            tensors[f"{key}/weights/{name}"] = local_part(parameter)
            adam = optimizer.state.get(parameter)
            if not adam:
                continue  # no step was taken yet
            for moment in MOMENTS:
                tensors[f"{key}/{moment}/{name}"] = local_part(adam[moment])
            steps[key] = float(adam["step"])
    return tensors, steps


@torch.no_grad()
def write_shards(folder: Path, tensors: Mapping[str, Tensor], machine: Machine,
                 copied: Event) -> dict[str, Any]:
    """Write this rank's file; return {its name: size and checksum}, {} of a further replica."""
    try:
        if machine.rank >= machine.shards:
            return {}
        tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
    finally:
        copied.set()
    file = folder / shard_name(machine.rank)
    checksum = write_safetensors(file, tensors)
    return {file.name: {"bytes": file.stat().st_size, "crc32": checksum}}


def shard_name(rank: int) -> str:
    return f"rank{rank:05d}.safetensors"


def put_checkpoint_in_place(path: Path, content: dict[str, Any], kept: int) -> None:
    """Write state.json, give the folder its name, and drop the checkpoints that have served."""
    new = partial_name(path)
    write_json(new / "state.json", sealed(content))
    names_to_disk(new)
    shutil.rmtree(path, ignore_errors=True)  # a damaged one, which was not resumed from
    put_in_place(new, path)
    older = [old for old in checkpoints_in(path.parent) if int(old.name) <= int(path.name)]
    for old in path.parent.iterdir():
        # neither halves nor, after a damaged one was left aside, what once came after this
        if old.is_dir() and old not in older[-kept:]:
            shutil.rmtree(old)


# ---------------------------------------------------------------------------------------------
# Read

def read_state(path: Path) -> dict[str, Any]:
    """Read state.json; ValueError naming it if it is not what was written."""
    file = path / "state.json"
    content = read_json(file)
    if not is_whole(content):
        raise ValueError(f"{file}: is not what was written")
    return content


def check_checkpoint(path: Path, machine: Machine) -> None:
    """Raise ValueError or OSError, on all ranks alike, unless a checkpoint is what was written.

    Every rank reads some of its files.
    """
    files = parallel.from_main(partial(read_state, path))["files"]

    def check_some() -> None:
        for name in sorted(files)[machine.rank::machine.world]:
            file, entry = path / name, files[name]
            size = file.stat().st_size
            if size != entry["bytes"]:
                raise ValueError(f"{file}: has {size} bytes, {entry['bytes']} were written")
            if stored_sum(file) != entry["crc32"]:
                raise ValueError(f"{file}: is not the file of this checkpoint")
            check_sum(file)
    parallel.on_all(check_some)


def load_checkpoint(path: Path, trained: Trained) -> dict:
    """Fill models and optimizers, written by any number of ranks, and return the state."""
    state = read_state(path)
    files = [read_safetensors(path / shard_name(rank)) for rank in range(state["shards"])]

    def fill(target: Tensor, key: str) -> None:
        # (rows of a file, ...) end to end -> (all rows, ...) -> (this rank's rows, ...): the number
        # of ranks that wrote need not be the number that reads
        whole = torch.cat([file[key] for file in files])
        local_part(target).copy_(split_like(whole, target))

    for key, (model, optimizer) in trained.items():
        for name, parameter in reshard(model).named_parameters():
            fill(parameter, f"{key}/weights/{name}")
            if key not in state["optimizer_steps"]:
                continue
            # Just as a first step would have made it. The fused kernel reads `step` where the
            # parameter lives: a number in CPU memory would be an address that a GPU cannot follow.
            steps = state["optimizer_steps"][key]
            adam = {"step": torch.tensor(steps, dtype=torch.float32, device=parameter.device)}
            for moment in MOMENTS:
                adam[moment] = torch.zeros_like(parameter)
                fill(adam[moment], f"{key}/{moment}/{name}")
            optimizer.state[parameter] = adam
    return state
