"""ICE-GRT end to end: SFT, sampling, ranking, reward model, PPO, evaluation.

    python train.py                                 one process
    torchrun --nproc_per_node=8 train.py            the same experiment, sharded over 8
    python train.py --help                          every knob, its default and its unit

This file owns the optimizer step and the loop of every stage. The algorithms are in sft.py,
reward.py and ppo.py; they are handed models, batches and callables, and know nothing of ranks or
files. Settings, the run folder and the data of every stage are in run/.
"""
from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
import parallel
import ppo
import reward
import sft
from formats import Prompt
from model import ScalarModel, Transformer, derive
from parallel import Machine
from reward import RunningMoments, Scale
from run import planner
from run.annotation import run_annotate, run_sample
from run.comparison import compare
from run.folder import (Run, keep, load_model, open_folder, prepare_tokenizer, record_config,
                        restore, save_model, timings)
from run.models import (answer, base_model, check_tokenizer, open_reward, policy_path,
                        ppo_models, ranker, score_all, to_text)
from run.settings import Config, check_ranks, parse_args, reward_shape, usage
from run.sources import Ranked, Source, open_source, reward_batch, sft_batch


# ---------------------------------------------------------------------------------------------
# The optimizer step

def lr_at(step: int, steps: int, peak: float, end: float, warmup: float) -> float:
    """Rise linearly to `peak` over warmup * steps, then fall to end * peak at the last step."""
    rise = int(warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise
    fallen = (step - rise) / max(steps - 1 - rise, 1)
    return peak * (1 - (1 - end) * fallen)


class Term(NamedTuple):
    """One term of a step's loss: weight * mean of `loss` over all its batches on all ranks."""
    loss: Callable[[nn.Module, Any], tuple[Tensor, ppo.Stats]]  # -> sum over its parts, and stats
    batches: Sequence[Any]  # this rank's micro-batches; batch.count is the number of parts
    weight: float = 1.0

    def count(self) -> Tensor:
        return torch.stack([batch.count for batch in self.batches]).sum().float()


class Largest(float):
    """A statistic of which, over several steps, the largest is of interest and not the mean."""


def update(model: nn.Module, optimizer: torch.optim.Optimizer, terms: Sequence[Term], lr: float,
           max_grad_norm: float, machine: Machine, norm_name: str = "grad_norm"
           ) -> dict[str, float]:
    """Take one optimizer step on the sum of the terms.

    Every loss is a *sum*, which is divided by the count of the whole step, over all micro-batches
    and ranks: how the batch is cut up does not change the update. Returns the stats, averaged
    globally, and the gradient's norm as `norm_name`.
    """
    # 1  the count of the whole step, before the first forward
    counts = parallel.all_sum(torch.stack([term.count() for term in terms]))
    # 2  gradients add up over the micro-batches; so do the statistics
    sums: dict[str, Tensor] = {}     # name -> (2,): sum and count
    maxima: dict[str, Tensor] = {}   # name -> ()
    for term, count in zip(terms, counts):
        for batch in term.batches:
            with machine.autocast():
                loss_sum, stats = term.loss(model, batch)
            # FSDP averages gradients over the ranks: times their number undoes that
            (loss_sum * (term.weight * machine.world / count.clamp(min=1))).backward()
            for name, stat in stats.items():
                if isinstance(stat, tuple):
                    pair = torch.stack([x.float() for x in stat])
                    sums[name] = sums[name] + pair if name in sums else pair
                else:
                    maxima[name] = torch.maximum(maxima[name], stat) if name in maxima else stat
    # 3  the same numbers on every rank
    totals = parallel.all_sum(torch.stack(list(sums.values())))
    result = {name: (total / count.clamp(min=1)).item()
              for name, (total, count) in zip(sums, totals)}
    for name, largest in maxima.items():
        result[name] = Largest(parallel.all_max(largest).item())
    # 4  the gradient's global norm: refused if it is not finite, else clipped
    norm = parallel.all_sum(parallel.grad_square_sum(model)).sqrt()
    if not torch.isfinite(norm):
        raise ValueError(f"the gradient is not finite ({result}): lower the learning rate; "
                         "nothing was updated")
    shrink = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
        for parameter in group["params"]:
            parallel.local_part(parameter.grad).mul_(shrink)
    # 5
    optimizer.step()
    optimizer.zero_grad()
    return {**result, norm_name: norm.item()}


def summary(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average the statistics of several optimizer steps; of a Largest take the largest."""
    result = {}
    for name, first in steps[0].items():
        values = [step[name] for step in steps]
        result[name] = max(values) if isinstance(first, Largest) else sum(values) / len(values)
    return result


def train_on(run: Run, name: str, model: nn.Module, examples: Sequence[Any],
             make_batch: Callable[[Sequence[Any], torch.device], Any], loss: Callable,
             config: sft.SFTConfig | reward.RewardConfig, show: Sequence[str]) -> None:
    """Fit a model to examples: the loop of SFT and reward training.

    make_batch: turns some examples into a batch that `loss` reads.
    show: statistics for the progress bar.
    """
    machine = run.machine
    optimizer = parallel.adamw(model, config.weight_decay)
    steps = max(1, round(config.epochs * len(examples) / config.batch_size))
    start = restore(run, name, {"model": (model, optimizer)}).get("step", 0)
    bar = run.bar(name, steps, start)
    for step in range(start, steps):
        began = time.perf_counter()
        # the batch is a function of (seed, step), so a resumed run sees what it would have seen
        rows = data.batch_indices(len(examples), config.batch_size, step, run.config.seed)
        parts = machine.microbatches(torch.tensor(rows), config.microbatch_size)
        batches = [make_batch([examples[i] for i in part], machine.device) for part in parts]

        lr = lr_at(step, steps, config.lr, config.lr_end, config.warmup)
        stats = update(model, optimizer, [Term(loss, batches)], lr, config.max_grad_norm, machine)

        tokens = torch.stack([batch.attention_mask.sum() for batch in batches]).sum().float()
        stats["tokens_per_second"] = (parallel.all_sum(tokens).item()
                                      / (time.perf_counter() - began))
        run.log(name, step + 1, **stats, lr=lr)
        shown = {key: f"{stats[key]:.3f}" for key in show}
        shown["tokens/s"] = tqdm.format_sizeof(stats["tokens_per_second"])
        bar.set_postfix(shown, refresh=False)
        bar.update()
        keep(run, name, step + 1, steps, run.config.checkpoint_every,
             {"model": (model, optimizer)}, {})
    bar.close()


# ---------------------------------------------------------------------------------------------
# ICE-Instruct

def supervise(run: Run, source: Source, name: str, model: nn.Module) -> None:
    """Fine-tune a model on the demonstrations and save it as `name`."""
    train_on(run, name, model, source.demonstrations(), sft_batch, sft.loss, run.config.sft,
             show=("loss",))
    save_model(run, model, name)


def run_sft(run: Run, source: Source) -> None:
    """ICE-Instruct."""
    supervise(run, source, "sft", base_model(run))


# ---------------------------------------------------------------------------------------------
# ICE-Reward

def reward_start(run: Run, source: Source) -> Path:
    """Return the weights the reward model starts from.

    Given ones, the SFT model's, or those of an SFT of its own when it has its own size.
    """
    shape = reward_shape(run.config)
    if run.config.reward.model:
        check_tokenizer(run, Path(run.config.reward.model))
        return Path(run.config.reward.model)
    if shape is None:
        return policy_path(run)
    if not run.result("reward_sft"):
        model = parallel.build(Transformer, shape, run.config.seed, run.machine)
        supervise(run, source, "reward_sft", model)
    return run.needed("reward_sft", "reward")


def hold_out(ranked: Sequence[Ranked], share: float) -> tuple[list[Ranked], list[Ranked]]:
    """Split rankings, by prompt, into those for measuring accuracy and those to train on.

    Else a prompt that was drawn twice would be trained on and count as unseen.
    """
    prompts = list(dict.fromkeys(tuple(ranking.prompt) for ranking, _ in ranked))
    chosen = set(prompts[:max(1, round(share * len(prompts)))])
    held = [one for one in ranked if tuple(one.ranking.prompt) in chosen]
    rest = [one for one in ranked if tuple(one.ranking.prompt) not in chosen]
    if not rest:
        raise ValueError(f"{len(ranked)} rankings with a pair are too few to train on and to hold "
                         f"out {len(held)}")
    return held, rest


def run_reward(run: Run, source: Source) -> None:
    """ICE-Reward."""
    config = run.config.reward
    held, rest = hold_out(source.rankings(), config.holdout)
    model = load_model(run, reward_start(run, source), ScalarModel)
    train_on(run, "reward", model, [ranking for ranking, _ in rest], reward_batch, reward.loss,
             config, show=("loss", "accuracy"))
    accuracy = {"accuracy": pair_accuracy(run, model, [ranking for ranking, _ in held])}
    if run.config.is_world:
        for name, is_general in (("in_domain", False), ("general", True)):
            part = [ranking for ranking, task in held if bool(task) == is_general]
            accuracy[name] = pair_accuracy(run, model, part)
    scale = calibration(run, source, model, rest)
    save_model(run, model, "reward", {"score_mean": scale.mean, "score_std": scale.std,
                                      "holdout_accuracy": accuracy})
    run.say(f"reward   : orders {100 * accuracy['accuracy']:.1f} % of held-out pairs as the "
            "annotator")


@torch.no_grad()
def pair_accuracy(run: Run, model: nn.Module, rankings: Sequence[data.TokenizedRanking]) -> float:
    """Return the share of pairs that the model orders as the annotator, over all ranks' parts."""
    machine, size = run.machine, run.config.reward.microbatch_size
    mine = machine.part(list(rankings))
    totals = torch.zeros(2, device=machine.device)  # right, pairs
    with parallel.gathered(model), machine.autocast():
        for start in range(0, len(mine), size):
            batch = reward_batch(mine[start:start + size], machine.device)
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
    score = reward.model_reward(model, Scale(), run.config.ppo.microbatch_size)
    return reward.calibrate(score_all(run, model, score, prompts, responses))


# ---------------------------------------------------------------------------------------------
# ICE-GRT

class Learner(NamedTuple):
    """A model that PPO trains."""
    model: nn.Module
    optimizer: torch.optim.Optimizer


def run_ppo(run: Run, source: Source) -> None:
    """ICE-GRT."""
    config = run.config.ppo
    if config.top_k or config.top_p < 1:
        run.say("ppo: with top_k or top_p responses are drawn from another distribution than the "
                "one that is scored; ratios and KL are biased")
    prompts = source.prompts_to_train()
    demonstrations = source.demonstrations() if config.ptx_coef else []
    score = open_reward(run, config.reward).score
    models = ppo_models(run)
    trained = {"actor": Learner(models.actor, parallel.adamw(models.actor, config.weight_decay))}
    if models.critic:
        trained["critic"] = Learner(models.critic,
                                    parallel.adamw(models.critic, config.weight_decay))

    state = restore(run, "ppo", trained)
    start = state.get("step", 0)
    controller = ppo.AdaptiveKLController(state.get("kl_coef", config.kl_coef), config.kl_target,
                                          config.kl_horizon)
    moments = RunningMoments(**state.get("moments", {}))
    rescale = moments.rescale if config.score_scale == "running" else ppo.identity
    steps_per_rollout = config.epochs * config.batch_size // config.minibatch_size
    checkpoint_every = -(-run.config.checkpoint_every // steps_per_rollout)  # in iterations
    bar = run.bar("ppo", config.iterations, start)

    for iteration in range(start, config.iterations):
        began = time.perf_counter()
        # 1, 2  episodes, and what the models say of them
        rollout = roll_out(run, models, score, prompts, iteration)
        # 3, 4, 5  rewards and advantages
        rollout, stats = ppo.assign_credit(rollout, config, controller.kl_coef, run.machine.world,
                                           rescale)
        rolled = time.perf_counter()
        # 6  the updates
        peaks = {"lr": config.lr, "critic_lr": config.critic_lr}
        lrs = {name: lr_at(iteration, config.iterations, peak, config.lr_end, config.warmup)
               for name, peak in peaks.items()}
        first = iteration * steps_per_rollout
        updates = []
        if iteration >= config.critic_warmup or not models.critic:
            updates.append(partial(update_actor, run, trained["actor"], lrs["lr"],
                                   controller.kl_coef, demonstrations, first))
        if models.critic:
            updates.append(partial(update_critic, run, trained["critic"], lrs["critic_lr"]))
        steps = ppo.learn(rollout, config, updates, derive(run.config.seed, "learn", iteration),
                          run.machine.microbatches)

        stats.update(summary(steps), kl_coef=controller.kl_coef, **lrs,
                     seconds_rollout=rolled - began, seconds_update=time.perf_counter() - rolled)
        if config.kl_target > 0:
            controller.update(stats["kl"], config.batch_size)
        show_iteration(run, iteration + 1, rollout, stats, bar)
        keep(run, "ppo", iteration + 1, config.iterations, checkpoint_every, trained,
             {"kl_coef": controller.kl_coef, "moments": vars(moments)})
    bar.close()
    save_model(run, models.actor, "ppo")


def roll_out(run: Run, models: ppo.Models, score: ppo.Score, prompts: Sequence[Prompt],
             iteration: int) -> ppo.Rollout:
    """Draw the episodes of an iteration, each rank its part; return those of all ranks."""
    config, machine = run.config.ppo, run.machine
    size = config.responses_per_prompt
    chosen = data.batch_indices(len(prompts), config.batch_size // size, iteration,
                                run.config.seed)
    # the episodes of one prompt stand together: advantages by group count on it
    episodes = [prompts[i] for i in chosen for _ in range(size)]
    mine = machine.part(list(range(config.batch_size)))
    rows = [iteration * config.batch_size + i for i in mine]
    with machine.autocast():
        rollout = ppo.collect(
            models, [episodes[i] for i in mine], rows, config, score,
            run.config.data.max_response_tokens, run.tokenizer.eos_id,
            derive(run.config.seed, "rollout"), parallel.gathered,
            partial(gather_rollouts, machine))
    for model in (models.actor, models.critic):
        if model:  # a forward without backward leaves the root of a trained model gathered
            parallel.reshard(model)
    return rollout


def gather_rollouts(machine: Machine, rollout: ppo.Rollout) -> list[ppo.Rollout]:
    """Hand every rank the rollouts of all.

    Through the CPU: a pickled CUDA tensor would come back on its sender's device.
    """
    parts = parallel.gather_objects(rollout.to(torch.device("cpu")))
    return [part.to(machine.device) for part in parts]


def update_actor(run: Run, learner: Learner, lr: float, kl_coef: float,
                 demonstrations: Sequence[data.TokenizedDialogue], first: int,
                 batches: Sequence[ppo.Rollout], step: int) -> dict[str, float]:
    """Take an optimizer step of the actor; with demonstrations the SFT loss joins in (PPO-ptx).

    first: the number, within the run, of the iteration's first optimizer step; step: within it.
    """
    config = run.config.ppo
    terms = [Term(partial(ppo.actor_loss, config=config, kl_coef=kl_coef), batches)]
    if demonstrations:
        rows = data.batch_indices(len(demonstrations), config.minibatch_size, first + step,
                                  run.config.seed)
        parts = run.machine.microbatches(torch.tensor(rows), config.microbatch_size)
        terms.append(Term(ptx_loss, [sft_batch([demonstrations[i] for i in part],
                                               run.machine.device) for part in parts],
                          config.ptx_coef))
    return update(*learner, terms, lr, config.max_grad_norm, run.machine, "actor_grad_norm")


def ptx_loss(model: nn.Module, batch: sft.Batch) -> tuple[Tensor, ppo.Stats]:
    """Return the SFT loss under a name of its own."""
    total, stats = sft.loss(model, batch)
    return total, {"ptx_loss": stats["loss"]}


def update_critic(run: Run, learner: Learner, lr: float, batches: Sequence[ppo.Rollout],
                  step: int) -> dict[str, float]:
    """Take an optimizer step of the critic."""
    config = run.config.ppo
    terms = [Term(partial(ppo.critic_loss, config=config), batches)]
    return update(*learner, terms, lr, config.max_grad_norm, run.machine, "critic_grad_norm")


def show_iteration(run: Run, step: int, rollout: ppo.Rollout, stats: Mapping[str, float],
                   bar: tqdm, n: int = 2) -> None:
    """Log an iteration's numbers, append its first episodes to samples.jsonl, move the bar."""
    seconds = stats["seconds_rollout"] + stats["seconds_update"]
    tokens = rollout.attention_mask.sum().item()
    run.log("ppo", step, **stats, tokens_per_second=tokens / seconds)
    for b in range(min(n, len(rollout.scores))):
        mask = rollout.response_mask[b]
        prompt_ids = rollout.tokens[b][rollout.attention_mask[b] & ~mask].tolist()
        response_ids = rollout.tokens[b][mask].tolist()
        run.append("samples.jsonl", {
            "stage": "ppo", "step": step, "prompt": run.tokenizer.decode(prompt_ids),
            "response": to_text(run, Prompt((), ""), response_ids),
            "score": rollout.scores[b].item(), "cut_off": rollout.cut_off[b].item()})
    bar.set_postfix({"score": f"{stats['score_mean']:.2f}", "kl": f"{stats['kl']:.2f}",
                     "length": f"{stats['response_length']:.1f}"}, refresh=False)
    bar.update()


# ---------------------------------------------------------------------------------------------
# The stages, in order, and the command

def run_eval(run: Run, source: Source) -> None:
    """Compare the models that the stages made, and the base they come from."""
    compare(run, source, [name for name, stage in STAGES.items() if stage.makes_policy])


class Stage(NamedTuple):
    """A part of the recipe. It is done when its result is in the run folder."""
    run: Callable[[Run, Source], None]
    result: str
    makes_policy: bool = False  # the result is a model that answers, so the evaluation asks it


STAGES = {
    "sft": Stage(run_sft, "sft", makes_policy=True),
    "sample": Stage(run_sample, "to_rank.jsonl"),
    "annotate": Stage(run_annotate, "ranked.jsonl"),
    "reward": Stage(run_reward, "reward"),
    "ppo": Stage(run_ppo, "ppo", makes_policy=True),
    "eval": Stage(run_eval, "eval.json"),
}


def stages_to_run(config: Config, out: Path) -> list[str]:
    """Drop stages that are not needed; refuse to overwrite a result."""
    idle = ("sample", "annotate") if config.reward.data else ()
    stages = [stage for stage in config.stages if stage not in idle]
    done = [stage for stage in stages if (out / STAGES[stage].result).exists()]
    if config.resume:
        return [stage for stage in stages if stage not in done or stage == "eval"]
    if done and done != ["eval"]:
        raise ValueError(f"{out / STAGES[done[0]].result} exists: name a fresh --out, or continue "
                         "with --resume")
    return stages


def main(args: Sequence[str]) -> None:
    """Run the stages asked for."""
    config = parse_args(args, STAGES)
    if config.plan:
        return planner.main(config, planner.shapes(config))
    machine = parallel.start(config.dtype, config.parallel)
    check_ranks(config, machine.world)
    if config.out:
        stages_to_run(config, Path(config.out))
    out = parallel.from_main(partial(open_folder, config))
    parallel.from_main(lambda: prepare_tokenizer(config, out).path)
    run = Run(config, machine, out, prepare_tokenizer(config, out))
    if machine.is_main:
        record_config(config, out, machine.world)
    run.say(f"run folder: {out}   {machine.world} process(es) on {machine.device.type}, "
            f"{str(machine.dtype).removeprefix('torch.')}")
    source = open_source(run)
    parallel.from_main(source.choose_heldout)
    for name in parallel.from_main(lambda: stages_to_run(config, out)):
        began = time.perf_counter()
        STAGES[name].run(run, source)
        if machine.is_main:
            seconds = {**timings(run), name: round(time.perf_counter() - began, 2)}
            (out / "seconds.json").write_text(json.dumps(seconds))
        if name == "sample" and not ranker(run):
            break  # people's turn
    parallel.stop()


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(usage(__doc__, STAGES))
    else:
        try:
            main(sys.argv[1:])
        except (ValueError, OSError) as error:
            parallel.fail(f"train.py: error: {error}")
