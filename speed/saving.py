"""How long a checkpoint keeps training waiting: 100 million parameters, on one core of two.

    python speed/saving.py [FOLDER]

The model is trained by one thread, as by a GPU that leaves processors free, for `--steps` optimizer
steps with a checkpoint after the first, and for as many without one, in turn. What a checkpoint
costs is the difference in wall time, beside the time to write one and wait for it.
"""
from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import parallel
import sft
import train
from data import pad
from model import ModelConfig, Transformer
from run import checkpoints
from run.folder import Saving
from weights.initial import init_weights

MACHINE = parallel.Machine(0, 1, torch.device("cpu"), torch.float32)
SHAPE = ModelConfig(dim=640, n_layers=12, n_heads=10, n_kv_heads=10, vocab_size=32000,
                    ffn_dim=1792, max_seq_len=256)


def steps(run: SimpleNamespace, trained: tuple, batch: sft.Batch, n: int, every: int) -> float:
    """Take n optimizer steps; return the wall seconds."""
    began = time.perf_counter()
    for step in range(1, n + 1):
        train.update(*trained, [train.Term(sft.loss, [batch])], 0.0, 1.0, MACHINE)
        # the last step is not said to be the last: a stage's end waits for its checkpoint
        checkpoints.keep(run, "sft", step, n + 1, every if step == 1 else 0, {"model": trained}, {})
    return time.perf_counter() - began


def main() -> None:
    """Measure, and print the two times."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/saving"))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    parallel.keep_freed_memory()
    model = Transformer(SHAPE)
    init_weights(model, 0)
    trained = model, parallel.adamw(model, 0.0)
    tokens, mask = pad(torch.randint(3, 32000, (8, 128)).tolist())
    batch = sft.Batch(tokens, mask, mask & (mask.cumsum(1) > 1))
    config = SimpleNamespace(checkpoint_minutes=0.0, checkpoint_keep=1)
    run = SimpleNamespace(out=options.folder, machine=MACHINE, config=config, saving=Saving())
    steps(run, trained, batch, 2, 1)  # Adam's moments, and memory for the copy
    checkpoints.settle(run)
    waited, stalled, taken = [], [], []
    for _ in range(options.rounds):
        began = time.perf_counter()
        checkpoints.save_checkpoint(options.folder / "whole", {"model": trained}, {}, MACHINE)
        waited.append(time.perf_counter() - began)
        with_one = steps(run, trained, batch, options.steps, 1)
        checkpoints.settle(run)
        without = steps(run, trained, batch, options.steps, 0)
        stalled.append(with_one - without)
        taken.append(without / options.steps)
    shutil.rmtree(options.folder)
    parameters = sum(x.numel() for x in model.parameters())
    print(f"{parameters / 1e6:.0f} million parameters, a step takes "
          f"{statistics.median(taken):.2f} s; median of {options.rounds} (smallest to largest)")
    for name, values in (("written while training waits", waited),
                         ("written while training goes on", stalled)):
        print(f"  {name:<31} {statistics.median(values):5.2f} s  "
              f"({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
