"""How a run begins and ends: its folder, made or found, in which one run works at a time."""
from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Iterator, Mapping, NoReturn, Sequence

import torch
from tqdm import tqdm

import parallel
from data import AUTO, Tokenizer, choose_template
from formats import harmless
from formats.files import LOGS, cut_torn_line, naming, read_json, write_json
from parallel import Machine
from run import planner, stopping
from run.continuing import changes
from run.folder import Run, folders_of, prepare_tokenizer, record_time
from run.settings import Config, flatten
from run.written import check_written, note_written, sealed

# What a disk says that is full, or that nobody may write to.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_RIGHT = (errno.EROFS, errno.EACCES, errno.EPERM)


def restarted(args: Sequence[str]) -> list[str]:
    """Return a command line that resumes, where torchrun has started the processes again."""
    outs = [Path(arg.removeprefix("--out=")) for arg in args if arg.startswith("--out=")]
    is_again = parallel.restarts() and any((out / "config.json").exists() for out in outs)
    return [*args, "--resume"] if is_again else list(args)


@contextmanager
def opened_run(config: Config, machine: Machine, results: Mapping[str, str]) -> Iterator[Run]:
    """Make a run of settings and a folder; what stops it inside is told with how to go on.

    results: of all stages, by their names.
    """
    with stopping.listening(machine.is_main):
        out = parallel.from_main(partial(open_folder, config))
        again = partial(command, config, out, machine.world, list(results))
        lock = parallel.from_main(partial(take_lock, out))
        try:
            parallel.from_main(partial(drop_served, out, results))
            for folder in folders_of(config, out):
                parallel.from_main(partial(check_written, folder))
            run = prepare(config, machine, out)
            with run.saving.writer:
                yield run
        except stopping.Stopped as stopped:
            if machine.is_main:
                tqdm.write(harmless(f"stopped, as asked, {stopped}; continue with: {again()}"))
        except OSError as error:
            if error.errno not in NO_ROOM + NO_RIGHT:
                raise
            raise ValueError(f"{told(error, out)}, then continue with: {again()}") from None
        except RuntimeError as error:
            if not parallel.is_lost(error):
                raise
            give_up(error, machine, again())
        finally:
            close_bars()
            if machine.is_main:
                free_lock(out, lock)


def prepare(config: Config, machine: Machine, out: Path) -> Run:
    """Put into the folder what every stage needs, made by one rank and seen by all."""
    parallel.from_main(lambda: prepare_tokenizer(config, out).path)
    planner.check_disk(config, out)
    tokenizer = prepare_tokenizer(config, out)
    config = with_template(config, tokenizer)
    run = Run(config, machine, out, tokenizer)
    parallel.from_main(lambda: record_config(config, out, machine.world))
    run.say(f"run folder: {out}   {machine.world} process(es) on {machine.device.type}, "
            f"{str(machine.dtype).removeprefix('torch.')}")
    return run


def open_folder(config: Config) -> Path:
    """Make the run folder: the one asked for, or the first free runs/NNN."""
    if config.out:
        Path(config.out).mkdir(parents=True, exist_ok=True)
        return Path(config.out)
    for number in range(1, 10_000):
        out = Path("runs") / f"{number:03d}"
        try:
            out.mkdir(parents=True)
        except FileExistsError:
            continue
        return out
    raise ValueError("runs/ is full: give --out=FOLDER")


def record_config(config: Config, out: Path, world: int) -> None:
    """Write config.json: everything needed to repeat the run, and what later calls changed."""
    path = out / "config.json"
    settings, defaults = flatten(config), flatten(Config())
    not_default = [flag for flag in settings if settings[flag] != defaults[flag]]
    settings = json.loads(json.dumps({**settings, "out": str(out)}))  # as the file will hold them
    earlier = read_json(path) if path.exists() else {}
    before, changed = earlier.get("changes"), changes(earlier.get("config", {}), settings)
    write_json(path, sealed({
        "config": settings, "not_default": not_default,
        "changes": [*(before if isinstance(before, list) else []), *([changed] if changed else [])],
        "processes": world, "git": git_revision(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}}))


def git_revision() -> str | None:
    """Return the commit this code is at; None where there is no git, or no repository."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True,
                              text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def with_template(config: Config, tokenizer: Tokenizer) -> Config:
    """Return the settings with the chat template that "auto" stands for.

    A base model brings none: SFT teaches it Alpaca's.
    """
    name = config.data.template
    if name == AUTO and not tokenizer.own.exists:
        name = "alpaca"
    chosen = choose_template(name, tokenizer)
    if chosen == config.data.template:
        return config
    return replace(config, data=replace(config.data, template=chosen))


# ---------------------------------------------------------------------------------------------
# One process at a time

def take_lock(out: Path) -> int:
    """Keep a second run out of the folder; return the lock, to be given to `free_lock`.

    The system lets go of the lock of a process that has died, however it did.
    """
    path = out / "lock"
    with naming(path):
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    is_taken = False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        is_taken = True
    except OSError:
        pass  # a file system without locks: the file alone has to tell
    host = platform.node()
    try:
        owner = json.loads(os.pread(lock, 1000, 0))
        is_taken = is_taken or owner["host"] != host
    except (ValueError, KeyError, TypeError):
        owner = {"host": host, "process": "?"}  # empty: it had no time to say who it is
    if is_taken:
        os.close(lock)
        remedy = "wait for it, or end it" if owner["host"] == host else (
            f"if it is not running any more, delete {path}")
        raise ValueError(f"{out}: process {owner['process']} on {owner['host']} is at work in it: "
                         f"{remedy}")
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps({"host": host, "process": os.getpid()}).encode(), 0)
    for name in LOGS:
        if cut_torn_line(out / name):
            print(harmless(f"{out / name}: its last line was torn, and is cut off"))
    return lock


def free_lock(out: Path, lock: int) -> None:
    """Let the next run in; leave no empty folder where all checkpoints have served."""
    with suppress(OSError):  # it is not empty, or not there
        (out / "checkpoints").rmdir()
    (out / "lock").unlink(missing_ok=True)
    os.close(lock)


def drop_served(out: Path, results: Mapping[str, str]) -> None:
    """Remove the checkpoints of finished stages, where a kill came between result and removal."""
    folders = (out / "checkpoints").iterdir() if (out / "checkpoints").is_dir() else ()
    for folder in folders:
        if (out / results.get(folder.name, folder.name)).exists():
            shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------------
# Stages

@contextmanager
def in_stage(run: Run, name: str) -> Iterator[None]:
    """Run a stage inside: its time and checksums are written down, an error carries its name."""
    stopping.stop_if_asked(f"before stage {name}")
    began = time.perf_counter()
    try:
        yield
    except RuntimeError as error:
        error.__notes__ = [f"stage {name}: "]
        raise
    record_time(run, name, time.perf_counter() - began)
    if run.machine.is_main:
        note_written(run.out)


def command(config: Config, out: Path, world: int, every: Sequence[str]) -> str:
    """Return the command that continues a run; its settings are in its folder."""
    if not (out / "config.json").exists():
        return "the same command"  # nothing was begun
    launcher = "python" if world == 1 else f"torchrun --nproc_per_node={world}"
    if os.environ.get("LOCAL_WORLD_SIZE", str(world)) != str(world):
        launcher = "torchrun ..."  # several machines: as it was called
    stages = "" if config.stages == tuple(every) else f" --stages={','.join(config.stages)}"
    return f"{launcher} train.py --out={shlex.quote(str(out))} --resume{stages}"


def close_bars() -> None:
    """End all progress bars, so that what is told next begins a line of its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def give_up(error: RuntimeError, machine: Machine, again: str) -> NoReturn:
    """End this process because another does not answer; the first that is alive says so."""
    close_bars()
    time.sleep(1)  # a process that dies closes its connections before it is gone
    here = platform.node()
    states = {rank: state_of(process) for rank, (host, process) in enumerate(machine.peers)
              if host == here}
    speaker = min(rank for rank, state in states.items() if not state)
    if machine.rank != speaker:
        time.sleep(10)  # it is ended together with the speaker
    missing = [f"rank {rank} (process {machine.peers[rank][1]} on {here}) {state}"
               for rank, state in states.items() if state]
    who = ", ".join(missing) or "a rank is gone or stuck, on another machine or in a computation"
    is_late = re.search("time.?out|timed out", str(error), re.IGNORECASE)
    waited = f" after {machine.config.timeout:g} minutes (--parallel.timeout)" if is_late else ""
    where = "".join(getattr(error, "__notes__", []))
    parallel.fail_alone(f"train.py: error: {where}another process does not answer{waited}: {who}; "
                        f"continue with: {again}")


def state_of(process: int) -> str:
    """Return what is the matter with a process of this machine; "" if it is alive."""
    try:
        # "123 (name) S ...": the state is the first word after the name
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "is gone"
    return {"T": "is stopped", "t": "is stopped", "Z": "is gone", "X": "is gone"}.get(state, "")


def told(error: OSError, out: Path) -> str:
    """Say what a disk lacks, and what to do about it."""
    path = error.filename or out
    if error.errno in NO_ROOM:
        free = shutil.disk_usage(out).free
        return f"{path}: {error.strerror}: {free / 1e6:.1f} MB are free; make room"
    return f"{path}: {error.strerror}: make it writable"
