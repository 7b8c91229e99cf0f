"""Shared fixtures. Tests use one thread: results do not depend on the machine, and small models are faster."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from evaluation import report
from model import ModelConfig, ScalarModel, Transformer
from weights.initial import init_weights

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    """A whole tiny run, with checkpoints: its folder and its numbers. Nobody may write into it."""
    import golden

    out = tmp_path_factory.mktemp("runs") / "a"
    return out, golden.tiny_run(out, "--checkpoint_every=10")


@pytest.fixture(autouse=True)
def without_plots(monkeypatch):
    """Drawing takes longer than a tiny run: `finished`, made before this, has plots and no other run."""
    monkeypatch.setattr(report, "write_plots", lambda *_: [])


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=61, ffn_dim=64, max_seq_len=64
    )


@pytest.fixture
def actor(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    init_weights(model, 0)
    return model


@pytest.fixture
def critic(config: ModelConfig) -> ScalarModel:
    model = ScalarModel(config)
    init_weights(model, 1)
    return model
