"""ICE-GRT, steps 1 and 2: episodes, and what the models say of them.

    1  sample responses to prompts from the actor
    2  read log-probabilities (actor, reference), values (critic) and scores (reward)

Every per-token tensor is (B, T), B episodes of T padded tokens, and index t speaks of token t:

    tokens          <s>  Copy  cat  .    cat  </s>  pad  pad
    attention_mask   1    1    1    1     1    1     0    0
    response_mask    0    0    0    0     1    1     0    0      the policy sampled these
    logprobs         0    0    0    0   -0.1 -0.7    0    0      log pi(token t | tokens before t)
    values           0    0    0    0    0.3  0.4    0    0      V(tokens before t)
    rewards          0    0    0    0    -kl  score - kl  0      (step 3, in ppo.py)

Models and the score are handed in: nothing here knows of ranks, optimizers or files. After
`collect` every rank holds the rollout of all ranks (a few numbers per token), so all that ppo.py
computes from it is global by construction.

Where practice differs: old log-probabilities come from the training forward, not from the sampler,
so the first ratio of PPO is exactly 1; the sampler's own are compared with them in
`rollout_logprob_diff`.
"""
from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Callable, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Share, cut, pad
from formats import Prompt
from model import Generation, generate, token_logprobs, token_values

# A reward: prompts and the ids of their responses -> (B,) float32, higher is better.
Score = Callable[[Sequence[Prompt], Sequence[list[int]]], Tensor]


@dataclass(frozen=True)
class SamplingConfig:
    responses_per_prompt: int = 1       # episodes of one prompt: a group; they count in batch_size
    microbatch_size: int = 64           # episodes per forward, per rank
    microbatch_tokens: int = 0          # real tokens per forward, at most; 0: rows count alone
    generation_batch: int = 1024        # episodes generated at once, per rank
    temperature: float = 1.0            # of sampling and of every log-probability here
    top_k: int = 0                      # 0: off; a filter parts sampled and scored distributions
    top_p: float = 1.0                  # 1: off; likewise


@dataclass(frozen=True)
class Rollout:
    """B episodes; all tensors (B, T) float32 unless said, 0 outside the response."""
    tokens: Tensor            # int64, prompt + response, right-padded
    attention_mask: Tensor    # bool, True = real token
    response_mask: Tensor     # bool, True = sampled by the policy
    logprobs: Tensor          # of the policy that sampled, by the training forward [nats]
    ref_logprobs: Tensor      # of the reference [nats]
    scores: Tensor            # (B,), as the reward gives them [reward units]
    cut_off: Tensor           # (B,) bool, True = ended without EOS
    sampler_logprobs: Tensor  # of the sampler's own, cached, forward [nats]
    values: Tensor | None = None      # V(state before token t) [reward units]; None: no critic
    rewards: Tensor | None = None     # after the KL penalty [reward units]
    advantages: Tensor | None = None  # whitened when asked for
    returns: Tensor | None = None     # what the critic learns to foretell [reward units]
    weights: Tensor | None = None     # of each token in the losses' sums

    def columns(self) -> dict[str, Tensor]:
        """Return the fields that are filled in, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: x for name, x in found.items() if x is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> Rollout:
        return Rollout(**{name: change(x) for name, x in self.columns().items()})

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
    """The networks of PPO. Actor and critic are trained, the reference never is."""
    actor: nn.Module
    ref: nn.Module
    critic: nn.Module | None = None  # None: advantages come from groups


def lay_out(prompts: Sequence[list[int]], generation: Generation,
            device: torch.device) -> dict[str, Tensor]:
    """Lay episodes on a right-padded grid; return Rollout's fields about tokens, by name."""
    # (B,) lists of prompt + response -> (B, T), both masks too
    tokens, attention_mask = pad([p + r for p, r in zip(prompts, generation.tokens, strict=True)])
    # masks come from lengths, never from ids: LLaMA has no pad token, and pad may equal EOS
    starts = torch.tensor([len(prompt) for prompt in prompts])
    response_mask = attention_mask & (torch.arange(tokens.size(1)) >= starts[:, None])
    flat = torch.tensor([logprob for row in generation.logprobs for logprob in row])
    logprobs = torch.zeros(tokens.shape).masked_scatter(response_mask, flat)
    grid = {"tokens": tokens, "attention_mask": attention_mask, "response_mask": response_mask,
            "sampler_logprobs": logprobs}
    return {name: x.to(device) for name, x in grid.items()}


def merge(parts: Sequence[Rollout]) -> Rollout:
    """Put the ranks' rollouts, in rank order, into one, padded to the widest."""
    width = max(part.tokens.size(1) for part in parts)

    def widen(x: Tensor) -> Tensor:  # (B, t) -> (B, T); scores and cut_off are (B,)
        return F.pad(x, (0, width - x.size(1))) if x.dim() == 2 else x

    columns = [part.columns() for part in parts]
    names = columns[0]
    return Rollout(**{name: torch.cat([widen(own[name]) for own in columns]) for name in names})


@torch.no_grad()
def collect(models: Models, prompts: Sequence[Prompt], rows: Sequence[int], config: SamplingConfig,
            score: Score, max_new_tokens: int, eos_ids: Sequence[int], seed: int,
            gathered: Callable[[nn.Module], AbstractContextManager] = nullcontext,
            gather: Callable[[Rollout], list[Rollout]] = lambda rollout: [rollout],
            share: Share = cut) -> Rollout:
    """Sample a response to every prompt and read off what the models say of it (steps 1 and 2).

    prompts: this rank's share; with groups each prompt stands there responses_per_prompt times.
    rows: global index of each episode within the run; it seeds the episode's noise.
    gathered: makes a sharded actor whole while it samples.
    gather: hands over the rollouts of all ranks.
    share: cuts this rank's episodes into micro-batches, as many as every other rank's.
    Returns: the rollout of all ranks, without rewards.
    """
    # 1: sampling. Once gathered the actor is whole on every rank: generating with sharded weights
    # would gather every layer again for every token. Each rank goes at its own pace, without any
    # collective inside `gathered`.
    ids = [list(prompt.ids) for prompt in prompts]
    with gathered(models.actor):
        generation = generate(models.actor, ids, max_new_tokens, config.temperature, config.top_k,
                              config.top_p, eos_ids, seed, rows, config.generation_batch)
    device = next(models.actor.parameters()).device
    grid = lay_out(ids, generation, device)
    cut_off = torch.tensor([response[-1] not in eos_ids for response in generation.tokens])

    # 2: reading what the actor said with the forward that will train it, so that the first ratio
    # is 1 to the last bit; the reference for the KL; the critic for what was to be expected. All
    # ranks have equally many micro-batches, so sharded forwards keep step.
    lengths = grid["attention_mask"].sum(1).tolist()
    parts = share(lengths, config.microbatch_size, config.microbatch_tokens)
    read: dict[str, list[Tensor]] = {"logprobs": [], "ref_logprobs": []}
    if models.critic:
        read["values"] = []
    for part in parts:
        episode = grid["tokens"][part], grid["attention_mask"][part], grid["response_mask"][part]
        read["logprobs"].append(token_logprobs(models.actor, *episode, config.temperature))
        read["ref_logprobs"].append(token_logprobs(models.ref, *episode, config.temperature))
        if models.critic:
            read["values"].append(token_values(models.critic, *episode))
    back = torch.cat(parts).argsort()  # from the micro-batches' order to the prompts'
    columns = {name: torch.cat(said)[back] for name, said in read.items()}
    # a score sees texts as they are: no padding, and no EOS that was not sampled
    scores = score(prompts, generation.tokens).to(device)
    return merge(gather(Rollout(**grid, **columns, scores=scores, cut_off=cut_off.to(device))))


# ---------------------------------------------------------------------------------------------
# Masked statistics

def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Average x over True slots; 0 if there are none."""
    # `where`, not a product: a NaN of the padding times 0 would still be NaN
    return x.where(mask, 0.0).sum() / mask.sum().clamp(min=1)


def masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """Return the population variance of x over True slots."""
    return masked_mean((x - masked_mean(x, mask)).square(), mask)


def rollout_stats(rollout: Rollout, raw: Tensor) -> dict[str, Tensor]:
    """Describe a rollout that has its rewards. raw: (B, T), its advantages before whitening."""
    mask = rollout.response_mask
    log_ratio = (rollout.logprobs - rollout.ref_logprobs).where(mask, 0.0)
    sampler_diff = (rollout.logprobs - rollout.sampler_logprobs).abs().where(mask, 0.0)
    stats = {
        "score_mean": rollout.scores.mean(),
        "score_std": rollout.scores.std(correction=0),
        "kl": log_ratio.sum(1).mean(),  # per response, and k1, whatever kl_kind is
        "kl_per_token": masked_mean(log_ratio, mask),
        "reward_mean": rollout.rewards.sum(1).mean(),
        "response_length": mask.sum(1).float().mean(),
        "cut_off": rollout.cut_off.float().mean(),
        "advantage_mean": masked_mean(raw, mask),
        "advantage_std": masked_variance(raw, mask).sqrt(),
        "rollout_logprob_diff": sampler_diff.max(),
    }
    # only a critic foretells returns; advantages by group have none
    if rollout.returns is not None:
        unexplained = masked_variance(rollout.returns - rollout.values, mask)
        spread = masked_variance(rollout.returns, mask)
        stats["return_mean"] = masked_mean(rollout.returns, mask)
        # 1: the critic foretells every return; 0: no better than a constant
        stats["explained_variance"] = 1 - unexplained / spread.clamp(min=1e-8)
    return stats
