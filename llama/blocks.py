"""The layers of a LLaMA, run on packed tokens.

Dimensions: B sequences, T padded tokens, N real tokens of all B rows laid end to end,
D model, H query heads, K kv heads, E head size, S slots of a cache, C anything.
Modules carry Hugging Face's names, so a `state_dict()` *is* a Hugging Face checkpoint.
"""
from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rope = tuple[Tensor, Tensor]  # cosines and sines of the rotary angles, (B or 1, T, 1, E/2) each


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
        for name in (field.name for field in fields(self) if field.type in ("int", "float")):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"{name}={value!r} must be positive and a number")
        if self.dim % (2 * self.n_heads):  # rotary angles turn pairs within a head
            raise ValueError(f"dim={self.dim} must be a multiple of 2 * n_heads={2 * self.n_heads}")
        if self.n_heads % self.n_kv_heads:  # each kv head serves equally many query heads
            raise ValueError(f"n_heads={self.n_heads} must be a multiple of "
                             f"n_kv_heads={self.n_kv_heads}")


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


def rope_table(positions: Tensor, config: ModelConfig) -> Rope:
    """Return cos and sin of the rotary angles, (..., 1, E/2) float32, at positions (...) int64.

    Source: Su et al. 2021, eq. 34, with the halves of E as pairs (Hugging Face's weight layout).
    """
    # Computed from the config at every forward rather than kept as a buffer: a buffer is garbage
    # after meta-device construction and is cast to bfloat16 by mixed precision.
    size = config.dim // config.n_heads
    exponent = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size
    periods = config.rope_scaling * config.rope_theta ** exponent  # (E/2,), tokens per radian
    angles = positions[..., None, None].float() / periods          # (..., 1, E/2), for any head
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate queries or keys, (B, T, heads, E), by their positions."""
    cos, sin = rope
    # in float32, as the angles are: rounded to bfloat16, neighbouring positions would blur
    a, b = x.float().chunk(2, dim=-1)  # (B, T, heads, E/2) each: pair i is (a[i], b[i])
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


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
        self.size = config.dim // config.n_heads
        self.q_proj = nn.Linear(config.dim, self.heads * self.size, bias=False)
        self.k_proj = nn.Linear(config.dim, self.kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(config.dim, self.kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(self.heads * self.size, config.dim, bias=False)

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
