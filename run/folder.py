"""A run's folder: results, log, checkpoints, model folders."""
from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping

import torch
from torch import Tensor, nn
from tqdm import tqdm

import microcosm
import parallel
from data import Tokenizer, open_tokenizer
from formats.files import read_json, read_jsonl, write_jsonl
from model import ScalarModel, Transformer
from parallel import Machine
from run.settings import Config, config_from_file, flatten
from weights import Source, read_config, read_weights, save_pretrained


@dataclass(frozen=True)
class Run:
    """What every stage needs: the settings, this process, and where results are."""
    config: Config
    machine: Machine
    out: Path
    tokenizer: Tokenizer

    def result(self, name: str) -> Path | None:
        """Return where an earlier stage's result is: in this run's folder, in its base's, or further down; None if nowhere."""
        folders, base = [self.out], self.config.base
        while base and Path(base) not in folders:
            folders.append(Path(base))
            base = config_from_file(f"{base}/config.json").get("base", "")
        return next((folder / name for folder in folders if (folder / name).exists()), None)

    def needed(self, name: str, stage: str) -> Path:
        found = self.result(name)
        if found is None:
            raise ValueError(f"{self.out / name} does not exist: run --stages={stage} first, or name a run that has it with --base=FOLDER")
        return found

    def log(self, stage: str, step: int, **numbers: float) -> None:
        """Append one line to metrics.jsonl."""
        if self.machine.is_main:
            with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": stage, "step": step, **numbers}) + "\n")

    def say(self, text: str) -> None:
        if self.machine.is_main:
            tqdm.write(text)

    def bar(self, stage: str, total: int, start: int = 0) -> tqdm:
        return tqdm(total=total, initial=start, desc=f"{stage:<9}", disable=not self.machine.is_main, dynamic_ncols=True, mininterval=0.5)


def keep(run: Run, stage: str, step: int, steps: int, every: int, trained: Mapping, state: dict) -> None:
    """Save a resumable checkpoint every `every` steps."""
    if every and step % every == 0 and step < steps:
        parallel.save_checkpoint(run.out / "checkpoints" / stage / f"{step:06d}", trained, {**state, "step": step}, run.machine)


def restore(run: Run, stage: str, trained: Mapping) -> dict:
    """Load the newest checkpoint of a stage when resuming; drop log lines written after it. {} if there is none."""
    if not run.config.resume:
        return {}
    folders = sorted(p for p in (run.out / "checkpoints" / stage).glob("*") if p.suffix != ".partial")
    state = parallel.load_checkpoint(folders[-1], trained) if folders else {}
    for name in ("metrics.jsonl", "samples.jsonl"):
        if run.machine.is_main and (run.out / name).exists():
            lines = read_jsonl(run.out / name)
            write_jsonl(run.out / name, [line for line in lines if line["stage"] != stage or line["step"] <= state.get("step", 0)])
    return state


def save_model(run: Run, model: nn.Module, name: str, extra: Mapping | None = None) -> None:
    """Write a model folder in the Hugging Face layout; the stage's checkpoint has served."""
    weights = parallel.full_weights(model)
    if run.machine.is_main:
        save_pretrained(model, run.out / name, run.tokenizer, weights, extra)
        shutil.rmtree(run.out / "checkpoints" / name, ignore_errors=True)
    for _ in weights:  # the other ranks take part in gathering what the main one writes
        pass
    parallel.gather_objects(None)


def load_model(run: Run, path: Path, kind: type[nn.Module] = Transformer, frozen: bool = False) -> nn.Module:
    """Load a model folder, sharded; a scalar model from a language model gets a fresh head."""
    weights = read_weights(path)
    config = read_config(path)
    if kind is ScalarModel and "score.weight" not in weights:
        head = torch.randn(1, config.dim, generator=torch.Generator().manual_seed(run.config.seed)) / (config.dim + 1) ** 0.5
        weights.sources["score.weight"] = Source(path, tuple(head.shape), head.dtype, lambda: head)
    return parallel.build(kind, config, weights, run.machine, frozen)


def to_device(run: Run, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(run.machine.device) for tensor in tensors)


RESULTS = {"sft": "sft", "sample": "to_rank.jsonl", "annotate": "ranked.jsonl", "reward": "reward", "ppo": "ppo", "eval": "eval.json"}


def timings(run: Run) -> dict[str, float]:
    """Return the wall seconds of every finished stage."""
    path = run.out / "seconds.json"
    return read_json(path) if path.exists() else {}


def stages_to_run(config: Config, out: Path) -> list[str]:
    """Drop stages that are not needed; refuse to overwrite a result."""
    stages = [stage for stage in config.stages if not (config.reward.data and stage in ("sample", "annotate"))]
    done = [stage for stage in stages if (out / RESULTS[stage]).exists()]
    if config.resume:
        return [stage for stage in stages if stage not in done or stage == "eval"]
    if done and done != ["eval"]:
        raise ValueError(f"{out / RESULTS[done[0]]} exists: name a fresh --out, or continue with --resume")
    return stages


def open_folder(config: Config) -> Path:
    """Make the run folder: the one asked for, or the first free runs/NNN."""
    if config.out:
        stages_to_run(config, Path(config.out))
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
    """Write config.json: everything needed to repeat the run."""
    here = Path(__file__).parent
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True).stdout.strip() or None
    content = {"config": {**flatten(config), "out": str(out)}, "processes": world, "git": revision,
               "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    (out / "config.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def prepare_tokenizer(config: Config, out: Path) -> Tokenizer:
    """Open the model's tokenizer, or train the embedded world's at the start of the run."""
    if not config.is_world:
        return open_tokenizer(Path(config.model.path))
    path = out / "tokenizer.model"
    if not path.exists():
        partial_path = out / "tokenizer.partial"
        try:
            microcosm.train_tokenizer(partial_path, config.model.vocab_size)
        except RuntimeError as error:
            raise ValueError(f"--model.vocab_size={config.model.vocab_size}: {str(error).splitlines()[-1]}")
        os.rename(partial_path, path)
    return Tokenizer(path)
