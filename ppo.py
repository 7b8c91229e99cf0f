"""ICE-GRT: proximal policy optimisation with actor, critic, reference and a reward.

One iteration, numbered as in the code below:

    1  sample responses to prompts from the actor                            (rollout.py)
    2  read log-probabilities (actor, reference), values (critic), scores    (rollout.py)
    3  rewards:     r_t = - kl_coef * kl_t,  plus the score at the last response token
    4  advantages:  delta_t = r_t + gamma V_{t+1} - V_t;   A_t = delta_t + gamma lambda A_{t+1}
                    R_t = A_t + V_t
    5  whiten the advantages over the whole rollout
    6  epochs x minibatches of  actor:  - min(ratio A, clip(ratio, 1 - c, 1 + c) A)
                                critic: 0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)

Every per-token tensor is (B, T), B episodes of T padded tokens, and index t speaks of token t.
`response_mask` is True exactly where the policy sampled the token, its EOS included. Models, score
and updates are handed in: nothing here knows of ranks, optimizers or files. After step 2 every rank
holds the rollout of all ranks, so whitening, KL control and all statistics are global.

Where the paper is silent or practice differs:
 1  old log-probabilities come from the training forward, so the first ratio is 1 (rollout.py)
 2  the score is added at the EOS itself (TRL: one past it), or at the last token when cut off
 3  advantages are whitened once, over the rollout of all ranks, not per rank or micro-batch
 4  the variance is the population's; the value loss has its factor 1/2; nothing is clamped silently
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Callable, Collection, Iterator, NamedTuple, Sequence

import torch
from torch import Tensor, nn

from data import Share, cut
from model import derive, token_logprobs_and_entropy, token_values
# steps 1 and 2, under this module's name too: ppo.collect, ppo.Models ...
from rollout import (Models, Rollout, SamplingConfig, Score, collect, masked_mean, masked_variance,
                     rollout_stats)

# A loss's statistics: (sum, count) are merged by adding, a bare tensor by taking the maximum.
Stats = dict[str, tuple[Tensor, Tensor] | Tensor]
# Takes optimizer step number n of an iteration on these micro-batches, returns its statistics.
Update = Callable[[Sequence[Rollout], int], dict[str, float]]


@dataclass(frozen=True)
class PPOConfig(SamplingConfig):
    prompts: tuple[str, ...] = ()       # prompt files; none: the embedded world's training prompts
    in_domain_share: float = 1.0        # of the prompts about the domain (embedded world)
    iterations: int = 30                # rollouts, each followed by epochs of updates
    batch_size: int = 128               # episodes per rollout, all ranks together
    minibatch_size: int = 32            # episodes per optimizer step, all ranks together
    epochs: int = 2                     # passes over a rollout
    lr: float = 4e-4                    # actor's peak learning rate; 0: it does not learn
    critic_lr: float = 1e-3             # critic's peak learning rate; 0: it does not learn
    lr_end: float = 0.1                 # last learning rate, as a share of the peak (linear decay)
    warmup: float = 0.0                 # share of the iterations in which learning rates rise
    weight_decay: float = 0.0           # AdamW's, on matrices
    max_grad_norm: float = 1.0          # the gradient's global norm is clipped to it; 1e9: never
    reward: str = "auto"                # what pays; auto: the reward model if there is one
    kl_coef: float = 0.15               # KL penalty per token, in reward units per nat; 0: none
    kl_kind: str = "k1"                 # estimator of the per-token KL
    kl_in: str = "reward"               # where the penalty acts; in the loss: k2, no whitening
    kl_target: float = 0.0              # nats per response; above 0 kl_coef adapts to hold it
    kl_horizon: int = 10_000            # episodes over which the adaptive controller acts
    advantage: str = "gae"              # estimator; group, leave_one_out: no critic, groups of 2+
    gamma: float = 1.0                  # discount per token (gae); 0: only the next reward counts
    gae_lambda: float = 0.95            # 1: Monte Carlo returns, 0: one-step differences (gae)
    clip_range: float = 0.2             # of the ratio
    value_clip_range: float = 0.2       # of the value, in reward units; 0: off
    whiten_advantages: str = "global"   # the paper's advantage normalization: over which episodes
    score_scale: str = "calibrated"     # standardised on SFT samples, on all so far, or raw
    score_clip: float = 0.0             # bound on the scaled score; 0: off
    missing_eos: str = "subtract"       # what eos_penalty does to the score of a response cut off
    eos_penalty: float = 1.0            # that penalty [reward units]; override: score = -penalty
    entropy_coef: float = 0.0           # bonus per nat of entropy in the actor's loss
    ptx_coef: float = 0.0               # weight of an SFT loss beside the actor's (PPO-ptx)
    loss_average: str = "tokens"        # what counts equally in a minibatch
    critic_init: str = "reward"         # the model whose weights the critic starts from
    critic_warmup: int = 0              # first iterations in which only the critic learns; 0: none

    def problems(self) -> Iterator[str]:
        """Yield what settings would do together: nothing, or something else than they say."""
        if self.kl_in == "loss" and self.kl_kind == "k1":
            yield ("--ppo.kl_in=loss with --ppo.kl_kind=k1: the expected gradient of k1 is zero, "
                   "so it would do nothing; use k2")
        for name in ("minibatch_size", "responses_per_prompt"):
            if self.batch_size % getattr(self, name):
                yield (f"--ppo.batch_size={self.batch_size} must be a multiple of "
                       f"--ppo.{name}={getattr(self, name)}")
        if self.responses_per_prompt < ADVANTAGES[self.advantage].least_responses:
            yield (f"--ppo.advantage={self.advantage} compares the responses to one prompt: set "
                   "--ppo.responses_per_prompt to 2 or more")
        # the controller may take a fifth of n / horizon off kl_coef, which must stay above 0
        if self.kl_target and self.batch_size >= 5 * self.kl_horizon:
            yield (f"--ppo.kl_horizon={self.kl_horizon} is too short for --ppo.batch_size="
                   f"{self.batch_size}: more than a fifth of it, or kl_coef changes its sign")

    @property
    def has_critic(self) -> bool:
        return ADVANTAGES[self.advantage].has_critic

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps of each trained model per iteration."""
        return self.epochs * self.batch_size // self.minibatch_size


def one_of(choices: Collection[str]) -> str:
    """Write choices as people list them: a, b or c."""
    *others, last = choices
    return f"{', '.join(others)} or {last}"


def identity(x: Tensor) -> Tensor:
    return x


# ---------------------------------------------------------------------------------------------
# 3: scores and KL become rewards
#
# The score speaks of a whole response and is paid once, at its end. The KL penalty is paid token by
# token: every word that the reference would hardly have said costs at once. Without it the policy
# finds what the reward model likes by mistake, and the score rises while the answers get worse.

# log_ratio = log pi - log pi_ref of sampled tokens -> KL(pi || pi_ref) [nats].
# Source: Schulman, "Approximating KL divergence", 2020.
KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda log_ratio: log_ratio,                            # unbiased, may be negative
    "k2": lambda log_ratio: 0.5 * log_ratio.square(),             # as a loss: the right gradient
    "k3": lambda log_ratio: torch.expm1(-log_ratio) + log_ratio,  # unbiased, never negative
    "abs": lambda log_ratio: log_ratio.abs(),
}


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Estimate KL(policy || reference) from sampled tokens: (B, T), (B, T) -> (B, T) [nats]."""
    if kind not in KL_ESTIMATORS:
        raise ValueError(f"unknown KL estimator {kind!r}: use {one_of(KL_ESTIMATORS)}")
    return KL_ESTIMATORS[kind](logprobs - ref_logprobs)


def last_response_index(response_mask: Tensor) -> Tensor:
    """Return (B,) int64: the column of each row's last response token."""
    columns = torch.arange(response_mask.size(1), device=response_mask.device)
    return columns.where(response_mask, -1).amax(1)


def shape_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float) -> Tensor:
    """Pay -kl_coef * kl at every response token, and the score at the last one.

    scores: (B,) float32 [reward units].   kl: (B, T) float32 [nats].
    Returns: (B, T), 0 outside the response. Source: Ziegler et al. 2019, eq. 2, per token.
    """
    rewards = (-kl_coef * kl).where(response_mask, 0.0)
    # (B,) -> (B, 1), added to (B, T) in the column of each row's last response token
    return rewards.scatter_add(1, last_response_index(response_mask)[:, None], scores[:, None])


# A response without EOS is no answer yet. What its score becomes, before KL shaping:
MISSING_EOS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "subtract": lambda scores, cut_off, penalty: scores - penalty * cut_off,             # TRL
    "override": lambda scores, cut_off, penalty: scores.masked_fill(cut_off, -penalty),  # 2019 code
    "off": lambda scores, cut_off, penalty: scores,
}


def final_scores(rollout: Rollout, config: PPOConfig,
                 rescale: Callable[[Tensor], Tensor] = identity) -> Tensor:
    """Return (B,) float32: scores scaled, clipped, and changed where cut off, in that order."""
    # the penalty comes last: clipped away, it would no longer tell the policy to stop
    scores = rescale(rollout.scores)
    if config.score_clip:
        scores = scores.clamp(-config.score_clip, config.score_clip)
    return MISSING_EOS[config.missing_eos](scores, rollout.cut_off, config.eos_penalty)


class AdaptiveKLController:
    """Steer kl_coef to a KL per response of `target` nats (Ziegler et al. 2019, section 2.2)."""

    def __init__(self, init: float, target: float, horizon: int) -> None:
        self.kl_coef = init
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, n_episodes: int) -> None:
        """kl: mean over all ranks' episodes of the KL summed over each response [nats]."""
        # proportional control; clipped, so that one wild rollout does not move the coefficient far
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.kl_coef *= 1 + error * n_episodes / self.horizon


# ---------------------------------------------------------------------------------------------
# 4 and 5: advantages
#
# How much better was a token than what was to be expected? GAE asks a critic what was to be
# expected of every prefix. The group estimators ask the other responses to the same prompt, which
# takes no critic but several samples, and tells nothing apart within a response.

def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float,
        gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Estimate advantages and returns with a critic.

    rewards, values: (B, T) float32.   response_mask: (B, T) bool, one run of True per row.
    Returns: (B, T) advantages and (B, T) returns = advantages + values, 0 outside the response.
    Source: Schulman et al. 2016, eq. 16.
    """
    # what stands in the padding may be anything, NaN included
    rewards = rewards.where(response_mask, 0.0)
    values = values.where(response_mask, 0.0)
    advantages = torch.zeros_like(rewards)
    # from the last token to the first, so that each finds its successor's numbers ready
    # V after the last token is 0: the episode is over, cut off or not, as everywhere in RLHF
    next_value = next_advantage = rewards.new_zeros(rewards.size(0))
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * gae_lambda * next_advantage
        # zeroed outside the response, so nothing of the padding reaches the last real token
        next_advantage = advantage.where(response_mask[:, t], 0.0)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, (advantages + values).where(response_mask, 0.0)


def gae_advantages(rewards: Tensor, values: Tensor, mask: Tensor,
                   config: PPOConfig) -> tuple[Tensor, Tensor]:
    return gae(rewards, values, mask, config.gamma, config.gae_lambda)


def group_advantages(rewards: Tensor, values: None, mask: Tensor,
                     config: PPOConfig) -> tuple[Tensor, None]:
    """Compare each response with the mean of its group, in the group's standard deviations.

    Every token of a response gets the same. Source: Shao et al. 2024 (GRPO, outcome supervision);
    the deviation has n - 1, as in TRL and verl.
    """
    # (B, T) -> (B,) -> (prompts, responses): the rows of one prompt stand together
    totals = rewards.where(mask, 0.0).sum(1).view(-1, config.responses_per_prompt)
    centred = totals - totals.mean(1, keepdim=True)
    # equal responses have deviation 0 and advantage 0: there is nothing to learn from them
    normed = centred / (totals.std(1, keepdim=True) + 1e-4)
    return normed.view(-1, 1).where(mask, 0.0), None  # (prompts, responses) -> (B, 1) -> (B, T)


def leave_one_out_advantages(rewards: Tensor, values: None, mask: Tensor,
                             config: PPOConfig) -> tuple[Tensor, None]:
    """Compare each response with the mean of the others of its group.

    Source: Ahmadian et al. 2024 (RLOO), eq. 8; the ratio stays per token, as in verl.
    """
    totals = rewards.where(mask, 0.0).sum(1).view(-1, config.responses_per_prompt)
    # a mean that held the response itself would be no baseline: it would take part of its merit
    others = (totals.sum(1, keepdim=True) - totals) / (config.responses_per_prompt - 1)
    return (totals - others).view(-1, 1).where(mask, 0.0), None


class Estimator(NamedTuple):
    """A way from rewards to advantages, and what it needs.

    estimate: (rewards, values or None, response_mask, config) -> advantages, and the returns that
        the critic learns or None; all (B, T).
    """
    estimate: Callable[..., tuple[Tensor, Tensor | None]]
    has_critic: bool = False
    least_responses: int = 1            # per prompt: 2 where they are compared with each other


ADVANTAGES = {
    "gae": Estimator(gae_advantages, has_critic=True),
    "group": Estimator(group_advantages, least_responses=2),
    "leave_one_out": Estimator(leave_one_out_advantages, least_responses=2),
}


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True,
           reduce: Callable[[Tensor], Tensor] = identity) -> Tensor:
    """Scale x to unit (population) variance over the True slots, and shift its mean to 0.

    x: (B, T) float32.   mask: (B, T) bool.   shift_mean: False keeps the mean.
    reduce: sums a tensor over ranks when each holds a part.
    Returns: (B, T), exactly 0 where mask is False; a single valid slot gives 0, not NaN.
    """
    # mean and variance from global sums: two all-reduces, and every rank whitens alike
    count, total = reduce(torch.stack((mask.sum().to(x.dtype), x.where(mask, 0.0).sum())))
    mean = total / count.clamp(min=1)
    variance = reduce((x - mean).square().where(mask, 0.0).sum()) / count.clamp(min=1)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean).where(mask, 0.0)


def whiten_by_rank(advantages: Tensor, mask: Tensor, ranks: int) -> Tensor:
    """Whiten each rank's episodes by themselves, as TRL does: results depend on the machine."""
    parts = zip(advantages.tensor_split(ranks), mask.tensor_split(ranks))
    return torch.cat([whiten(part, part_mask) for part, part_mask in parts])


WHITENING: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "global": lambda advantages, mask, ranks: whiten(advantages, mask),
    "rank": whiten_by_rank,
    "off": lambda advantages, mask, ranks: advantages,
}


# Each token's weight in a loss that is divided by the sum of weights, (B, T) bool -> float32.
# tokens: long responses count more (OpenRLHF, verl); sequences: every response counts 1.
TOKEN_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens": lambda mask: mask.float(),
    "sequences": lambda mask: mask.float() / mask.sum(1, keepdim=True).clamp(min=1),
}


def assign_credit(rollout: Rollout, config: PPOConfig, kl_coef: float, ranks: int = 1,
                  rescale: Callable[[Tensor], Tensor] = identity
                  ) -> tuple[Rollout, dict[str, float]]:
    """Turn scores and KL into rewards, advantages and returns (steps 3 to 5), with statistics.

    ranks: how many ranks drew the episodes, equal shares in order.   rescale: of the scores, (B,).
    """
    mask = rollout.response_mask
    # 3  what is paid where
    scores = final_scores(rollout, config, rescale)
    kl = kl_penalty(rollout.logprobs, rollout.ref_logprobs, config.kl_kind)
    rewards = shape_rewards(scores, kl, mask, kl_coef if config.kl_in == "reward" else 0.0)
    # 4  what was better than expected
    raw, returns = ADVANTAGES[config.advantage].estimate(rewards, rollout.values, mask, config)
    # 5  in units of its own spread: the step size then does not depend on the reward's scale
    advantages = WHITENING[config.whiten_advantages](raw, mask, ranks)
    weights = TOKEN_WEIGHTS[config.loss_average](mask)
    rollout = replace(rollout, rewards=rewards, advantages=advantages, returns=returns,
                      weights=weights)
    return rollout, {name: x.item() for name, x in rollout_stats(rollout, raw).items()}


# ---------------------------------------------------------------------------------------------
# 6: losses, and the passes over a rollout
#
# The episodes were sampled by the policy as it was. After the first optimizer step it is another
# one, and the ratio of the two corrects for that; clipping takes away the gain of moving a token's
# probability further than clip_range, so that several steps on the same episodes stay harmless.

def policy_loss(new_logprobs: Tensor, logprobs: Tensor, advantages: Tensor, response_mask: Tensor,
                clip_range: float, weights: Tensor | None = None) -> tuple[Tensor, Stats]:
    """Compute the clipped surrogate, summed over response tokens; also return stats.

    All (B, T); weights: see TOKEN_WEIGHTS, None: 1 for every response token.
    Source: Schulman et al. 2017, eq. 7.
    """
    weights = response_mask.float() if weights is None else weights
    # masked before anything is multiplied: a NaN of the padding would come back through the
    # gradient, as 0 * NaN
    log_ratio = (new_logprobs - logprobs).where(response_mask, 0.0)
    advantages = advantages.where(response_mask, 0.0)
    ratio = log_ratio.exp()  # new probability / old probability, 1 in the first step
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    # the smaller of the two: clipping may take a gain away, but never hides a loss
    loss = -(torch.minimum(unclipped, clipped) * weights).sum()

    count = response_mask.sum()
    is_clipped = clipped < unclipped  # these tokens have no gradient any more
    approx_kl = torch.expm1(log_ratio) - log_ratio  # k3 of KL(old || new)
    return loss, {
        "policy_loss": (loss.detach(), weights.sum()),
        "clip_fraction": (is_clipped.sum(), count),
        "approx_kl": (approx_kl.detach().sum(), count),
        "ratio_max": ratio.detach().where(response_mask, 0.0).amax(),
    }


def value_loss(new_values: Tensor, values: Tensor, returns: Tensor, response_mask: Tensor,
               value_clip_range: float, weights: Tensor | None = None) -> tuple[Tensor, Stats]:
    """Compute the clipped squared error, 0.5 * max(...), summed over response tokens.

    All (B, T) [reward units]; range 0: no clipping; weights as in `policy_loss`.
    Source: OpenAI baselines ppo2; not in Schulman et al. 2017.
    """
    weights = response_mask.float() if weights is None else weights
    squared = (new_values - returns).where(response_mask, 0.0).square()  # masked first, as above
    is_clipped = torch.zeros_like(response_mask)
    if value_clip_range > 0:
        # a value that moved further than the range is judged as if it had moved so far only
        moved = new_values - values
        near = values + moved.clamp(-value_clip_range, value_clip_range)
        squared_near = (near - returns).where(response_mask, 0.0).square()
        # within the range `near` is the new value but for rounding, which must not count
        is_clipped = (moved.abs() > value_clip_range) & (squared_near > squared)
        squared = torch.maximum(squared, squared_near)
    loss = 0.5 * (squared * weights).sum()
    return loss, {"value_loss": (loss.detach(), weights.sum()),
                  "value_clip_fraction": (is_clipped.sum(), response_mask.sum())}


def actor_loss(actor: nn.Module, batch: Rollout, config: PPOConfig,
               kl_coef: float) -> tuple[Tensor, Stats]:
    """Run the actor over a micro-batch: `policy_loss`, entropy bonus, KL penalty if in the loss."""
    mask = batch.response_mask
    new_logprobs, entropy = token_logprobs_and_entropy(
        actor, batch.tokens, batch.attention_mask, mask, config.temperature)
    loss, stats = policy_loss(new_logprobs, batch.logprobs, batch.advantages, mask,
                              config.clip_range, batch.weights)
    if config.entropy_coef:  # else its gradient, as large as the logits, is never made
        loss = loss - config.entropy_coef * (entropy * batch.weights).sum()
    # in the loss the penalty has a gradient of its own, and is not mixed into the advantages
    if config.kl_in == "loss":
        kl = kl_penalty(new_logprobs, batch.ref_logprobs.where(mask, 0.0), config.kl_kind)
        loss = loss + kl_coef * (kl * batch.weights).sum()
    return loss, {**stats, "entropy": (entropy.detach().sum(), mask.sum())}


def critic_loss(critic: nn.Module, batch: Rollout, config: PPOConfig) -> tuple[Tensor, Stats]:
    """Run the critic over a micro-batch; return `value_loss`."""
    mask = batch.response_mask
    new_values = token_values(critic, batch.tokens, batch.attention_mask, mask)
    return value_loss(new_values, batch.values, batch.returns, mask, config.value_clip_range,
                      batch.weights)


def learn(rollout: Rollout, config: PPOConfig, updates: Sequence[Update], seed: int,
          share: Share = cut) -> list[dict[str, float]]:
    """Update what is trained on the rollout, epochs x minibatches (step 6).

    updates: one per trained model, in order; each takes one optimizer step.
    share: cuts a minibatch, of which all ranks know all lengths, into this rank's micro-batches.
    Returns: the statistics of every optimizer step; the first has ratio 1 by construction.
    """
    steps: list[dict[str, float]] = []
    lengths = rollout.attention_mask.sum(1).cpu()  # (B,)
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(derive(seed, "epoch", epoch))
        # a fresh order every epoch, the same on every rank
        order = torch.randperm(config.batch_size, generator=generator)
        for minibatch in order.split(config.minibatch_size):
            # (minibatch_size,) -> this rank's micro-batches, each (microbatch_size,) or less
            parts = share(lengths[minibatch].tolist(), config.microbatch_size,
                          config.microbatch_tokens)
            batches = [rollout.rows(minibatch[part].to(rollout.tokens.device)) for part in parts]
            stats: dict[str, float] = {}
            for update in updates:
                stats.update(update(batches, len(steps)))
            steps.append(stats)
    assert len(steps) == config.steps_per_rollout
    return steps


# What each switch of PPOConfig can be: the keys of the dictionaries above, or plain names.
CHOICES: dict[str, Collection[str]] = {
    "reward": ("auto", "model", "function"), "kl_kind": KL_ESTIMATORS, "kl_in": ("reward", "loss"),
    "advantage": ADVANTAGES, "whiten_advantages": WHITENING,
    "score_scale": ("calibrated", "running", "none"), "missing_eos": MISSING_EOS,
    "loss_average": TOKEN_WEIGHTS, "critic_init": ("reward", "actor"),
}
