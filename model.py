"""A LLaMA-architecture transformer: forward, log-probabilities, sampling, weights in and out.

Dimensions: B sequences, T padded tokens, N valid tokens of all B rows laid end to end,
D model, H query heads, K kv heads, E head size, V vocabulary, S cache slots.

The grid is what callers see, packing is what runs here. Callers hand over (B, T) tokens and a
mask; the valid tokens are pulled out into one (N, D) stream, so no linear layer ever touches
padding, and only attention sees a grid again: a compact one, every row moved to the left edge.
There column = position, and plain causal attention is right whether the caller padded left,
right or both: padding can only stand after the tokens that might look at it.

Modules carry Hugging Face's names, so a `state_dict()` *is* a Hugging Face checkpoint.
"""
from __future__ import annotations

import itertools
import json
import math
import mmap
import os
import pickle
import re
import shutil
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Rope = tuple[Tensor, Tensor]


# ---------------------------------------------------------------------------------------------
# Architecture

@dataclass(frozen=True)
class ModelConfig:
    """Shape of a LLaMA; impossible shapes raise ValueError."""
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    ffn_dim: int
    max_seq_len: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_embeddings: bool = False
    rope_scaling: float = 1.0  # positions are divided by it (linear scaling, Chen et al. 2023)

    def __post_init__(self) -> None:
        sizes = (self.dim, self.n_layers, self.n_heads, self.n_kv_heads, self.vocab_size, self.ffn_dim, self.max_seq_len)
        if min(sizes) < 1:
            raise ValueError(f"every size of a model must be at least 1: {self}")
        if self.dim % (2 * self.n_heads):
            raise ValueError(f"dim={self.dim} must be a multiple of 2 * n_heads={2 * self.n_heads}: rotary pairs")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}")
        if min(self.rope_theta, self.rope_scaling) <= 0:
            raise ValueError(f"rope_theta={self.rope_theta} and rope_scaling={self.rope_scaling} must be positive")


class Grid(NamedTuple):
    """Where the N packed tokens stand in the compact (B, T) grid."""
    batch: int
    time: int
    slots: Tensor | None  # (N,) int64, row * T + position; None when every slot holds a token
    mask: Tensor | None = None  # (B, 1, T, T) bool, True = that query sees that key; None: causal

    def spread(self, x: Tensor) -> Tensor:  # (N, C) -> (B, T, C)
        if self.slots is not None:
            x = x.new_zeros(self.batch * self.time, x.size(-1)).index_copy(0, self.slots, x)
        return x.view(self.batch, self.time, -1)

    def pack(self, x: Tensor) -> Tensor:  # (B, T, C) -> (N, C)
        x = x.reshape(self.batch * self.time, -1)
        return x if self.slots is None else x.index_select(0, self.slots)


class Cache:
    """Keys and values of one layer, (B, K, S, E) each; slot = position."""
    keys: Tensor
    values: Tensor

    def __init__(self, slots: int) -> None:
        self.slots = slots

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Take the prompts' keys and values, (B, K, T, E)."""
        self.keys, self.values = (F.pad(x, (0, 0, 0, self.slots - x.size(2))) for x in (keys, values))

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Take one token per row, (B, K, 1, E), at its position (B,) int64."""
        rows = torch.arange(len(positions), device=positions.device)
        self.keys[rows, :, positions] = keys[:, :, 0]
        self.values[rows, :, positions] = values[:, :, 0]

    def keep(self, rows: Tensor) -> None:
        """Drop every row but these, (B',) int64."""
        self.keys, self.values = self.keys[rows], self.values[rows]


def rope_table(positions: Tensor, config: ModelConfig) -> Rope:
    """Return cos and sin of the rotary angles, (..., 1, E/2) float32 each, for positions (...) int64.

    Computed from the config at every forward rather than kept as a buffer: a buffer is garbage
    after meta-device construction and is cast to bfloat16 by mixed precision.
    Source: Su et al. 2021, eq. 34, with the halves of E as pairs (Hugging Face's weight layout).
    """
    size = config.dim // config.n_heads
    exponent = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size
    angles = positions[..., None, None].float() / (config.rope_scaling * config.rope_theta ** exponent)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate queries or keys, (B, T, heads, E), by their positions."""
    cos, sin = rope
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped-query heads and rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = config.n_heads, config.n_kv_heads, config.dim // config.n_heads
        self.q_proj = nn.Linear(config.dim, self.heads * self.size, bias=False)
        self.k_proj = nn.Linear(config.dim, self.kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(config.dim, self.kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(self.heads * self.size, config.dim, bias=False)

    def forward(self, x: Tensor, rope: Rope, grid: Grid, cache: Cache | None, positions: Tensor | None) -> Tensor:
        """Mix (N, D) packed states along their rows; with `positions` (B,), one new token per row, against the cache."""
        qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1)  # (N, (H + 2K) E)
        qkv = grid.spread(qkv).unflatten(-1, (-1, self.size))                      # (B, T, H + 2K, E)
        rotated, values = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        queries, keys = rotate(rotated, rope).split((self.heads, self.kv_heads), dim=2)
        queries, keys, values = (t.transpose(1, 2) for t in (queries, keys, values))  # (B, heads, T, E)
        mask = grid.mask
        if positions is not None:  # decoding: one query per row against that row's filled slots
            cache.append(keys, values, positions)
            keys, values = cache.keys, cache.values
            mask = (torch.arange(cache.slots, device=x.device) <= positions[:, None])[:, None, None]  # (B, 1, 1, S)
        elif cache is not None:
            cache.fill(keys, values)
        mixed = F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=mask is None,
                                               enable_gqa=self.kv_heads != self.heads)
        return self.o_proj(grid.pack(mixed.transpose(1, 2).flatten(2)))  # (B, H, T, E) -> (N, D)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, rope: Rope, grid: Grid, cache: Cache | None, positions: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, grid, cache, positions)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embedding, blocks and final norm: everything that language model and scalar model share."""
    recompute = False  # activation checkpointing: the backward pass computes what is inside a block again

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Map (B, T) tokens to the hidden states of the valid ones.

        Returns: (N, D) hidden states in reading order; (N,) int64 flat index of each in (B, T), None for all.
        """
        batch, time = tokens.shape
        valid, slots = None, None
        if attention_mask is not None:
            valid = attention_mask.flatten().nonzero()[:, 0]
            positions = (attention_mask.cumsum(1) - 1).flatten()[valid]
            slots = valid // time * time + positions
        flat = tokens.flatten() if valid is None else tokens.flatten()[valid]
        rope = rope_table(torch.arange(time, device=tokens.device), self.config)
        return self.run(flat, rope, Grid(batch, time, slots)), valid

    def run(self, flat: Tensor, rope: Rope, grid: Grid, caches: Sequence[Cache] | None = None,
            positions: Tensor | None = None) -> Tensor:
        """Map packed tokens (N,) to hidden states (N, D), through the caches when there are any."""
        x = self.embed_tokens(flat)
        for i, layer in enumerate(self.layers):
            arguments = x, rope, grid, caches[i] if caches else None, positions
            x = checkpoint(layer, *arguments, use_reentrant=False) if self.recompute and torch.is_grad_enabled() else layer(*arguments)
        return self.norm(x)


def unpack(x: Tensor, shape: torch.Size, valid: Tensor | None) -> Tensor:
    """Lay packed outputs, (N, C), out on the caller's (B, T) grid, zero where there is no token."""
    valid = torch.arange(shape.numel(), device=x.device) if valid is None else valid
    return x.new_zeros(*shape, x.size(-1)).index_put((valid // shape[1], valid % shape[1]), x)


class Transformer(nn.Module):
    """A LLaMA language model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None, where: Tensor | None = None) -> Tensor:
        """Compute next-token logits.

        tokens: (B, T) int64; what stands in padded slots does not matter.
        attention_mask: (B, T) bool, True = real token, each row's real tokens contiguous; None: all real.
        where: (B, T) bool, a subset of the real tokens: only their logits are computed.
        Returns: (B, T, V) logits, zero in padded slots; with `where` (K, V), its True slots in reading order.
        """
        hidden, valid = self.model(tokens, attention_mask)
        if where is not None:
            wanted = where.flatten() if valid is None else where.flatten()[valid]
            return self.lm_head(hidden[wanted.nonzero()[:, 0]])
        return unpack(self.lm_head(hidden), tokens.shape, valid)


class ScalarModel(nn.Module):
    """A LLaMA that reads one number off every position: reward model and critic."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.score = nn.Linear(config.dim, 1, bias=False)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return (B, T) float32: the scalar after reading token t, zero in padded slots."""
        hidden, valid = self.model(tokens, attention_mask)
        with torch.autocast(tokens.device.type, enabled=False):  # bfloat16 would round scores and values to 8 bits
            scalars = F.linear(hidden.float(), self.score.weight.float())
        return unpack(scalars, tokens.shape, valid)[:, :, 0].clone()  # FSDP wants no view from a forward


def random_weights(model: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Draw every weight of `model` (which may be on the meta device) from `seed`; yield (name, float32 tensor).

    Matrices N(0, 1/fan_in), those that write into the residual stream smaller by sqrt(2 L) (GPT-2), so
    that tiny and large models alike start with unit-sized activations; norms 1; the scalar head
    N(0, 1/(D + 1)) (Stiennon et al. 2020).
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            yield name, torch.ones(parameter.shape)
            continue
        fan_in = parameter.size(1) + ("score" in name)
        depth = 2 * model.config.n_layers if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
        yield name, torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in * depth)


def init_weights(model: nn.Module, seed: int) -> None:
    """Fill a model in place with `random_weights`."""
    model.load_state_dict(dict(random_weights(model, seed)), strict=not model.config.tie_embeddings)


# ---------------------------------------------------------------------------------------------
# The one shift: what a model says at t - 1 speaks of token t

def shift_left(mask: Tensor) -> Tensor:
    """Move a (B, T) mask from tokens to the positions that predict them."""
    if mask[:, 0].any():
        raise ValueError("the first token of a row has no predecessor, so nothing predicts it")
    return mask.roll(-1, dims=1)


def response_distributions(model: nn.Module | Tensor, tokens: Tensor, attention_mask: Tensor | None,
                           response_mask: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the K log-distributions the scored tokens were drawn from, (K, V) float32, and the (B, T) mask of those tokens."""
    if response_mask is None:
        real = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask
        response_mask = real & (real.cumsum(1) > 1)
    where = shift_left(response_mask)
    logits = model[where] if isinstance(model, Tensor) else model(tokens, attention_mask, where)
    return F.log_softmax(logits.float() / temperature, dim=-1), response_mask  # float32 before the softmax, always


def pick(distributions: Tensor, tokens: Tensor, response_mask: Tensor) -> Tensor:
    """Lay each scored token's log-probability back on the grid: (K, V), (B, T), (B, T) -> (B, T) float32."""
    chosen = distributions.gather(1, tokens[response_mask][:, None])[:, 0]
    return chosen.new_zeros(tokens.shape).masked_scatter(response_mask, chosen)


def token_logprobs(model: nn.Module | Tensor, tokens: Tensor, attention_mask: Tensor | None = None,
                   response_mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Score tokens under softmax(logits / temperature).

    model: a Transformer, or its logits (B, T, V).
    tokens: (B, T) int64.   attention_mask: (B, T) bool, True = real token; None: all real.
    response_mask: (B, T) bool, tokens to score; None: every real token but the first of its row.
    Returns: (B, T) float32, log-probability of token t given those before it [nats], 0 where not scored.
    """
    distributions, scored = response_distributions(model, tokens, attention_mask, response_mask, temperature)
    return pick(distributions, tokens, scored)


def token_logprobs_and_entropy(model: nn.Module | Tensor, tokens: Tensor, attention_mask: Tensor | None = None,
                               response_mask: Tensor | None = None, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Do `token_logprobs` and also return (B, T) float32, the entropy each scored token was drawn with [nats]."""
    distributions, scored = response_distributions(model, tokens, attention_mask, response_mask, temperature)
    entropy = -(distributions.exp() * distributions).sum(-1)
    return pick(distributions, tokens, scored), entropy.new_zeros(tokens.shape).masked_scatter(scored, entropy)


def token_values(critic: nn.Module, tokens: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
    """Return (B, T) float32: the critic's value of the state before token t, zero outside the response."""
    shift_left(response_mask)  # the same precondition: token 0 has no state before it
    return critic(tokens, attention_mask).roll(1, dims=1).where(response_mask, 0.0)


def last_scores(reward_model: nn.Module, tokens: Tensor, attention_mask: Tensor) -> Tensor:
    """Return (B,) float32: the scalar at each row's last real token, wherever the padding is."""
    scalars = reward_model(tokens, attention_mask)
    columns = torch.arange(tokens.size(1), device=tokens.device)
    last = columns.where(attention_mask, -1).amax(1, keepdim=True)
    return scalars.gather(1, last)[:, 0]


# ---------------------------------------------------------------------------------------------
# Sampling

class Generation(NamedTuple):
    """New tokens of every prompt, its EOS included, and their log-probabilities under softmax(logits / temperature)."""
    tokens: list[list[int]]
    logprobs: list[list[float]]


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set to -inf all but the top_k largest and all outside the smallest set with mass >= top_p; (B, V) -> (B, V)."""
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.masked_fill((mass_before >= top_p).gather(1, order.argsort(-1)), -torch.inf)
    return logits


def choose(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Pick one token per row by inverting the cumulative distribution at uniforms (B,) in [0, 1).

    logits: (B, V). Returns (B,) int64 tokens and (B,) float32 log-probabilities before top-k and top-p.
    One uniform per (row, position) makes a sample independent of the batch it is drawn in.
    """
    logits = logits.float() / (temperature or 1.0)
    if temperature == 0.0:
        tokens = logits.argmax(-1)
    else:
        cdf = filter_logits(logits, top_k, top_p).softmax(-1).cumsum(-1)
        # scaled by the total, so that rounding in the sum can never select past the last possible token
        tokens = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)[:, 0]
        tokens = tokens.clamp(max=logits.size(-1) - 1)
    return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def row_uniforms(seed: int, rows: Sequence[int], length: int) -> Tensor:
    """Return (B, length) float32 noise in [0, 1), row i a function of (seed, rows[i]) alone."""
    generator = torch.Generator()
    return torch.stack([torch.rand(length, generator=generator.manual_seed((seed * 1_000_003 + row) % 2**63)) for row in rows])


def check_lengths(model: Transformer, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Raise ValueError for an empty prompt, or one that with max_new_tokens exceeds the model's context."""
    lengths = [len(p) for p in prompts]
    if min(lengths) == 0:
        raise ValueError("a prompt is empty: it needs at least the BOS token")
    if max(lengths) + max_new_tokens > model.config.max_seq_len:
        raise ValueError(f"the longest prompt has {max(lengths)} tokens and {max_new_tokens} new ones are asked for, "
                         f"but the model's context is {model.config.max_seq_len}")


@torch.no_grad()
def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int, temperature: float = 1.0, top_k: int = 0,
             top_p: float = 1.0, eos_id: int | None = None, seed: int = 0, rows: Sequence[int] | None = None,
             batch_size: int = 1024, stop: Callable[[list[int]], bool] | None = None) -> Generation:
    """Continue every prompt until its EOS or max_new_tokens.

    temperature: 0.0 is greedy.   eos_id: None never stops.
    rows: global index of each prompt (default 0..B-1): the noise of a row depends on (seed, its index),
        so neither batch nor rank count changes a sample.
    batch_size: prompts generated at once, which bounds the cache's memory.
    stop: called with a row's new tokens after each one; True ends the row as EOS does.
    Finished rows are dropped from the batch once they are 15 % of it, so the tail of long answers is cheap.
    Raises ValueError for an empty prompt, or one that with max_new_tokens exceeds the model's context.
    """
    if not prompts:
        return Generation([], [])
    check_lengths(model, prompts, max_new_tokens)
    rows = range(len(prompts)) if rows is None else rows
    parts = [generate_batch(model, prompts[i:i + batch_size], max_new_tokens, temperature, top_k, top_p, eos_id,
                            row_uniforms(seed, rows[i:i + batch_size], max_new_tokens), stop) for i in range(0, len(prompts), batch_size)]
    return Generation([row for part in parts for row in part.tokens], [row for part in parts for row in part.logprobs])


def generate_batch(model: Transformer, prompts: list[list[int]], max_new_tokens: int, temperature: float, top_k: int,
                   top_p: float, eos_id: int | None, noise: Tensor, stop: Callable[[list[int]], bool] | None) -> Generation:
    """Continue one batch of prompts; noise: (B, max_new_tokens) float32 in [0, 1)."""
    device = model.lm_head.weight.device
    taken = torch.zeros(len(prompts), max_new_tokens, dtype=torch.int64, device=device)
    scored = torch.zeros(len(prompts), max_new_tokens, device=device)
    count = torch.full((len(prompts),), max_new_tokens, device=device)
    steps = generation_steps(model, prompts, max_new_tokens, temperature, top_k, top_p, eos_id, noise, stop)
    for step, (alive, tokens, logprobs, ends) in enumerate(steps):
        taken[alive, step], scored[alive, step] = tokens, logprobs
        count[alive[ends]] = step + 1
    lengths = count.tolist()
    return Generation([row[:n] for row, n in zip(taken.tolist(), lengths)], [row[:n] for row, n in zip(scored.tolist(), lengths)])


def generation_steps(model: Transformer, prompts: list[list[int]], max_new_tokens: int, temperature: float, top_k: int, top_p: float,
                     eos_id: int | None, noise: Tensor, stop: Callable[[list[int]], bool] | None = None
                     ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield, step by step until all have ended, the prompts still in the batch, their new tokens, the tokens' log-probabilities, and which end so; (B',) each.

    A prompt stays in the batch for a while after its end; what is yielded for it then means nothing.
    """
    device, lengths = model.lm_head.weight.device, [len(p) for p in prompts]
    noise = noise.to(device)
    logits, caches = prefill(model, prompts, lengths, max(lengths) + max_new_tokens)
    positions = torch.tensor(lengths, device=device)
    alive = torch.arange(len(prompts), device=device)         # prompts still in the batch
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)  # of the batch, not of all prompts
    taken = torch.zeros(len(prompts), max_new_tokens if stop else 0, dtype=torch.int64, device=device)
    for step in range(max_new_tokens):
        tokens, logprobs = choose(logits, noise[alive, step], temperature, top_k, top_p)
        ends = torch.zeros_like(finished)
        if eos_id is not None:
            ends = tokens == eos_id
        if stop:
            taken[alive, step] = tokens
            ends = ends | torch.tensor([stop(row) for row in taken[alive, :step + 1].tolist()], device=device)
        ends = ends & ~finished
        finished = finished | ends
        yield alive, tokens, logprobs, ends
        if eos_id is not None or stop:
            live = (~finished).nonzero()[:, 0]
            if len(live) == 0:
                return
            if len(live) <= 0.85 * len(finished):
                alive, tokens, positions, finished = alive[live], tokens[live], positions[live], finished[live]
                for cache in caches:
                    cache.keep(live)
        if step + 1 < max_new_tokens:
            rope = rope_table(positions[:, None], model.config)
            hidden = model.model.run(tokens, rope, Grid(len(tokens), 1, None), caches, positions)
            logits, positions = model.lm_head(hidden), positions + 1


@torch.no_grad()
def stream(model: Transformer, prompt: list[int], max_new_tokens: int, temperature: float = 1.0, eos_id: int | None = None, seed: int = 0,
           row: int = 0) -> Iterator[int]:
    """Yield one by one the tokens that `generate` returns for this prompt and row."""
    check_lengths(model, [prompt], max_new_tokens)
    for _, tokens, _, _ in generation_steps(model, [prompt], max_new_tokens, temperature, 0, 1.0, eos_id, row_uniforms(seed, [row], max_new_tokens)):
        yield tokens.item()


def prefill(model: Transformer, prompts: list[list[int]], lengths: list[int], slots: int) -> tuple[Tensor, list[Cache]]:
    """Read the prompts; return the logits after each one's last token, (B, V), and one filled cache per layer."""
    device, time = model.lm_head.weight.device, max(lengths)
    grid_slots = torch.tensor([row * time + t for row, n in enumerate(lengths) for t in range(n)], device=device)
    flat = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    caches = [Cache(slots) for _ in model.model.layers]
    rope = rope_table(torch.arange(time, device=device), model.config)
    hidden = model.model.run(flat, rope, Grid(len(prompts), time, grid_slots), caches)
    return model.lm_head(hidden[torch.tensor(lengths, device=device).cumsum(0) - 1]), caches


# ---------------------------------------------------------------------------------------------
# Weights in: Hugging Face layout (config.json, *.safetensors or pytorch_model*.bin), Meta layout (params.json, consolidated.*.pth)

SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
                      "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
SUPPORTED_TYPES = ("llama", "mistral")
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
UNDERSTOOD = {*SIZES, "model_type", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
              "rope_parameters", "tie_word_embeddings", "hidden_act", "attention_bias", "mlp_bias", "head_dim", "sliding_window",
              "layer_types", "pretraining_tp", "attention_dropout", "quantization_config"}
# Entries of config.json that do not change what the model computes.
INERT = set("""architectures dtype torch_dtype transformers_version use_cache initializer_range max_sequence_length name_or_path tokenizer_class
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id decoder_start_token_id id2label label2id num_labels
    problem_type finetuning_task return_dict output_attentions output_hidden_states torchscript chunk_size_feed_forward unsloth_version
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences
    score_mean score_std holdout_accuracy""".split())
# Meta's name -> ours, and the axis along which model parallelism splits the tensor (None: every file holds the whole)
META = {"tok_embeddings": ("model.embed_tokens", 1), "norm": ("model.norm", None), "output": ("lm_head", 0),
        "attention_norm": ("input_layernorm", None), "ffn_norm": ("post_attention_layernorm", None),
        "attention.wq": ("self_attn.q_proj", 0), "attention.wk": ("self_attn.k_proj", 0), "attention.wv": ("self_attn.v_proj", 0),
        "attention.wo": ("self_attn.o_proj", 1), "feed_forward.w1": ("mlp.gate_proj", 0), "feed_forward.w2": ("mlp.down_proj", 1),
        "feed_forward.w3": ("mlp.up_proj", 0)}
META_PARAMS = {"dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps", "vocab_size", "rope_theta",
               "max_seq_len", "max_batch_size"}


class Source(NamedTuple):
    """A tensor that is not read yet."""
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class Weights(Mapping[str, Tensor]):
    """The tensors in `path` by name.

    Each is mapped into memory when it is asked for and, from safetensors, unmapped with its last reference:
    what nobody touches is not read, and what has been used takes no room.
    """

    def __init__(self, path: Path, sources: dict[str, Source]) -> None:
        self.path, self.sources = path, sources

    def __getitem__(self, name: str) -> Tensor:
        return self.sources[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self.sources

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)


def map_tensor(file: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Map the bytes of one tensor: private pages, because torch wants a writable buffer."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    page = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with open(file, "rb") as handle:
        data = mmap.mmap(handle.fileno(), offset - page + count * dtype.itemsize, access=mmap.ACCESS_COPY, offset=page)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=offset - page).view(shape)


def read_safetensors(file: Path) -> Weights:
    """Read the header of a .safetensors file: an 8-byte little-endian length, a JSON object, then the tensors' bytes.

    Raises ValueError naming the file, and the tensor, unless the tensors fill the file to its end without hole or overlap.
    """
    with open(file, "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        start = 8 + int.from_bytes(handle.read(8), "little")
        try:
            header = json.loads(handle.read(start - 8)) if start <= size else None
        except (ValueError, RecursionError):
            header = None
    if not isinstance(header, dict):
        raise ValueError(f"{file}: not a safetensors file, or cut off in its header")
    header.pop("__metadata__", None)
    sources, spans = {}, []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            possible = all(type(n) is int and n >= 0 for n in (*shape, begin)) and end == begin + math.prod(shape) * dtype.itemsize
        except (KeyError, TypeError, ValueError):
            possible = False
        if not possible:
            raise ValueError(f"{file}: tensor {name} has an impossible size or an unknown type: {str(entry)[:100]}")
        if start + end > size:
            raise ValueError(f"{file}: cut off: it has {size} bytes, and tensor {name} ends at {start + end}")
        sources[name] = Source(file, shape, dtype, partial(map_tensor, file, start + begin, shape, dtype))
        spans.append((begin, end, name))
    filled = 0
    for begin, end, name in sorted(spans):
        if begin != filled:
            raise ValueError(f"{file}: tensor {name} {'overlaps the one before it' if begin < filled else 'comes after a hole'}")
        filled = end
    if start + filled != size:
        raise ValueError(f"{file}: {size - start - filled} bytes after the last tensor belong to none")
    return Weights(file, sources)


def read_pickle(file: Path) -> dict[str, Tensor]:
    """Map the tensors of a file written by torch.save; ValueError naming the file if it is torn or holds anything else.

    Nothing in it is executed: torch's restricted unpickler refuses all but tensors and plain containers.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises a dozen kinds, some for a torn file, some for a hostile one
        if isinstance(error, pickle.UnpicklingError):
            raise ValueError(f"{file}: not a plain dictionary of tensors; what else its pickle holds is never executed") from None
        raise ValueError(f"{file}: cut off, or not a file of torch.save since version 1.6; fetch it again or save it anew") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds {type(content).__name__}, expected a dictionary of tensors")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor) or not isinstance(name, str):
            raise ValueError(f"{file}: entry {name} is {type(tensor).__name__}, expected a tensor")
    return content


def read_bin(file: Path) -> Weights:
    """Map a pytorch_model*.bin file."""
    tensors = read_pickle(file)
    return Weights(file, {name: Source(file, tuple(x.shape), x.dtype, partial(tensors.get, name)) for name, x in tensors.items()})


def read_indexed(index: Path, read: Callable[[Path], Weights]) -> Weights:
    """Read the files that an index names; every tensor has to be where it says."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) and Path(name).name == name for name in places.values()):
        raise ValueError(f"{index}: has no weight_map, from tensors to files beside it")
    files: dict[str, Weights] = {}
    for tensor, name in places.items():
        file = index.with_name(name)
        if not file.is_file():
            raise ValueError(f"{file}: no such file, but {index.name} says it holds tensor {tensor}")
        if name not in files:
            files[name] = read(file)
        if tensor not in files[name]:
            raise ValueError(f"{file}: tensor {tensor} is missing, but {index.name} says it is there")
    return Weights(index, {tensor: files[name].sources[tensor] for tensor, name in places.items()})


def join(parts: Sequence[Tensor], axis: int, heads: int) -> Tensor:
    """Put the parts of a model-parallel tensor together; with `heads`, bring rows that turn as neighbours into halves."""
    whole = torch.cat(list(parts), axis) if len(parts) > 1 else parts[0]
    return whole.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2) if heads else whole


def read_meta(path: Path) -> Weights:
    """Map Meta's consolidated.NN.pth files; every tensor is joined when it is asked for, q and k in Hugging Face's row order."""
    config = read_config(path)
    files = sorted(path.glob("consolidated.*.pth"))
    for i, file in enumerate(files or [None]):
        if file != path / f"consolidated.{i:02d}.pth":
            raise ValueError(f"{path}/consolidated.{i:02d}.pth: no such file")
    shards = [read_pickle(file) for file in files]
    sources = {}
    for name, first in shards[0].items():
        if name == "rope.freqs":  # computed, not learnt
            continue
        place = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.weight", name)
        if not place or place[2] not in META:
            raise ValueError(f"{files[0]}: tensor {name} is none of a LLaMA's")
        ours, axis = META[place[2]]
        for file, shard in zip(files, shards):
            if name not in shard:
                raise ValueError(f"{file}: tensor {name} is missing, but {files[0].name} has it")
            if shard[name].shape != first.shape or first.dim() != (1 if axis is None else 2):
                raise ValueError(f"{file}: tensor {name} has shape {tuple(shard[name].shape)}, which is no part of a model's")
        shape = tuple(n * len(files) if i == axis else n for i, n in enumerate(first.shape))
        heads = {"attention.wq": config.n_heads, "attention.wk": config.n_kv_heads}.get(place[2], 0)
        parts = [shard[name] for shard in shards][:1 if axis is None else None]
        layer = f"model.layers.{place[1]}." if place[1] else ""
        sources[f"{layer}{ours}.weight"] = Source(files[0], shape, first.dtype, partial(join, parts, axis or 0, heads))
    embeddings = sources.get("model.embed_tokens.weight")
    if embeddings and embeddings.shape[1] != config.dim:
        raise ValueError(f"{files[-1]}: tensor tok_embeddings.weight has {embeddings.shape[1]} columns in the {len(files)} files "
                         f"up to this one, params.json says {config.dim}: files are missing, or too many")
    return Weights(path, sources)


def read_weights(path: str | Path) -> Weights:
    """Map the weights of the model in folder `path`, in whichever layout they are; ValueError says what is wrong with them."""
    path = Path(path)
    if is_meta(path):
        return read_meta(path)
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_bin)):
        if (path / name).is_file():
            return read(path / name)
        if (path / f"{name}.index.json").is_file():
            return read_indexed(path / f"{name}.index.json", read)
    raise ValueError(f"{path}: holds no weights: no model.safetensors, no pytorch_model.bin and no index of either")


def read_json(path: Path) -> dict:
    """Read a JSON object; ValueError naming the file when it is missing or is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file")
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, expected an object")
    return content


def is_meta(path: Path) -> bool:
    return not (path / "config.json").is_file() and (path / "params.json").is_file()


def read_config(path: str | Path) -> ModelConfig:
    """Read the shape of the model in folder `path`; whatever this code cannot compute is refused by name."""
    path = Path(path)
    file = path / ("params.json" if is_meta(path) else "config.json")
    if not file.is_file():
        raise ValueError(f"{path}: no model folder: it has no config.json (Hugging Face) and no params.json (Meta)")
    content = read_json(file)
    if is_meta(path) and content.get("vocab_size", -1) == -1:
        content["vocab_size"] = len(read_pickle(path / "consolidated.00.pth").get("tok_embeddings.weight", ()))
    try:
        return meta_config(content) if is_meta(path) else huggingface_config(content)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{file}: {error}") from None


def huggingface_config(c: dict) -> ModelConfig:
    """Translate the content of a config.json."""
    missing = [name for name in SIZES if not isinstance(c.get(name), int)]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}: not the config of a LLaMA")
    heads, context = c["num_attention_heads"], c.get("max_position_embeddings", 2048)
    rope = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    unknown = sorted(name for name, value in c.items() if value and name not in UNDERSTOOD | INERT and not name.startswith("_"))
    window = c.get("sliding_window")
    refused = [
        (c.get("model_type") not in SUPPORTED_TYPES, f"model_type {c.get('model_type')!r} (supported: {', '.join(SUPPORTED_TYPES)})"),
        (c.get("hidden_act", "silu") != "silu", f"hidden_act {c.get('hidden_act')!r}"),
        (c.get("attention_bias"), "attention_bias"), (c.get("mlp_bias"), "mlp_bias"),
        (kind not in ("default", "linear"), f"rope scaling of type {kind!r}"),
        (rope.keys() - {"rope_type", "type", "rope_theta", *(["factor"] if kind == "linear" else [])}, f"rope scaling {rope}"),
        (c.get("head_dim") not in (None, c["hidden_size"] // heads), f"head_dim {c.get('head_dim')} other than hidden_size / heads"),
        (window is not None and window < context,
         f"sliding_window {window} (within it attention is full: lower max_position_embeddings to it to use the model so)"),
        (set(c.get("layer_types") or []) - {"full_attention"}, f"layer_types {c.get('layer_types')}"),
        (c.get("pretraining_tp", 1) not in (None, 1), f"pretraining_tp {c.get('pretraining_tp')} (1 gives the same up to rounding)"),
        (c.get("attention_dropout"), "attention_dropout"), (c.get("quantization_config"), "quantization_config"),
        (unknown, f"the unknown entry {', '.join(unknown)} (remove it if the model is the same without it)"),
    ]
    for present, what in refused:
        if present:
            raise ValueError(f"{what} is not supported")
    return ModelConfig(
        dim=c["hidden_size"], n_layers=c["num_hidden_layers"], n_heads=heads, n_kv_heads=c.get("num_key_value_heads") or heads,
        vocab_size=c["vocab_size"], ffn_dim=c["intermediate_size"], max_seq_len=context, norm_eps=float(c.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta") or c.get("rope_theta") or 10000.0),
        tie_embeddings=bool(c.get("tie_word_embeddings", False)), rope_scaling=float(rope.get("factor", 1.0)))


def meta_config(p: dict) -> ModelConfig:
    """Translate the content of a params.json.

    It does not tell the context. Unless someone wrote a max_seq_len into it: CodeLlama, told by its rope_theta, has 16384;
    LLaMA 1, told by its norm_eps of 1e-6 (65B: by its size without grouped heads), 2048; LLaMA 2 4096.
    """
    missing = sorted({"dim", "n_layers", "n_heads", "multiple_of", "norm_eps"} - p.keys())
    unknown = sorted(p.keys() - META_PARAMS)
    if missing or unknown:
        raise ValueError(f"lacks {', '.join(missing)}" if missing else f"{', '.join(unknown)} is not supported: not the params of a LLaMA 1 or 2")
    theta, kv_heads = p.get("rope_theta") or 10000.0, p.get("n_kv_heads")
    first = p["norm_eps"] < 5e-6 or p["dim"] == 8192 and not kv_heads
    ffn_dim = int((p.get("ffn_dim_multiplier") or 1) * int(2 * 4 * p["dim"] / 3))
    return ModelConfig(
        dim=p["dim"], n_layers=p["n_layers"], n_heads=p["n_heads"], n_kv_heads=kv_heads or p["n_heads"], vocab_size=p["vocab_size"],
        ffn_dim=-(-ffn_dim // p["multiple_of"]) * p["multiple_of"], norm_eps=p["norm_eps"], rope_theta=float(theta),
        max_seq_len=p.get("max_seq_len") or (16384 if theta > 10000 else 2048 if first else 4096))


def check_weights(model: nn.Module, weights: Weights) -> None:
    """Raise ValueError unless `weights` hold exactly the parameters of `model`, in their shapes; nothing is read.

    Left aside are an lm_head that the model has no use for and the rotary frequencies that old checkpoints hold.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name not in weights:
            raise ValueError(f"{weights.path}: tensor {name} is missing")
        file, shape, dtype, _ = weights.sources[name]
        if shape != parameter.shape:
            raise ValueError(f"{file}: tensor {name} has shape {shape}, the model's config says {tuple(parameter.shape)}")
        if not dtype.is_floating_point:
            raise ValueError(f"{file}: tensor {name} holds {dtype}, expected floating point")
    for name, source in weights.sources.items():
        if name not in parameters and name != "lm_head.weight" and not name.endswith(".rotary_emb.inv_freq"):
            raise ValueError(f"{source.file}: tensor {name} is none of this model's")


def materialize(model: nn.Module, device: str | torch.device) -> nn.Module:
    """Give a model on the meta device memory, not yet filled; tied embeddings stay one parameter."""
    model.to_empty(device=device)
    if isinstance(model, Transformer) and model.config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def load_pretrained(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
                    kind: type[nn.Module] = Transformer) -> nn.Module:
    """Load a model folder; `kind` ScalarModel reads a sequence classifier with one label (reward model or critic)."""
    config, weights = read_config(path), read_weights(path)
    with torch.device("meta"):
        model = kind(config).to(dtype)
    check_weights(model, weights)
    materialize(model, device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model


# ---------------------------------------------------------------------------------------------
# Weights out: Hugging Face layout

def write_safetensors(file: Path, tensors: Mapping[str, Tensor], stream: Iterable[Tensor] | None = None) -> None:
    """Write a .safetensors file, wide types first so that every tensor stays aligned.

    stream: in place of the values of `tensors`, which then only tell names, shapes and (alike) dtypes; taken one at a time.
    """
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header, offset = {}, 0
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    for name, tensor in ordered.items():
        size = tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for tensor in ordered.values() if stream is None else stream:
            handle.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def plan_shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> dict[str, dict[str, Tensor]]:
    """Deal tensors out, in order, to files of at most `shard_bytes` (or one tensor) each: file name -> tensors."""
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.dtype.itemsize
        if size > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def config_json(model: nn.Module, bos_id: int, eos_id: int) -> dict:
    """Return the Hugging Face config.json of a model of ours."""
    config = model.config
    scaling = {"type": "linear", "factor": config.rope_scaling} if config.rope_scaling != 1.0 else {}
    common = {
        "model_type": "llama", "hidden_size": config.dim, "intermediate_size": config.ffn_dim, "vocab_size": config.vocab_size,
        "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads, "num_key_value_heads": config.n_kv_heads,
        "max_position_embeddings": config.max_seq_len, "rms_norm_eps": config.norm_eps, "hidden_act": "silu",
        "rope_theta": config.rope_theta, "rope_scaling": scaling or None,  # and for transformers since version 5:
        "rope_parameters": {"rope_type": "linear" if scaling else "default", "rope_theta": config.rope_theta, **scaling},
        "tie_word_embeddings": config.tie_embeddings, "attention_bias": False, "mlp_bias": False,
        "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch."), "bos_token_id": bos_id, "eos_token_id": eos_id}
    common["rope_parameters"].pop("type", None)
    if isinstance(model, Transformer):
        return {"architectures": ["LlamaForCausalLM"], **common}
    # transformers reads the score at the last token that is not pad, so pad must not be EOS: 0 is <unk>, never produced
    return {"architectures": ["LlamaForSequenceClassification"], **common, "pad_token_id": 0,
            "id2label": {"0": "score"}, "label2id": {"score": 0}}


def save_pretrained(model: nn.Module, path: str | Path, tokenizer: Any = None, weights: Iterable[tuple[str, Tensor]] | None = None,
                    extra: Mapping | None = None, shard_bytes: int = 5_000_000_000) -> None:
    """Write a folder that `transformers` and `load_pretrained` load; a new folder appears whole or not at all.

    tokenizer: data.Tokenizer to put beside the weights.   extra: further entries for config.json.
    weights: in place of model.named_parameters(), name for name: a sharded model's, gathered one by one as they are written.
    shard_bytes: with more than this, the weights are cut into several files with an index.
    """
    path = Path(path)
    partial_path = path.with_name(path.name + ".partial")
    shutil.rmtree(partial_path, ignore_errors=True)
    partial_path.mkdir(parents=True)
    bos_id, eos_id = (tokenizer.bos_id, tokenizer.eos_id) if tokenizer else (1, 2)
    texts = {**(tokenizer.huggingface_files() if tokenizer else {}), "config.json": {**config_json(model, bos_id, eos_id), **(extra or {})}}
    if isinstance(model, Transformer):
        texts["generation_config.json"] = {"bos_token_id": bos_id, "eos_token_id": eos_id}
    parameters = dict(model.named_parameters())
    shards, stream = plan_shards(parameters, shard_bytes), iter(parameters.items() if weights is None else weights)
    for name, tensors in shards.items():
        write_safetensors(partial_path / name, tensors, (tensor for _, tensor in itertools.islice(stream, len(tensors))))
    if len(shards) > 1:
        total = sum(p.numel() * p.dtype.itemsize for p in parameters.values())
        places = {tensor: name for name, tensors in shards.items() for tensor in tensors}
        texts["model.safetensors.index.json"] = {"metadata": {"total_size": total}, "weight_map": places}
    for name, content in texts.items():
        (partial_path / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if tokenizer:
        shutil.copyfile(tokenizer.path, partial_path / "tokenizer.model")
    if not path.exists():
        os.rename(partial_path, path)
        return
    for stale in (path / "config.json", *path.glob("model*.safetensors*")):  # without its config.json it is no model folder
        stale.unlink(missing_ok=True)
    for file in sorted(partial_path.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, path / file.name)
    partial_path.rmdir()
