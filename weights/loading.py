"""Model folders in: the weights of a model, checked before anything is read."""
from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from model import Transformer
from weights.files import Weights, check_beside, check_sum
from weights.layouts import read_config, read_weights


def stored_dtype(path: str | Path) -> torch.dtype:
    """Return the dtype that most of a folder's numbers are stored in."""
    sizes: dict[torch.dtype, int] = {}
    for source in read_weights(path).sources.values():
        sizes[source.dtype] = sizes.get(source.dtype, 0) + math.prod(source.shape)
    return max(sizes, key=sizes.get)


def check_weights(model: nn.Module, weights: Weights) -> None:
    """Raise ValueError unless `weights` hold exactly the parameters of `model`, in their shapes.

    Nothing is read. Left aside are an lm_head that the model has no use for, and the rotary
    frequencies that old checkpoints hold.
    """
    # 1. every parameter has its tensor
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name not in weights:
            raise ValueError(f"{weights.path}: tensor {name} is missing")
        source = weights.sources[name]
        if source.shape != parameter.shape:
            raise ValueError(f"{source.file}: tensor {name} has shape {source.shape}, "
                             f"the model's config says {tuple(parameter.shape)}")
        if not source.dtype.is_floating_point:
            raise ValueError(f"{source.file}: tensor {name} holds {source.dtype}, "
                             "expected floating point")

    # 2. every tensor has its parameter: one too many is a sign of another architecture, with
    # biases, say, or with norms of queries and keys
    for name, source in weights.sources.items():
        is_harmless = name == "lm_head.weight" or name.endswith(".rotary_emb.inv_freq")
        if name not in parameters and not is_harmless:
            raise ValueError(f"{source.file}: tensor {name} is none of this model's")


def materialize(model: nn.Module, device: str | torch.device) -> nn.Module:
    """Give a model on the meta device memory, not yet filled."""
    model.to_empty(device=device)
    # to_empty makes two parameters of one; tied embeddings stay one
    if isinstance(model, Transformer) and model.config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def load_pretrained(path: str | Path, device: str | torch.device = "cpu",
                    dtype: torch.dtype = torch.float32,
                    kind: type[nn.Module] = Transformer) -> nn.Module:
    """Load a model folder.

    kind: Transformer, or ScalarModel, which reads a sequence classifier with one label.
    """
    check_beside(Path(path))
    config = read_config(path)
    weights = read_weights(path)
    # first the shape alone: what does not fit is refused before any memory is taken
    with torch.device("meta"):
        model = kind(config).to(dtype)
    check_weights(model, weights)
    for file in weights.summed_files():
        check_sum(file)
    materialize(model, device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # mapped here, converted into place, and unmapped: never two copies of a model
            parameter.copy_(weights[name])
    return model
