"""This code and what a user would run instead, in turn in one process, on one core.

    python speed/versus.py sft          a training step: ragged rows, rows of one length
    python speed/versus.py generate     answers of 96 tokens, and ragged ones
    python speed/versus.py head         a training step with a vocabulary of 32,000
    python speed/versus.py ppo          a PPO iteration, against TRL's trainer
    python speed/versus.py eval         multiple choice, against lm-evaluation-harness
    python speed/versus.py memory       the memory of both, each in a process of its own
    python speed/versus.py all --rounds=5 --dtype=bfloat16

For development: needs `pip install transformers trl==1.12.0 lm_eval`. A number is the other's CPU
time over ours, the median of the rounds with the smallest and largest, above 1 where this code is
faster. The model is random, 6 layers of 288 (8.3 million parameters with a vocabulary of 4,096),
the tokens too. Ragged rows have log-normal lengths, median 60, at most 256. transformers gets them
padded, padded with like lengths together, laid end to end in one row (DataCollatorWithFlattening),
and packed into rows of 256. Ragged answers are 32 tokens long on average, at most 96, the same ones
for all. Memory is allocated as users of either have it (parallel.keep_freed_memory is ours). A
share is of the fastest matrix product measured beside it.
"""
from __future__ import annotations

import argparse
import ctypes
import gc
import io
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Sequence

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import parallel
import sft
from benchmarks.engine import Engine
from benchmarks.questions import Request
from data import pad
from model import ModelConfig, Transformer, generate
from speed import iteration
from speed.iteration import EndOurs, EndTheirs, shape
from weights.initial import init_weights

Work = Callable[[], Any]
Rows = list[list[int]]
Questions = Sequence[Sequence[Request]]           # requests of every question
Scores = Callable[[int, Questions], list[float]]  # (batch size, questions) -> logprobs [nats]
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


def measure(runners: dict[str, Work], rounds: int) -> dict[str, list[float]]:
    """Run all in turn, `rounds` times after a warm-up; return the CPU seconds of each."""
    for work in runners.values():
        work()
    seconds: dict[str, list[float]] = {runner: [] for runner in runners}
    for _ in range(rounds):
        for runner, work in runners.items():
            if runner.startswith("ours"):
                parallel.keep_freed_memory()
            else:
                allocate_as_usual()
            seconds[runner].append(cpu_seconds(work))
    return seconds


def spread(values: Iterable[float]) -> str:
    """Return the median, with the smallest and the largest."""
    ordered = sorted(values)
    return f"{statistics.median(ordered):.2f} x  ({ordered[0]:.2f} to {ordered[-1]:.2f})"


def race(name: str, ours: Work, rivals: dict[str, Work], rounds: int, flops: float = 0) -> None:
    """Run all in turn and print ratios."""
    seconds = measure({"ours": ours, **rivals}, rounds)
    best = statistics.median(seconds["ours"])
    share = f", {100 * flops / best / peak():.0f} % of the peak" if flops else ""
    print(f"\n{name}: ours {best:.2f} s{share}")
    for rival in rivals:
        ratios = spread(b / a for a, b in zip(seconds["ours"], seconds[rival]))
        print(f"  {rival:<30} {ratios}", flush=True)


def peak() -> float:
    """Measure the floating-point operations a second of a large matrix product."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    a = torch.randn(1024, 1024, dtype=dtype)
    rates = [2 * 1024 ** 3 * 10 / cpu_seconds(lambda: [a @ a for _ in range(10)])
             for _ in range(5)]
    return max(rates)


# ---------------------------------------------------------------------------------------------
# Training

def ragged_rows(n: int, vocab_size: int, median: int = 60, sigma: float = 0.8, least: int = 8,
                most: int = 256, seed: int = 0) -> Rows:
    """Draw rows of random tokens with log-normal lengths."""
    g = torch.Generator().manual_seed(seed)
    lengths = (median * torch.randn(n, generator=g).mul(sigma).exp()).clamp(least, most).long()
    return [torch.randint(3, vocab_size, (length,), generator=g).tolist()
            for length in lengths.tolist()]


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
    ours, theirs = models(4096)
    theirs.eval()
    for size in (16, 64):
        prompts = random_prompts(size)
        rows = prompts.tolist()
        race(f"generate, {size} x 96 tokens", lambda: generate(ours, rows, 96),
             {f"{cache} cache": dynamic(theirs, prompts, size, cache=cache)
              for cache in ("dynamic", "static")}, rounds)
    for size, slots in ((16, 16), (64, 64), (256, 64)):
        race_ragged(ours, theirs, random_prompts(size), slots, rounds)
    race_sizes(ours, rounds)


def random_prompts(size: int) -> Tensor:
    """Draw prompts, (size, 32) int64."""
    g = torch.Generator().manual_seed(0)
    return torch.randint(3, 4096, (size, 32), generator=g)


def race_ragged(ours: Transformer, theirs: nn.Module, prompts: Tensor, slots: int,
                rounds: int) -> None:
    """Answer as many prompts at once as there are slots, until all have their answer."""
    rows = prompts.tolist()
    ends = EndOurs(32, 96)
    lengths = ends.foretell(ours, rows)
    with continuous(theirs, rows, lengths.tolist(), slots) as paged:
        race(f"generate, {len(rows)} ragged answers ({int(lengths.sum())} tokens), {slots} at once",
             lambda: generate(ours, rows, 96, batch_size=slots, stop=ends),
             {"dynamic cache": dynamic(theirs, prompts, slots, lengths),
              "continuous batching": paged}, rounds)


def dynamic(model: nn.Module, prompts: Tensor, slots: int, lengths: Tensor | None = None,
            cache: str = "dynamic") -> Work:
    """Return what calls transformers' generate for `slots` prompts at a time."""
    from transformers import GenerationConfig, LogitsProcessorList
    is_ragged = lengths is not None
    settings = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=96, cache_implementation=cache,
        eos_token_id=iteration.EOS if is_ragged else None, pad_token_id=0, disable_compile=True)

    def work() -> None:
        for start in range(0, len(prompts), slots):
            part = slice(start, start + slots)
            ends = [EndTheirs(lengths[part], prompts.size(1))] if is_ragged else []
            model.generate(prompts[part], attention_mask=torch.ones_like(prompts[part]),
                           generation_config=settings, logits_processor=LogitsProcessorList(ends))

    return work


@contextmanager
def continuous(model: nn.Module, prompts: Rows, lengths: list[int], slots: int) -> Iterator[Work]:
    """Yield what hands prompts to transformers' continuous batching, which waits in a thread.

    Its memory is there before, and has room for `slots` answers and all their prompts in a batch.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig
    room = ContinuousBatchingConfig(
        page_size=32, num_blocks=4 * slots, max_batch_tokens=32 * slots, safety_margin=0.0,
        max_requests_per_batch=slots, allow_block_sharing=False, auto_switch_to_flash=False)
    settings = GenerationConfig(do_sample=True, top_k=0, eos_token_id=-1)
    if torch.is_autocast_enabled("cpu"):  # a thread knows nothing of it
        model = deepcopy(model).bfloat16()
    manager = model.init_continuous_batching(settings, room)

    def work() -> None:
        for prompt, length in zip(prompts, lengths):
            manager.add_request(prompt, max_new_tokens=length)
        answers = [manager.get_result(timeout=600) for _ in prompts]
        assert sum(len(answer.generated_tokens) for answer in answers) == sum(lengths)

    manager.start()
    try:
        yield work
    finally:
        manager.stop()


def race_sizes(model: Transformer, rounds: int) -> None:
    """Print tokens a second of ours for few and many prompts, all at once."""
    sizes = (64, 256, 1024)
    seconds = measure({f"ours, {size}": partial(generate, model, random_prompts(size).tolist(), 48)
                       for size in sizes}, rounds)
    print("\ngenerate, any number of prompts x 48 tokens, all at once; ratios to 64 prompts")
    for size in sizes:
        own, fewest = seconds[f"ours, {size}"], seconds[f"ours, {sizes[0]}"]
        rate = size * 48 / statistics.median(own)
        ratios = spread(few * size / (sizes[0] * many) for few, many in zip(fewest, own))
        print(f"  {size:>4} prompts: {rate:.0f} tokens/s {ratios}", flush=True)


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


# ---------------------------------------------------------------------------------------------
# Multiple choice

def race_eval(rounds: int) -> None:
    """Score four choices of each of 200 questions, with lengths as in ARC-e.

    Each side first finds its best size of a batch, on 64 of them.
    """
    ours, theirs = models(4096)
    contexts = ragged_rows(200, 4096, 24, 0.45, 10, 95)
    choices = ragged_rows(800, 4096, 3, 0.8, 1, 16, seed=1)
    questions = [[Request(tuple(context), tuple(choice)) for choice in choices[4 * i:4 * i + 4]]
                 for i, context in enumerate(contexts)]
    score, score_theirs = our_scores(ours), harness_scores(theirs.eval())
    tokens = fastest(score, (256, 512, 1024, 2048), questions[:64])
    requests = fastest(score_theirs, (4, 8, 16, 32), questions[:64])
    pairs = zip(score(tokens, questions), score_theirs(requests, questions), strict=True)
    difference = max(abs(a - b) for a, b in pairs)
    race(f"200 questions with four choices, {tokens} tokens a batch; the largest difference is "
         f"{difference:.0e} nats", lambda: score(tokens, questions),
         {f"harness, {requests} requests a batch": lambda: score_theirs(requests, questions)},
         rounds)


def fastest(score: Scores, sizes: Sequence[int], questions: Questions) -> int:
    """Return the batch size with which questions are scored fastest."""
    score(sizes[0], questions)
    return min(sizes, key=lambda size: cpu_seconds(lambda: score(size, questions)))


def our_scores(model: Transformer) -> Scores:
    machine = parallel.Machine(0, 1, torch.device("cpu"), torch.float32)
    engine = Engine(model, None, machine, batch_tokens=1)  # ids need no tokenizer

    def score(size: int, questions: Questions) -> list[float]:
        with redirect_stderr(io.StringIO()):  # its progress
            found = replace(engine, batch_tokens=size).score(questions, "ours")
        return [one.logprob for question in found for one in question]

    return score


def harness_scores(model: nn.Module) -> Scores:
    """Return what lm-evaluation-harness does with its Hugging Face backend."""
    from lm_eval.models.huggingface import HFLM
    harness = HFLM(model, tokenizer=iteration.tokenizer())

    def score(size: int, questions: Questions) -> list[float]:
        harness.batch_size_per_gpu = size
        flat = [request for question in questions for request in question]
        # the first field stands for the texts, by which the harness knows a request again
        rows = [(("", str(i)), list(request.context), list(request.continuation))
                for i, request in enumerate(flat)]
        found = harness._loglikelihood_tokens(rows, disable_tqdm=True)
        return [logprob for logprob, _is_greedy in found]

    return score


RACES = {"sft": race_sft, "generate": race_generate, "head": race_head, "ppo": race_ppo,
         "eval": race_eval, "memory": race_memory}


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
