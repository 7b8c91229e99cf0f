"""This code and what a user would run instead, in turn in one process, on one core.

    python speed/versus.py sft          a training step: ragged rows, rows of one length
    python speed/versus.py generate     96 new tokens from 16 and from 64 prompts
    python speed/versus.py head         a training step with a vocabulary of 32,000
    python speed/versus.py ppo          a PPO iteration, against TRL's trainer
    python speed/versus.py memory       the memory of both, each in a process of its own
    python speed/versus.py all --rounds=5 --dtype=bfloat16

For development: needs `pip install transformers trl==1.12.0`. A number is the other's CPU time over
ours, the median of the rounds with the smallest and largest, above 1 where this code is faster. The
model is random, 6 layers of 288 (8.3 million parameters with a vocabulary of 4,096), the tokens
too. Ragged rows have log-normal lengths, median 60, at most 256. transformers gets them padded,
padded with like lengths together, laid end to end in one row (DataCollatorWithFlattening), and
packed into rows of 256. Memory is allocated as users of either have it (parallel.keep_freed_memory
is ours). A share is of the fastest matrix product measured beside it.
"""
from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import parallel
import sft
from data import pad
from model import ModelConfig, Transformer, generate
from speed import iteration
from speed.iteration import EndOurs, EndTheirs, shape
from weights.initial import init_weights

Work = Callable[[], Any]
Rows = list[list[int]]
IGNORED = -100  # a label that transformers leaves out of its loss


def models(vocab_size: int) -> tuple[Transformer, nn.Module]:
    """Make the same model twice: ours, and transformers' with our weights."""
    from transformers import LlamaConfig, LlamaForCausalLM
    config = shape(vocab_size)
    ours = Transformer(config)
    init_weights(ours, 0)
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab_size, hidden_size=config.dim, num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads, intermediate_size=config.ffn_dim,
        max_position_embeddings=config.max_seq_len, rms_norm_eps=config.norm_eps,
        bos_token_id=None, eos_token_id=None))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def allocate_as_usual() -> None:
    """Undo parallel.keep_freed_memory: glibc as it is in a program that has run for a while."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 65536)     # M_MMAP_MAX
    libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, to which it has risen by then
    libc.mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD, twice that
    libc.malloc_trim(0)


def cpu_seconds(work: Work) -> float:
    gc.collect()
    began = time.process_time()
    work()
    return time.process_time() - began


def race(name: str, ours: Work, rivals: dict[str, Work], rounds: int, flops: float = 0) -> None:
    """Run all in turn, `rounds` times after a warm-up, and print ratios."""
    runners = {"ours": ours, **rivals}
    for work in runners.values():
        work()
    seconds: dict[str, list[float]] = {runner: [] for runner in runners}
    for _ in range(rounds):
        for runner, work in runners.items():
            if runner == "ours":
                parallel.keep_freed_memory()
            else:
                allocate_as_usual()
            seconds[runner].append(cpu_seconds(work))
    best = statistics.median(seconds["ours"])
    share = f", {100 * flops / best / peak():.0f} % of the peak" if flops else ""
    print(f"\n{name}: ours {best:.2f} s{share}")
    for rival in rivals:
        ratios = sorted(b / a for a, b in zip(seconds["ours"], seconds[rival]))
        print(f"  {rival:<28} {statistics.median(ratios):.2f} x  ({ratios[0]:.2f} to "
              f"{ratios[-1]:.2f})", flush=True)


def peak() -> float:
    """Measure the floating-point operations a second of a large matrix product."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    a = torch.randn(1024, 1024, dtype=dtype)
    rates = [2 * 1024 ** 3 * 10 / cpu_seconds(lambda: [a @ a for _ in range(10)])
             for _ in range(5)]
    return max(rates)


# ---------------------------------------------------------------------------------------------
# Training

def ragged_rows(n: int, vocab_size: int) -> Rows:
    """Draw rows of random tokens with log-normal lengths: median 60, from 8 to 256."""
    g = torch.Generator().manual_seed(0)
    lengths = (60 * torch.randn(n, generator=g).mul(0.8).exp()).clamp(8, 256).long().tolist()
    return [torch.randint(3, vocab_size, (length,), generator=g).tolist() for length in lengths]


def step_of_ours(model: Transformer, optimizer: torch.optim.Optimizer, rows: Rows) -> None:
    tokens, mask = pad(rows)
    batch = sft.Batch(tokens, mask, mask & (mask.cumsum(1) > 1))
    loss, _ = sft.loss(model, batch)
    (loss / batch.count).backward()
    optimizer.step()
    optimizer.zero_grad()


def step_of_theirs(model: nn.Module, optimizer: torch.optim.Optimizer, **batch: Tensor) -> None:
    model(**batch, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def padded(rows: Rows) -> dict[str, Tensor]:
    tokens, mask = pad(rows)
    return {"input_ids": tokens, "attention_mask": mask.long(),
            "labels": tokens.masked_fill(~mask, IGNORED)}


def laid_end_to_end(rows: Rows) -> dict[str, Tensor]:
    """Join rows into one, as DataCollatorWithFlattening does; no row predicts the next one."""
    tokens = [token for row in rows for token in row]
    labels = [token for row in rows for token in [IGNORED, *row[1:]]]
    positions = [t for row in rows for t in range(len(row))]
    return {name: torch.tensor([x]) for name, x in
            (("input_ids", tokens), ("labels", labels), ("position_ids", positions))}


def packed(rows: Rows, width: int = 256) -> list[dict[str, Tensor]]:
    """Fit rows into rows of `width`, longest first into the fullest that takes it."""
    bins: list[Rows] = []
    for row in sorted(rows, key=len, reverse=True):
        fits = [one for one in bins if sum(map(len, one)) + len(row) <= width]
        if fits:
            max(fits, key=lambda one: sum(map(len, one))).append(row)
        else:
            bins.append([row])
    ends = {"input_ids": 0, "labels": IGNORED, "position_ids": 0}
    flat = [laid_end_to_end(one) for one in bins]
    wide = [{name: F.pad(x, (0, width - x.size(1)), value=ends[name]) for name, x in one.items()}
            for one in flat]
    return [{name: torch.cat([one[name] for one in wide[i:i + 8]]) for name in ends}
            for i in range(0, len(wide), 8)]


def steps(batches: list, step: Callable[[Any], None]) -> Work:
    def work() -> None:
        for batch in batches:
            step(batch)
    return work


def training_flops(config: ModelConfig, rows: Rows) -> float:
    """Count the operations of a forward and backward over real tokens."""
    layer = 4 * config.dim ** 2 + 3 * config.dim * config.ffn_dim
    tokens = sum(map(len, rows))
    pairs = sum(len(row) ** 2 / 2 for row in rows)
    matrices = tokens * (config.n_layers * layer + config.vocab_size * config.dim)
    return 6 * matrices + 12 * config.n_layers * config.dim * pairs


def race_sft(rounds: int, vocab_size: int = 4096) -> None:
    """Train on ragged rows, against four ways to lay them out, and on rows of one length."""
    ours, theirs = models(vocab_size)
    mine = parallel.adamw(ours, 0.0)
    adam = torch.optim.AdamW(theirs.parameters(), lr=0.0, fused=True)
    rows = ragged_rows(128, vocab_size)
    grouped = sorted(rows, key=len)
    by_8 = [rows[i:i + 8] for i in range(0, len(rows), 8)]
    alike = [grouped[i:i + 8] for i in range(0, len(rows), 8)]

    def rival(batches: list[dict[str, Tensor]]) -> Work:
        return steps(batches, lambda batch: step_of_theirs(theirs, adam, **batch))

    race(f"SFT, 128 ragged rows ({sum(map(len, rows))} tokens), 8 a step",
         steps(by_8, lambda part: step_of_ours(ours, mine, part)), {
             "padded": rival([padded(part) for part in by_8]),
             "padded, like lengths together": rival([padded(part) for part in alike]),
             "end to end": rival([laid_end_to_end(part) for part in by_8]),
         }, rounds, training_flops(ours.config, rows))
    # packed rows hold more, so fewer of them make a step: ours takes as many steps as they do
    wide = packed(rows)
    size = -(-len(rows) // len(wide))
    race(f"SFT, the same rows in {len(wide)} steps",
         steps([rows[i:i + size] for i in range(0, len(rows), size)],
               lambda part: step_of_ours(ours, mine, part)),
         {"packed into rows of 256": rival(wide)}, rounds, training_flops(ours.config, rows))
    g = torch.Generator().manual_seed(1)
    even = torch.randint(3, vocab_size, (2, 8, 256), generator=g).tolist()
    race("SFT, 8 rows of 256 tokens, two steps",
         steps(even, lambda part: step_of_ours(ours, mine, part)),
         {"padded": rival([padded(part) for part in even])}, rounds,
         training_flops(ours.config, even[0]) * 2)


def race_head(rounds: int) -> None:
    """Train where the logits are the largest tensor."""
    ours, theirs = models(32000)
    mine = parallel.adamw(ours, 0.0)
    adam = torch.optim.AdamW(theirs.parameters(), lr=0.0, fused=True)
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 32000, (16, 256), generator=g).tolist()
    race("a step of 16 rows of 256 tokens, vocabulary 32,000",
         lambda: step_of_ours(ours, mine, rows),
         {"logits of all tokens": lambda: step_of_theirs(theirs, adam, **padded(rows))}, rounds,
         training_flops(ours.config, rows))


# ---------------------------------------------------------------------------------------------
# Generation

def race_generate(rounds: int) -> None:
    """Sample 96 tokens from prompts of 32; then answers that end after 32 on average."""
    from transformers import GenerationConfig, LogitsProcessorList
    ours, theirs = models(4096)
    theirs.eval()
    g = torch.Generator().manual_seed(0)
    for size in (16, 64):
        prompts = torch.randint(3, 4096, (size, 32), generator=g)
        lengths = torch.empty(size).geometric_(1 / 32, generator=g).clamp(1, 96).long()

        def rival(cache: str, is_ragged: bool = False) -> Work:
            settings = GenerationConfig(
                do_sample=True, top_k=0, max_new_tokens=96, cache_implementation=cache,
                eos_token_id=2 if is_ragged else None, pad_token_id=0, disable_compile=True)
            ends = LogitsProcessorList([EndTheirs(lengths, 32)] if is_ragged else [])
            return lambda: theirs.generate(
                prompts, attention_mask=torch.ones_like(prompts), generation_config=settings,
                logits_processor=ends)

        rows = prompts.tolist()
        race(f"generate, {size} x 96 tokens", lambda: generate(ours, rows, 96),
             {"dynamic cache": rival("dynamic"), "static cache": rival("static")}, rounds)
        race(f"generate, {size} ragged answers ({int(lengths.sum())} tokens)",
             lambda: generate(ours, rows, 96, stop=EndOurs(lengths)),
             {"dynamic cache": rival("dynamic", is_ragged=True)}, rounds)


# ---------------------------------------------------------------------------------------------
# A PPO iteration

def race_ppo(rounds: int) -> None:
    """Do what speed/iteration.py describes, in one minibatch and in four."""
    for minibatches in (1, 4):
        for is_ragged, name in ((False, "answers of 48"), (True, "ragged answers, mean 16")):
            race(f"a PPO iteration, {name}, {minibatches} minibatch(es) an epoch",
                 iteration.ours(minibatches, is_ragged),
                 {"TRL": iteration.trl(minibatches, is_ragged)}, rounds)


def race_memory(rounds: int) -> None:
    """Print the memory of an iteration; it is the same in every round."""
    command = Path(__file__).with_name("iteration.py")
    for minibatches in (1, 4):
        print(f"\na PPO iteration, {minibatches} minibatch(es) an epoch")
        for side in iteration.SIDES:
            done = subprocess.run([sys.executable, command, side, f"--minibatches={minibatches}"],
                                  capture_output=True, text=True, check=True)
            print(f"  {side:<5}{done.stdout.splitlines()[-1].split('; ')[1]}", flush=True)


RACES = {"sft": race_sft, "generate": race_generate, "head": race_head, "ppo": race_ppo,
         "memory": race_memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*RACES, "all"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    is_cast = options.dtype == "bfloat16"
    with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
        for name in RACES if options.what == "all" else [options.what]:
            RACES[name](options.rounds)


if __name__ == "__main__":
    main()
