"""A run's folder: where results are, the log, model folders."""
from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Mapping

import torch
from torch import nn
from tqdm import tqdm

import microcosm
import parallel
from data import Tokenizer, end_ids, open_tokenizer
from formats import harmless
from formats.files import append_line, read_json, write_bytes, write_json
from model import ScalarModel, Transformer, derive
from parallel import Machine
from run.settings import Config, config_from_file
from weights import (check_beside, check_sum, read_config, read_weights, save_pretrained,
                     stored_dtype)


@dataclass
class Saving:
    """How far the checkpoints of a stage are (run/checkpoints.py)."""
    since: float = field(default_factory=time.monotonic)  # the last one, or the stage, began [s]
    under_way: Any = None  # the one that is being written, if any
    writer: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, 1))


@dataclass(frozen=True)
class Run:
    """What every stage needs: the settings, this process, and where results are."""
    config: Config
    machine: Machine
    out: Path
    tokenizer: Tokenizer
    saving: Saving = field(default_factory=Saving)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """What ends an answer."""
        return end_ids(self.tokenizer, self.config.data.template)

    def result(self, name: str) -> Path | None:
        """Return where a result is: in this run's folder or a base's; None if it is nowhere."""
        return find_result(self.config, self.out, name)

    def needed(self, name: str, stage: str) -> Path:
        """Return where a result is; ValueError naming the stage that makes it, if it is nowhere."""
        found = self.result(name)
        if found is None:
            raise ValueError(f"{self.out / name} does not exist: run --stages={stage} first, or "
                             "name a run that has it with --base=FOLDER")
        return found

    def log(self, stage: str, step: int, **numbers: float) -> None:
        """Append one line to metrics.jsonl."""
        self.append("metrics.jsonl", {"stage": stage, "step": step, **numbers})

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Append one object to a file of JSON lines."""
        if self.machine.is_main:
            append_line(self.out / name, row)

    def say(self, text: str) -> None:
        if self.machine.is_main:
            tqdm.write(harmless(text))

    def bar(self, stage: str, total: int, start: int = 0) -> tqdm:
        return tqdm(total=total, initial=start, desc=f"{stage:<9}", mininterval=0.5,
                    disable=not self.machine.is_main, dynamic_ncols=True)


def find_result(config: Config, out: Path, name: str) -> Path | None:
    """Look for a result in a run's folder, then in its base's, then in the base's base's ..."""
    return next((folder / name for folder in folders_of(config, out) if (folder / name).exists()),
                None)


def folders_of(config: Config, out: Path) -> list[Path]:
    """Return the folders that a run builds on: its own, its base's, the base's base's ..."""
    folders = [out]
    base = config.base
    while base and Path(base) not in folders:
        folders.append(Path(base))
        base = config_from_file(Path(base, "config.json")).get("base", "")
    return folders


def prepare_tokenizer(config: Config, out: Path) -> Tokenizer:
    """Open the tokenizer that the run's models were trained with; train the embedded world's."""
    if not config.is_world:
        return open_tokenizer(Path(config.model.path))
    path = out / "tokenizer.model"
    if not path.exists():
        earlier = find_result(config, out, "tokenizer.model")
        # models of the base know the base's pieces: trained anew, other ids would mean other words
        write_bytes(path, earlier.read_bytes() if earlier else
                    train_tokenizer(out / "tokenizer.new", config.model.vocab_size))
    return open_tokenizer(path)


def train_tokenizer(path: Path, vocab_size: int) -> bytes:
    try:
        microcosm.train_tokenizer(path, vocab_size)
        return path.read_bytes()
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise ValueError(f"--model.vocab_size={vocab_size}: {reason}")
    finally:
        path.unlink(missing_ok=True)


def timings(out: Path) -> dict[str, float]:
    """Return the wall seconds of every finished stage; only the main rank, which writes, reads."""
    path = out / "seconds.json"
    try:
        return read_json(path) if path.exists() else {}
    except ValueError:
        return {}  # no result hangs on them


def record_time(run: Run, stage: str, seconds: float) -> None:
    """Write how long a stage took."""
    if run.machine.is_main:
        write_json(run.out / "seconds.json", {**timings(run.out), stage: round(seconds, 2)})


# ---------------------------------------------------------------------------------------------
# Model folders

def save_model(run: Run, model: nn.Module, name: str, extra: Mapping | None = None) -> None:
    """Write a model folder in the Hugging Face layout; the stage's checkpoint has served."""
    weights = parallel.full_weights(model)
    if run.machine.is_main:
        save_pretrained(model, run.out / name, run.tokenizer, weights, extra,
                        template=run.config.data.template, dtype=export_dtype(run.config))
        shutil.rmtree(run.out / "checkpoints" / name, ignore_errors=True)
    for _ in weights:  # the other ranks take part in gathering what the main one writes
        pass
    parallel.gather_objects(None)


def export_dtype(config: Config) -> torch.dtype:
    """Return what weights are written in: float32 on the embedded world, else as the base's are."""
    if config.export.dtype != "auto":
        return getattr(torch, config.export.dtype)
    return torch.float32 if config.is_world else stored_dtype(config.model.path)


def load_model(run: Run, path: Path, kind: type[nn.Module] = Transformer,
               frozen: bool = False) -> nn.Module:
    """Load a model folder, sharded; a scalar model from a language model gets a fresh head."""
    check_beside(path)
    weights = read_weights(path)
    config = read_config(path)
    # a bit that flipped on the disk would go on into every later model; each rank reads some files
    files = weights.summed_files()[run.machine.rank::run.machine.world]
    parallel.on_all(lambda: [check_sum(file) for file in files])
    if kind is ScalarModel and "score.weight" not in weights:
        generator = torch.Generator().manual_seed(derive(run.config.seed, "score head"))
        head = torch.randn(1, config.dim, generator=generator) / (config.dim + 1) ** 0.5
        weights = weights.with_tensor("score.weight", head)
    return parallel.build(kind, config, weights, run.machine, frozen)
