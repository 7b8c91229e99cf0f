"""A whole PPO iteration, every switch, against an oracle that shares no code with it.

The oracle takes one episode at a time, unpadded, in float64, and reads every token's log-probability and value off a
forward over the tokens before it: there is nothing to shift, to mask or to average wrongly.
"""
import copy
import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import ppo
import rollout as episodes_module
from episodes import Four, collect
from model import Generation
from ppo import PPOConfig
from reward import RunningMoments

EOS, KL_COEF, SCALE = 12, 0.3, (0.4, 0.5)
EPISODES = [  # prompts and responses: an EOS in a prompt, an EOS at once, cut off, cut off after one token, id 0, an ordinary one
    ([1, 5, EOS, 8], [9, 4, EOS]), ([1, 6, 7], [EOS]), ([1, 9], [30, 31, 32, 33, 34, 35]), ([1, 3, 3], [20]), ([1], [0, 8, 0, EOS]), ([1, 12, 13], [7, 0, 7, 7, EOS])]
PROMPTS, RESPONSES = [p for p, _ in EPISODES], [r for _, r in EPISODES]


class Numbers(NamedTuple):
    """What the oracle finds: per episode lists of floats, then scalars."""
    rewards: list[list[float]]
    advantages: list[list[float]]
    returns: list[list[float]]
    stats: dict[str, float]
    actor_loss: Tensor
    critic_loss: Tensor


def noisy(model: nn.Module, seed: int, size: float) -> nn.Module:
    """Return a copy whose weights are off by some noise."""
    other, g = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p += size * torch.randn(p.shape, generator=g)
    return other


def distributions(model: nn.Module, prompt: list[int], response: list[int], temperature: float) -> list[Tensor]:
    """Return the log-distribution that each response token was drawn from."""
    rows = [prompt + response[:t] for t in range(len(response))]
    logits = [model(torch.tensor([row]))[0, -1].double() / temperature for row in rows]
    return [x - x.logsumexp(0) for x in logits]


def moments(xs: list[float]) -> tuple[float, float]:
    mean = sum(xs) / len(xs)
    return mean, sum((x - mean) ** 2 for x in xs) / len(xs)


def estimate(x: float | Tensor, kind: str) -> float | Tensor:
    exp = torch.exp if isinstance(x, Tensor) else math.exp
    return {"k1": x, "k2": x * x / 2, "k3": exp(-x) - 1 + x, "abs": abs(x)}[kind]


def oracle(models: Four, new_actor: nn.Module, new_critic: nn.Module, c: PPOConfig, parts: int) -> Numbers:
    old, ref, values, scores = [], [], [], []
    for p, r in EPISODES:
        with torch.no_grad():
            old.append([d[y].item() for d, y in zip(distributions(models.actor, p, r, c.temperature), r)])
            ref.append([d[y].item() for d, y in zip(distributions(models.ref, p, r, c.temperature), r)])
            values.append([models.critic(torch.tensor([p + r[:t]]))[0, -1].item() for t in range(len(r))])
            scores.append((models.reward_model(torch.tensor([p + r]))[0, -1].item() - SCALE[0]) / SCALE[1])
    final, (mean, variance) = list(scores), moments(scores)
    for i, (_, r) in enumerate(EPISODES):
        if c.score_scale == "running":
            final[i] = (final[i] - mean) / variance ** 0.5
        if c.score_clip:
            final[i] = max(-c.score_clip, min(c.score_clip, final[i]))
        if r[-1] != EOS and c.missing_eos != "off":
            final[i] = final[i] - c.eos_penalty if c.missing_eos == "subtract" else -c.eos_penalty
    rewards, raw = [], []
    for score, lp, lq, v in zip(final, old, ref, values):
        n = len(lp)
        r = [-KL_COEF * estimate(lp[t] - lq[t], c.kl_kind) if c.kl_in == "reward" else 0.0 for t in range(n)]
        r[-1] += score
        delta = [r[t] + c.gamma * (v[t + 1] if t + 1 < n else 0.0) - v[t] for t in range(n)]
        rewards.append(r)
        raw.append([sum((c.gamma * c.gae_lambda) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)])
    returns = [[a + x for a, x in zip(row, v)] for row, v in zip(raw, values)]
    advantages = [list(row) for row in raw]
    if c.whiten_advantages != "off":
        size = len(raw) // (parts if c.whiten_advantages == "rank" else 1)
        for start in range(0, len(raw), size):
            mean, variance = moments([a for row in raw[start:start + size] for a in row])
            advantages[start:start + size] = [[(a - mean) / (variance + 1e-8) ** 0.5 for a in row] for row in raw[start:start + size]]
    actor_loss, critic_loss, total, tokens = 0.0, 0.0, 0.0, sum(map(len, RESPONSES))
    entropy, approx_kl, clipped, value_clipped, ratios = 0.0, 0.0, 0, 0, []
    for i, (p, r) in enumerate(EPISODES):
        weight = 1.0 if c.loss_average == "tokens" else 1.0 / len(r)
        for t, d in enumerate(distributions(new_actor, p, r, c.temperature)):
            ratio, a = (d[r[t]] - old[i][t]).exp(), advantages[i][t]
            bounded = max(min(ratio.item(), 1 + c.clip_range), 1 - c.clip_range)
            surrogate = ratio * a if ratio.item() * a <= bounded * a else torch.tensor(bounded * a)
            h = -(d.exp() * d).sum()
            penalty = KL_COEF * estimate(d[r[t]] - ref[i][t], c.kl_kind) if c.kl_in == "loss" else 0.0
            actor_loss = actor_loss + weight * (-surrogate - c.entropy_coef * h + penalty)
            v, v_old, target = new_critic(torch.tensor([p + r[:t]]))[0, -1].double(), values[i][t], returns[i][t]
            near = v_old + (v - v_old).clamp(-c.value_clip_range, c.value_clip_range) if c.value_clip_range else v
            critic_loss = critic_loss + weight * 0.5 * torch.maximum((v - target) ** 2, (near - target) ** 2)
            total += weight
            entropy, approx_kl = entropy + h.item(), approx_kl + ratio.item() - 1 - math.log(ratio.item())
            clipped, value_clipped = clipped + (bounded * a < ratio.item() * a), value_clipped + (abs(v - v_old).item() > c.value_clip_range > 0 and ((near - target) ** 2 > (v - target) ** 2).item())
            ratios.append(ratio.item())
    flat_raw, flat_returns = [a for row in raw for a in row], [x for row in returns for x in row]
    log_ratios = [[a - b for a, b in zip(lp, lq)] for lp, lq in zip(old, ref)]
    stats = {"score_mean": moments(scores)[0], "score_std": moments(scores)[1] ** 0.5, "kl": sum(map(sum, log_ratios)) / len(EPISODES),
             "kl_per_token": sum(map(sum, log_ratios)) / tokens, "reward_mean": sum(map(sum, rewards)) / len(EPISODES),
             "response_length": tokens / len(EPISODES), "cut_off": 2 / 6, "return_mean": moments(flat_returns)[0],
             "explained_variance": 1 - moments(flat_raw)[1] / moments(flat_returns)[1],  # returns - values = raw advantages
             "advantage_mean": moments(flat_raw)[0], "advantage_std": moments(flat_raw)[1] ** 0.5, "entropy": entropy / tokens,
             "approx_kl": approx_kl / tokens, "clip_fraction": clipped / tokens, "value_clip_fraction": value_clipped / tokens, "ratio_max": max(ratios)}
    return Numbers(rewards, advantages, returns, stats, actor_loss / total, critic_loss / total)


SWITCHES = [{}, {"kl_kind": "k2"}, {"kl_kind": "k3"}, {"kl_kind": "abs"}, {"kl_in": "loss", "kl_kind": "k2"}, {"kl_in": "loss", "kl_kind": "k3"},
            {"whiten_advantages": "off"}, {"whiten_advantages": "rank"}, {"missing_eos": "override"}, {"missing_eos": "off"}, {"score_clip": 0.3},
            {"score_scale": "running"}, {"loss_average": "sequences", "entropy_coef": 0.1}, {"entropy_coef": 0.1}, {"value_clip_range": 0.0},
            {"temperature": 0.7}, {"gamma": 0.9, "gae_lambda": 0.8}, {"clip_range": 0.05}]


@pytest.mark.line(1, 2, 3, 4, 5, 7, 8, 11, 12, 15, 16)
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_iteration_against_the_oracle(actor, critic, monkeypatch, switches):
    config = replace(PPOConfig(batch_size=6, minibatch_size=6, microbatch_size=4, eos_penalty=0.7), **switches)
    models = Four(actor, critic, noisy(actor, 1, 0.02), noisy(critic, 2, 0.05))
    new_actor, new_critic = noisy(actor, 3, 0.05), noisy(critic, 4, 0.05)
    sampled = Generation(RESPONSES, [[0.0] * len(r) for r in RESPONSES])
    monkeypatch.setattr(episodes_module, "generate", lambda *args: sampled)
    rollout = collect(models, PROMPTS, list(range(6)), config, 6, EOS, SCALE, seed=0)
    rescale = RunningMoments().rescale if config.score_scale == "running" else ppo.identity
    rollout, stats = ppo.assign_credit(rollout, config, KL_COEF, ranks=2, rescale=rescale)
    new64 = [copy.deepcopy(model).double() for model in (new_actor, new_critic)]
    expected = oracle(Four(*(copy.deepcopy(model).double() for model in models)), *new64, config, parts=2)
    mask = rollout.response_mask
    for b in range(6):
        for name in ("rewards", "advantages", "returns"):
            assert getattr(rollout, name)[b][mask[b]].tolist() == pytest.approx(getattr(expected, name)[b], abs=2e-5), name
    assert all(x[~mask].abs().max() == 0 for x in (rollout.rewards, rollout.advantages, rollout.returns))
    found: dict[str, list] = {}
    for model, model64, loss, expected_loss in ((new_actor, new64[0], partial(ppo.actor_loss, config=config, kl_coef=KL_COEF), expected.actor_loss),
                                                (new_critic, new64[1], partial(ppo.critic_loss, config=config), expected.critic_loss)):
        total = 0.0
        for rows in (torch.tensor([4, 1]), torch.tensor([0, 5, 3, 2])):  # two uneven micro-batches
            part, stats_of_part = loss(model, rollout.rows(rows))
            total = total + part / rollout.count
            for name, stat in stats_of_part.items():
                found.setdefault(name, []).append(stat)
        assert total.item() == pytest.approx(expected_loss.item(), abs=2e-5)
        for x, y in zip(torch.autograd.grad(total, list(model.parameters())), torch.autograd.grad(expected_loss, list(model64.parameters()))):
            torch.testing.assert_close(x.double(), y.double(), atol=2e-5, rtol=1e-4)
    stats["ratio_max"] = max(found.pop("ratio_max")).item()
    stats |= {name: sum(part.item() for part, _ in parts) / sum(n.item() for _, n in parts) for name, parts in found.items()}
    for name, value in expected.stats.items():
        assert stats[name] == pytest.approx(value, abs=3e-5), name
    assert stats["clip_fraction"] > 0 and (stats["value_clip_fraction"] > 0) == (config.value_clip_range > 0), "or the test is too tame"
