"""This code on one GPU of 80 to 140 GB, in less than 9 minutes: what it reaches of what there is.

    python speed/gpu.py                 a LLaMA of 1.1 billion parameters (TinyLlama's shape)
    python speed/gpu.py --toy           all of it in small, on a CPU too: does it run?

    sft      optimizer steps in bfloat16 on float32 weights: tokens a second, the share of the GPU's
             operations that the model needs (MFU), memory beside the plan's
    decode   tokens a second of 1, 16 and 128 prompts, and the share of the time that remains if a
             step only reads the weights and the cache, at the speed of a copy
    ppo      an iteration of four such models, its halves and their memory beside the plan's

Where transformers is installed, its step and its `generate` are timed on the same shape. Every
result is a line, printed at once; what fails, by want of memory or else, is a line too.
"""
from __future__ import annotations

import argparse
import gc
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn

import parallel
import ppo
import sft
import train
from model import ModelConfig, ScalarModel, Transformer, generate
from run import planner
from run.settings import Config, unflatten
from speed import iteration

LIMIT = 480.0  # after so many seconds nothing new begins
# dense bfloat16 operations a second by the data sheets, by a part of the name; the first that fits
NOMINAL = {"A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12}


class Sizes(NamedTuple):
    """How large everything is."""
    shape: ModelConfig
    prompt: int = 256                         # tokens
    response: int = 1792                      # tokens of an SFT row
    rows: int = 4                             # of an SFT micro-batch, of which a step has two
    steps: int = 8                            # timed
    answer: int = 256                         # tokens that are generated
    batches: tuple[int, ...] = (1, 16, 128)   # prompts that are answered at once
    episodes: int = 64                        # of a PPO iteration
    product: int = 8192                       # rows of the matrices whose product is the peak
    copied: int = 2 ** 30                     # bytes


FULL = Sizes(ModelConfig(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, vocab_size=32_000,
                         ffn_dim=5632, max_seq_len=2048))
TOY = Sizes(ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64, ffn_dim=64,
                        max_seq_len=64), prompt=6, response=10, rows=2, steps=1, answer=3,
            batches=(1, 3), episodes=4, product=64, copied=2 ** 16)


class Bench:
    """A device, how large the work on it is, and what it was found to be able to do."""

    def __init__(self, sizes: Sizes) -> None:
        self.began = time.monotonic()
        self.sizes = sizes
        self.is_cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if self.is_cuda else torch.device("cpu")
        self.machine = parallel.Machine(0, 1, self.device, torch.bfloat16)
        self.operations = 0.0   # a second, of a matrix product
        self.bandwidth = 0.0    # bytes a second, read and written by a copy

    def seconds(self, work: Callable[[], Any]) -> float:
        """Time work to its end on the device."""
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def forget_peak(self) -> None:
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak(self, planned: planner.Parts) -> str:
        """Return the most memory since `forget_peak`, and the plan's [GiB]."""
        plan = sum(planned) / planner.GIB
        if not self.is_cuda:
            return f"plan {plan:.2f} GiB, on a CPU not measured"
        peak = torch.cuda.max_memory_allocated() / planner.GIB
        return f"{peak:.2f} GiB at the peak, plan {plan:.2f} ({100 * (peak / plan - 1):+.0f} %)"

    def say(self, name: str, result: str) -> None:
        print(f"{name:<40}{result}", flush=True)

    def attempt(self, name: str, work: Callable[[Bench], None]) -> None:
        """Do one part of the work, or say in a line why not; then let its memory go."""
        if time.monotonic() - self.began > LIMIT:
            self.say(name, "not begun: no time is left")
            return
        try:
            work(self)
        except ImportError as error:
            self.say(name, f"left out: {error.name} is not installed")
        except Exception as error:  # out of memory, mostly; the other parts can still be measured
            self.say(name, f"failed: {type(error).__name__}: {str(error).splitlines()[0]}")
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def made(self, kind: type[nn.Module], frozen: bool = False) -> nn.Module:
        """Draw a model on the device."""
        with self.device:
            model = kind(self.sizes.shape).requires_grad_(not frozen)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        if frozen:
            parallel.cast_frozen(model, self.machine)
        return model

    def drawn(self, rows: int, width: int) -> Tensor:
        """Draw tokens, (rows, width) int64."""
        return torch.randint(3, self.sizes.shape.vocab_size, (rows, width), device=self.device)

    def plan(self, stage: str, prompt: int, response: int, **flags: Any) -> planner.Parts:
        """Return what train.py --plan says of a stage in one process."""
        config: Config = unflatten({
            "ranks": 1, "dtype": "bfloat16", "data.max_prompt_tokens": prompt,
            "data.max_response_tokens": response, **flags})
        return planner.plan_stage(stage, config, self.sizes.shape, self.sizes.shape)


# ---------------------------------------------------------------------------------------------
# What there is

def measure_limits(bench: Bench) -> None:
    """Measure a large matrix product and a large copy, the fastest of ten."""
    n, size = bench.sizes.product, bench.sizes.copied
    a = torch.randn(n, n, device=bench.device, dtype=torch.bfloat16)
    b = torch.randn(n, n, device=bench.device, dtype=torch.bfloat16)
    fastest = min(bench.seconds(lambda: a @ b) for _ in range(10))
    bench.operations = 2 * n ** 3 / fastest
    source = torch.zeros(size, dtype=torch.uint8, device=bench.device)
    target = torch.zeros_like(source)
    fastest = min(bench.seconds(lambda: target.copy_(source)) for _ in range(10))
    bench.bandwidth = 2 * size / fastest
    bench.say("matrix product in bfloat16", f"{bench.operations / 1e12:.1f} TFLOP/s")
    bench.say("copy, read and written", f"{bench.bandwidth / 1e9:.0f} GB/s")


def nominal() -> float | None:
    """Return the data sheet's operations a second of this GPU."""
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    return next((rate for part, rate in NOMINAL.items() if part in name), None)


def matrix_parameters(shape: ModelConfig) -> int:
    """Count the weights that a token is multiplied with: all but embeddings and norms."""
    width = shape.head_size * (2 * shape.n_heads + 2 * shape.n_kv_heads)
    return (shape.n_layers * shape.dim * (width + 3 * shape.ffn_dim)
            + shape.vocab_size * shape.dim)


# ---------------------------------------------------------------------------------------------
# SFT

def measure_sft(bench: Bench) -> None:
    """Train on full rows, two micro-batches a step."""
    sizes, machine = bench.sizes, bench.machine
    width = sizes.prompt + sizes.response
    model = bench.made(Transformer)
    optimizer = parallel.adamw(model, 0.0)
    tokens = bench.drawn(sizes.rows, width)
    real = torch.ones_like(tokens, dtype=torch.bool)
    batch = sft.Batch(tokens, real, real & (torch.arange(width, device=bench.device)
                                            >= sizes.prompt))

    def step() -> None:
        train.update(model, optimizer, [train.Term(sft.loss, [batch, batch])], 0.0, 1.0, machine)

    planned = bench.plan("sft", sizes.prompt, sizes.response, **{"sft.microbatch_size": sizes.rows})
    bench.say("SFT", f"{tell_steps(bench, step)}; {bench.peak(planned)}")


def measure_transformers_sft(bench: Bench) -> None:
    """Train transformers' model on the same rows, as versus.py does."""
    sizes = bench.sizes
    model = theirs(bench)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    tokens = bench.drawn(sizes.rows, sizes.prompt + sizes.response)
    labels = tokens.clone()
    labels[:, :sizes.prompt] = -100  # these have no loss

    def step() -> None:
        for _ in range(2):
            with bench.machine.autocast():
                loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
            (loss / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    peak = ""
    told = tell_steps(bench, step)
    if bench.is_cuda:
        peak = f"; {torch.cuda.max_memory_allocated() / planner.GIB:.2f} GiB at the peak"
    bench.say("SFT, transformers", told + peak)


def tell_steps(bench: Bench, step: Callable[[], None]) -> str:
    """Time optimizer steps on two micro-batches; return tokens a second and MFU."""
    sizes = bench.sizes
    rows, width = 2 * sizes.rows, sizes.prompt + sizes.response
    for _ in range(2):  # Adam's moments are there from the second on
        step()
    bench.forget_peak()
    took = bench.seconds(lambda: [step() for _ in range(sizes.steps)]) / sizes.steps
    # forward and backward: 6 per weight and token; attention 12 per pair, layer and channel
    attention = sizes.shape.n_layers * sizes.shape.n_heads * sizes.shape.head_size * width / 2
    operations = rows * width * (6 * matrix_parameters(sizes.shape) + 12 * attention) / took
    told = (f"{rows * width / took:.0f} tokens/s, "
            f"{100 * operations / bench.operations:.0f} % of the matrix product's")
    if nominal():
        told += f", MFU {100 * operations / nominal():.0f} % of {nominal() / 1e12:.0f} TFLOP/s"
    return told


def theirs(bench: Bench) -> nn.Module:
    """Return transformers' model of the same shape, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM
    shape = bench.sizes.shape
    with bench.device:
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=shape.vocab_size, hidden_size=shape.dim,
            num_hidden_layers=shape.n_layers, num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_kv_heads, intermediate_size=shape.ffn_dim,
            max_position_embeddings=shape.max_seq_len, bos_token_id=None, eos_token_id=None))


# ---------------------------------------------------------------------------------------------
# Decoding

def measure_decode(bench: Bench, is_trained: bool) -> None:
    """Answer prompts with float32 weights, as PPO does, or with bfloat16 ones, as `eval.py`."""
    model = bench.made(Transformer)
    name = "decode, float32 weights, cast"
    if not is_trained:
        model = model.bfloat16().requires_grad_(False)
        name = "decode, bfloat16 weights"
    for size in bench.sizes.batches:
        bench.attempt(f"{name}, batch {size}", partial(decode, model=model, size=size, name=name))


def decode(bench: Bench, model: Transformer, size: int, name: str) -> None:
    prompts = bench.drawn(size, bench.sizes.prompt).tolist()

    def write(count: int) -> None:
        with bench.machine.autocast():
            generate(model, prompts, count)

    tell_decode(bench, write, size, name)


def measure_transformers_decode(bench: Bench) -> None:
    """Answer with transformers' generate, dynamic cache, bfloat16 weights."""
    model = theirs(bench).bfloat16().eval()
    for size in bench.sizes.batches:
        tokens = bench.drawn(size, bench.sizes.prompt)

        def write(count: int, tokens: Tensor = tokens) -> None:
            model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=True, top_k=0,
                           max_new_tokens=count, pad_token_id=0)

        tell_decode(bench, write, size, "decode, transformers")


def tell_decode(bench: Bench, write: Callable[[int], None], size: int, name: str) -> None:
    """Time the steps after the first token, and compare with reading weights and cache."""
    shape, count = bench.sizes.shape, bench.sizes.answer
    write(count)
    prefill = min(bench.seconds(lambda: write(1)) for _ in range(2))
    took = max(bench.seconds(lambda: write(count)) - prefill, 1e-9) / (count - 1)
    held = bench.sizes.prompt + count / 2  # tokens of a row in the cache, on average
    cache = size * held * 2 * shape.n_layers * shape.n_kv_heads * shape.head_size
    least = 2 * (matrix_parameters(shape) + cache) / bench.bandwidth  # bfloat16: two bytes
    bench.say(f"{name}, batch {size}", f"{size / took:.0f} tokens/s, {1000 * took:.2f} ms a step, "
              f"{100 * least / took:.0f} % of the bandwidth's")


# ---------------------------------------------------------------------------------------------
# PPO

def measure_ppo(bench: Bench) -> None:
    """Run two iterations; print the second one's halves."""
    sizes = bench.sizes
    settings = {"batch_size": sizes.episodes, "minibatch_size": sizes.episodes // 2,
                "microbatch_size": sizes.episodes // 4, "epochs": iteration.EPOCHS}
    models = ppo.Models(bench.made(Transformer), bench.made(Transformer, frozen=True),
                        bench.made(ScalarModel))
    both = iteration.halves(models, bench.made(ScalarModel, frozen=True),
                            bench.drawn(sizes.episodes, sizes.prompt).tolist(), sizes.answer,
                            ppo.PPOConfig(**settings), bench.machine)
    both.learn(both.roll_out())
    flags = {f"ppo.{name}": value for name, value in settings.items()}
    found: list[ppo.Rollout] = []
    total = 0.0
    for stage, work in (("ppo rollout", lambda: found.append(both.roll_out())),
                        ("ppo update", lambda: both.learn(found[0]))):
        bench.forget_peak()
        took = bench.seconds(work)
        total += took
        planned = bench.plan(stage, sizes.prompt, sizes.answer, **flags)
        bench.say(stage.replace("ppo", "PPO"), f"{took:.2f} s; {bench.peak(planned)}")
    tokens = sizes.episodes * (sizes.prompt + sizes.answer)
    bench.say("PPO iteration", f"{total:.2f} s, {tokens / total:.0f} tokens/s")


PARTS: dict[str, Callable[[Bench], None]] = {
    "limits": measure_limits,
    "SFT": measure_sft,
    "SFT, transformers": measure_transformers_sft,
    "decode, float32 weights": partial(measure_decode, is_trained=True),
    "decode, bfloat16 weights": partial(measure_decode, is_trained=False),
    "decode, transformers": measure_transformers_decode,
    "PPO": measure_ppo,
}


def main(args: list[str]) -> None:
    """Do all parts, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args(args)
    if not options.toy and not torch.cuda.is_available():
        parser.error("there is no GPU here; --toy runs all of it in small")
    bench = Bench(TOY if options.toy else FULL)
    where = torch.cuda.get_device_name(0) if bench.is_cuda else "CPU"
    bench.say("device", f"{where}, torch {torch.__version__}")
    for name, work in PARTS.items():
        bench.attempt(name, work)
    bench.say("all", f"{time.monotonic() - bench.began:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
