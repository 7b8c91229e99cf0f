"""How long ranks need to load a model of TinyLlama's shape, and how much memory each holds.

    python speed/load.py [FOLDER [LAYERS [RANKS]]]

writes a checkpoint of 22 layers (1.1 billion parameters, random, bfloat16, 5 files) into FOLDER
unless it is there, and loads it with 2 ranks into float32.

Memory is what the kernel says of each process in /proc/self/status, the interpreter and its
libraries included: RssAnon (private to it), RssFile (mapped files, counted in full though ranks
share pages) and VmHWM, the largest sum of both at any moment. "cold" means that the files were
dropped from the page cache before. Reading is timed into a buffer used again and into fresh memory,
because fresh memory, which a model needs too, can cost more than the disk. CPU seconds are given
because other programs may be using the processors.
"""
from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import parallel
from model import ModelConfig, Transformer
from weights.initial import random_weights
from weights import read_config, read_weights, save_pretrained

GB = 1e9


def write(folder: Path, layers: int) -> None:
    """Draw and write the checkpoint, one tensor at a time."""
    config = ModelConfig(
        dim=2048, n_layers=layers, n_heads=32, n_kv_heads=4, vocab_size=32000, ffn_dim=5632,
        max_seq_len=2048)
    with torch.device("meta"):  # its shape alone: the whole model is never in memory
        model = Transformer(config).bfloat16()
    weights = ((name, x.bfloat16()) for name, x in random_weights(model, 0))
    save_pretrained(model, folder, weights=weights, shard_bytes=500_000_000)


def read_once(folder: Path) -> None:
    """Read all weights into one small buffer."""
    buffer = bytearray(16 << 20)
    for file in folder.glob("*.safetensors"):
        with open(file, "rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass


def read_whole(folder: Path) -> None:
    """Read all weights into fresh memory, file by file."""
    for file in folder.glob("*.safetensors"):
        file.read_bytes()


def timed(work: Callable[[], Any]) -> str:
    """Do it and say how long it took."""
    began = time.perf_counter()
    used = time.process_time()
    work()
    seconds = time.perf_counter() - began
    return f"{seconds:.2f} s, {time.process_time() - used:.2f} s of CPU"


def forget(folder: Path) -> None:
    """Drop the weights from the page cache."""
    os.sync()
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory() -> dict[str, float]:
    """Return this process's memory [GB] by the kernel's names."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _colon, text = line.partition(":")
        if name.startswith("Rss") or name == "VmHWM":
            kilobytes = int(text.split()[0])
            found[name] = kilobytes * 1024 / GB
    return found


def describe(model: Transformer, took: str, label: str) -> str:
    """Say what a rank holds of the model and in memory."""
    parameters = list(model.parameters())
    full = sum(p.numel() * 4 for p in parameters) / GB
    held = sum(parallel.local_part(p).numel() * 4 for p in parameters) / GB
    used = memory()
    peak = used["VmHWM"]
    return (
        f"{label}: {took}; holds {held:.2f} of {full:.2f} GB; anonymous {used['RssAnon']:.2f}, "
        f"files {used['RssFile']:.2f}, "
        f"at most {peak:.2f} GB = {100 * peak / full:.0f} % of the model"
    )


def load(folder: Path) -> None:
    """Be one rank: load its part and say what that took."""
    machine = parallel.start("float32")
    models = []

    def build() -> None:
        weights = read_weights(folder)
        models.append(parallel.build(Transformer, read_config(folder), weights, machine))

    for state in ("cold", "warm"):
        models.clear()
        gc.collect()
        if machine.is_main and state == "cold":
            forget(folder)
        parallel.gather_objects(None)  # nobody reads before the files are forgotten
        took = timed(build)
        said = describe(models[0], took, f"rank {machine.rank}, {state}")
        for line in parallel.gather_objects(said):
            if machine.is_main:
                print(line, flush=True)
    parallel.stop()


def main(folder: Path, layers: int, ranks: int) -> None:
    """Write the checkpoint if it is not there, time reading it, and start the ranks."""
    if not folder.exists():
        write(folder, layers)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / GB
    for read in (read_once, read_whole):
        forget(folder)
        for state in ("cold", "warm"):
            took = timed(lambda: read(folder))
            print(f"{read.__name__}, {size:.2f} GB, {state}: {took}", flush=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc_per_node={ranks}", __file__, str(folder)]
    subprocess.run(launcher, check=True)


if __name__ == "__main__":
    if "RANK" in os.environ:
        load(Path(sys.argv[1]))
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/bench_load"))
        parser.add_argument("layers", type=int, nargs="?", default=22)
        parser.add_argument("ranks", type=int, nargs="?", default=2)
        options = parser.parse_args()
        main(options.folder, options.layers, options.ranks)
