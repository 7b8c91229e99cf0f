"""How a token is drawn, who has a place in the batch, and where all noise comes from.

A token is drawn by inverting the cumulative distribution at a number from [0, 1), and there is one
such number for every (row, position), fixed by the seed. So neither the batch that a prompt is
generated in, nor the number of processes, nor rows that end early change what is drawn.
"""
from __future__ import annotations

import hashlib
import operator
from collections import deque
from typing import Callable, Collection, NamedTuple, Sequence

import numpy
import torch
from torch import Tensor

Ends = int | Sequence[int] | None          # what ends an answer
Stop = Callable[[list[int]], bool] | None  # is an answer over with these tokens?


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


class Places:
    """A batch has a place for some of the prompts; the others wait until an answer is over.

    The noise belongs to the prompt, so what is drawn does not depend on who stands where.
    """

    def __init__(self, prompts: Sequence[list[int]], size: int, most: int) -> None:
        self.prompts = prompts
        self.most = most                                  # tokens of an answer
        self.rows = list(range(len(prompts)))[:size]      # the prompt in each place
        self.counts = [0] * len(self.rows)                # tokens of the answer in each place
        self.active = list(range(len(self.rows)))         # places whose answer goes on
        self.waiting = deque(range(len(self.rows), len(prompts)))
        self.answers: list[list[int]] = [[] for _ in prompts]

    def asked(self, places: Sequence[int]) -> list[list[int]]:
        """Return the prompts that stand in some places."""
        return [self.prompts[self.rows[place]] for place in places]

    def positions(self) -> list[int]:
        """Return where the newest token of each place stands in its row."""
        return [len(self.prompts[row]) + count - 1 for row, count in zip(self.rows, self.counts)]

    def go_on(self, tokens: Sequence[int], ends: Collection[int], stop: Stop) -> None:
        """Take a token for every place, and note whose answer is over with it."""
        for place in self.active:
            self.answers[self.rows[place]].append(tokens[place])
        # a place whose answer is over keeps step with the others, as far as there is room
        self.counts = [min(count + 1, self.most) for count in self.counts]
        self.active = [place for place in self.active
                       if self.counts[place] < self.most and tokens[place] not in ends
                       and not (stop and stop(self.answers[self.rows[place]]))]

    def free(self) -> list[int]:
        """Return the places of answers that are over, once they are so many that it pays.

        Whoever comes costs a prefill, and to do without the places a copy of the cache.
        """
        is_worth_it = len(self.active) <= 0.85 * len(self.rows)
        return sorted(set(range(len(self.rows))) - set(self.active)) if is_worth_it else []

    def admit(self, places: Sequence[int]) -> None:
        """Give places to prompts that wait."""
        for place in places:
            self.rows[place], self.counts[place] = self.waiting.popleft(), 0
        self.active = sorted([*self.active, *places])

    def shrink(self) -> list[int]:
        """Hold none but the active places; return which those were."""
        kept = self.active
        self.rows = [self.rows[place] for place in kept]
        self.counts = [self.counts[place] for place in kept]
        self.active = list(range(len(kept)))
        return kept


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
