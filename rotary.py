"""Where a token stands: rotary positions, and how they are stretched for longer contexts.

Queries and keys are turned, pair by pair, by an angle that grows with the position. The product of
a query and a key then depends on how far they are apart, and on neither position alone.
"""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]  # cos, sin of rotary angles, (N, 1, E/2) each, float32


def rope_table(positions: Tensor, config: Any) -> Rope:
    """Return cos and sin of the rotary angles, (N, 1, E/2) float32, at positions (N,) int64.

    config: a model.ModelConfig.   Source: Su et al. 2021, eq. 34, with the halves of E as pairs
        (Hugging Face's weight layout); scaling: Chen et al. 2023, and Llama 3.1's own code.
    """
    # Computed from the config at every forward rather than kept as a buffer: a buffer is garbage
    # after meta-device construction and is cast to bfloat16 by mixed precision.
    size = config.head_size
    exponent = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size
    periods = config.rope_scaling * config.rope_theta ** exponent  # (E/2,), tokens per radian
    if config.rope_llama3:
        # Llama 3.1: pairs that turn `high` times within the old context stay as they were, those
        # that turn `low` times or less are slowed down, in between by shares of both
        low, high, context = config.rope_llama3
        own = config.rope_theta ** exponent
        share = ((context / (2 * math.pi * own) - low) / (high - low)).clamp(0, 1)
        periods = 1 / (share / own + (1 - share) / periods)
    angles = positions[..., None, None].float() / periods          # (N, 1, E/2), for any head
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate queries or keys, (N, heads, E), by their positions; return float32."""
    cos, sin = rope
    # in float32, as the angles are: rounded to bfloat16, neighbouring positions would blur
    a, b = x.float().chunk(2, dim=-1)  # (N, heads, E/2) each: pair i is (a[i], b[i])
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
