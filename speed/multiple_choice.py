"""Speed of multiple choice: this code against lm-evaluation-harness with its Hugging Face backend.

    python speed/multiple_choice.py FILE --tokenizer=FILE [--dim=512] [--layers=8]

FILE is ARC in Hugging Face's fields, as JSON lines. Both programs score the same token ids with the
same random weights in float32, in one process; reading and encoding are not timed. Each first finds
its best batch size on 64 questions. Needs `pip install lm_eval transformers` and a LLaMA
tokenizer.model.
"""
from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.engine import Engine
from benchmarks.questions import Question, Request, encode_question
from benchmarks.reading import read_items
from benchmarks.tasks import TASKS
from data import Tokenizer, open_tokenizer
from model import ModelConfig, Transformer
from weights.initial import init_weights
from parallel import Machine
from weights import load_pretrained, save_pretrained

REQUESTS_PER_BATCH = (4, 8, 16, 32)     # tried for the harness, which counts a batch in requests
TOKENS_PER_BATCH = (512, 1024, 2048, 4096)  # tried for this code
TRIED_ON = 64                           # questions

Requests = Sequence[Sequence[Request]]              # of every question
Program = Callable[[int, Requests], list[float]]    # (batch size, requests) -> logprobs [nats]


class Run(NamedTuple):
    """One pass over requests."""
    seconds: float
    logprobs: list[float]


def timed(program: Program, size: int, requests: Requests) -> Run:
    """Run a program and stop the time."""
    began = time.perf_counter()
    logprobs = program(size, requests)
    return Run(time.perf_counter() - began, logprobs)


def best(program: Program, sizes: Sequence[int], requests: Requests) -> int:
    """Return the batch size with which a program is fastest."""
    seconds = {size: timed(program, size, requests[:TRIED_ON]).seconds for size in sizes}
    print({size: round(x, 2) for size, x in seconds.items()}, flush=True)
    return min(seconds, key=seconds.__getitem__)


def encode(file: Path, tokenizer: Tokenizer) -> Requests:
    """Return the requests of ARC's questions."""
    task = TASKS["arc_easy"]
    parts = read_items(task, (file.name,), file.parent)
    questions = [Question(item) for items in parts.values() for item in items]
    return [encode_question(question, task, tokenizer, 10**6).requests for question in questions]


def our_program(folder: Path, tokenizer: Tokenizer) -> Program:
    """Load a model folder into this code."""
    machine = Machine(0, 1, torch.device("cpu"), torch.float32)
    engine = Engine(load_pretrained(folder), tokenizer, machine, batch_tokens=1)

    def score(batch_tokens: int, requests: Requests) -> list[float]:
        found = replace(engine, batch_tokens=batch_tokens).score(requests, "ours")
        return [one.logprob for question in found for one in question]
    return score


def harness_program(folder: Path) -> Program:
    """Load a model folder into the harness."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, LlamaTokenizer
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    harness = HFLM(model, tokenizer=LlamaTokenizer.from_pretrained(folder))

    def score(batch_size: int, requests: Requests) -> list[float]:
        harness.batch_size_per_gpu = batch_size
        flat = [request for question in requests for request in question]
        # The first field stands for the texts, by which the harness knows a request again.
        rows = [
            (("", str(i)), list(request.context), list(request.continuation))
            for i, request in enumerate(flat)
        ]
        found = harness._loglikelihood_tokens(rows, disable_tqdm=True)
        return [logprob for logprob, _is_greedy in found]
    return score


def make_model(dim: int, layers: int, vocab_size: int) -> Transformer:
    """Draw a model of LLaMA's proportions."""
    heads = dim // 64
    model = Transformer(ModelConfig(
        dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=heads, vocab_size=vocab_size,
        ffn_dim=dim * 11 // 4, max_seq_len=2048))
    init_weights(model, 0)
    return model


def main() -> None:
    """Print seconds of both, their ratio, and the largest difference of a log-likelihood."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    tokenizer = open_tokenizer(options.tokenizer)
    requests = encode(options.file, tokenizer)
    model = make_model(options.dim, options.layers, tokenizer.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, f"{folder}/model", tokenizer)
        harness = harness_program(Path(folder, "model"))
        ours = our_program(Path(folder, "model"), tokenizer)

    batch_size = best(harness, REQUESTS_PER_BATCH, requests)
    batch_tokens = best(ours, TOKENS_PER_BATCH, requests)
    theirs_run = timed(harness, batch_size, requests)
    our_run = timed(ours, batch_tokens, requests)
    pairs = zip(theirs_run.logprobs, our_run.logprobs, strict=True)
    difference = max(abs(theirs - mine) for theirs, mine in pairs)

    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{len(requests)} questions, {millions:.0f} million parameters, "
          f"{torch.get_num_threads()} threads")
    print(f"harness: {theirs_run.seconds:.1f} s ({batch_size} requests a batch)   "
          f"here: {our_run.seconds:.1f} s ({batch_tokens} tokens a batch)   "
          f"ratio {theirs_run.seconds / our_run.seconds:.2f}   "
          f"largest difference {difference:.1e} nats")


if __name__ == "__main__":
    main()
