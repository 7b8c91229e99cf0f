"""A LLaMA and what is asked of it: logits, log-probabilities, values, scores, samples.

Dimensions: B sequences, T padded tokens, N real tokens of all B rows laid end to end, M of them
scored, D model, H query heads, K kv heads, E head size, V vocabulary, S slots of a cache, R rows
that are still being generated, C anything. Modules carry Hugging Face's names, so a `state_dict()`
*is* a Hugging Face checkpoint.
"""
from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Callable, Iterator, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# positions; how a token is drawn, and noise: under this module's name too, model.derive ...
from rotary import Rope, rope_table, rotate
from sampling import Generation, check_lengths, choose, derive, filter_logits, row_uniforms

Mask = Tensor | None                       # (B, T) bool; what None means, each docstring says
Ends = int | Sequence[int] | None          # what ends an answer
Stop = Callable[[list[int]], bool] | None  # is an answer over with these tokens?


# ---------------------------------------------------------------------------------------------
# Architecture
#
# The grid is what callers see, packing is what runs. The real tokens are pulled out of the
# caller's (B, T) grid into one stream of N, so that no linear layer ever touches padding. Only
# attention sees a grid again, a compact one: every row moved to the left edge. There a column is
# a position, and plain causal attention is right whether the caller padded left, right or both,
# since padding only stands after the tokens that might look at it.
#
# So there are two index spaces, both (N,) int64 and flat, row * T + column:
#
#     places: where the tokens stand in the caller's grid
#     slots:  where they stand in the compact grid
#
#     caller's grid    compact grid      packed   a b c d e
#         . . a b          a b . .       places   2 3 4 5 6
#         c d e .          c d e .       slots    0 1 4 5 6

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
            if not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"{name}={value!r} must be positive and a number")
        # rotary angles turn pairs within a head
        if self.head_size % 2 or self.dim % self.n_heads and not self.head_dim:
            raise ValueError(f"dim={self.dim} must be a multiple of 2 * n_heads={2 * self.n_heads}")
        if self.n_heads % self.n_kv_heads:  # each kv head serves equally many query heads
            raise ValueError(f"n_heads={self.n_heads} must be a multiple of "
                             f"n_kv_heads={self.n_kv_heads}")

    @property
    def head_size(self) -> int:
        return self.head_dim or self.dim // self.n_heads


class Grid(NamedTuple):
    """The compact (B, T) grid of attention, in which column = position (see model.Trunk)."""
    batch: int
    time: int
    slots: Tensor | None             # (N,) int64, row * T + position; None: every slot is filled
    mask: Tensor | None = None       # (B, 1, T, T) bool, query sees key; None: causal
    positions: Tensor | None = None  # (B,) int64, when every row is one new token: its position

    def spread(self, x: Tensor) -> Tensor:
        """Lay packed states out, (N, C) -> (B, T, C), zero where no token stands."""
        if self.slots is not None:
            # (N, C) -> (B * T, C)
            x = x.new_zeros(self.batch * self.time, x.size(-1)).index_copy(0, self.slots, x)
        return x.view(self.batch, self.time, -1)  # (B * T, C) -> (B, T, C)

    def pack(self, x: Tensor) -> Tensor:
        """Take the tokens' states off the grid again, (B, T, C) -> (N, C)."""
        x = x.reshape(self.batch * self.time, -1)  # (B, T, C) -> (B * T, C)
        return x if self.slots is None else x.index_select(0, self.slots)


class Cache:
    """Keys and values of one layer, (B, K, S, E) each; slot = position."""
    keys: Tensor
    values: Tensor

    def __init__(self, slots: int) -> None:
        self.slots = slots

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Take the prompts' keys and values, (B, K, T, E)."""
        # empty slots behind the prompts for the tokens to come: E stays as it is, T becomes S
        room = (0, 0, 0, self.slots - keys.size(2))
        self.keys = F.pad(keys, room)
        self.values = F.pad(values, room)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Take one token per row, (B, K, 1, E), at its position (B,) int64."""
        rows = torch.arange(len(positions), device=positions.device)
        # rows and positions go in pairs: in row b it is slot positions[b] that is written
        self.keys[rows, :, positions] = keys[:, :, 0]      # (B, K, E)
        self.values[rows, :, positions] = values[:, :, 0]  # (B, K, E)

    def keep(self, rows: Tensor) -> None:
        """Drop every row of the batch but these, (R,) int64."""
        self.keys = self.keys[rows]
        self.values = self.values[rows]


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

    def forward(self, x: Tensor, rope: Rope, grid: Grid, cache: Cache | None) -> Tensor:
        """Mix packed states, (N, D), along their rows; later tokens find theirs in the cache."""
        # together, so that queries, keys and values go to the grid in one scatter instead of three
        qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1)
        # (N, (H + 2K) E) -> (B, T, (H + 2K) E) -> (B, T, H + 2K, E)
        qkv = grid.spread(qkv).unflatten(-1, (-1, self.size))
        turning, values = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        queries, keys = rotate(turning, rope).split((self.heads, self.kv_heads), dim=2)
        queries = queries.transpose(1, 2)  # (B, T, H, E) -> (B, H, T, E)
        keys = keys.transpose(1, 2)        # (B, T, K, E) -> (B, K, T, E)
        values = values.transpose(1, 2)    # (B, T, K, E) -> (B, K, T, E)

        mask = grid.mask
        if grid.positions is not None:
            # decoding: the one query of a row sees the filled slots of that row, its own included
            cache.append(keys, values, grid.positions)
            keys = cache.keys      # (B, K, S, E)
            values = cache.values  # (B, K, S, E)
            filled = torch.arange(cache.slots, device=x.device) <= grid.positions[:, None]
            mask = filled[:, None, None]  # (B, S) -> (B, 1 for heads, 1 for the query, S)
        elif cache is not None:
            cache.fill(keys, values)

        # grouped queries: H / K query heads share a kv head, which the kernel does not copy
        mixed = F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=mask is None,
                                               enable_gqa=self.kv_heads != self.heads)
        # (B, H, T, E) -> (B, T, H, E) -> (B, T, H E) -> (N, H E) -> (N, D)
        return self.o_proj(grid.pack(mixed.transpose(1, 2).flatten(2)))


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

    def forward(self, x: Tensor, rope: Rope, grid: Grid, cache: Cache | None) -> Tensor:
        # each half reads a normed copy and adds to the stream, which is itself never normed
        x = x + self.self_attn(self.input_layernorm(x), rope, grid, cache)
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

    def forward(self, tokens: Tensor, attention_mask: Mask) -> tuple[Tensor, Tensor | None]:
        """Return the hidden states (N, D) of the real tokens, and their places; None: all."""
        batch, time = tokens.shape
        places = slots = None
        flat = tokens.flatten()  # (B, T) -> (B * T,)
        if attention_mask is not None:
            places = attention_mask.flatten().nonzero()[:, 0]
            flat = flat[places]  # (B * T,) -> (N,)
            # a token's position is how many real tokens of its row stand before it
            positions = (attention_mask.cumsum(1) - 1).flatten()[places]
            slots = places // time * time + positions
        rope = rope_table(torch.arange(time, device=tokens.device), self.config)
        return self.run(flat, rope, Grid(batch, time, slots)), places

    def run(self, flat: Tensor, rope: Rope, grid: Grid,
            caches: Sequence[Cache] | None = None) -> Tensor:
        """Map packed tokens (N,) to hidden states (N, D), through the caches when there are any."""
        x = self.embed_tokens(flat)
        for i, layer in enumerate(self.layers):
            cache = caches[i] if caches else None
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, grid, cache, use_reentrant=False)
            else:
                x = layer(x, rope, grid, cache)
        return self.norm(x)


def unpack(x: Tensor, shape: torch.Size, places: Tensor | None) -> Tensor:
    """Lay outputs, (N, C), out on the caller's grid, (B, T, C), zero where there is no token."""
    if places is None:
        places = torch.arange(shape.numel(), device=x.device)
    where = (places // shape[1], places % shape[1])  # rows and columns
    # written into a fresh grid of the full shape: FSDP wants no view from a forward
    return x.new_zeros(*shape, x.size(-1)).index_put(where, x)


class Transformer(nn.Module):
    """A LLaMA language model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, attention_mask: Mask = None, where: Mask = None) -> Tensor:
        """Compute next-token logits.

        tokens: (B, T) int64; what stands in padded places does not matter.
        attention_mask: (B, T) bool, True = real token, contiguous in its row; None: all real.
        where: (B, T) bool, a subset of the real tokens: only their logits are computed.
        Returns: (B, T, V) logits, zero where padded; with `where` (M, V), in reading order.
        """
        hidden, places = self.model(tokens, attention_mask)
        if where is None:
            return unpack(self.lm_head(hidden), tokens.shape, places)
        # logits of all tokens would be the largest tensor of the program: a loss names its own
        wanted = where.flatten() if places is None else where.flatten()[places]  # (N,) bool
        return self.lm_head(hidden[wanted.nonzero()[:, 0]])  # (N, D) -> (M, D) -> (M, V)


class ScalarModel(nn.Module):
    """A LLaMA that reads one number off every position: reward model and critic."""
    offset: float = 0.0  # added to every real token's scalar; no parameter, so in no file

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.score = nn.Linear(config.dim, 1, bias=False)

    def forward(self, tokens: Tensor, attention_mask: Mask = None) -> Tensor:
        """Return (B, T) float32: the scalar after reading token t, zero where padded."""
        hidden, places = self.model(tokens, attention_mask)
        # outside autocast: bfloat16 would round scores and values to 8 bits
        with torch.autocast(tokens.device.type, enabled=False):
            scalars = F.linear(hidden.float(), self.score.weight.float()) + self.offset  # (N, 1)
        # (N, 1) -> (B, T, 1) -> (B, T), which is a view: hence the clone
        return unpack(scalars, tokens.shape, places)[:, :, 0].clone()


# ---------------------------------------------------------------------------------------------
# The one shift: what a model says at t - 1 speaks of token t
#
# A model that has read tokens 0 .. t - 1 says at t - 1 what comes next. The algorithm, though,
# keeps everything about token t in column t: its log-probability, and the value of the state in
# which it was chosen. These functions cross from one way of counting to the other, and nothing
# outside of them shifts anything.

def check_predecessors(response_mask: Tensor) -> None:
    """Raise ValueError if the first token of a row, which nothing predicts, is to be scored."""
    if response_mask[:, 0].any():
        raise ValueError("the first token of a row has no predecessor, so nothing predicts it")


def response_distributions(model: nn.Module | Tensor, tokens: Tensor, attention_mask: Mask,
                           response_mask: Mask, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the log-distributions, (M, V), of M tokens, and the (B, T) mask of these."""
    if response_mask is None:
        # all real tokens but the first of each row, which is the first that the mask counts
        real = torch.ones_like(tokens).bool() if attention_mask is None else attention_mask
        response_mask = real & (real.cumsum(1) > 1)
    check_predecessors(response_mask)
    where = response_mask.roll(-1, dims=1)  # from the tokens to the positions that predict them
    logits = model[where] if isinstance(model, Tensor) else model(tokens, attention_mask, where)
    # float32 before the softmax, always: in bfloat16 log-probabilities are off by up to 0.03
    return F.log_softmax(logits.float() / temperature, dim=-1), response_mask


def lay_out(values: Tensor, mask: Tensor) -> Tensor:
    """Put the values of a mask's True places, (M,), back on the (B, T) grid; zero elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def token_logprobs(model: nn.Module | Tensor, tokens: Tensor, attention_mask: Mask = None,
                   response_mask: Mask = None, temperature: float = 1.0) -> Tensor:
    """Score tokens under softmax(logits / temperature).

    model: a Transformer, or its logits (B, T, V).
    tokens: (B, T) int64.   attention_mask: (B, T) bool, True = real token; None: all real.
    response_mask: (B, T) bool, tokens to score; None: every real token but the first of its row.
    Returns: (B, T) float32, log-probability of token t given those before it [nats], else 0.
    """
    distributions, scored = response_distributions(model, tokens, attention_mask, response_mask,
                                                   temperature)
    chosen = distributions.gather(1, tokens[scored][:, None])  # (M, V) -> (M, 1)
    return lay_out(chosen[:, 0], scored)


def token_logprobs_and_entropy(model: nn.Module | Tensor, tokens: Tensor,
                               attention_mask: Mask = None, response_mask: Mask = None,
                               temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Do `token_logprobs`, and return alike the entropy each token was drawn with [nats]."""
    distributions, scored = response_distributions(model, tokens, attention_mask, response_mask,
                                                   temperature)
    chosen = distributions.gather(1, tokens[scored][:, None])  # (M, V) -> (M, 1)
    entropy = -(distributions.exp() * distributions).sum(-1)   # (M, V) -> (M,)
    return lay_out(chosen[:, 0], scored), lay_out(entropy, scored)


def token_values(critic: nn.Module, tokens: Tensor, attention_mask: Mask,
                 response_mask: Tensor) -> Tensor:
    """Return (B, T) float32: the value of the state before token t, zero outside the response."""
    check_predecessors(response_mask)
    # the critic's word after token t - 1, moved from column t - 1 to t; what the roll carries
    # around from the last column to the first is no value of anything, and masked
    return critic(tokens, attention_mask).roll(1, dims=1).where(response_mask, 0.0)


def last_scores(reward_model: nn.Module, tokens: Tensor, attention_mask: Tensor) -> Tensor:
    """Return (B,) float32: the scalar at each row's last real token, wherever the padding is."""
    # no shift here: the score is of all that was read, the last token included
    scalars = reward_model(tokens, attention_mask)
    columns = torch.arange(tokens.size(1), device=tokens.device)
    last = columns.where(attention_mask, -1).amax(1, keepdim=True)  # (B, T) -> (B, 1)
    return scalars.gather(1, last)[:, 0]


# ---------------------------------------------------------------------------------------------
# Sampling: the loop. How a token is drawn stands in sampling.py.

class Step(NamedTuple):
    """One new token for each of the R prompts that had not ended before."""
    rows: Tensor      # (R,) int64, which prompts
    tokens: Tensor    # (R,) int64
    logprobs: Tensor  # (R,) float32


@torch.no_grad()
def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int,
             temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
             eos_id: Ends = None, seed: int = 0, rows: Sequence[int] | None = None,
             batch_size: int = 1024, stop: Stop = None) -> Generation:
    """Continue every prompt until its EOS or max_new_tokens.

    temperature: 0.0 is greedy.   eos_id: one id or several; None never stops.
    rows: global index of each prompt (default 0..B-1): the noise of a row depends on (seed, its
        index), so neither batch nor rank count changes a sample.
    batch_size: prompts generated at once, which bounds the cache's memory.
    stop: called with a row's new tokens after each one; True ends the row as EOS does.
    """
    generation = Generation([[] for _ in prompts], [[] for _ in prompts])
    if prompts:
        check_lengths(prompts, max_new_tokens, model.config.max_seq_len)
    rows = range(len(prompts)) if rows is None else rows
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        noise = row_uniforms(seed, rows[batch], max_new_tokens)
        steps = generation_steps(model, prompts[batch], max_new_tokens, temperature, top_k, top_p,
                                 eos_id, noise, stop)
        # a list, so that all steps run first: to read numbers is to wait for the device
        for step in list(steps):
            for row, token, logprob in zip(*(column.tolist() for column in step)):
                generation.tokens[start + row].append(token)
                generation.logprobs[start + row].append(logprob)
    return generation


def generation_steps(model: Transformer, prompts: list[list[int]], max_new_tokens: int,
                     temperature: float, top_k: int, top_p: float, eos_id: Ends,
                     noise: Tensor, stop: Stop = None) -> Iterator[Step]:
    """Yield token after token of all prompts; noise: (B, max_new_tokens) float32 in [0, 1)."""
    device = model.lm_head.weight.device
    noise = noise.to(device)
    ends = None if eos_id is None else torch.tensor(eos_id, device=device)  # () or (ids,)
    lengths = [len(prompt) for prompt in prompts]
    logits, caches = prefill(model, prompts, lengths, max(lengths) + max_new_tokens)
    # The batch holds some of the prompts, and some of its rows may have ended. To drop these
    # copies the cache, so it waits until it pays; then the tail of long answers is cheap.
    rows = torch.arange(len(prompts), device=device)  # which prompts the batch holds
    active = rows                                     # which rows of the batch go on
    positions = torch.tensor(lengths, device=device)  # where the next token of a row stands
    written = torch.zeros_like(noise, dtype=torch.int64)  # the answers so far, for `stop`
    for n in range(max_new_tokens):
        # 1. a token for every row of the batch, by the noise of its prompt
        tokens, logprobs = choose(logits, noise[rows, n], temperature, top_k, top_p)
        yield Step(rows[active], tokens[active], logprobs[active])
        if n + 1 == max_new_tokens:
            return

        # 2. rows that end with it are active no longer, and leave the batch now or later
        if eos_id is not None:
            active = active[~torch.isin(tokens[active], ends)]
        if stop:
            written[rows, n] = tokens
            answers = written[rows[active], :n + 1].tolist()
            going_on = [not stop(answer) for answer in answers]
            active = active[torch.tensor(going_on, dtype=torch.bool, device=device)]
        if len(active) == 0:
            return
        if len(active) <= 0.85 * len(rows):
            rows = rows[active]
            tokens = tokens[active]
            positions = positions[active]
            for cache in caches:
                cache.keep(active)
            active = torch.arange(len(rows), device=device)

        # 3. the model reads it, the tokens before it stand in the cache
        rope = rope_table(positions[:, None], model.config)  # (B,) -> (B, T = 1): each row its own
        grid = Grid(len(tokens), 1, None, None, positions)
        logits = model.lm_head(model.model.run(tokens, rope, grid, caches))
        positions = positions + 1


def prefill(model: Transformer, prompts: list[list[int]], lengths: list[int],
            slots: int) -> tuple[Tensor, list[Cache]]:
    """Read the prompts; return the logits after each one's last token, (B, V), and the caches."""
    # the prompts are packed already, and their compact grid is written down from their lengths
    device = model.lm_head.weight.device
    time = max(lengths)
    stands = [row * time + t for row, length in enumerate(lengths) for t in range(length)]
    grid = Grid(len(prompts), time, torch.tensor(stands, device=device))
    flat = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    caches = [Cache(slots) for _ in model.model.layers]
    rope = rope_table(torch.arange(time, device=device), model.config)
    hidden = model.model.run(flat, rope, grid, caches)
    # each prompt's last token, by its index in the stream of N
    ends = torch.tensor(lengths, device=device).cumsum(0) - 1
    return model.lm_head(hidden[ends]), caches  # (N, D) -> (B, D) -> (B, V)
