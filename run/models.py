"""The models of a run: which ones there are, what they answer, how they score."""
from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple, Sequence

import torch
from torch import nn

import data
import parallel
import ppo
import reward
from formats import Prompt
from formats.files import read_json
from model import ScalarModel, Transformer, derive, generate
from reward import RewardFunction, Scale
from run.folder import Run, load_model
from run.settings import world_shape
from run.sources import Ranked, Source, reward_batch

RUBRIC = Path(__file__).parents[1] / "microcosm" / "rubric.py"  # the embedded world's own judge


# ---------------------------------------------------------------------------------------------
# Models

def base_model(run: Run) -> nn.Module:
    """Return the model before any training: random weights on the embedded world."""
    if run.config.is_world:
        return parallel.build(Transformer, world_shape(run.config), run.config.seed, run.machine)
    return load_model(run, Path(run.config.model.path))


def policy_path(run: Run) -> Path:
    """Return where PPO starts, and what the reward is calibrated on: the SFT model, or --model."""
    if run.config.model.path and not run.result("sft"):
        return Path(run.config.model.path)
    return run.needed("sft", "sft")


def ppo_models(run: Run) -> ppo.Models:
    """Load actor, reference, and critic where the advantages need one."""
    config = run.config.ppo
    policy = policy_path(run)
    actor = load_model(run, policy)
    ref = load_model(run, policy, frozen=True)
    if not config.has_critic:
        return ppo.Models(actor, ref)
    reward_path = run.result("reward") if config.critic_init == "reward" else None
    critic = load_model(run, reward_path or policy, ScalarModel)
    if reward_path and config.score_scale != "none":
        # it starts in the units of the scores: (raw - mean) / std
        content = read_json(reward_path / "config.json")
        parallel.local_part(critic.score.weight).div_(content.get("score_std", 1.0))
        critic.offset = -content.get("score_mean", 0.0) / content.get("score_std", 1.0)
    return ppo.Models(actor, ref, critic)


# ---------------------------------------------------------------------------------------------
# Answers

def answer(run: Run, model: nn.Module, prompts: Sequence[Prompt], temperature: float,
           purpose: str = "greedy") -> list[list[int]]:
    """Return one response of `model` to every prompt, on every rank; each rank draws a part."""
    mine = run.machine.part(list(range(len(prompts))))
    with parallel.gathered(model), run.machine.autocast():
        drawn = generate(model, [list(prompts[i].ids) for i in mine],
                         run.config.data.max_response_tokens, temperature,
                         eos_id=run.end_ids, seed=derive(run.config.seed, purpose),
                         rows=mine, batch_size=run.config.ppo.generation_batch)
    return [ids for part in parallel.gather_objects(drawn.tokens) for ids in part]


def to_text(run: Run, prompt: Prompt, ids: Sequence[int]) -> str:
    """Return the text of a response to a prompt."""
    return data.decode_response(run.tokenizer, ids, run.config.data.template, prompt.messages)


def best_of(run: Run, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return, of several samples of the SFT model, the one that the reward likes best."""
    policy = load_model(run, policy_path(run), frozen=True)
    drawn = [answer(run, policy, prompts, 1.0, f"best of {i}")
             for i in range(run.config.eval.best_of)]
    scorer = open_reward(run)
    scores = [score_all(run, scorer.model, scorer.score, prompts, responses) for responses in drawn]
    # one column per prompt: its samples' scores and ids
    best = []
    for column_scores, column in zip(zip(*scores), zip(*drawn)):
        best.append(column[column_scores.index(max(column_scores))])
    return best


# ---------------------------------------------------------------------------------------------
# Scores

def ranker(run: Run) -> RewardFunction | None:
    """Return the function that ranks responses and judges answers; None: people do, or a model."""
    path = run.config.reward.function or (RUBRIC if run.config.is_world else "")
    return RewardFunction(path) if path else None


class Reward(NamedTuple):
    """What pays, and the model behind it: None for a function."""
    score: ppo.Score
    model: nn.Module | None


def pays_by_function(run: Run) -> bool:
    """Whether PPO is paid by a function; --ppo.reward=auto: by the reward model if there is one."""
    config = run.config
    is_left = run.result("reward") is None and config.reward.function
    return config.ppo.reward == "function" or config.ppo.reward == "auto" and bool(is_left)


def open_reward(run: Run) -> Reward:
    """Return what pays PPO."""
    if pays_by_function(run):
        return Reward(reward.function_reward(ranker(run), partial(to_text, run)), None)
    return reward_model(run)


def reward_model(run: Run) -> Reward:
    """Return the run's reward model."""
    config = run.config
    path = run.needed("reward", "reward")
    content = read_json(path / "config.json")
    scale = Scale(content.get("score_mean", 0.0), content.get("score_std", 1.0))
    if config.ppo.score_scale == "none":
        scale = Scale()
    model = load_model(run, path, ScalarModel, frozen=True)
    return Reward(scored_by(run, model, scale), model)


def scored_by(run: Run, model: nn.Module, scale: Scale) -> ppo.Score:
    """Return a reward model as what pays, in micro-batches of PPO's size."""
    config = run.config.ppo
    return reward.model_reward(model, scale, config.microbatch_size, config.microbatch_tokens,
                               run.machine.own_microbatches)


def score_all(run: Run, model: nn.Module | None, score: ppo.Score, prompts: Sequence[Prompt],
              responses: Sequence[list[int]]) -> list[float]:
    """Score all responses, each rank a part of them. model: the score's own, to be gathered."""
    mine = run.machine.part(list(range(len(prompts))))
    with parallel.gathered(model) if model else nullcontext(), run.machine.autocast():
        scores = score([prompts[i] for i in mine], [responses[i] for i in mine]).tolist()
    return [x for part in parallel.gather_objects(scores) for x in part]


@torch.no_grad()
def pair_accuracy(run: Run, model: nn.Module, rankings: Sequence[data.TokenizedRanking]) -> float:
    """Return the share of pairs that the model orders as the annotator, over all ranks' parts."""
    machine, config = run.machine, run.config.reward
    mine = machine.part(list(rankings))
    parts = data.cut([ranking.n_tokens for ranking in mine], config.microbatch_size,
                     config.microbatch_tokens)
    totals = torch.zeros(2, device=machine.device)  # right, pairs
    with parallel.gathered(model), machine.autocast():
        for part in parts:
            batch = reward_batch([mine[i] for i in part], machine.device)
            scores = reward.group_scores(model, batch)
            totals += torch.stack(reward.pair_accuracy(scores, batch.ranks))
    right, pairs = parallel.all_sum(totals).tolist()
    return right / max(pairs, 1)


def calibration(run: Run, source: Source, model: nn.Module, ranked: Sequence[Ranked],
                n: int = 512) -> Scale:
    """Return the scale of a reward model: its scores on samples of the policy that PPO starts from.

    On PPO's prompts; a run that has none yet uses those of the rankings. Always on samples: ranked
    responses may come from elsewhere, and kl_coef would then mean something else.
    """
    prompts = source.prompts_to_train()[:n]
    if not prompts:
        ids = [tuple(ranking.prompt) for ranking, _ in ranked[:n]]
        prompts = [Prompt((), "a ranking", ids=prompt_ids) for prompt_ids in ids]
    responses = answer(run, load_model(run, policy_path(run), frozen=True), prompts,
                       run.config.ppo.temperature, "calibration")
    score = scored_by(run, model, Scale())
    return reward.calibrate(score_all(run, model, score, prompts, responses))


def check_tokenizer(run: Run, path: Path) -> None:
    """Refuse a reward model that would read the actor's ids as other words."""
    theirs = data.open_tokenizer(path)
    if theirs.path.read_bytes() != run.tokenizer.path.read_bytes():
        raise ValueError(f"--reward.model={path}: its tokenizer {theirs.path} is not the actor's, "
                         f"{run.tokenizer.path}: actor and reward model must read the same ids")
