"""A LLaMA: its logits, the scalars of a reward model or critic, and the decoding loop.

Dimensions: B sequences, T padded tokens, N real tokens of all B rows laid end to end, M of them
scored, D model, H query heads, K kv heads, E head size, V vocabulary, S slots of a cache, R rows
that are still being generated, C anything. Modules carry Hugging Face's names, so a `state_dict()`
*is* a Hugging Face checkpoint.
"""
from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import groupby
from math import inf
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# positions; what a model says of tokens; how a token is drawn, and noise: all of it under this
# module's name too, model.token_logprobs, model.derive ...
from logprobs import (Mask, all_real, finite, last_scores, lay_out, token_logprobs,
                      token_logprobs_and_entropy, token_values)
from rotary import Rope, rope_table, rotate
from sampling import (Ends, Generation, Places, Stop, check_lengths, choose, derive, filter_logits,
                      row_uniforms)

Read = Callable[[Tensor, Tensor], Any]  # (states (M, D), head (V, D)) -> what is asked of them


# ---------------------------------------------------------------------------------------------
# Architecture
#
# The grid is what callers see, packing is what runs. The real tokens are pulled out of the
# caller's (B, T) grid into one stream of N, row after row, short rows first. So no layer touches
# padding, wherever the caller put it, and rows of one length stand together: they are a grid
# without holes, over which attention is plain causal attention.
#
#     caller's grid    stream       b c | d e | a f g        two groups: 2 rows of 2, 1 row of 3
#         a f g .      places       5 6   8 9   0 1 2        row * T + column in the caller's grid
#         . b c .      positions    0 1   0 1   0 1 2        how many tokens of the row come before
#         d e . .

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
    rope_llama3: tuple[float, float, int] | None = None  # low, high, context: see rope_table
    head_dim: int | None = None  # E; None: D / H
    qkv_bias: bool = False       # as Qwen 2 has them
    out_bias: bool = False       # attention's output projection has one, too

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.type in ("int", "float")):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < inf:  # true is no number
                raise ValueError(f"{name}={value!r} must be a finite number above 0")
        # rotary angles turn pairs within a head
        if self.head_size % 2 or self.dim % self.n_heads and not self.head_dim:
            raise ValueError(f"dim={self.dim} must be a multiple of 2 * n_heads={2 * self.n_heads}")
        if self.n_heads % self.n_kv_heads:  # each kv head serves equally many query heads
            raise ValueError(f"n_heads={self.n_heads} must be a multiple of "
                             f"n_kv_heads={self.n_kv_heads}")

    @property
    def head_size(self) -> int:
        return self.head_dim or self.dim // self.n_heads


class Group(NamedTuple):
    """Rows of equal length, which stand together in the stream."""
    rows: int
    length: int
    mask: Tensor | None = None  # (rows, 1, length, length) bool, query sees key; None: causal


class Layout(NamedTuple):
    """Where the N tokens of a stream stand."""
    positions: Tensor                # (N,) int64, in their rows
    groups: Sequence[Group] = ()     # the rows they make up; (): each is the newest of its row
    rows: Tensor | None = None       # (N,) int64, rows of the cache; None: there is none
    empty: Tensor | None = None      # (N, S) bool, slots a new token does not see; None: sees all
    slots: int = 0                   # S, slots in use


def lay_out_rows(tokens: Tensor, attention_mask: Mask) -> tuple[Layout, Tensor]:
    """Return the layout of a grid's real tokens, and their places in the grid, (N,) int64."""
    batch, time = tokens.shape
    columns = torch.arange(time, device=tokens.device)
    if attention_mask is None:
        places = torch.arange(batch * time, device=tokens.device)
        return Layout(columns.repeat(batch), [Group(batch, time)]), places
    lengths, order = attention_mask.sum(1).sort(stable=True)  # (B,) each: short rows first
    real = attention_mask[order]                              # (B, T), rows in the new order
    places = (order[:, None] * time + columns)[real]
    # a token's position is how many real tokens of its row stand before it
    positions = (real.cumsum(1) - 1)[real]
    sizes = torch.stack(torch.unique_consecutive(lengths, return_counts=True), dim=1)
    groups = [Group(rows, length) for length, rows in sizes.tolist() if length]
    return Layout(positions, groups), places


class Cache:
    """Keys and values of one layer, (B, K, slots, E) each; slot = position."""
    keys: Tensor
    values: Tensor

    def __init__(self, rows: int, slots: int) -> None:
        self.rows = rows
        self.slots = slots

    def write(self, keys: Tensor, values: Tensor, layout: Layout) -> None:
        """Take the keys and values of N tokens, (N, K, E)."""
        if not hasattr(self, "keys"):
            shape = self.rows, keys.size(1), self.slots, keys.size(2)
            self.keys = values.new_zeros(shape)
            self.values = values.new_zeros(shape)
        # rows and positions go in pairs: in row rows[n] it is slot positions[n] that is written
        self.keys[layout.rows, :, layout.positions] = keys.to(values.dtype)
        self.values[layout.rows, :, layout.positions] = values

    def keep(self, rows: list[int]) -> None:
        """Hold these rows of the batch and no others."""
        self.keys = self.keys[rows]
        self.values = self.values[rows]

    def copy(self, sources: list[int], targets: list[int], slots: int) -> None:
        """Put into some rows what others hold in their first slots."""
        self.keys[targets, :, :slots] = self.keys[sources, :, :slots]
        self.values[targets, :, :slots] = self.values[sources, :, :slots]


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        # back to the type of x before the weight, as LLaMA does it
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped-query heads and rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.n_heads
        self.kv_heads = config.n_kv_heads
        self.size = config.head_size
        width, kv_width = self.heads * self.size, self.kv_heads * self.size
        self.q_proj = nn.Linear(config.dim, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.dim, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.dim, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, config.dim, bias=config.out_bias)

    def forward(self, x: Tensor, rope: Rope, layout: Layout, cache: Cache | None) -> Tensor:
        """Mix states, (N, D), along their rows; new tokens find the older ones in the cache."""
        turning = torch.cat((self.q_proj(x), self.k_proj(x)), dim=-1)   # (N, (H + K) E)
        turned = rotate(turning.unflatten(-1, (-1, self.size)), rope)   # (N, H + K, E)
        queries, keys = turned.split((self.heads, self.kv_heads), dim=1)
        values = self.v_proj(x).unflatten(-1, (-1, self.size))          # (N, K, E)
        if cache:
            cache.write(keys, values, layout)
        if layout.groups:
            mixed = attend(queries, keys, values, layout.groups)
        else:
            mixed = attend_to_cache(queries, cache, layout)
        return self.o_proj(mixed.flatten(1))  # (N, H, E) -> (N, H E) -> (N, D)


def attend(queries: Tensor, keys: Tensor, values: Tensor, groups: Sequence[Group]) -> Tensor:
    """Let every token look at its row up to itself: (N, H, E), (N, K, E) twice -> (N, H, E)."""
    # a CPU is half as fast at the backward of attention in bfloat16 as in float32
    dtype = torch.float32 if values.device.type == "cpu" else values.dtype
    sizes = [group.rows * group.length for group in groups]
    parts = zip(groups, *(x.to(dtype).split(sizes) for x in (queries, keys, values)))
    mixed = []
    with torch.autocast(queries.device.type, enabled=False):
        for (rows, length, mask), *part in parts:
            # (rows * length, H or K, E) -> (rows, H or K, length, E)
            grid = [x.unflatten(0, (rows, length)).transpose(1, 2) for x in part]
            # grouped queries: H / K query heads share a kv head, which the kernel does not copy
            out = F.scaled_dot_product_attention(*grid, attn_mask=mask, is_causal=mask is None,
                                                 enable_gqa=queries.size(1) != keys.size(1))
            mixed.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(mixed).to(values.dtype)


def attend_to_cache(queries: Tensor, cache: Cache, layout: Layout) -> Tensor:
    """Let each row's newest token look at its row: (R, H, E) -> (R, H, E)."""
    keys = cache.keys[:, :, :layout.slots]      # (R, K, S, E)
    values = cache.values[:, :, :layout.slots]  # (R, K, S, E)
    # Two products in place of the fused kernel, which is made for many queries per row: for one,
    # it is slower (13 times on a CPU in bfloat16). The H / K heads that share a kv head are to it
    # as many queries: (R, H, E) -> (R, K, H / K, E).
    grouped = queries.to(keys.dtype).unflatten(1, (keys.size(1), -1)) * queries.size(-1) ** -0.5
    logits = (grouped @ keys.transpose(-1, -2)).float()  # (R, K, H / K, S)
    if layout.empty is not None:
        logits = logits.masked_fill(layout.empty[:, None, None], -torch.inf)
    return (logits.softmax(-1).to(values.dtype) @ values).flatten(1, 2)


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

    def forward(self, x: Tensor, rope: Rope, layout: Layout, cache: Cache | None,
                wanted: Tensor | None = None) -> Tensor:
        # each half reads a normed copy and adds to the stream, which is itself never normed
        x = x + self.self_attn(self.input_layernorm(x), rope, layout, cache)
        if wanted is not None:
            x = x.index_select(0, wanted)  # (N, D) -> (M, D)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embedding, blocks and final norm: all that language model and scalar model share."""
    recompute = False  # activation checkpointing: backward computes the inside of a block again

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, tokens: Tensor, attention_mask: Mask, where: Tensor) -> Tensor:
        """Return hidden states (M, D): of the tokens at `where`, (B, T) bool, in reading order."""
        layout, places = lay_out_rows(tokens, attention_mask)
        flat = tokens.flatten()[places]              # (B * T,) -> (N,)
        stands = torch.zeros_like(tokens).flatten()  # (B * T,): where in the stream a token is
        stands[places] = torch.arange(len(places), device=places.device)
        return self.run(flat, layout, wanted=stands[where.flatten()])

    def run(self, flat: Tensor, layout: Layout, caches: Sequence[Cache] | None = None,
            wanted: Tensor | None = None) -> Tensor:
        """Map a stream of tokens (N,) to states (N, D); with `wanted`, (M,) of them, to these."""
        rope = rope_table(layout.positions, self.config)
        x = self.embed_tokens(flat)
        for i, layer in enumerate(self.layers):
            # after the last attention no token looks at another: what nobody wants stays behind
            is_last = i == len(self.layers) - 1
            parts = x, rope, layout, caches[i] if caches else None, wanted if is_last else None
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, *parts, use_reentrant=False)
            else:
                x = layer(*parts)
        return self.norm(x)


class Transformer(nn.Module):
    """A LLaMA language model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, attention_mask: Mask = None, where: Mask = None,
                read: Read | None = None) -> Any:
        """Compute next-token logits.

        tokens: (B, T) int64; what stands in padded places does not matter.
        attention_mask: (B, T) bool, True = real token, contiguous in its row; None: all real.
        where: (B, T) bool, a subset of the real tokens: only their logits are computed.
        read: makes something else than logits of the (M, D) states at `where` and the (V, D) head.
        Returns: (B, T, V) logits, zero where padded; with `where` (M, V), in reading order; with
            `read` what that returns.
        """
        # logits of all tokens would be the largest tensor of the program: a loss names its own
        chosen = all_real(tokens, attention_mask) if where is None else where
        states = self.model(tokens, attention_mask, chosen)
        found = read(states, self.lm_head.weight) if read else self.lm_head(states)
        if where is None:  # (N, V) -> (B, T, V)
            return found.new_zeros(*tokens.shape, found.size(1)).index_put((chosen,), found)
        return found


class ScalarModel(nn.Module):
    """A LLaMA that reads one number off every position: reward model and critic."""
    offset: float = 0.0  # added to every real token's scalar; no parameter, so in no file

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.score = nn.Linear(config.dim, 1, bias=False)

    def forward(self, tokens: Tensor, attention_mask: Mask = None, where: Mask = None) -> Tensor:
        """Return (B, T) float32: the scalar after token t at `where`, (B, T) bool, or zero."""
        if where is None:
            where = all_real(tokens, attention_mask)
        states = self.model(tokens, attention_mask, where)
        # outside autocast: bfloat16 would round scores and values to 8 bits
        with torch.autocast(tokens.device.type, enabled=False):
            scalars = F.linear(states.float(), self.score.weight.float()) + self.offset  # (M, 1)
        return lay_out(scalars, where)


# ---------------------------------------------------------------------------------------------
# Sampling: the loop. How a token is drawn stands in sampling.py.

class Step(NamedTuple):
    """One new token for each of the R prompts that had not ended before."""
    rows: Tensor      # (R,) int64, which prompts
    tokens: Tensor    # (R,) int64
    logprobs: Tensor  # (R,) float32


@torch.no_grad()
def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int,
             temperature: float | Sequence[float] = 1.0, top_k: int = 0, top_p: float = 1.0,
             eos_id: Ends = None, seed: int = 0, rows: Sequence[int] | None = None,
             batch_size: int = 1024, stop: Stop = None) -> Generation:
    """Continue every prompt until its EOS or max_new_tokens.

    temperature: of all, or one per prompt; 0.0 is greedy.   eos_id: one id or several; None: never.
    rows: global index of each prompt (default 0..B-1): the noise of a row depends on (seed, its
        index), so neither batch nor rank count changes a sample.
    batch_size: prompts at once, which bounds the cache; the others follow as places get free.
    stop: called with a row's new tokens after each one; True ends the row as EOS does.
    """
    generation = Generation([[] for _ in prompts], [[] for _ in prompts])
    if not prompts:
        return generation
    check_lengths(prompts, max_new_tokens, model.config.max_seq_len)
    noise = row_uniforms(seed, range(len(prompts)) if rows is None else rows, max_new_tokens)
    steps = generation_steps(model, prompts, max_new_tokens, torch.tensor(temperature), top_k,
                             top_p, eos_id, noise, stop, batch_size)
    # a list, so that all steps run first: to read numbers is to wait for the device
    for step in list(steps):
        finite(step.logprobs)
        for row, token, logprob in zip(*(column.tolist() for column in step)):
            generation.tokens[row].append(token)
            generation.logprobs[row].append(logprob)
    return generation


def generation_steps(model: Transformer, prompts: list[list[int]], max_new_tokens: int,
                     temperature: float | Tensor, top_k: int, top_p: float, eos_id: Ends,
                     noise: Tensor, stop: Stop = None, batch_size: int = 0) -> Iterator[Step]:
    """Yield token after token of all prompts.

    noise: (B, max_new_tokens) float32 in [0, 1).   temperature: of all, or (B,) float32.
    batch_size: prompts at once; 0: all.
    """
    device = model.lm_head.weight.device
    noise = noise.to(device)
    temperatures = torch.as_tensor(temperature, device=device).expand(len(prompts))
    ends = {eos_id} if isinstance(eos_id, int) else set(eos_id or ())
    batch = Places(prompts, batch_size or len(prompts), max_new_tokens)
    slots = max(map(len, prompts)) + max_new_tokens
    caches = [Cache(len(batch.rows), slots) for _ in model.model.layers]
    logits = prefill(model, prompts[:len(batch.rows)], caches, batch.active)
    while True:
        # 1. a token for every place, by the noise of its prompt
        rows, counts, active = (torch.tensor(x, device=device)
                                for x in (batch.rows, batch.counts, batch.active))
        uniforms = noise[rows, counts.clamp(max=max_new_tokens - 1)]
        tokens, logprobs = choose(logits, uniforms, temperatures[rows], top_k, top_p)
        yield Step(rows[active], tokens[active], logprobs[active])

        # 2. Prompts that wait get the places of answers that are over. When none waits any more
        #    the batch shrinks: so the tail of long answers is cheap.
        batch.go_on(tokens.tolist(), ends, stop)
        free = batch.free()
        if free and not batch.waiting:
            kept = batch.shrink()
            tokens = tokens[kept]
            for cache in caches:
                cache.keep(kept)
        if not batch.active and not batch.waiting:
            return

        # 3. the model reads the tokens, and then the prompts that are new
        logits = read_tokens(model, tokens, batch.positions(), caches)
        if new := free[:len(batch.waiting)]:
            batch.admit(new)
            logits[new] = prefill(model, batch.asked(new), caches, new)


def read_tokens(model: Transformer, tokens: Tensor, positions: list[int],
                caches: Sequence[Cache]) -> Tensor:
    """Read a token (R,) for every row of the caches; return the logits after it, (R, V)."""
    device = tokens.device
    stands = torch.tensor(positions, device=device)
    slots = max(positions) + 1
    unlike = len(set(positions)) > 1
    empty = torch.arange(slots, device=device) > stands[:, None] if unlike else None  # (R, S)
    layout = Layout(stands, (), torch.arange(len(tokens), device=device), empty, slots)
    return model.lm_head(model.model.run(tokens, layout, caches))


def prefill(model: Transformer, prompts: Sequence[list[int]], caches: Sequence[Cache],
            places: list[int]) -> Tensor:
    """Read prompts into rows `places` of the caches; return the logits after each, (B, V)."""
    device = model.lm_head.weight.device
    # a prompt that is asked several times is read once; short ones first, as in every stream
    home = {tuple(prompt): place for prompt, place in zip(prompts, places, strict=True)}
    unique = sorted(home, key=len)
    groups = [Group(len(list(same)), length) for length, same in groupby(map(len, unique))]
    flat, rows, positions = torch.tensor([(token, home[prompt], position) for prompt in unique
                                          for position, token in enumerate(prompt)],
                                         device=device).unbind(1)
    # each prompt's last token, by its index in the stream of N
    ends = torch.tensor(list(map(len, unique)), device=device).cumsum(0) - 1
    states = model.model.run(flat, Layout(positions, groups, rows), caches, ends)
    logits = model.lm_head(states)  # (unique, D) -> (unique, V)
    # what was read once stands in the cache for every prompt that is the same
    if len(unique) < len(prompts):
        for cache in caches:
            cache.copy([home[tuple(prompt)] for prompt in prompts], places, len(unique[-1]))
    index = {prompt: i for i, prompt in enumerate(unique)}
    return logits[[index[tuple(prompt)] for prompt in prompts]]
