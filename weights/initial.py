"""Weights before any training: random, each by its name."""
from __future__ import annotations

import math
from typing import Iterator, Sequence

import torch
from torch import Tensor, nn

from model import ModelConfig
from sampling import derive


def random_weights(model: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Draw every weight of a model, which may be on the meta device; yield (name, float32)."""
    for name, parameter in model.named_parameters():
        yield name, random_weight(name, parameter.shape, model.config, seed)


def random_weight(name: str, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """Draw one weight, float32, scaled so that activations start with unit size at any width.

    Norms are 1, biases 0. Matrices are N(0, 1/fan_in), those that write into the residual
    stream smaller by sqrt(2 L) (GPT-2). The scalar head is N(0, 1/(D + 1)) (Stiennon et al. 2020).
    """
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    variance = 1 / (shape[1] + 1) if name == "score.weight" else 1 / shape[1]
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        variance /= 2 * config.n_layers
    # a stream for every name: what one tensor gets does not depend on the others, and a fresh
    # head is no copy of the first row of the embedding
    generator = torch.Generator().manual_seed(derive(seed, name))
    return torch.randn(*shape, generator=generator) * math.sqrt(variance)


def init_weights(model: nn.Module, seed: int) -> None:
    """Fill a model in place with `random_weights`."""
    # tied embeddings are one parameter with two names in a state_dict: the second is missing
    weights = dict(random_weights(model, seed))
    model.load_state_dict(weights, strict=not model.config.tie_embeddings)
