"""What the tests of PPO share: the four networks of the paper, prompts made of ids, a rollout."""
from typing import NamedTuple, Sequence

from torch import nn

import ppo
from data import Share, cut
from formats import Prompt
from reward import Scale, model_reward


class Four(NamedTuple):
    """Actor, critic, reference and reward model; a reward model is one kind of score to PPO."""
    actor: nn.Module
    critic: nn.Module | None
    ref: nn.Module
    reward_model: nn.Module


def prompts_of(ids: Sequence[Sequence[int]]) -> list[Prompt]:
    return [Prompt((), "a test", ids=tuple(row)) for row in ids]


def collect(four: Four, ids: Sequence[Sequence[int]], rows: Sequence[int], config: ppo.PPOConfig,
            max_new_tokens: int, eos_id: int, scale: tuple[float, float], seed: int,
            share: Share = cut, **calls) -> ppo.Rollout:
    """Collect a rollout. scale: mean and deviation that standardise the reward model's scores."""
    score = model_reward(four.reward_model, Scale(*scale), config.microbatch_size,
                         config.microbatch_tokens, share)
    models = ppo.Models(four.actor, four.ref, four.critic)
    return ppo.collect(models, prompts_of(ids), rows, config, score, max_new_tokens, (eos_id,), seed,
                       share=share, **calls)
