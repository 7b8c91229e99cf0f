"""How a token is drawn, and where all noise comes from.

A token is drawn by inverting the cumulative distribution at a number from [0, 1), and there is one
such number for every (row, position), fixed by the seed. So neither the batch that a prompt is
generated in, nor the number of processes, nor rows that end early change what is drawn.
"""
from __future__ import annotations

import hashlib
import operator
from typing import NamedTuple, Sequence

import numpy
import torch
from torch import Tensor


def derive(seed: int, *what: str | int) -> int:
    """Return the seed, in [0, 2**63), of one stream of noise: of what, under the run's seed."""
    # A hash, because arithmetic collides: by seed * 1000 + row, row 1000 of seed 0 would get the
    # noise of row 0 of seed 1. Of plain numbers, so that numpy's 3 is 3, and 3.0 a TypeError.
    key = [part if isinstance(part, str) else operator.index(part) for part in (seed, *what)]
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def row_uniforms(seed: int, rows: Sequence[int], length: int) -> Tensor:
    """Return (B, length) float32 noise in [0, 1), row i a function of (seed, rows[i]) alone."""
    # Philox takes all 63 bits as its key. torch's generator on the CPU looks at 32 bits of a seed,
    # so among 100,000 rows two would probably get the same noise.
    streams = [numpy.random.Philox(key=derive(seed, row)) for row in rows]
    noise = [numpy.random.Generator(stream).random(length, numpy.float32) for stream in streams]
    return torch.from_numpy(numpy.stack(noise))


def check_lengths(prompts: list[list[int]], max_new_tokens: int, context: int) -> None:
    """Raise ValueError for an empty prompt, or one that outgrows the context [tokens]."""
    # told before the first token: running out of context half way would waste the work
    longest = max(len(prompt) for prompt in prompts)
    if not all(prompts):
        raise ValueError("a prompt is empty: it needs at least the BOS token")
    if longest + max_new_tokens > context:
        raise ValueError(f"the longest prompt has {longest} tokens and {max_new_tokens} new ones "
                         f"are asked for, but the context is {context}")


class Generation(NamedTuple):
    """New tokens of every prompt, its EOS included, and their log-probabilities.

    These are under softmax(logits / temperature), whatever top-k and top-p left out.
    """
    tokens: list[list[int]]
    logprobs: list[list[float]]


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set to -inf all but the top_k largest, then all outside the smallest set with mass >= top_p.

    logits: (B, V), as the result.   top_k: 0 keeps all; what ties with the last one stays.
    """
    # in this order, as everywhere: top_p is a share of what top_k has left
    if 0 < top_k < logits.size(-1):
        smallest = logits.topk(top_k).values[:, -1:]  # (B, k) -> (B, 1)
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        # a token stays while those before it do not reach top_p: so the first one always does
        outside = probabilities.cumsum(-1) - probabilities >= top_p
        # argsort inverts the order: from sorted columns back to those of the vocabulary
        logits = logits.masked_fill(outside.gather(1, order.argsort(-1)), -torch.inf)
    return logits


def choose(logits: Tensor, uniforms: Tensor, temperature: float | Tensor, top_k: int,
           top_p: float) -> tuple[Tensor, Tensor]:
    """Pick one token per row by inverting the cumulative distribution at uniforms (B,) in [0, 1).

    logits: (B, V).   temperature: of all rows, or (B,); 0: the likeliest token.
    Returns: (B,) int64; (B,) float32 log-probabilities before top-k and top-p.
    """
    # in float32, and at the temperature at which PPO scores the same tokens later
    temperature = torch.as_tensor(temperature, device=logits.device).expand(len(logits))[:, None]
    is_greedy = temperature == 0                                         # (B, 1)
    logits = logits.float() / temperature.masked_fill(is_greedy, 1.0)
    logprobs = logits.log_softmax(-1)
    # the cumulative distribution takes the one softmax there is, unless a filter changes it
    is_filtered = top_k > 0 or top_p < 1.0
    kept = filter_logits(logits, top_k, top_p).log_softmax(-1) if is_filtered else logprobs
    cdf = kept.exp().cumsum(-1)
    # the smallest token whose cumulated probability exceeds the uniform; scaled by the total,
    # else rounding in the sum could select past the last possible token
    thresholds = uniforms[:, None] * cdf[:, -1:]                         # (B, 1)
    drawn = torch.searchsorted(cdf, thresholds, right=True).clamp(max=logits.size(-1) - 1)
    tokens = torch.where(is_greedy, logits.argmax(-1, keepdim=True), drawn)
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]                # (B, V) -> (B, 1) -> (B,)
