"""ICE-Reward: rank several responses per prompt, learn a scalar from the rankings, fix its scale.

For one prompt with responses of scores s_1..s_G and an annotator's ranking (InstructGPT, eq. 1):

    loss = mean over pairs (i better than j) of  -log sigmoid(s_i - s_j)

All pairs of a prompt come from one forward and average to one term per prompt: shuffled as separate
examples they would be G(G-1)/2 almost equal gradient steps on the same texts, which overfits.

The paper credits "reward size scaling". It can be read in two ways, so both are switches: the
reward model has its own size (`dim`, `n_layers`, ... below, or its own weights), and its scores are
standardised on samples of the SFT policy (`calibrate`), so that kl_coef means the same for every
size.

A reward may also be a Python function of one's own: `--reward.function=FILE.py`, RewardFunction.
"""
from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Share, cut, pad
from formats import Prompt
from model import Transformer, finite, generate, last_scores


@dataclass(frozen=True)
class RewardConfig:
    data: tuple[str, ...] = ()          # ranked lists or pairs; none: what sample, annotate leave
    function: str = ""                  # FILE.py with score(prompt, response, answer)
    model: str = ""                     # model folder to start from; "": the SFT model
    dim: int = 0                        # own size, 0: the actor's; another size gets its own SFT
    n_layers: int = 0                   # likewise
    n_heads: int = 0                    # likewise; then as many key and value heads
    ffn_dim: int = 0                    # likewise
    sampled_prompts: int = 9_000        # prompts to draw responses for
    in_domain_share: float = 0.7        # of these prompts (embedded world)
    temperatures: tuple[float, ...] = (0.7, 1.0, 1.0, 1.0, 1.3)  # the paper's 5 settings; 0: greedy
    top_p: float = 1.0                  # nucleus for these responses
    generation_batch: int = 1024        # responses sampled at once, per rank
    noise: float = 0.05                 # deviation of a function's error as annotator [its units]
    holdout: float = 0.1                # share of the ranked prompts kept for measuring accuracy
    epochs: float = 2.0                 # passes over the rankings
    batch_size: int = 64                # prompts per optimizer step, all ranks together
    microbatch_size: int = 32           # prompts per forward, per rank
    microbatch_tokens: int = 0          # real tokens per forward, at most; 0: rows count alone
    lr: float = 1.5e-3                  # peak learning rate; 0: nothing is learnt
    lr_end: float = 0.1                 # last learning rate, as a share of the peak (linear decay)
    warmup: float = 0.05                # share of the steps over which the learning rate rises
    weight_decay: float = 0.1           # AdamW's, on matrices
    max_grad_norm: float = 1.0          # the gradient's global norm is clipped to it; 1e9: never


# ---------------------------------------------------------------------------------------------
# The ranking loss
#
# People cannot say how good an answer is, but which of two is better. Bradley and Terry's model
# turns that into a number: i beats j with probability sigmoid(s_i - s_j). Only differences within
# a prompt matter, so the scores' zero is arbitrary, and `calibrate` fixes it later.

class Batch(NamedTuple):
    """N prompts with up to G ranked responses each; row n * G + g is prompt n with its response g.

    tokens (N*G, T) int64; attention_mask (N*G, T) bool; ranks (N, G) float32, lower is better,
    NaN = no such response.
    """
    tokens: Tensor
    attention_mask: Tensor
    ranks: Tensor

    @property
    def count(self) -> Tensor:
        """Terms in the loss's sum: prompts with at least one pair."""
        return better(self.ranks).flatten(1).any(1).sum()


def better(ranks: Tensor) -> Tensor:
    """Return (N, G, G) bool: response i is ranked strictly better than j; ties and NaN: no pair."""
    # (N, G, 1) < (N, 1, G); a comparison with NaN is False either way
    return ranks[:, :, None] < ranks[:, None, :]


def margins_of(scores: Tensor) -> Tensor:
    """Return (N, G, G): the score of response i less that of j."""
    return scores[:, :, None] - scores[:, None, :]


def ranking_loss(scores: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Compare all pairs within each prompt.

    scores: (N, G) float32, higher is better.   ranks: (N, G), lower is better; ties give no pair.
    Returns: the sum over prompts of the mean -log sigmoid(margin) of their pairs [nats], and the
        number of prompts that have a pair. Source: Ouyang et al. 2022, eq. 1; G = 2: Bradley-Terry.
    """
    pairs = better(ranks)
    # logsigmoid, not the log of a sigmoid: that would be -inf for a pair that is far off.
    # (N, G, G) -> (N,): a prompt's pairs are averaged, so that one with many counts no more.
    losses = (-F.logsigmoid(margins_of(scores))).where(pairs, 0.0).sum((1, 2))
    n_pairs = pairs.sum((1, 2))
    return (losses / n_pairs.clamp(min=1)).sum(), (n_pairs > 0).sum()


def pair_accuracy(scores: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Return (correctly ordered pairs, pairs) over (N, G) scores and ranks; equal scores: half."""
    pairs = better(ranks)
    margins = margins_of(scores)
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
    return total, {
        "loss": (total.detach(), prompts),
        "accuracy": pair_accuracy(scores.detach(), batch.ranks),
        "score_mean": (scores.detach().where(present, 0.0).sum(), present.sum()),
    }


# ---------------------------------------------------------------------------------------------
# The responses that are ranked
#
# Several temperatures, as in the paper: careful answers and daring ones. If all five were alike
# there would be nothing to rank.

def sample(model: Transformer, prompts: Sequence[list[int]], rows: Sequence[int],
           config: RewardConfig, max_new_tokens: int, eos_ids: Sequence[int],
           seed: int) -> list[list[list[int]]]:
    """Draw len(config.temperatures) responses per prompt.

    rows: global index of each prompt, so that the noise does not depend on who draws it.
    Returns: for each prompt its responses' token ids, EOS included unless cut off.
    """
    # response g of prompt `row` is number row * size + g of all: no two share their noise
    size = len(config.temperatures)
    drawn = generate(model, [prompt for prompt in prompts for _ in range(size)], max_new_tokens,
                     list(config.temperatures) * len(prompts), top_p=config.top_p, eos_id=eos_ids,
                     seed=seed, rows=[row * size + g for row in rows for g in range(size)],
                     batch_size=config.generation_batch)
    return [drawn.tokens[start:start + size] for start in range(0, len(drawn.tokens), size)]


# ---------------------------------------------------------------------------------------------
# Scores, and their scale
#
# PPO weighs the score against kl_coef nats of KL. Two reward models of equal taste can differ by
# any factor in their scores; standardised, one unit is one deviation of what the SFT model says,
# and kl_coef means the same for both.

@torch.no_grad()
def model_scores(model: nn.Module, rows: Sequence[list[int]], microbatch_size: int,
                 microbatch_tokens: int = 0, share: Share = cut) -> list[float]:
    """Return a reward model's raw score of every row of ids, prompt and response."""
    scores = torch.zeros(len(rows))
    for part in share([len(row) for row in rows], microbatch_size, microbatch_tokens):
        tokens, attention_mask = pad([rows[i] for i in part])
        device = model.score.weight.device
        said = last_scores(model, tokens.to(device), attention_mask.to(device))
        scores[part] = finite(said).cpu()
    return scores.tolist()


class Scale(NamedTuple):
    """What makes scores comparable between reward models: PPO uses (score - mean) / std."""
    mean: float = 0.0
    std: float = 1.0


def calibrate(scores: Sequence[float]) -> Scale:
    """Return mean and standard deviation of a reward model's scores on samples of the SFT policy.

    A constant reward model is refused: it cannot rank anything.
    """
    values = torch.tensor(scores, dtype=torch.float64)
    std = values.std(correction=0).item()
    if not std > 1e-6:
        raise ValueError(f"the reward model gives every sample the same score (std {std:.1e}): "
                         "train it longer or check the rankings")
    return Scale(values.mean().item(), std)


class RunningMoments:
    """Mean and variance of all scores so far (Chan et al. 1983): the other way to fix the scale."""

    def __init__(self, count: float = 0.0, mean: float = 0.0, square_sum: float = 0.0) -> None:
        self.count = count
        self.mean = mean
        self.square_sum = square_sum

    def update(self, scores: Tensor) -> None:
        """Add the scores (B,) of a rollout of all ranks."""
        values = scores.double()
        n = len(values)
        shift = values.mean().item() - self.mean
        within = (values - values.mean()).square().sum().item()
        self.square_sum += within + shift ** 2 * self.count * n / (self.count + n)
        self.mean += shift * n / (self.count + n)
        self.count += n

    def rescale(self, scores: Tensor) -> Tensor:
        """Standardise scores by all so far, themselves included."""
        self.update(scores)
        variance = self.square_sum / self.count
        return (scores - self.mean) / max(variance ** 0.5, 1e-6)


def model_reward(model: nn.Module, scale: Scale, microbatch_size: int, microbatch_tokens: int = 0,
                 share: Share = cut) -> Callable[[Sequence[Prompt], Sequence[list[int]]], Tensor]:
    """Make a rollout.Score of a reward model: (prompts, response ids) -> (B,) float32."""
    def score(prompts: Sequence[Prompt], responses: Sequence[list[int]]) -> Tensor:
        rows = [[*prompt.ids, *ids] for prompt, ids in zip(prompts, responses, strict=True)]
        scores = model_scores(model, rows, microbatch_size, microbatch_tokens, share)
        return (torch.tensor(scores) - scale.mean) / scale.std
    return score


def function_reward(function: RewardFunction, decode: Callable[[Prompt, list[int]], str]
                    ) -> Callable[[Sequence[Prompt], Sequence[list[int]]], Tensor]:
    """Make a rollout.Score of a function of texts. decode: the text of a response to a prompt."""
    def score(prompts: Sequence[Prompt], responses: Sequence[list[int]]) -> Tensor:
        texts = [decode(prompt, ids) for prompt, ids in zip(prompts, responses, strict=True)]
        return torch.tensor(function(prompts, texts), dtype=torch.float32)
    return score


# ---------------------------------------------------------------------------------------------
# A person's function as a reward
#
# What can be computed need not be learnt: exact answers, unit tests, formats. Such a function
# ranks and judges, and pays PPO where there is no reward model (--ppo.reward). A mistake in it
# would surface hours later as NaN in a loss, so every number it gives is looked at at once.

class RewardFunction:
    """The functions of a Python file, as a reward.

    score(prompt: str, response: str, answer: str | None) -> float     higher is better
    score_batch(prompts, responses, answers) -> list of floats         in its place, if it is there
    metrics(prompt, response, answer) -> dict of floats                optional, for the evaluation
    answer: the reference answer where the data have one. What the file raises, and what is no
    finite number, becomes a ValueError of one line that shows prompt and response.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.module = load_module(self.path.absolute())
        names = [name for name in ("score", "score_batch") if hasattr(self.module, name)]
        # told now, before the hours of SFT that come before its first use
        if not names:
            raise ValueError(f"{path}: defines neither score(prompt, response, answer) nor "
                             "score_batch(prompts, responses, answers)")

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """Score a response to each prompt."""
        answers = [prompt.answer for prompt in prompts]
        if hasattr(self.module, "score_batch"):
            shown = [prompt.text for prompt in prompts]
            values = self.guarded("score_batch", shown, list(texts), answers)
            if not hasattr(values, "__len__") or len(values) != len(texts):
                raise ValueError(f"{self.path}: score_batch must return one number for each of the "
                                 f"{len(texts)} responses, got {str(values)[:80]}")
        else:
            values = [self.guarded("score", prompt.text, text, prompt.answer)
                      for prompt, text in zip(prompts, texts, strict=True)]
        return [self.number(value, prompt, text)
                for value, prompt, text in zip(values, prompts, texts, strict=True)]

    def metrics(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[dict[str, float]]:
        """Return what else the file measures of each response; {} each if it measures nothing."""
        if not hasattr(self.module, "metrics"):
            return [{} for _ in prompts]
        rows = []
        for prompt, text in zip(prompts, texts, strict=True):
            row = self.guarded("metrics", prompt.text, text, prompt.answer)
            if not isinstance(row, dict):
                raise ValueError(f"{self.path}: metrics must return a dict, got {row!r:.80}")
            rows.append({name: self.number(x, prompt, text) for name, x in row.items()})
        return rows

    def guarded(self, name: str, prompt: Any, response: Any, answer: Any) -> Any:
        """Call one of the file's functions; what it raises becomes one line."""
        try:
            return getattr(self.module, name)(prompt, response, answer)
        except Exception as error:  # it is the user's code: anything can come
            raise ValueError(f"{self.path}: {name} raised {describe(error)} for the prompt "
                             f"{clip(prompt)} and the response {clip(response)}") from None

    def number(self, value: Any, prompt: Prompt, text: str) -> float:
        """Return a value as a finite float."""
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{self.path}: gave {value!r:.80}, expected a finite number, for the "
                             f"prompt {clip(prompt.text)} and the response {clip(text)}")
        return number


def describe(error: Exception) -> str:
    """Write an exception on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def clip(text: Any, length: int = 120) -> str:
    """Show a text on one line, cut off when it is long."""
    shown = repr(text)
    return shown if len(shown) <= length else shown[:length] + "..."


@cache
def load_module(path: Path) -> ModuleType:
    """Run a Python file and return its module; ValueError in one line if it cannot be run."""
    # once per process, however many stages ask for it: the file may load a model of its own
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a Python file with score(prompt, response, "
                         "answer)")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None:
        raise ValueError(f"{path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path}: cannot be run: {describe(error)}") from None
    return module
