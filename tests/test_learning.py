"""Every stage can learn one batch by heart; what cannot do that has a broken gradient somewhere."""

from functools import partial

import pytest
import torch
from torch import nn

import data
import parallel
import ppo
import reward
import sft
from model import Transformer, generate, token_logprobs
from episodes import Four, collect
from ppo import PPOConfig
from train import Term, update

MACHINE = parallel.Machine(rank=0, world=1, device=torch.device("cpu"), dtype=torch.float32)
EOS = 2


def step(model: nn.Module, loss, lr: float = 3e-3):
    """Return a function that takes one optimizer step of `model` on some batches."""
    optimizer = parallel.adamw(model, 0.0)
    return lambda batches, step=0: update(model, optimizer, [Term(loss, batches)], lr, 1.0, MACHINE)


def dialogues() -> tuple[list[list[int]], list[list[int]]]:
    """Return four prompts of uneven length with their responses, which end in EOS."""
    g = torch.Generator().manual_seed(0)

    def row(n: int) -> list[int]:
        return torch.randint(3, 61, (n,), generator=g).tolist()

    return [[1, *row(n)] for n in (3, 9, 5, 1)], [[*row(n), EOS] for n in (7, 1, 12, 4)]


def sft_batch() -> sft.Batch:
    prompts, responses = dialogues()
    return sft.Batch(
        *data.pad([p + r for p, r in zip(prompts, responses)]),
        data.pad_masks([[False] * len(p) + [True] * len(r) for p, r in zip(prompts, responses)]),
    )


@pytest.mark.line(21)
def test_sft_loss_against_a_loop(actor):
    """Float64, one dialogue at a time: response tokens and EOS count, prompt tokens do not."""
    total, stats = sft.loss(actor, sft_batch())
    expected, terms = 0.0, 0
    for prompt, response in zip(*dialogues()):
        logits = actor.double()(torch.tensor([prompt + response]))[0]
        for t in range(len(prompt), len(prompt) + len(response)):
            expected -= logits[t - 1].log_softmax(-1)[(prompt + response)[t]].item()
            terms += 1
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert stats["loss"][1] == sft_batch().count == terms == 28


def test_sft_learns_a_batch_by_heart(actor):
    take = step(actor, sft.loss)
    losses = [take([sft_batch()])["loss"] for _ in range(150)]
    assert losses[0] > 3.5 and losses[-1] < 0.01
    prompts, responses = dialogues()
    assert generate(actor, prompts, 20, temperature=0.0, eos_id=EOS).tokens == responses
    assert token_logprobs(actor, torch.tensor([prompts[2]])).exp().mean() < 0.5, (
        "prompts are not trained on"
    )


def test_reward_learns_a_batch_by_heart(critic):
    prompts, _ = dialogues()
    g = torch.Generator().manual_seed(1)
    rows = [
        prompt + torch.randint(3, 61, (5,), generator=g).tolist()
        for prompt in prompts
        for _ in range(3)
    ]
    ranks = torch.tensor([[1, 2, 3], [3, 1, 2], [2, 2, 1], [2, 3, 1.0]])
    take = step(critic, reward.loss)
    stats = [take([reward.Batch(*data.pad(rows), ranks)]) for _ in range(60)]
    assert stats[0]["loss"] > 0.4 and stats[-1]["loss"] < 0.01 and stats[-1]["accuracy"] == 1.0


class Taste(nn.Module):
    """A reward model that one can read: the share of even tokens so far."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(1, 1)  # says where the model is

    def forward(self, tokens, attention_mask, where):
        even = (tokens % 2 == 0) & attention_mask
        return even.cumsum(1) / attention_mask.cumsum(1).clamp(min=1)


@pytest.mark.parametrize("kl_coef", [0.0, 1.0])
def test_ppo_learns_what_is_rewarded_and_the_critic_what_comes(actor, critic, config, kl_coef):
    settings = PPOConfig(batch_size=64, minibatch_size=16, kl_coef=kl_coef, eos_penalty=0.0)
    ref = Transformer(config)
    ref.load_state_dict(actor.state_dict())
    models = Four(actor, critic, ref, Taste())
    take = [
        step(actor, partial(ppo.actor_loss, config=settings, kl_coef=kl_coef), 1e-3),
        step(critic, partial(ppo.critic_loss, config=settings), 1e-3),
    ]
    prompts, seen = dialogues()[0] * 16, []
    for iteration in range(18):
        rows = [iteration * 64 + i for i in range(64)]
        rollout = collect(models, prompts, rows, settings, 8, EOS, (0.5, 0.1), seed=0)
        rollout, stats = ppo.assign_credit(rollout, settings, kl_coef)
        steps = ppo.learn(rollout, settings, take, seed=iteration, share=MACHINE.microbatches)
        assert (
            steps[0]["ratio_max"] == pytest.approx(1, abs=1e-5) and steps[0]["clip_fraction"] == 0
        )
        seen.append(stats)
    first, last = seen[0], seen[-1]
    assert abs(first["kl"]) < 1e-4 and first["explained_variance"] < 0.1
    if kl_coef:
        assert last["kl"] < 2 and last["score_mean"] > first["score_mean"] + 0.5
    else:
        assert last["kl"] > 4 and last["score_mean"] > first["score_mean"] + 2
        assert last["explained_variance"] > 0.3
