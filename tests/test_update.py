"""One optimizer step against Adam written out in plain floats."""

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import parallel
from run.checkpoints import MOMENTS
from train import Term, lr_at, update

MACHINE = parallel.Machine(rank=0, world=1, device=torch.device("cpu"), dtype=torch.float32)


class Batch(NamedTuple):
    x: Tensor  # (n, 3)
    y: Tensor  # (n, 2)

    @property
    def count(self) -> Tensor:
        return torch.tensor(len(self.x))


def squares(model: nn.Module, batch: Batch) -> tuple[Tensor, dict]:
    total = (model(batch.x) - batch.y).square().sum()
    return total, {"loss": (total.detach(), batch.count), "largest": batch.x.amax()}


def data(n: int, seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(n, 3, generator=g), torch.randn(n, 2, generator=g) * 3)


class ByHand:
    """AdamW with clipping for a linear layer, in lists of Python floats.

    Loshchilov and Hutter 2019, algorithm 2. Numbers 0 to 5 are the matrix, 6 and 7 the bias.
    """

    def __init__(self, model: nn.Linear, weight_decay: float) -> None:
        self.w = model.weight.double().tolist()
        self.b = model.bias.double().tolist()
        self.decay = weight_decay
        self.t = 0
        self.m = [0.0] * 8
        self.v = [0.0] * 8

    def gradient(self, batches: list[Batch], weight: float = 1.0) -> list[float]:
        grad = [0.0] * 8
        count = sum(len(batch.x) for batch in batches)
        for batch in batches:
            for x, y in zip(batch.x.double().tolist(), batch.y.double().tolist()):
                for i in range(2):
                    given = sum(w * z for w, z in zip(self.w[i], x)) + self.b[i]
                    error = 2 * (given - y[i]) * weight / count
                    for j in range(3):
                        grad[3 * i + j] += error * x[j]
                    grad[6 + i] += error
        return grad

    def step(self, grad: list[float], lr: float, max_norm: float) -> float:
        norm = math.sqrt(sum(g * g for g in grad))
        self.t += 1
        flat = [w for row in self.w for w in row] + self.b
        for k, g in enumerate(grad):
            g *= min(1.0, max_norm / norm)
            self.m[k] = 0.9 * self.m[k] + 0.1 * g
            self.v[k] = 0.95 * self.v[k] + 0.05 * g * g
            flat[k] *= 1 - lr * self.decay if k < 6 else 1.0  # matrices only
            first = self.m[k] / (1 - 0.9**self.t)
            second = self.v[k] / (1 - 0.95**self.t)
            flat[k] -= lr * first / (math.sqrt(second) + 1e-5)
        self.w = [flat[:3], flat[3:6]]
        self.b = flat[6:]
        return norm


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


@pytest.mark.line(17, 24)
def test_adam_by_hand():
    """Betas, eps, decay on matrices, one norm over all parameters clipped, uneven micro-batches."""
    model = layer()
    optimizer = parallel.adamw(model, 0.1)
    hand = ByHand(model, 0.1)
    for step, (lr, max_norm) in enumerate([(0.1, 1.0), (0.05, 100.0), (0.02, 0.3), (0.02, 1.0)]):
        batches = [data(1, step), data(5, 10 + step), data(2, 20 + step)]
        stats = update(model, optimizer, [Term(squares, batches)], lr, max_norm, MACHINE)
        norm = hand.step(hand.gradient(batches), lr, max_norm)
        assert stats["grad_norm"] == pytest.approx(norm, rel=1e-5), (
            "the norm is logged before clipping"
        )
        assert model.weight.flatten().tolist() == pytest.approx(sum(hand.w, []), abs=2e-6)
        assert model.bias.tolist() == pytest.approx(hand.b, abs=2e-6)
        assert stats["largest"] == max(batch.x.max().item() for batch in batches)


def test_terms_are_averaged_each_by_its_own_count():
    model = layer()
    optimizer = parallel.adamw(model, 0.0)
    hand = ByHand(model, 0.0)
    few = [data(2, 0)]
    many = [data(7, 1), data(3, 2)]
    terms = [Term(squares, few), Term(squares, many, weight=0.25)]
    stats = update(model, optimizer, terms, 0.1, 1e9, MACHINE)
    grad = [a + b for a, b in zip(hand.gradient(few), hand.gradient(many, 0.25))]
    assert stats["grad_norm"] == pytest.approx(hand.step(grad, 0.1, 1e9), rel=1e-5)


def test_a_gradient_that_is_not_finite_updates_nothing():
    model = layer()
    before = model.weight.clone()
    batch = data(2, 0)
    terms = [Term(squares, [Batch(batch.x * math.nan, batch.y)])]
    with pytest.raises(ValueError, match="not finite"):
        update(model, parallel.adamw(model, 0.0), terms, 0.1, 1.0, MACHINE)
    assert torch.equal(model.weight, before)


@pytest.mark.line(15)
def test_bfloat16_steps_float32_masters():
    """Steps of 1e-6, which bfloat16 weights would round away, add up."""
    model = layer()
    optimizer = parallel.adamw(model, 0.0)
    before = model.weight.detach().clone()
    machine = replace(MACHINE, dtype=torch.bfloat16)
    for _ in range(10):
        update(model, optimizer, [Term(squares, [data(4, 0)])], 1e-6, 1.0, machine)
    moments = [state[key] for state in optimizer.state.values() for key in MOMENTS]
    assert {x.dtype for x in (*model.parameters(), *moments)} == {torch.float32}
    assert (model.weight - before).abs().min() > 8e-6
    assert (before.bfloat16() - 1e-6 == before.bfloat16()).all()


def test_learning_rate():
    """101 steps, 10 of them rising, then down to a tenth at the last, number 100: by hand."""
    rates = [lr_at(step, 101, 2.0, 0.1, 0.1) for step in (0, 4, 9, 10, 55, 100)]
    assert rates == pytest.approx([0.2, 1.0, 2.0, 2.0, 1.1, 0.2])
