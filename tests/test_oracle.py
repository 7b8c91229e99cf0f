"""A whole PPO iteration, every switch, against an oracle that shares no code with it.

The oracle takes one episode at a time, unpadded, in float64, and reads every token's
log-probability and value off a forward over the tokens before it: there is nothing to shift, to
mask or to average wrongly.
"""
import copy
import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple, Sequence

import pytest
import torch
from torch import Tensor, nn

import ppo
import rollout as episodes_module
from episodes import Four, collect, prompts_of
from model import Generation
from ppo import PPOConfig
from reward import RunningMoments

EOS, KL_COEF, SCALE = 12, 0.3, (0.4, 0.5)
Episodes = Sequence[tuple[list[int], list[int]]]  # prompts with a response each
EPISODES = [
    ([1, 5, EOS, 8], [9, 4, EOS]),            # an EOS in the prompt
    ([1, 6, 7], [EOS]),                       # over at once
    ([1, 9], [30, 31, 32, 33, 34, 35]),       # cut off
    ([1, 3, 3], [20]),                        # cut off after one token
    ([1], [0, 8, 0, EOS]),                    # id 0, which is also what stands in the padding
    ([1, 12, 13], [7, 0, 7, 7, EOS]),         # an ordinary one
]


class Numbers(NamedTuple):
    """What the oracle finds: per episode lists of floats, then scalars; None without a critic."""
    rewards: list[list[float]]
    advantages: list[list[float]]
    returns: list[list[float]] | None
    stats: dict[str, float]
    actor_loss: Tensor
    critic_loss: Tensor | None


class Read(NamedTuple):
    """What models say of the episodes' tokens, per episode a list of floats."""
    logprobs: list[list[float]]
    ref_logprobs: list[list[float]]


def noisy(model: nn.Module, seed: int, size: float) -> nn.Module:
    """Return a copy whose weights are off by some noise."""
    other, g = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p += size * torch.randn(p.shape, generator=g)
    return other


def distributions(model: nn.Module, prompt: list[int], response: list[int],
                  temperature: float) -> list[Tensor]:
    """Return the log-distribution that each response token was drawn from."""
    rows = [prompt + response[:t] for t in range(len(response))]
    logits = [model(torch.tensor([row]))[0, -1].double() / temperature for row in rows]
    return [x - x.logsumexp(0) for x in logits]


@torch.no_grad()
def logprobs_of(model: nn.Module, episodes: Episodes, temperature: float) -> list[list[float]]:
    return [[d[y].item() for d, y in zip(distributions(model, p, r, temperature), r)]
            for p, r in episodes]


def moments(xs: Sequence[float]) -> tuple[float, float]:
    mean = sum(xs) / len(xs)
    return mean, sum((x - mean) ** 2 for x in xs) / len(xs)


def estimate(x: float | Tensor, kind: str) -> float | Tensor:
    exp = torch.exp if isinstance(x, Tensor) else math.exp
    return {"k1": x, "k2": x * x / 2, "k3": exp(-x) - 1 + x, "abs": abs(x)}[kind]


def final_scores(scores: list[float], episodes: Episodes, c: PPOConfig) -> list[float]:
    """Scale, clip, and change where cut off."""
    mean, variance = moments(scores)
    final = []
    for score, (_, response) in zip(scores, episodes):
        if c.score_scale == "running":
            score = (score - mean) / variance ** 0.5
        if c.score_clip:
            score = max(-c.score_clip, min(c.score_clip, score))
        if response[-1] != EOS and c.missing_eos != "off":
            score = score - c.eos_penalty if c.missing_eos == "subtract" else -c.eos_penalty
        final.append(score)
    return final


def rewards_of(final: list[float], read: Read, c: PPOConfig) -> list[list[float]]:
    """Pay the penalty at every token and the score at the last one."""
    rewards = []
    for score, lp, lq in zip(final, read.logprobs, read.ref_logprobs):
        row = [-KL_COEF * estimate(a - b, c.kl_kind) if c.kl_in == "reward" else 0.0
               for a, b in zip(lp, lq)]
        row[-1] += score
        rewards.append(row)
    return rewards


def whitened(raw: list[list[float]], c: PPOConfig, parts: int) -> list[list[float]]:
    if c.whiten_advantages == "off":
        return [list(row) for row in raw]
    size = len(raw) // (parts if c.whiten_advantages == "rank" else 1)
    result = []
    for start in range(0, len(raw), size):
        mean, variance = moments([a for row in raw[start:start + size] for a in row])
        result += [[(a - mean) / (variance + 1e-8) ** 0.5 for a in row]
                   for row in raw[start:start + size]]
    return result


def weight_of(response: list[int], c: PPOConfig) -> float:
    return 1.0 if c.loss_average == "tokens" else 1.0 / len(response)


def actor_side(new_actor: nn.Module, episodes: Episodes, read: Read,
               advantages: list[list[float]], c: PPOConfig) -> tuple[Tensor, dict[str, float]]:
    """Return the actor's loss and its statistics, token by token."""
    loss, total, tokens = 0.0, 0.0, sum(len(r) for _, r in episodes)
    entropy, approx_kl, clipped, ratios = 0.0, 0.0, 0, []
    for i, (p, r) in enumerate(episodes):
        for t, d in enumerate(distributions(new_actor, p, r, c.temperature)):
            ratio, a = (d[r[t]] - read.logprobs[i][t]).exp(), advantages[i][t]
            bounded = max(min(ratio.item(), 1 + c.clip_range), 1 - c.clip_range)
            is_free = ratio.item() * a <= bounded * a
            surrogate = ratio * a if is_free else torch.tensor(bounded * a)
            h = -(d.exp() * d).sum()
            penalty = 0.0
            if c.kl_in == "loss":
                penalty = KL_COEF * estimate(d[r[t]] - read.ref_logprobs[i][t], c.kl_kind)
            loss = loss + weight_of(r, c) * (-surrogate - c.entropy_coef * h + penalty)
            total += weight_of(r, c)
            entropy += h.item()
            approx_kl += ratio.item() - 1 - math.log(ratio.item())
            clipped += not is_free
            ratios.append(ratio.item())
    return loss / total, {"entropy": entropy / tokens, "approx_kl": approx_kl / tokens,
                          "clip_fraction": clipped / tokens, "ratio_max": max(ratios)}


def critic_side(new_critic: nn.Module, episodes: Episodes, values: list[list[float]],
                returns: list[list[float]], c: PPOConfig) -> tuple[Tensor, dict[str, float]]:
    """Return the critic's loss and its statistics, token by token."""
    loss, total, clipped, tokens = 0.0, 0.0, 0, sum(len(r) for _, r in episodes)
    for i, (p, r) in enumerate(episodes):
        for t in range(len(r)):
            v = new_critic(torch.tensor([p + r[:t]]))[0, -1].double()
            old, target, near = values[i][t], returns[i][t], v
            if c.value_clip_range:
                near = old + (v - old).clamp(-c.value_clip_range, c.value_clip_range)
            loss = loss + weight_of(r, c) * 0.5 * torch.maximum((v - target) ** 2,
                                                                (near - target) ** 2)
            total += weight_of(r, c)
            # within the range near and v are one value, but for rounding
            left = c.value_clip_range and abs(v.item() - old) > c.value_clip_range
            clipped += bool(left and (near - target) ** 2 > (v - target) ** 2)
    return loss / total, {"value_clip_fraction": clipped / tokens}


def common_stats(scores: list[float], rewards: list[list[float]], raw: list[list[float]],
                 read: Read, episodes: Episodes) -> dict[str, float]:
    """Return the statistics that need no critic."""
    n, tokens = len(episodes), sum(len(r) for _, r in episodes)
    log_ratios = [a - b for lp, lq in zip(*read) for a, b in zip(lp, lq)]
    flat = [a for row in raw for a in row]
    return {
        "score_mean": moments(scores)[0], "score_std": moments(scores)[1] ** 0.5,
        "kl": sum(log_ratios) / n, "kl_per_token": sum(log_ratios) / tokens,
        "reward_mean": sum(map(sum, rewards)) / n, "response_length": tokens / n,
        "cut_off": sum(r[-1] != EOS for _, r in episodes) / n,
        "advantage_mean": moments(flat)[0], "advantage_std": moments(flat)[1] ** 0.5}


def oracle(models: Four, new_actor: nn.Module, new_critic: nn.Module, c: PPOConfig,
           parts: int) -> Numbers:
    """Compute an iteration with a critic."""
    read = Read(logprobs_of(models.actor, EPISODES, c.temperature),
                logprobs_of(models.ref, EPISODES, c.temperature))
    values, scores = [], []
    with torch.no_grad():
        for p, r in EPISODES:
            values.append([models.critic(torch.tensor([p + r[:t]]))[0, -1].item()
                           for t in range(len(r))])
            raw_score = models.reward_model(torch.tensor([p + r]))[0, -1].item()
            scores.append((raw_score - SCALE[0]) / SCALE[1])
    rewards = rewards_of(final_scores(scores, EPISODES, c), read, c)
    raw = []
    for r, v in zip(rewards, values):
        n = len(r)
        delta = [r[t] + c.gamma * (v[t + 1] if t + 1 < n else 0.0) - v[t] for t in range(n)]
        raw.append([sum((c.gamma * c.gae_lambda) ** (k - t) * delta[k] for k in range(t, n))
                    for t in range(n)])
    returns = [[a + x for a, x in zip(row, v)] for row, v in zip(raw, values)]
    advantages = whitened(raw, c, parts)
    actor_loss, actor_stats = actor_side(new_actor, EPISODES, read, advantages, c)
    critic_loss, critic_stats = critic_side(new_critic, EPISODES, values, returns, c)
    flat_raw = [a for row in raw for a in row]  # returns - values
    flat_returns = [x for row in returns for x in row]
    stats = {"return_mean": moments(flat_returns)[0],
             "explained_variance": 1 - moments(flat_raw)[1] / moments(flat_returns)[1]}
    stats |= common_stats(scores, rewards, raw, read, EPISODES) | actor_stats | critic_stats
    return Numbers(rewards, advantages, returns, stats, actor_loss, critic_loss)


def compare(rollout: ppo.Rollout, stats: dict[str, float], expected: Numbers,
            trained: Sequence[tuple[nn.Module, nn.Module, ppo.Update, Tensor]]) -> None:
    """Hold an iteration against the oracle's numbers.

    trained: a model, its copy in float64, its loss, and what the oracle's copy lost.
    """
    mask = rollout.response_mask
    names = ["rewards", "advantages"] + ["returns"] * (expected.returns is not None)
    for name in names:
        found = getattr(rollout, name)
        for b in range(len(mask)):
            row = getattr(expected, name)[b]
            assert found[b][mask[b]].tolist() == pytest.approx(row, abs=2e-5), name
        assert found[~mask].abs().max() == 0
    parts_of: dict[str, list] = {}
    for model, model64, loss, expected_loss in trained:
        total = 0.0
        for rows in (torch.tensor([4, 1]), torch.tensor([0, 5, 3, 2])):  # two uneven micro-batches
            part, stats_of_part = loss(model, rollout.rows(rows))
            total = total + part / rollout.count
            for name, stat in stats_of_part.items():
                parts_of.setdefault(name, []).append(stat)
        assert total.item() == pytest.approx(expected_loss.item(), abs=2e-5)
        gradients = torch.autograd.grad(total, list(model.parameters()))
        gradients64 = torch.autograd.grad(expected_loss, list(model64.parameters()))
        for x, y in zip(gradients, gradients64):
            torch.testing.assert_close(x.double(), y.double(), atol=2e-5, rtol=1e-4)
    stats["ratio_max"] = max(parts_of.pop("ratio_max")).item()
    for name, parts in parts_of.items():
        stats[name] = sum(part.item() for part, _ in parts) / sum(n.item() for _, n in parts)
    for name, value in expected.stats.items():
        assert stats[name] == pytest.approx(value, abs=3e-5), name


SWITCHES = [
    {}, {"kl_kind": "k2"}, {"kl_kind": "k3"}, {"kl_kind": "abs"},
    {"kl_in": "loss", "kl_kind": "k2"}, {"kl_in": "loss", "kl_kind": "k3"},
    {"whiten_advantages": "off"}, {"whiten_advantages": "rank"},
    {"missing_eos": "override"}, {"missing_eos": "off"}, {"score_clip": 0.3},
    {"score_scale": "running"}, {"loss_average": "sequences", "entropy_coef": 0.1},
    {"entropy_coef": 0.1}, {"value_clip_range": 0.0}, {"temperature": 0.7},
    {"gamma": 0.9, "gae_lambda": 0.8}, {"clip_range": 0.05},
    # pairs that meet in one line of code
    {"kl_in": "loss", "kl_kind": "k2", "loss_average": "sequences"},
    {"kl_in": "loss", "kl_kind": "k3", "temperature": 0.7},
    {"score_clip": 0.3, "missing_eos": "override"}, {"score_clip": 0.3, "score_scale": "running"},
    {"temperature": 0.7, "entropy_coef": 0.1},
    {"whiten_advantages": "rank", "loss_average": "sequences"},
    {"value_clip_range": 0.0, "loss_average": "sequences"},
    {"gamma": 0.9, "whiten_advantages": "off", "kl_kind": "k3"},
]


@pytest.mark.line(1, 2, 3, 4, 5, 7, 8, 11, 12, 15, 16)
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_iteration_against_the_oracle(actor, critic, monkeypatch, switches):
    config = replace(PPOConfig(batch_size=6, minibatch_size=6, microbatch_size=4, eos_penalty=0.7),
                     **switches)
    models = Four(actor, critic, noisy(actor, 1, 0.02), noisy(critic, 2, 0.05))
    new_actor, new_critic = noisy(actor, 3, 0.05), noisy(critic, 4, 0.05)
    responses = [r for _, r in EPISODES]
    sampled = Generation(responses, [[0.0] * len(r) for r in responses])
    monkeypatch.setattr(episodes_module, "generate", lambda *args: sampled)
    rollout = collect(models, [p for p, _ in EPISODES], list(range(6)), config, 6, EOS, SCALE,
                      seed=0)
    rescale = RunningMoments().rescale if config.score_scale == "running" else ppo.identity
    rollout, stats = ppo.assign_credit(rollout, config, KL_COEF, ranks=2, rescale=rescale)
    actor64, critic64 = (copy.deepcopy(model).double() for model in (new_actor, new_critic))
    models64 = Four(*(copy.deepcopy(model).double() for model in models))
    expected = oracle(models64, actor64, critic64, config, parts=2)
    compare(rollout, stats, expected, [
        (new_actor, actor64, partial(ppo.actor_loss, config=config, kl_coef=KL_COEF),
         expected.actor_loss),
        (new_critic, critic64, partial(ppo.critic_loss, config=config), expected.critic_loss)])
    is_clipping = config.value_clip_range > 0
    assert stats["clip_fraction"] > 0, "or the test is too tame"
    assert (stats["value_clip_fraction"] > 0) == is_clipping, "or the test is too tame"


# ---------------------------------------------------------------------------------------------
# Advantages from groups: no critic

GROUPED = [  # two prompts with three responses each, of uneven lengths
    ([1, 5, EOS, 8], [9, 4, EOS]),
    ([1, 5, EOS, 8], [30, 31, 32, 33, 34, 35]),
    ([1, 5, EOS, 8], [EOS]),
    ([1, 6], [20]),
    ([1, 6], [0, 8, 0, EOS]),
    ([1, 6], [7, 7]),
]
SPREAD = [0.25, -1.25, 0.75, 1.5, 0.125, -0.5]
EQUAL = [0.25, -1.25, 0.75, 0.75, 0.75, 0.75]  # nothing to tell the second prompt's apart by


def group_oracle(actor: nn.Module, ref: nn.Module, new_actor: nn.Module, scores: list[float],
                 c: PPOConfig, parts: int) -> Numbers:
    """Compute an iteration whose advantages compare the three responses to a prompt."""
    read = Read(logprobs_of(actor, GROUPED, c.temperature),
                logprobs_of(ref, GROUPED, c.temperature))
    rewards = rewards_of(final_scores(scores, GROUPED, c), read, c)
    totals = [sum(row) for row in rewards]
    raw = []
    for i, (prompt, response) in enumerate(GROUPED):
        group = [j for j, (other, _) in enumerate(GROUPED) if other == prompt]
        if c.advantage == "leave_one_out":
            others = [totals[j] for j in group if j != i]
            advantage = totals[i] - sum(others) / len(others)
        else:
            mean, variance = moments([totals[j] for j in group])
            unbiased = variance * len(group) / (len(group) - 1)
            advantage = (totals[i] - mean) / (unbiased ** 0.5 + 1e-4)
        raw.append([advantage] * len(response))
    advantages = whitened(raw, c, parts)
    loss, actor_stats = actor_side(new_actor, GROUPED, read, advantages, c)
    stats = common_stats(scores, rewards, raw, read, GROUPED) | actor_stats
    return Numbers(rewards, advantages, None, stats, loss, None)


GROUP_SWITCHES = [
    {}, {"whiten_advantages": "off"}, {"whiten_advantages": "rank"},
    {"kl_in": "loss", "kl_kind": "k2"},
    {"kl_in": "loss", "kl_kind": "k3", "whiten_advantages": "off", "loss_average": "sequences"},
    {"missing_eos": "off", "kl_in": "loss", "kl_kind": "k2", "whiten_advantages": "off"},
    {"score_scale": "running", "missing_eos": "override"}, {"temperature": 0.7, "kl_kind": "k3"},
]


@pytest.mark.parametrize("scores", [SPREAD, EQUAL], ids=["spread", "equal"])
@pytest.mark.parametrize("advantage", ["group", "leave_one_out"])
@pytest.mark.parametrize("switches", GROUP_SWITCHES, ids=str)
def test_groups_against_the_oracle(actor, monkeypatch, advantage, switches, scores):
    config = replace(PPOConfig(batch_size=6, minibatch_size=6, microbatch_size=4, eos_penalty=0.7,
                               advantage=advantage, responses_per_prompt=3), **switches)
    ref, new_actor = noisy(actor, 1, 0.02), noisy(actor, 3, 0.05)
    responses = [r for _, r in GROUPED]
    sampled = Generation(responses, [[0.0] * len(r) for r in responses])
    monkeypatch.setattr(episodes_module, "generate", lambda *args: sampled)
    rollout = ppo.collect(ppo.Models(actor, ref), prompts_of([p for p, _ in GROUPED]),
                          list(range(6)), config, lambda *asked: torch.tensor(scores), 6, (EOS,), 0)
    rescale = RunningMoments().rescale if config.score_scale == "running" else ppo.identity
    rollout, stats = ppo.assign_credit(rollout, config, KL_COEF, ranks=2, rescale=rescale)
    assert rollout.values is None and rollout.returns is None
    assert not {"return_mean", "explained_variance"} & stats.keys()
    actor64, ref64, new64 = (copy.deepcopy(model).double() for model in (actor, ref, new_actor))
    expected = group_oracle(actor64, ref64, new64, scores, config, parts=2)
    compare(rollout, stats, expected, [
        (new_actor, new64, partial(ppo.actor_loss, config=config, kl_coef=KL_COEF),
         expected.actor_loss)])
    if scores == EQUAL and config.missing_eos == "off":
        assert rollout.advantages[3:].abs().max() == 0, "equal answers teach nothing, and no NaN"
