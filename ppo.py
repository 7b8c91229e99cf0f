"""ICE-GRT: proximal policy optimisation with actor, critic, reference and reward model.

One iteration, numbered as in the code below:

    1  sample a response to every prompt from the actor
    2  read log-probabilities (actor, reference), values (critic) and scores (reward model)
    3  rewards:     r_t = - kl_coef * kl_t,  plus the score at the last response token
    4  advantages:  delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1};  R_t = A_t + V_t
    5  whiten the advantages over the whole rollout
    6  epochs x minibatches of  actor:  - min(ratio A, clip(ratio, 1 - c, 1 + c) A)
                                critic: 0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)

Every per-token tensor is (B, T) and index t speaks of token t; `response_mask` is True exactly where the
policy sampled the token, its EOS included. Models and updates are handed in: nothing here knows of
ranks, optimizers or files. After step 2 every rank holds the rollout of all ranks (a few numbers per
token), so whitening, KL control and all statistics are global by construction.

Where the paper is silent or practice differs:
 - old log-probabilities come from the training forward, not from the sampler, so the first ratio is
   exactly 1; the sampler's own are compared with them in `rollout_logprob_diff`
 - the score is added at the EOS itself (TRL: one past it), or at the last token when the answer was cut off
 - advantages are whitened once, over the whole rollout of all ranks, not per rank or per micro-batch
 - the variance is the population's; the value loss has its factor 1/2; nothing is clamped silently
"""
from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Callable, Iterable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import generate, last_scores, token_logprobs, token_logprobs_and_entropy, token_values

Stats = dict[str, tuple[Tensor, Tensor] | Tensor]  # (sum, count): merged by adding; a bare tensor: by its maximum


CHOICES = {
    "kl_kind": ("k1", "k2", "k3", "abs"), "kl_in": ("reward", "loss"), "whiten_advantages": ("global", "rank", "off"),
    "score_scale": ("calibrated", "running", "none"), "missing_eos": ("subtract", "override", "off"),
    "loss_average": ("tokens", "sequences"), "critic_init": ("reward", "actor"),
}


@dataclass(frozen=True)
class PPOConfig:
    prompts: tuple[str, ...] = ()       # prompt files; none: the embedded world's training prompts
    in_domain_share: float = 1.0        # of the prompts about the domain (embedded world)
    iterations: int = 30                # rollouts, each followed by epochs * batch_size / minibatch_size updates
    batch_size: int = 128               # episodes per rollout, all ranks together
    minibatch_size: int = 32            # episodes per optimizer step, all ranks together
    microbatch_size: int = 64           # episodes per forward, per rank
    generation_batch: int = 1024        # episodes generated at once, per rank
    epochs: int = 2                     # passes over a rollout
    lr: float = 2e-4                    # actor's peak learning rate
    critic_lr: float = 1e-3             # critic's peak learning rate
    lr_end: float = 0.1                 # final learning rates, as a share of the peak (linear decay)
    warmup: float = 0.0                 # share of the iterations over which the learning rates rise
    weight_decay: float = 0.0           # AdamW's, on matrices
    max_grad_norm: float = 1.0          # the gradient's global norm is clipped to it
    temperature: float = 1.0            # of sampling and of every log-probability here
    top_k: int = 0                      # 0: off; a filter makes sampled and scored distributions differ
    top_p: float = 1.0                  # 1: off; likewise
    kl_coef: float = 0.3                # KL penalty per token, in reward units per nat
    kl_kind: str = "k1"                 # k1 | k2 | k3 | abs: estimator of the per-token KL
    kl_in: str = "reward"               # reward | loss: where the penalty acts; in the loss use k2, and no whitening, which would change kl_coef's unit
    kl_target: float = 0.0              # nats per response; above 0 kl_coef adapts to hold it
    kl_horizon: int = 10_000            # episodes over which the adaptive controller acts
    gamma: float = 1.0                  # discount per token
    gae_lambda: float = 0.95            # 1: Monte Carlo returns, 0: one-step differences
    clip_range: float = 0.2             # of the ratio
    value_clip_range: float = 0.2       # of the value, in reward units; 0: off
    whiten_advantages: str = "global"   # global | rank | off: the paper's advantage normalization, and over which episodes
    score_scale: str = "calibrated"     # calibrated | running | none: standardised on SFT samples, on all so far, or raw
    score_clip: float = 0.0             # bound on the scaled score; 0: off
    missing_eos: str = "subtract"       # subtract | override | off: what eos_penalty does to the score of a response cut off
    eos_penalty: float = 1.0            # that penalty [scaled reward units]; override makes the score its negative
    entropy_coef: float = 0.0           # bonus per nat of entropy in the actor's loss
    ptx_coef: float = 0.0               # weight of the SFT loss in the actor's loss (InstructGPT's PPO-ptx, on SFT data)
    loss_average: str = "tokens"        # tokens | sequences: what counts equally in a minibatch, each token or each response
    critic_init: str = "reward"         # reward | actor: the model whose weights the critic starts from
    critic_warmup: int = 0              # first iterations in which only the critic learns

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"ppo.{name}={getattr(self, name)!r}: use {', '.join(choices[:-1])} or {choices[-1]}")
        if self.kl_in == "loss" and self.kl_kind == "k1":
            raise ValueError("ppo.kl_in='loss' with ppo.kl_kind='k1': the expected gradient of k1 is zero, so it would do nothing; use k2")
        if self.batch_size % self.minibatch_size:
            raise ValueError(f"ppo.batch_size={self.batch_size} must be a multiple of ppo.minibatch_size={self.minibatch_size}")
        if self.temperature <= 0:
            raise ValueError("ppo.temperature must be above 0: PPO needs samples, not the greedy answer")


@dataclass(frozen=True)
class Rollout:
    """B episodes; all tensors (B, T) float32 unless said, 0 outside the response."""
    tokens: Tensor          # int64, prompt + response, right-padded
    attention_mask: Tensor  # bool, True = real token
    response_mask: Tensor   # bool, True = sampled by the policy
    logprobs: Tensor        # of the policy that sampled, by the training forward [nats]
    ref_logprobs: Tensor    # of the reference [nats]
    values: Tensor          # V(state before token t) [reward units]
    scores: Tensor          # (B,), calibrated unless the scale is "none", before clipping and penalties [reward units]
    cut_off: Tensor         # (B,) bool, True = ended without EOS
    sampler_logprobs: Tensor  # of the sampler's own, cached, forward [nats]
    rewards: Tensor | None = None     # after the KL penalty [reward units]
    advantages: Tensor | None = None  # whitened when asked for
    returns: Tensor | None = None     # raw advantages + values [reward units]
    weights: Tensor | None = None     # of each token in the losses' sums

    def map(self, change: Callable[[Tensor], Tensor]) -> Rollout:
        return replace(self, **{f.name: change(getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) is not None})

    def rows(self, index: Tensor) -> Rollout:
        """Return the episodes at index (B',) int64."""
        return self.map(lambda x: x[index])

    def to(self, device: torch.device) -> Rollout:
        return self.map(lambda x: x.to(device))

    @property
    def count(self) -> Tensor:
        """Terms in the losses' sums: response tokens, or responses if those count equally."""
        return self.weights.sum()


class Models(NamedTuple):
    """The four models of PPO; only actor and critic are ever trained."""
    actor: nn.Module
    critic: nn.Module
    ref: nn.Module
    reward_model: nn.Module


# ---------------------------------------------------------------------------------------------
# Masked statistics

def identity(x: Tensor) -> Tensor:
    return x


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Average x over True slots; 0 if there are none. `where`, not a product: NaN * 0 would be NaN."""
    return x.where(mask, 0.0).sum() / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, reduce: Callable[[Tensor], Tensor] = identity) -> Tensor:
    """Scale x to unit (population) variance over the True slots, and to mean 0 unless shift_mean is False.

    x: (B, T) float32.   mask: (B, T) bool.   reduce: sums a tensor over ranks when each holds a part.
    Returns: (B, T), exactly 0 where mask is False; a single valid slot gives 0, not NaN.
    """
    count, total = reduce(torch.stack((mask.sum().to(x.dtype), x.where(mask, 0.0).sum())))
    mean = total / count.clamp(min=1)
    variance = reduce((x - mean).square().where(mask, 0.0).sum()) / count.clamp(min=1)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean).where(mask, 0.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Return 1 - Var(returns - values) / Var(returns) over True slots: 1 perfect, 0 no better than a constant."""
    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)).square(), mask)
    return 1 - variance(returns - values) / variance(returns).clamp(min=1e-8)


# ---------------------------------------------------------------------------------------------
# 3: KL and rewards

def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Estimate KL(policy || reference) from sampled tokens.

    logprobs, ref_logprobs: (B, T) float32 [nats].   Returns: (B, T) float32 [nats].
    k1 is unbiased and may be negative, k2 has the right gradient as a loss, k3 is unbiased and never
    negative, abs is |k1|. Source: Schulman, "Approximating KL divergence", 2020.
    """
    log_ratio = logprobs - ref_logprobs
    match kind:
        case "k1": return log_ratio
        case "k2": return 0.5 * log_ratio.square()
        case "k3": return torch.expm1(-log_ratio) + log_ratio
        case "abs": return log_ratio.abs()
    raise ValueError(f"unknown KL estimator {kind!r}: use k1, k2, k3 or abs")


def last_response_index(response_mask: Tensor) -> Tensor:
    """Return (B,) int64: the column of each row's last response token."""
    columns = torch.arange(response_mask.size(1), device=response_mask.device)
    return columns.where(response_mask, -1).amax(1)


def shape_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float) -> Tensor:
    """Pay -kl_coef * kl at every response token, and the score at the last one.

    scores: (B,) float32 [reward units].   kl: (B, T) float32 [nats].   Returns: (B, T), 0 outside the response.
    Source: Ziegler et al. 2019, eq. 2, per token.
    """
    rewards = (-kl_coef * kl).where(response_mask, 0.0)
    return rewards.scatter_add(1, last_response_index(response_mask)[:, None], scores[:, None])


class AdaptiveKLController:
    """Steer kl_coef so that the KL per response stays near `target` nats (Ziegler et al. 2019, section 2.2)."""

    def __init__(self, init: float, target: float, horizon: int) -> None:
        self.kl_coef, self.target, self.horizon = init, target, horizon

    def update(self, kl: float, n_episodes: int) -> None:
        """kl: mean over all ranks' episodes of the KL summed over each response [nats]; n_episodes: of all ranks."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.kl_coef *= 1 + error * n_episodes / self.horizon


# ---------------------------------------------------------------------------------------------
# 4: advantages

def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Estimate advantages and returns.

    rewards, values: (B, T) float32.   response_mask: (B, T) bool, one run of True per row.
    Returns: (B, T) advantages and (B, T) returns = advantages + values, both 0 outside the response.
    The value after the last response token is 0: an episode that was cut off is treated as ended, as
    everywhere in RLHF; `eos_penalty` is where that is made unattractive.
    Source: Schulman et al. 2016, eq. 16.
    """
    rewards, values = rewards.where(response_mask, 0.0), values.where(response_mask, 0.0)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = rewards.new_zeros(rewards.size(0))
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # outside the response everything is zeroed, so nothing of the padding reaches the last real token
        next_advantage = (delta + gamma * gae_lambda * next_advantage).where(response_mask[:, t], 0.0)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, (advantages + values).where(response_mask, 0.0)


# ---------------------------------------------------------------------------------------------
# 6: losses

def token_weights(response_mask: Tensor, average: str) -> Tensor:
    """Return (B, T) float32, each token's weight in a loss that is divided by the sum of weights.

    "tokens": every response token counts 1, so long responses count more (OpenRLHF, verl, and the default here).
    "sequences": every response counts 1, shared by its tokens (so the 2019 code, whose responses had one length).
    """
    weights = response_mask.float()
    return weights if average == "tokens" else weights / weights.sum(1, keepdim=True).clamp(min=1)


def policy_loss(new_logprobs: Tensor, logprobs: Tensor, advantages: Tensor, response_mask: Tensor,
                clip_range: float, weights: Tensor | None = None) -> tuple[Tensor, Stats]:
    """Compute the clipped surrogate.

    All (B, T); weights: see `token_weights`, None: 1 for every response token.
    Returns the weighted sum over response tokens and stats as (sum, count). Source: Schulman et al. 2017, eq. 7.
    """
    weights = response_mask.float() if weights is None else weights
    # masked before anything is multiplied: a NaN of the padding would come back through the gradient, as 0 * NaN
    log_ratio, advantages = (new_logprobs - logprobs).where(response_mask, 0.0), advantages.where(response_mask, 0.0)
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    count = response_mask.sum()
    loss = -(torch.minimum(unclipped, clipped) * weights).sum()
    active = clipped < unclipped  # tokens that have no gradient any more
    approx_kl = torch.expm1(log_ratio) - log_ratio  # k3 of old || new
    return loss, {"policy_loss": (loss.detach(), weights.sum()), "clip_fraction": (active.sum(), count),
                  "approx_kl": (approx_kl.detach().sum(), count), "ratio_max": ratio.detach().where(response_mask, 0.0).amax()}


def value_loss(new_values: Tensor, values: Tensor, returns: Tensor, response_mask: Tensor,
               value_clip_range: float, weights: Tensor | None = None) -> tuple[Tensor, Stats]:
    """Compute the clipped squared error, 0.5 * max(...), summed over response tokens; 0 as range: no clipping.

    All (B, T) [reward units]; weights as in `policy_loss`. Source: OpenAI baselines ppo2; not in Schulman et al. 2017.
    """
    weights = response_mask.float() if weights is None else weights
    squared = (new_values - returns).where(response_mask, 0.0).square()  # masked first, as in policy_loss
    clipped = torch.zeros_like(response_mask)
    if value_clip_range > 0:
        near = values + (new_values - values).clamp(-value_clip_range, value_clip_range)
        squared_near = (near - returns).where(response_mask, 0.0).square()
        clipped = squared_near > squared
        squared = torch.maximum(squared, squared_near)
    count = response_mask.sum()
    loss = 0.5 * (squared * weights).sum()
    return loss, {"value_loss": (loss.detach(), weights.sum()), "value_clip_fraction": (clipped.sum(), count)}


def actor_loss(actor: nn.Module, batch: Rollout, config: PPOConfig, kl_coef: float) -> tuple[Tensor, Stats]:
    """Run the actor over a micro-batch; return `policy_loss` with the entropy bonus and, if it acts here, the KL penalty."""
    mask = batch.response_mask
    new_logprobs, entropy = token_logprobs_and_entropy(actor, batch.tokens, batch.attention_mask, mask, config.temperature)
    loss, stats = policy_loss(new_logprobs, batch.logprobs, batch.advantages, mask, config.clip_range, batch.weights)
    loss = loss - config.entropy_coef * (entropy * batch.weights).sum()
    if config.kl_in == "loss":
        kl = kl_penalty(new_logprobs, batch.ref_logprobs.where(mask, 0.0), config.kl_kind)
        loss = loss + kl_coef * (kl * batch.weights).sum()
    return loss, {**stats, "entropy": (entropy.detach().sum(), mask.sum())}


def critic_loss(critic: nn.Module, batch: Rollout, config: PPOConfig) -> tuple[Tensor, Stats]:
    """Run the critic over a micro-batch; return `value_loss`."""
    new_values = token_values(critic, batch.tokens, batch.attention_mask, batch.response_mask)
    return value_loss(new_values, batch.values, batch.returns, batch.response_mask, config.value_clip_range, batch.weights)


# ---------------------------------------------------------------------------------------------
# 1 and 2: the rollout

def pad_responses(prompts: list[list[int]], responses: list[list[int]], sampler_logprobs: list[list[float]],
                  device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lay episodes on a right-padded grid.

    Returns: tokens (B, T) int64, attention_mask and response_mask (B, T) bool, sampler log-probabilities (B, T).
    The masks come from the lengths, never from the ids: LLaMA has no pad token, and pad may equal EOS.
    """
    width = max(len(p) + len(r) for p, r in zip(prompts, responses))
    tokens = torch.zeros(len(prompts), width, dtype=torch.int64)
    attention_mask, response_mask = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens, dtype=torch.bool)
    logprobs = torch.zeros(len(prompts), width)
    for b, (prompt, response) in enumerate(zip(prompts, responses)):
        start, end = len(prompt), len(prompt) + len(response)
        tokens[b, :end] = torch.tensor(prompt + response)
        attention_mask[b, :end] = True
        response_mask[b, start:end] = True
        logprobs[b, start:end] = torch.tensor(sampler_logprobs[b])
    return tokens.to(device), attention_mask.to(device), response_mask.to(device), logprobs.to(device)


def merge(parts: list[Rollout]) -> Rollout:
    """Put the ranks' rollouts, in rank order, into one, padded to the widest."""
    width = max(part.tokens.size(1) for part in parts)

    def widen(x: Tensor) -> Tensor:
        return F.pad(x, (0, width - x.size(1))) if x.dim() == 2 else x

    names = [f.name for f in fields(Rollout) if getattr(parts[0], f.name) is not None]
    return Rollout(**{name: torch.cat([widen(getattr(part, name)) for part in parts]) for name in names})


@torch.no_grad()
def collect(models: Models, prompts: list[list[int]], rows: list[int], config: PPOConfig, max_new_tokens: int, eos_id: int,
            calibration: tuple[float, float], seed: int, gathered: Callable[[nn.Module], AbstractContextManager] = nullcontext,
            gather: Callable[[Rollout], list[Rollout]] = lambda rollout: [rollout]) -> Rollout:
    """Sample one response per prompt and read off what the four models say about it (steps 1 and 2).

    prompts: this rank's share, token ids.   rows: their global indices within the run, which seed the noise.
    calibration: mean and standard deviation of the reward model on the SFT policy.
    gathered: makes a sharded actor whole while it samples.   gather: hands over the rollouts of all ranks.
    Returns: the rollout of all ranks, without rewards.
    """
    actor, critic, ref, reward_model = models
    with gathered(actor):
        generation = generate(actor, prompts, max_new_tokens, config.temperature, config.top_k, config.top_p, eos_id, seed, rows,
                              config.generation_batch)
    device = next(actor.parameters()).device
    tokens, attention_mask, response_mask, sampler_logprobs = pad_responses(prompts, *generation, device)
    cut_off = torch.tensor([response[-1] != eos_id for response in generation.tokens], device=device)
    mean, std = calibration
    columns: dict[str, list[Tensor]] = {"logprobs": [], "ref_logprobs": [], "values": [], "scores": []}
    for part in torch.arange(len(prompts)).split(config.microbatch_size):
        episode = tokens[part], attention_mask[part]
        columns["logprobs"].append(token_logprobs(actor, *episode, response_mask[part], config.temperature))
        columns["ref_logprobs"].append(token_logprobs(ref, *episode, response_mask[part], config.temperature))
        columns["values"].append(token_values(critic, *episode, response_mask[part]))
        columns["scores"].append((last_scores(reward_model, *episode) - mean) / std)
    rollout = Rollout(tokens, attention_mask, response_mask, cut_off=cut_off, sampler_logprobs=sampler_logprobs,
                      **{name: torch.cat(parts) for name, parts in columns.items()})
    return merge(gather(rollout))


# ---------------------------------------------------------------------------------------------
# 3 to 6, put together

class RunningMoments:
    """Mean and variance of all scores so far (Chan et al. 1983): the other way to fix the reward's scale."""

    def __init__(self, count: float = 0.0, mean: float = 0.0, square_sum: float = 0.0) -> None:
        self.count, self.mean, self.square_sum = count, mean, square_sum

    def update(self, scores: Tensor) -> None:
        """Add the scores (B,) of a rollout of all ranks."""
        values = scores.double()
        n, shift = len(values), values.mean().item() - self.mean
        self.square_sum += (values - values.mean()).square().sum().item() + shift ** 2 * self.count * n / (self.count + n)
        self.mean += shift * n / (self.count + n)
        self.count += n

    def standardise(self, scores: Tensor) -> Tensor:
        return (scores - self.mean) / max((self.square_sum / max(self.count, 1)) ** 0.5, 1e-6)


def final_scores(rollout: Rollout, config: PPOConfig, moments: RunningMoments) -> Tensor:
    """Return (B,) float32: scores scaled, clipped, and changed where the response was cut off, in that order.

    A response without EOS is no answer yet: "subtract" lowers its score (TRL), "override" replaces it (torchtune, the
    2019 code); both before KL shaping.
    """
    scores = rollout.scores
    if config.score_scale == "running":
        moments.update(scores)
        scores = moments.standardise(scores)
    if config.score_clip:
        scores = scores.clamp(-config.score_clip, config.score_clip)
    match config.missing_eos:
        case "subtract": return scores - config.eos_penalty * rollout.cut_off
        case "override": return scores.masked_fill(rollout.cut_off, -config.eos_penalty)
    return scores


def assign_credit(rollout: Rollout, config: PPOConfig, kl_coef: float, ranks: int = 1,
                  moments: RunningMoments | None = None) -> tuple[Rollout, dict[str, float]]:
    """Turn scores and KL into rewards, advantages and returns (steps 3 to 5); also return the rollout's statistics.

    ranks: how many ranks drew the episodes, equal shares in order (for whitening by rank).   moments: of earlier rollouts.
    """
    mask = rollout.response_mask
    kl = kl_penalty(rollout.logprobs, rollout.ref_logprobs, config.kl_kind)
    rewards = shape_rewards(final_scores(rollout, config, moments or RunningMoments()), kl, mask, kl_coef if config.kl_in == "reward" else 0.0)
    raw, returns = gae(rewards, rollout.values, mask, config.gamma, config.gae_lambda)
    parts = {"global": 1, "rank": ranks}.get(config.whiten_advantages)  # "rank": what TRL does, and why its results depend on the machine
    advantages = torch.cat([whiten(*part) for part in zip(raw.tensor_split(parts), mask.tensor_split(parts))]) if parts else raw
    log_ratio = (rollout.logprobs - rollout.ref_logprobs).where(mask, 0.0)
    raw_mean = masked_mean(raw, mask)
    stats = {
        "score_mean": rollout.scores.mean(), "score_std": rollout.scores.std(correction=0),
        "kl": log_ratio.sum(1).mean(), "kl_per_token": masked_mean(log_ratio, mask),  # both k1, whatever kl_kind is
        "reward_mean": rewards.sum(1).mean(), "response_length": mask.sum(1).float().mean(),
        "cut_off": rollout.cut_off.float().mean(), "return_mean": masked_mean(returns, mask),
        "explained_variance": explained_variance(rollout.values, returns, mask),
        "advantage_mean": raw_mean, "advantage_std": masked_mean((raw - raw_mean).square(), mask).sqrt(),
        "rollout_logprob_diff": (rollout.logprobs - rollout.sampler_logprobs).abs().where(mask, 0.0).max()}
    rollout = replace(rollout, rewards=rewards, advantages=advantages, returns=returns, weights=token_weights(mask, config.loss_average))
    return rollout, {k: v.item() for k, v in stats.items()}


def learn(rollout: Rollout, config: PPOConfig, update_actor: Callable[[Iterable[Rollout]], dict[str, float]] | None,
          update_critic: Callable[[Iterable[Rollout]], dict[str, float]], seed: int,
          share: Callable[[Tensor, int], list[Tensor]] = lambda rows, size: list(rows.split(size))) -> list[dict[str, float]]:
    """Update actor and critic on the rollout, epochs x minibatches (step 6).

    update_actor, update_critic: take one optimizer step on the micro-batches given and return its statistics; no
        update_actor: only the critic learns.
    share: cuts a minibatch's rows, (minibatch_size,) int64, into this rank's micro-batches of at most `size` rows.
    Returns: the statistics of every optimizer step, in order; the first has ratio 1 by construction.
    """
    steps = []
    for epoch in range(config.epochs):
        order = torch.randperm(config.batch_size, generator=torch.Generator().manual_seed(seed * 1_000 + epoch))
        for minibatch in order.split(config.minibatch_size):
            batches = [rollout.rows(rows.to(rollout.tokens.device)) for rows in share(minibatch, config.microbatch_size)]
            steps.append({**(update_actor(batches) if update_actor else {}), **update_critic(batches)})
    assert len(steps) == config.epochs * config.batch_size // config.minibatch_size
    return steps
