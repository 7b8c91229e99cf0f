"""How long ranks need to load a model of TinyLlama's shape, and how much memory each holds.

    python speed/load.py [FOLDER [LAYERS [RANKS]]]

writes a checkpoint of 22 layers (1.1 billion parameters, random, bfloat16, 5 files) into FOLDER unless it is there, and loads
it with 2 ranks into float32. Memory is what the kernel says of each process in /proc/self/status, the interpreter and its
libraries included: RssAnon (private to it), RssFile (mapped files, counted in full though ranks share pages) and VmHWM, the
largest sum of both at any moment. "cold" means that the files were dropped from the page cache before. Reading is timed into
a buffer that is used again and into fresh memory, because fresh memory, which a model needs too, can cost more than the disk.
CPU seconds are given because other programs may be using the processors.
"""
from __future__ import annotations

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
    config = ModelConfig(dim=2048, n_layers=layers, n_heads=32, n_kv_heads=4, vocab_size=32000, ffn_dim=5632, max_seq_len=2048)
    with torch.device("meta"):
        model = Transformer(config).bfloat16()
    save_pretrained(model, folder, weights=((name, x.bfloat16()) for name, x in random_weights(model, 0)), shard_bytes=500_000_000)


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
    began, used = time.perf_counter(), time.process_time()
    work()
    return f"{time.perf_counter() - began:.2f} s, {time.process_time() - used:.2f} s of CPU"


def forget(folder: Path) -> None:
    """Drop the weights from the page cache."""
    os.sync()
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory() -> dict[str, float]:
    """Return this process's memory [GB] by the kernel's names."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 / GB for line in lines if line[0].startswith(("Rss", "VmHWM", "VmRSS"))}


def load(folder: Path) -> None:
    """One rank: load its part and say what that took."""
    machine, models = parallel.start("float32"), []
    for cold in (True, False):
        models.clear()
        gc.collect()
        if machine.is_main and cold:
            forget(folder)
        parallel.gather_objects(None)
        took = timed(lambda: models.append(parallel.build(Transformer, read_config(folder), read_weights(folder), machine)))
        full = sum(p.numel() * 4 for p in models[0].parameters()) / GB
        held = sum(parallel.local_part(p).numel() * 4 for p in models[0].parameters()) / GB
        m = memory()
        said = (f"rank {machine.rank}, {'cold' if cold else 'warm'}: {took}; holds {held:.2f} of {full:.2f} GB; anonymous {m['RssAnon']:.2f}, "
                f"files {m['RssFile']:.2f}, at most {m['VmHWM']:.2f} GB = {100 * m['VmHWM'] / full:.0f} % of the model")
        for line in parallel.gather_objects(said):
            if machine.is_main:
                print(line, flush=True)
    parallel.stop()


def main(folder: Path, layers: int, ranks: int) -> None:
    if not folder.exists():
        write(folder, layers)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / GB
    for read in (read_once, read_whole):
        forget(folder)
        print(f"{read.__name__}, {size:.2f} GB, cold: {timed(lambda: read(folder))}", flush=True)
        print(f"{read.__name__}, {size:.2f} GB, warm: {timed(lambda: read(folder))}", flush=True)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", __file__, str(folder)], check=True)


if __name__ == "__main__":
    if "RANK" in os.environ:
        load(Path(sys.argv[1]))
    else:
        given = [*sys.argv[1:], *("runs/bench_load", "22", "2")[len(sys.argv) - 1:]]
        main(Path(given[0]), int(given[1]), int(given[2]))
