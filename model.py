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

import math
from dataclasses import dataclass
from typing import Callable, Iterator, NamedTuple, Sequence

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
