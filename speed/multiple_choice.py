"""Speed of multiple choice: this code against lm-evaluation-harness with its Hugging Face backend, in one process.

    python speed/multiple_choice.py FILE [--dim=512] [--layers=8]

FILE is ARC in Hugging Face's fields, as JSON lines; its folder's parent is the data folder. Both programs score the same
token ids with the same random weights in float32; reading and encoding are not timed. Each first finds its best batch size
on 64 questions. Needs `pip install lm_eval transformers` and a LLaMA tokenizer.model (--tokenizer).
"""
from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Sequence

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import Tokenizer
from model import ModelConfig, Transformer
from weights.initial import init_weights
from parallel import Machine
from benchmarks import questions
from benchmarks.engine import Engine
from benchmarks.tasks import TASKS
from weights import load_pretrained, save_pretrained

SIZES = (4, 8, 16, 32)                   # requests per batch of the harness
BATCH_TOKENS = (512, 1024, 2048, 4096)


def best(settings: Sequence[int], run: Callable[[int], Any]) -> int:
    """Return the setting with which `run` is fastest."""
    seconds = {setting: timed(lambda: run(setting))[0] for setting in settings}
    print({setting: round(x, 2) for setting, x in seconds.items()}, flush=True)
    return min(seconds, key=seconds.__getitem__)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result


def main() -> None:
    """Print seconds of both programs, their ratio, and the largest difference between their log-likelihoods."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, LlamaTokenizer
    tokenizer = Tokenizer(options.tokenizer)
    parts = questions.read_items(TASKS["arc_easy"], (options.file.name,), options.file.parent)
    asked = [questions.Question(item) for items in parts.values() for item in items]
    requests = [questions.encode_question(question, TASKS["arc_easy"], tokenizer, 10**6).requests for question in asked]
    with tempfile.TemporaryDirectory() as folder:
        model = Transformer(ModelConfig(options.dim, options.layers, options.dim // 64, options.dim // 64, tokenizer.vocab_size,
                                        options.dim * 11 // 4, 2048))
        init_weights(model, 0)
        save_pretrained(model, f"{folder}/model", tokenizer)
        engine = Engine(load_pretrained(f"{folder}/model"), tokenizer, Machine(0, 1, torch.device("cpu"), torch.float32), 0)
        theirs = HFLM(AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32), tokenizer=LlamaTokenizer.from_pretrained(f"{folder}/model"))

    def harness(size: int, wanted: Sequence[Sequence[questions.Request]] = requests[:64]) -> list[float]:
        theirs.batch_size_per_gpu = size
        flat = [(("", str(i)), list(r.context), list(r.continuation)) for i, r in enumerate(r for group in wanted for r in group)]
        return [logprob for logprob, _ in theirs._loglikelihood_tokens(flat, disable_tqdm=True)]

    def ours(batch_tokens: int, wanted: Sequence[Sequence[questions.Request]] = requests[:64]) -> list[float]:
        asked = Engine(engine.model, tokenizer, engine.machine, batch_tokens)
        return [logprob for group in asked.score(wanted, "ours") for logprob, _ in group]
    size, batch_tokens = best(SIZES, harness), best(BATCH_TOKENS, ours)
    harness_seconds, a = timed(lambda: harness(size, requests))
    our_seconds, b = timed(lambda: ours(batch_tokens, requests))
    print(f"{len(requests)} questions, {sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters, {torch.get_num_threads()} threads")
    print(f"harness: {harness_seconds:.1f} s ({size} requests a batch)   here: {our_seconds:.1f} s ({batch_tokens} tokens a batch)   "
          f"ratio {harness_seconds / our_seconds:.2f}   largest difference {max(abs(x - y) for x, y in zip(a, b)):.1e} nats")


if __name__ == "__main__":
    main()
