"""ICE-Reward: rank several responses per prompt, learn a scalar from the rankings, fix its scale.

For one prompt with responses of scores s_1..s_G and an annotator's ranking (InstructGPT, eq. 1):

    loss = mean over pairs (i better than j) of  -log sigmoid(s_i - s_j)

All pairs of a prompt come from one forward and average to one term per prompt: shuffled as separate
examples they would be G(G-1)/2 almost equal gradient steps on the same texts, which overfits.

The paper credits "reward size scaling". It can be read in two ways, so both are switches:
the reward model has its own size (`dim`, `n_layers`, ... below, or its own weights), and its scores are
standardised on samples of the SFT policy (`calibrate`), so that kl_coef means the same for every size.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Generation, Transformer, generate, last_scores


@dataclass(frozen=True)
class RewardConfig:
    data: tuple[str, ...] = ()          # ranked lists or preference pairs; none: the sample and annotate stages' rankings
    model: str = ""                     # model folder to start from; "": the SFT model
    dim: int = 0                        # the reward model's own size, 0: as the actor's; another size gets its own SFT first
    n_layers: int = 0                   # likewise
    n_heads: int = 0                    # likewise; when given, there are as many key and value heads
    ffn_dim: int = 0                    # likewise
    sampled_prompts: int = 6_000        # prompts to draw responses for
    in_domain_share: float = 0.7        # of these prompts (embedded world)
    temperatures: tuple[float, ...] = (0.7, 1.0, 1.0, 1.0, 1.3)  # one response per entry: the paper's 5 decoding settings
    top_p: float = 1.0                  # nucleus for these responses
    generation_batch: int = 1024        # prompts sampled at once, per rank
    noise: float = 0.1                  # standard deviation of the embedded annotator's error, in units of the rubric
    holdout: float = 0.1                # share of the ranked prompts kept for measuring accuracy
    epochs: float = 2.0                 # passes over the rankings
    batch_size: int = 64                # prompts per optimizer step, all ranks together
    microbatch_size: int = 32           # prompts per forward, per rank
    lr: float = 1.5e-3                  # peak learning rate
    lr_end: float = 0.1                 # final learning rate, as a share of the peak (linear decay)
    warmup: float = 0.05                # share of the steps over which the learning rate rises
    weight_decay: float = 0.1           # AdamW's, on matrices
    max_grad_norm: float = 1.0          # the gradient's global norm is clipped to it


class Batch(NamedTuple):
    """N prompts with up to G ranked responses each; row n * G + g is prompt n with its response g.

    tokens (N*G, T) int64; attention_mask (N*G, T) bool; ranks (N, G) float32, lower is better, NaN = no such response.
    """
    tokens: Tensor
    attention_mask: Tensor
    ranks: Tensor

    @property
    def count(self) -> Tensor:
        """Terms in the loss's sum: prompts with at least one pair."""
        return better(self.ranks).flatten(1).any(1).sum()


def better(ranks: Tensor) -> Tensor:
    """Return (N, G, G) bool: response i is ranked strictly better than j. Ties and NaN give no pair."""
    return ranks[:, :, None] < ranks[:, None, :]


def ranking_loss(scores: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Compare all pairs within each prompt.

    scores: (N, G) float32, higher is better.   ranks: (N, G), lower is better; ties give no pair.
    Returns: the sum over prompts of the mean -log sigmoid(margin) of their pairs [nats], and the number
        of prompts that have a pair. Source: Ouyang et al. 2022, eq. 1; G = 2 is Bradley-Terry.
    """
    pairs = better(ranks)
    margins = scores[:, :, None] - scores[:, None, :]  # (N, G, G)
    losses = (-F.logsigmoid(margins)).where(pairs, 0.0).sum((1, 2))
    n_pairs = pairs.sum((1, 2))
    return (losses / n_pairs.clamp(min=1)).sum(), (n_pairs > 0).sum()


def pair_accuracy(scores: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Return (correctly ordered pairs, pairs) over (N, G) scores and ranks; equal scores count half."""
    pairs = better(ranks)
    margins = scores[:, :, None] - scores[:, None, :]
    right = (margins > 0).float() + 0.5 * (margins == 0).float()
    return right.where(pairs, 0.0).sum(), pairs.sum()


def group_scores(model: nn.Module, batch: Batch) -> Tensor:
    """Return (N, G) float32: the score after each response's last real token."""
    return last_scores(model, batch.tokens, batch.attention_mask).view(batch.ranks.shape)


def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Return the summed ranking loss and stats as (sum, count)."""
    scores = group_scores(model, batch)
    total, prompts = ranking_loss(scores, batch.ranks)
    present = ~batch.ranks.isnan()
    return total, {"loss": (total.detach(), prompts), "accuracy": pair_accuracy(scores.detach(), batch.ranks),
                   "score_mean": (scores.detach().where(present, 0.0).sum(), present.sum())}


def sample(model: Transformer, prompts: list[list[int]], rows: Sequence[int], config: RewardConfig, max_new_tokens: int,
           eos_id: int, seed: int) -> list[list[list[int]]]:
    """Draw len(config.temperatures) responses per prompt.

    rows: global index of each prompt, so that the noise does not depend on who draws it.
    Returns: for each prompt its responses' token ids, EOS included unless cut off.
    """
    size = len(config.temperatures)
    columns: list[Generation] = [
        generate(model, prompts, max_new_tokens, temperature, top_p=config.top_p, eos_id=eos_id, seed=seed,
                 rows=[row * size + g for row in rows], batch_size=config.generation_batch)
        for g, temperature in enumerate(config.temperatures)]
    return [[column.tokens[i] for column in columns] for i in range(len(prompts))]


def calibrate(scores: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation of a reward model's scores on samples of the SFT policy.

    PPO then uses (score - mean) / std. A constant reward model is refused: it cannot rank anything.
    """
    values = torch.tensor(scores, dtype=torch.float64)
    std = values.std(correction=0).item()
    if not std > 1e-6:
        raise ValueError(f"the reward model gives every sample the same score (std {std:.1e}): train it longer or check the rankings")
    return values.mean().item(), std
