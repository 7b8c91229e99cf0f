"""ICE-GRT end to end: SFT, sampling, ranking, reward model, PPO, evaluation.

    python train.py                                 one process
    torchrun --nproc_per_node=8 train.py            the same experiment, sharded over 8
    python train.py --help                          every knob, its default and its unit

This file owns the optimizer step and the loop of every stage. The algorithms are in sft.py,
reward.py and ppo.py; they are handed models, batches and callables, and know nothing of ranks or
files. Settings, the run folder and the data of every stage are in run/.
"""
from __future__ import annotations

import sys
import time
from dataclasses import replace
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
from formats.files import print_any_text
from model import ScalarModel, Transformer, derive
from parallel import Machine
from reward import RunningMoments
from run import planner, stopping
from run.annotation import run_annotate, run_sample
from run.checkpoints import keep, restore
from run.comparison import compare
from run.continuing import stages_to_run
from run.folder import Run, load_model, save_model
from run.health import Watch, not_finite, told
from run.models import (base_model, calibration, check_tokenizer, open_reward, pair_accuracy,
                        policy_path, ppo_models, ranker)
from run.opening import in_stage, opened_run, restarted
from run.progress import show_iteration, tell_of_few_steps
from run.settings import check_ranks, parse_args, reward_shape, usage
from run.sources import Source, hold_out, open_source, reward_batch, sft_batch


# ---------------------------------------------------------------------------------------------
# The optimizer step
#
# SFT, reward model, actor and critic are all trained by the one function `update`. Whatever is
# particular to them stands in their loss; whatever is particular to the machine (how many ranks,
# how many micro-batches fit) must not show in the result. That is why every loss is a sum: sums of
# parts can be added up in any grouping, means of parts cannot.

def lr_at(step: int, steps: int, peak: float, end: float, warmup: float) -> float:
    """Rise linearly to `peak` over warmup * steps, then fall to end * peak at the last step."""
    rise = int(warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise  # step 0 already moves: a rate of 0 would waste it
    fallen = (step - rise) / max(steps - 1 - rise, 1)
    return peak * (1 - (1 - end) * fallen)


# PPO-ptx has two terms, the clipped surrogate on episodes and the SFT loss on demonstrations;
# everything else has one.
class Term(NamedTuple):
    """One term of a step's loss: weight * mean of `loss` over all its batches on all ranks."""
    loss: Callable[[nn.Module, Any], tuple[Tensor, ppo.Stats]]  # -> sum over its parts, and stats
    batches: Sequence[Any]  # this rank's micro-batches; batch.count is the number of parts
    weight: float = 1.0     # beside the other terms of the step

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
    # 1  the count of the whole step, before the first forward. Divided by counts of its own, a
    #    micro-batch of short answers would weigh as much as one of long answers.
    counts = parallel.all_sum(torch.stack([term.count() for term in terms]))
    # 2  gradients add up over the micro-batches; so do the statistics. FSDP reduces gradients over
    #    the ranks during each backward.
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
    # 3  the same numbers on every rank: what is logged describes the global batch
    totals = parallel.all_sum(torch.stack(list(sums.values())))
    result = {name: (total / count.clamp(min=1)).item()
              for name, (total, count) in zip(sums, totals)}
    for name, largest in maxima.items():
        result[name] = Largest(parallel.all_max(largest).item())
    # 4  the gradient's global norm. One NaN would poison every weight and Adam's moments for good,
    #    so a step that is not finite is not taken; a long one is shortened, its direction kept.
    gradients = [parallel.local_part(p.grad) for p in model.parameters()]
    norm = parallel.all_sum(parallel.square_sum(gradients, machine)).sqrt()
    if not torch.isfinite(norm):
        raise not_finite(model, optimizer, terms, machine, norm_name)
    # 1e-6 keeps a gradient of zero from being divided by zero
    shrink = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, shrink)
    for group in optimizer.param_groups:
        group["lr"] = lr
    # 5  the step itself, on float32 master weights whatever the dtype of the forward was
    optimizer.step()
    optimizer.zero_grad()
    return {**result, norm_name: norm.item()}


def microbatches(machine: Machine, examples: Sequence[Any], make_batch: Callable,
                 config: sft.SFTConfig | reward.RewardConfig | ppo.PPOConfig) -> list[Any]:
    """Return this rank's micro-batches of the examples of a step, which every rank knows."""
    parts = machine.microbatches([example.n_tokens for example in examples],
                                 config.microbatch_size, config.microbatch_tokens)
    return [make_batch([examples[i] for i in part], machine.device) for part in parts]


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
    # an epoch need not be a whole number of steps: the order of the next one simply follows
    steps = max(1, round(config.epochs * len(examples) / config.batch_size))
    start = restore(run, name, {"model": (model, optimizer)}).get("step", 0)
    tell_of_few_steps(run, name, len(examples), steps)
    watch = Watch(run, name)
    bar = run.bar(name, steps, start)
    for step in range(start, steps):
        began = time.perf_counter()
        # every rank knows the whole batch and takes its rows of it, cut into micro-batches;
        # the batch is a function of (seed, step), so a resumed run sees what it would have seen
        rows = data.batch_indices(len(examples), config.batch_size, step, run.config.seed)
        # rows of like length in a micro-batch: little padding
        chosen = sorted((examples[i] for i in rows), key=lambda example: example.length)
        batches = microbatches(machine, chosen, make_batch, config)

        lr = lr_at(step, steps, config.lr, config.lr_end, config.warmup)
        stats = update(model, optimizer, [Term(loss, batches)], lr, config.max_grad_norm, machine)

        # real tokens of all ranks: padding is no work done
        tokens = torch.stack([batch.attention_mask.sum() for batch in batches]).sum().float()
        stats["tokens_per_second"] = (parallel.all_sum(tokens).item()
                                      / (time.perf_counter() - began))
        run.log(name, step + 1, **stats, lr=lr)
        watch.look(step + 1, stats)
        shown = {key: f"{stats[key]:.3f}" for key in show}
        shown["tokens/s"] = tqdm.format_sizeof(stats["tokens_per_second"])
        bar.set_postfix(shown, refresh=False)
        bar.update()
        keep(run, name, step + 1, steps, run.config.checkpoint_every,
             {"model": (model, optimizer)}, {})
    bar.close()


# ---------------------------------------------------------------------------------------------
# ICE-Instruct: the base model learns to answer at all, from blended demonstrations.
# Then its answers are sampled and ranked: run/annotation.py. Whoever wants to know what PPO adds
# compares with SFT on the best of those answers, which needs neither reward model nor PPO.

def supervise(run: Run, model: nn.Module, examples: Sequence[data.TokenizedDialogue],
              config: sft.SFTConfig, name: str) -> None:
    """Fine-tune a model on dialogues and save it as `name`."""
    train_on(run, name, model, examples, sft_batch, sft.loss, config, show=("loss",))
    save_model(run, model, name)


def run_sft(run: Run, source: Source) -> None:
    """ICE-Instruct."""
    supervise(run, base_model(run), source.demonstrations(), run.config.sft, "sft")


def run_top(run: Run, source: Source) -> None:
    """Continue SFT on the top-ranked response of every ranking that holds a pair.

    Rejection sampling with people as the judge, on the rankings that the reward model learns from.
    """
    config = replace(run.config.sft, epochs=run.config.top.epochs, lr=run.config.top.lr)
    _, rest = hold_out(source.rankings(), run.config.reward.holdout)
    model = load_model(run, policy_path(run))
    supervise(run, model, [ranking.best for ranking, _ in rest], config, "top")


# ---------------------------------------------------------------------------------------------
# ICE-Reward: a scalar model learns from the rankings what people like.

def reward_start(run: Run, source: Source) -> Path:
    """Return the weights the reward model starts from.

    Given ones, the SFT model's, or those of an SFT of its own when it has its own size.
    """
    # the paper credits the size of the reward model: it may differ from the actor's, and then has
    # to learn the language first, as the actor did
    shape = reward_shape(run.config)
    if run.config.reward.model:
        check_tokenizer(run, Path(run.config.reward.model))
        return Path(run.config.reward.model)
    if shape is None:
        return policy_path(run)
    if not run.result("reward_sft"):
        model = parallel.build(Transformer, shape, run.config.seed, run.machine)
        supervise(run, model, source.demonstrations(), run.config.sft, "reward_sft")
    return run.needed("reward_sft", "reward")


def run_reward(run: Run, source: Source) -> None:
    """ICE-Reward."""
    config = run.config.reward
    # some rankings are kept to find out whether it learnt the annotator's taste or those texts
    held, rest = hold_out(source.rankings(), config.holdout)
    model = load_model(run, reward_start(run, source), ScalarModel)
    train_on(run, "reward", model, [ranking for ranking, _ in rest], reward_batch, reward.loss,
             config, show=("loss", "accuracy"))
    accuracy = {"accuracy": pair_accuracy(run, model, [ranking for ranking, _ in held])}
    if run.config.is_world:
        for name, is_general in (("in_domain", False), ("general", True)):
            part = [ranking for ranking, task in held if bool(task) == is_general]
            accuracy[name] = pair_accuracy(run, model, part)
    # its scores have an arbitrary zero and unit: fixed once, on what the SFT model says
    scale = calibration(run, source, model, rest)
    save_model(run, model, "reward", {"score_mean": scale.mean, "score_std": scale.std,
                                      "holdout_accuracy": accuracy})
    run.say(f"reward   : orders {100 * accuracy['accuracy']:.1f} % of held-out pairs as the "
            "annotator")


# ---------------------------------------------------------------------------------------------
# ICE-GRT: the policy looks for answers that the reward model likes, without leaving the SFT model
# further behind than kl_coef allows: the reward model is only right near what it was trained on.

class Learner(NamedTuple):
    """A model that PPO trains."""
    model: nn.Module                  # sharded, parameters in float32
    optimizer: torch.optim.Optimizer  # built after sharding: it steps shards


def run_ppo(run: Run, source: Source) -> None:
    """ICE-GRT."""
    config = run.config.ppo
    if config.top_k or config.top_p < 1:
        run.say("ppo: with top_k or top_p responses are drawn from another distribution than the "
                "one that is scored; ratios and KL are biased")
    # what is read and never trained: prompts, demonstrations (PPO-ptx), the score; the reference
    prompts = source.prompts_to_train()
    demonstrations = source.demonstrations() if config.ptx_coef else []
    score = open_reward(run).score
    models = ppo_models(run)
    # what is trained: the actor, and the critic where advantages need one, each with an optimizer
    # of its own, so that the large errors of a young critic do not move the actor
    trained = {"actor": Learner(models.actor, parallel.adamw(models.actor, config.weight_decay))}
    if models.critic:
        trained["critic"] = Learner(models.critic,
                                    parallel.adamw(models.critic, config.weight_decay))

    # what a resumed run has to know besides weights: how far it was, and what adapts on the way
    state = restore(run, "ppo", trained)
    start = state.get("step", 0)
    controller = ppo.AdaptiveKLController(state.get("kl_coef", config.kl_coef), config.kl_target,
                                          config.kl_horizon)
    moments = RunningMoments(**state.get("moments", {}))
    rescale = moments.rescale if config.score_scale == "running" else ppo.identity
    checkpoint_every = -(-run.config.checkpoint_every // config.steps_per_rollout)  # iterations
    watch = Watch(run, "ppo")
    bar = run.bar("ppo", config.iterations, start)

    for iteration in range(start, config.iterations):
        began = time.perf_counter()
        # 1, 2  episodes, and what the models say of them; afterwards all ranks hold all episodes
        episodes = episodes_of(run, prompts, iteration)
        rollout = roll_out(run, models, score, episodes, iteration)
        # 3, 4, 5  scores and KL become rewards, rewards become whitened advantages
        rollout, stats = ppo.assign_credit(rollout, config, controller.kl_coef, run.machine.world,
                                           rescale)
        rolled = time.perf_counter()
        # 6  epochs x minibatches of updates
        updates = updates_of(run, trained, iteration, controller.kl_coef, demonstrations)
        steps = ppo.learn(rollout, config, updates, derive(run.config.seed, "learn", iteration),
                          run.machine.microbatches)

        # by construction 1, whatever was learnt since
        stats["first_ratio_max"] = steps[0].get("ratio_max", 1.0)
        stats.update(summary(steps), kl_coef=controller.kl_coef,
                     seconds_rollout=rolled - began, seconds_update=time.perf_counter() - rolled)
        # kl_coef for the next iteration, from the KL of this one before its updates
        if config.kl_target > 0:
            controller.update(stats["kl"], config.batch_size)
        show_iteration(run, iteration + 1, episodes, rollout, stats, bar)
        watch.look(iteration + 1, stats)
        keep(run, "ppo", iteration + 1, config.iterations, checkpoint_every, trained,
             {"kl_coef": controller.kl_coef, "moments": vars(moments)})
    bar.close()
    save_model(run, models.actor, "ppo")


def episodes_of(run: Run, prompts: Sequence[Prompt], iteration: int) -> list[Prompt]:
    """Return the prompt of every episode of an iteration, all ranks' together."""
    size = run.config.ppo.responses_per_prompt
    # a pass over all prompts before any comes again, in an order that depends on the seed alone
    chosen = data.batch_indices(len(prompts), run.config.ppo.batch_size // size, iteration,
                                run.config.seed)
    # the episodes of one prompt stand together: advantages by group count on it
    return [prompts[i] for i in chosen for _ in range(size)]


def roll_out(run: Run, models: ppo.Models, score: ppo.Score, episodes: Sequence[Prompt],
             iteration: int) -> ppo.Rollout:
    """Draw a response to every prompt, each rank its part; return the episodes of all ranks."""
    config, machine = run.config.ppo, run.machine
    mine = machine.part(list(range(config.batch_size)))
    # an episode's number within the run: its noise depends on it, and on no rank or batch
    rows = [iteration * config.batch_size + i for i in mine]
    with machine.autocast():
        rollout = ppo.collect(
            models, [episodes[i] for i in mine], rows, config, score,
            run.config.data.max_response_tokens, run.end_ids,
            derive(run.config.seed, "rollout"), parallel.gathered,
            partial(gather_rollouts, machine), machine.own_microbatches)
    for model in (models.actor, models.critic):
        if model:  # a forward without backward leaves the root of a trained model gathered
            parallel.reshard(model)
    return rollout


def gather_rollouts(machine: Machine, rollout: ppo.Rollout) -> list[ppo.Rollout]:
    """Hand every rank the rollouts of all.

    Through the CPU: a pickled CUDA tensor would come back on its sender's device.
    """
    # a few numbers per token, against billions of weights: this is cheap
    parts = parallel.gather_objects(rollout.to(torch.device("cpu")))
    return [part.to(machine.device) for part in parts]


def updates_of(run: Run, trained: Mapping[str, Learner], iteration: int, kl_coef: float,
               demonstrations: Sequence[data.TokenizedDialogue]) -> list[ppo.Update]:
    """Return what takes the optimizer steps of an iteration, one function per trained model."""
    config = run.config.ppo
    lr, critic_lr = (lr_at(iteration, config.iterations, peak, config.lr_end, config.warmup)
                     for peak in (config.lr, config.critic_lr))
    updates: list[ppo.Update] = []
    # While the critic warms up it learns alone: advantages of a critic that knows nothing would
    # only shake the policy.
    if iteration >= config.critic_warmup or not config.has_critic:
        first = iteration * config.steps_per_rollout
        updates.append(partial(update_actor, run, trained["actor"], lr, kl_coef, demonstrations,
                               first))
    if config.has_critic:
        updates.append(partial(update_critic, run, trained["critic"], critic_lr))
    return updates


def update_actor(run: Run, learner: Learner, lr: float, kl_coef: float,
                 demonstrations: Sequence[data.TokenizedDialogue], first: int,
                 batches: Sequence[ppo.Rollout], step: int) -> dict[str, float]:
    """Take an optimizer step of the actor; with demonstrations the SFT loss joins in (PPO-ptx).

    first: the number, within the run, of the iteration's first optimizer step; step: within it.
    """
    config = run.config.ppo
    terms = [Term(partial(ppo.actor_loss, config=config, kl_coef=kl_coef), batches)]
    if demonstrations:
        # as many demonstrations as there are episodes, the next ones in their order
        rows = data.batch_indices(len(demonstrations), config.minibatch_size, first + step,
                                  run.config.seed)
        batches = microbatches(run.machine, [demonstrations[i] for i in rows], sft_batch, config)
        terms.append(Term(ptx_loss, batches, config.ptx_coef))
    stats = update(*learner, terms, lr, config.max_grad_norm, run.machine, "actor_grad_norm")
    return {**stats, "lr": lr}


def ptx_loss(model: nn.Module, batch: sft.Batch) -> tuple[Tensor, ppo.Stats]:
    """Return the SFT loss under a name of its own."""
    total, stats = sft.loss(model, batch)
    return total, {"ptx_loss": stats["loss"]}


def update_critic(run: Run, learner: Learner, lr: float, batches: Sequence[ppo.Rollout],
                  step: int) -> dict[str, float]:
    """Take an optimizer step of the critic."""
    config = run.config.ppo
    terms = [Term(partial(ppo.critic_loss, config=config), batches)]
    stats = update(*learner, terms, lr, config.max_grad_norm, run.machine, "critic_grad_norm")
    return {**stats, "critic_lr": lr}


# ---------------------------------------------------------------------------------------------
# The stages, in order, and the command
#
# A stage of one's own is a function of (run, source) and a line in STAGES: the flag --stages, its
# help, resuming and the evaluation follow from the table.

def run_eval(run: Run, source: Source) -> None:
    """Compare the models that the stages made, and the base they come from."""
    compare(run, source, [name for name, stage in STAGES.items() if stage.makes_policy])


class Stage(NamedTuple):
    """A part of the recipe. It is done when its result is in the run folder."""
    run: Callable[[Run, Source], None]  # where the loop stands
    result: str                 # a file or a model folder
    makes_policy: bool = False  # the result is a model that answers, so the evaluation asks it


STAGES = {
    "sft": Stage(run_sft, "sft", makes_policy=True),
    "sample": Stage(run_sample, "to_rank.jsonl"),
    "annotate": Stage(run_annotate, "ranked.jsonl"),
    "top": Stage(run_top, "top", makes_policy=True),
    "reward": Stage(run_reward, "reward"),
    "ppo": Stage(run_ppo, "ppo", makes_policy=True),
    "eval": Stage(run_eval, "eval.json"),
}


def main(args: Sequence[str]) -> None:
    """Run the stages asked for."""
    # 1  settings; whatever can be refused is refused before anything is touched
    config = parse_args(restarted(args), STAGES)
    if config.plan:
        return planner.main(config, planner.shapes(config))
    machine = parallel.start(config.dtype, config.parallel)
    check_ranks(config, machine.world)
    # 2  the run folder, which no other process works in, and what is made in it once
    results = {name: stage.result for name, stage in STAGES.items()}
    with opened_run(config, machine, results) as run:
        ranker(run)  # a reward function that cannot be loaded shows now, not when first asked
        # 3  what the evaluation will ask is put aside before any stage sees data
        source = open_source(run)
        parallel.from_main(source.choose_heldout)
        # 4  the stages, one after the other; each finds the results of those before it
        left = parallel.from_main(partial(stages_to_run, STAGES, run.config, run.out))
        if not left:
            run.say("nothing is left to do: every stage asked for has its result")
        for name in left:
            with in_stage(run, name), told(run, name):
                STAGES[name].run(run, source)
            if name == "sample" and not ranker(run):
                break  # people's turn: they fill in the ranks, the next command goes on
    # a signal that all got came from torchrun, which was asked to stop
    parallel.stop(launcher_too=all(parallel.gather_objects(bool(stopping.received))))


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(usage(__doc__, STAGES))
    else:
        print_any_text()
        try:
            main(sys.argv[1:])
        except (ValueError, OSError) as error:
            parallel.fail(f"train.py: error: {error}")
        except RuntimeError as error:
            if not parallel.is_lost(error):
                raise
            parallel.fail_alone("train.py: error: another process does not answer")
        except KeyboardInterrupt:
            parallel.leave(130)  # before there was anything to save
