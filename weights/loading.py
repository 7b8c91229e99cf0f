"""Model folders in: the weights of a model, checked before anything is read."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from model import Transformer
from weights.files import Weights
from weights.layouts import read_config, read_weights


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
