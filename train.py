"""ICE-GRT end to end: SFT, sampling, ranking, reward model, PPO, evaluation.

    python train.py                                 one process
    torchrun --nproc_per_node=8 train.py            the same experiment, sharded over 8
    python train.py --help                          every knob, its default and its unit

This file owns the machine: configuration, optimizer steps, schedules, checkpoints, logs and the loop of
every stage. The algorithms are in sft.py, reward.py and ppo.py; they are handed models, batches and
callables, and know nothing of ranks or files.
"""
from __future__ import annotations

import itertools
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
import microcosm
import parallel
import ppo
import reward
import sft
from eval import changes, summarise, world_values
from evaluation import report, statistics
from evaluation.speaking import score_rows
from formats.files import read_json, read_jsonl, write_jsonl
from model import ScalarModel, Transformer, generate
from parallel import Machine
from reward import RewardConfig
from run import planner
from run.settings import check_ranks, parse_args, reward_shape, usage, world_shape
from run.folder import (Run, keep, load_model, open_folder, prepare_tokenizer, record_config, restore, save_model, stages_to_run, timings)
from run.sources import (held_out_prompts, ppo_prompts, preference_items, rankings, reward_batch, sft_batch, sft_examples, training_prompts,
                         world_prompts)
from sft import SFTConfig


# ---------------------------------------------------------------------------------------------
# A run: its folder, its log, its optimizer steps


def lr_at(step: int, steps: int, peak: float, end: float, warmup: float) -> float:
    """Rise linearly to `peak` over warmup * steps, then fall linearly to end * peak at the last step."""
    rise = int(warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * (1 - (1 - end) * (step - rise) / max(steps - rise, 1))


class Term(NamedTuple):
    """One term of an optimizer step's loss: weight * mean of `loss` over all its batches on all ranks."""
    loss: Callable[[nn.Module, Any], tuple[Tensor, ppo.Stats]]  # (model, batch) -> sum over the batch's parts, and stats
    batches: Sequence[Any]                                      # this rank's micro-batches; batch.count is the number of parts
    weight: float = 1.0


def update(model: nn.Module, optimizer: torch.optim.Optimizer, terms: Sequence[Term], lr: float, max_grad_norm: float,
           machine: Machine, norm_name: str = "grad_norm") -> dict[str, float]:
    """Take one optimizer step on the sum of the terms.

    Every loss is a *sum*, which is divided by the count of the whole step, over all micro-batches and ranks:
    how the batch is cut up does not change the update. Returns the stats, averaged globally, and the gradient's
    norm as `norm_name`.
    """
    counts = parallel.all_sum(torch.stack([torch.stack([batch.count for batch in term.batches]).sum().float() for term in terms]))
    gathered_stats: dict[str, list] = {}
    for term, count in zip(terms, counts):
        for batch in term.batches:
            with machine.autocast():
                loss_sum, stats = term.loss(model, batch)
            (loss_sum * (term.weight * machine.world / count.clamp(min=1))).backward()  # FSDP averages gradients: undo that
            for name, stat in stats.items():
                gathered_stats.setdefault(name, []).append(stat)
    means = [name for name, parts in gathered_stats.items() if isinstance(parts[0], tuple)]
    sums = [torch.stack([torch.stack([x.float() for x in part]) for part in gathered_stats[name]]).sum(0) for name in means]
    sums = parallel.all_sum(torch.cat([parallel.grad_square_sum(model)[None], *sums]))
    norm = sums[0].sqrt()
    result = {name: (sums[1 + 2 * i] / sums[2 + 2 * i].clamp(min=1)).item() for i, name in enumerate(means)}
    for name in gathered_stats.keys() - set(means):
        result[name] = parallel.all_max(torch.stack(gathered_stats[name]).amax()).item()
    if not torch.isfinite(norm):
        raise ValueError(f"the gradient is not finite ({result}): lower the learning rate; nothing was updated")
    for group in optimizer.param_groups:
        group["lr"] = lr
        for parameter in group["params"]:
            parallel.local_part(parameter.grad).mul_((max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
    optimizer.step()
    optimizer.zero_grad()
    return {**result, norm_name: norm.item()}


def train_on(run: Run, name: str, model: nn.Module, examples: Sequence, make_batch: Callable[[Sequence], Any],
             loss: Callable, config: SFTConfig | RewardConfig, show: Sequence[str]) -> None:
    """Fit a model to examples: the loop of SFT and reward training.

    make_batch: turns some examples into a batch that `loss` reads.   show: statistics for the progress bar.
    """
    optimizer = parallel.adamw(model, config.weight_decay)
    steps = max(1, round(config.epochs * len(examples) / config.batch_size))
    start = restore(run, name, {"model": (model, optimizer)}).get("step", 0)
    bar = run.bar(name, steps, start)
    for step in range(start, steps):
        began = time.perf_counter()
        rows = torch.tensor(data.batch_indices(len(examples), config.batch_size, step, run.config.seed))
        batches = [make_batch([examples[i] for i in part]) for part in run.machine.microbatches(rows, config.microbatch_size)]
        lr = lr_at(step, steps, config.lr, config.lr_end, config.warmup)
        stats = update(model, optimizer, [Term(loss, batches)], lr, config.max_grad_norm, run.machine)
        tokens = parallel.all_sum(torch.tensor(float(sum(batch.attention_mask.sum() for batch in batches)))).item()
        stats["tokens_per_second"] = tokens / (time.perf_counter() - began)
        run.log(name, step + 1, **stats, lr=lr)
        bar.set_postfix({**{key: f"{stats[key]:.3f}" for key in show}, "tokens/s": tqdm.format_sizeof(stats["tokens_per_second"])}, refresh=False)
        bar.update()
        keep(run, name, step + 1, steps, run.config.checkpoint_every, {"model": (model, optimizer)}, {})
    bar.close()


# ---------------------------------------------------------------------------------------------
# The six stages

def supervise(run: Run, name: str, model: nn.Module) -> None:
    """Fine-tune a model on the demonstrations and save it as `name`."""
    train_on(run, name, model, sft_examples(run), partial(sft_batch, run), sft.loss, run.config.sft, show=("loss",))
    save_model(run, model, name)


def run_sft(run: Run) -> None:
    """ICE-Instruct."""
    supervise(run, "sft", base_model(run))


def run_sample(run: Run) -> None:
    """Draw several responses per prompt from the SFT model, for an annotator to rank."""
    config = run.config
    if config.is_world:
        items = preference_items(run)
        texts, tasks = [item.prompt for item in items], [item.task for item in items]
        prompts = world_prompts(run, items)
    else:
        records, prompts = ppo_prompts(run)
        prompts = prompts[:config.reward.sampled_prompts]
        texts, tasks = [record.messages[-1].content for record in records], [""] * len(prompts)
    model = load_model(run, run.needed("sft", "sft"))
    mine = run.machine.part(list(range(len(prompts))))
    bar = run.bar("sample", len(mine))
    drawn: list[list[list[int]]] = []
    with parallel.gathered(model):
        for i in range(0, len(mine), config.reward.generation_batch):
            rows = mine[i:i + config.reward.generation_batch]
            drawn += reward.sample(model, [prompts[row] for row in rows], rows, config.reward, config.data.max_response_tokens,
                                   run.tokenizer.eos_id, seed=config.seed * 10 + 1)
            bar.update(len(rows))
    bar.close()
    responses = [row for part in parallel.gather_objects(drawn) for row in part]
    if run.machine.is_main:
        write_jsonl(run.out / "to_rank.jsonl", (
            {"id": i, "task": task, "prompt": text, "responses": [run.tokenizer.decode(ids) for ids in group], "ranks": None,
             "prompt_ids": prompt, "response_ids": group}
            for i, (task, text, prompt, group) in enumerate(zip(tasks, texts, prompts, responses))))
    parallel.gather_objects(None)
    if not config.is_world:
        run.say(f"{len(responses)} prompts with {len(config.reward.temperatures)} responses each wait in {run.out / 'to_rank.jsonl'}.\n"
                f"Replace each \"ranks\": null by a list such as [2, 1, 3, 3, 5] (1 is best, equal numbers are ties), then run\n"
                f"  train.py --out={run.out} --stages=annotate,reward,ppo,eval")


def run_annotate(run: Run) -> None:
    """Turn the drawn responses into rankings: people's, or the embedded annotator's."""
    def rank() -> int:
        path, config = run.needed("to_rank.jsonl", "sample"), run.config
        rows = read_jsonl(path)
        if config.is_world:
            for row, item in zip(rows, preference_items(run), strict=True):
                row["ranks"] = row["ranks"] or microcosm.annotate(item.prompt, item.answer, row["responses"], config.seed, config.reward.noise)
        for number, row in enumerate(rows, 1):
            ranks = row.get("ranks")
            if not isinstance(ranks, list) or len(ranks) != len(row["responses"]) or not all(isinstance(r, (int, float)) for r in ranks):
                raise ValueError(f"{path}:{number}: \"ranks\" must be a list of {len(row['responses'])} numbers, 1 is best: rank this prompt first")
        write_jsonl(run.out / "ranked.jsonl", rows)
        return sum(len(set(row["ranks"])) > 1 for row in rows)
    informative = parallel.from_main(rank)
    run.say(f"annotate : {informative} prompts have a pair of differently ranked responses")


def reward_start(run: Run) -> Path:
    """Return the weights the reward model starts from: given ones, the SFT model, or its own SFT when it has its own size."""
    shape = reward_shape(run.config)
    if run.config.reward.model:
        return Path(run.config.reward.model)
    if shape is None:
        return run.needed("sft", "sft")
    if not run.result("reward_sft"):
        supervise(run, "reward_sft", parallel.build(Transformer, shape, run.config.seed, run.machine))
    return run.needed("reward_sft", "reward")


@torch.no_grad()
def measure_accuracy(run: Run, model: nn.Module, held_out: Sequence[data.TokenizedRanking], tasks: Sequence[str]) -> dict[str, float]:
    """Return the share of held-out pairs in the annotator's order: all, and by in-domain and general where that is known."""
    totals = torch.zeros(2, 2, device=run.machine.device)  # (general, in-domain) x (right, pairs)
    mine, size = run.machine.part(list(range(len(held_out)))), run.config.reward.microbatch_size
    with parallel.gathered(model), run.machine.autocast():
        for kind in (0, 1):
            rows = [i for i in mine if (tasks[i] == "") == kind]
            for i in range(0, len(rows), size):
                batch = reward_batch(run, [held_out[row] for row in rows[i:i + size]])
                totals[kind] += torch.stack(reward.pair_accuracy(reward.group_scores(model, batch), batch.ranks))
    parallel.all_sum(totals)
    shares = {"accuracy": (totals[:, 0].sum() / totals[:, 1].sum()).item()}
    if run.config.is_world:
        shares["in_domain"], shares["general"] = ((totals[k, 0] / totals[k, 1]).item() for k in (1, 0))
    return shares


def score_samples(run: Run, model: nn.Module, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[float]:
    """Return the reward model's raw scores of this rank's responses; the model is gathered by the caller."""
    with run.machine.autocast():
        rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        return score_rows(model, rows, run.config.ppo.microbatch_size)


def answer(run: Run, model: nn.Module, prompts: Sequence[list[int]], temperature: float, seed: int = 0) -> list[list[int]]:
    """Return one response of `model` to each of this rank's part of the prompts."""
    mine = run.machine.part(list(range(len(prompts))))
    with parallel.gathered(model), run.machine.autocast():
        return generate(model, [prompts[i] for i in mine], run.config.data.max_response_tokens, temperature,
                        eos_id=run.tokenizer.eos_id, seed=seed, rows=mine, batch_size=run.config.ppo.generation_batch).tokens


def calibration(run: Run, model: nn.Module, fallback: Sequence[data.TokenizedRanking]) -> tuple[float, float]:
    """Return mean and standard deviation of the scores of SFT samples on PPO's prompts; of ranked responses if there are no prompts."""
    config = run.config
    if config.is_world or config.ppo.prompts:
        prompts = training_prompts(run)[:512]
        responses = answer(run, load_model(run, run.needed("sft", "sft")), prompts, config.ppo.temperature, seed=config.seed * 10 + 2)
        prompts = run.machine.part(prompts)
    else:
        pairs = [(ranking.prompt, response) for ranking in fallback[:512] for response in ranking.responses]
        prompts, responses = (run.machine.part(list(part)) for part in zip(*pairs))
    with parallel.gathered(model):
        scores = score_samples(run, model, prompts, responses)
    return reward.calibrate([score for part in parallel.gather_objects(scores) for score in part])


def score_scale(run: Run) -> tuple[float, float]:
    """Return the mean and standard deviation that make scores comparable between reward models; (0, 1) if not wanted."""
    config = read_json(run.needed("reward", "reward") / "config.json")
    return (0.0, 1.0) if run.config.ppo.score_scale == "none" else (config.get("score_mean", 0.0), config.get("score_std", 1.0))


def run_reward(run: Run) -> None:
    """ICE-Reward."""
    config = run.config.reward
    ranked, tasks = rankings(run)
    kept = max(1, round(config.holdout * len(ranked)))
    if len(ranked) - kept < 1:
        raise ValueError(f"{len(ranked)} rankings with a pair are too few to train on and to hold out {kept}")
    start = reward_start(run)
    model = load_model(run, start, ScalarModel)
    train_on(run, "reward", model, ranked[kept:], partial(reward_batch, run), reward.loss, config, show=("loss", "accuracy"))
    accuracy = measure_accuracy(run, model, ranked[:kept], tasks[:kept])
    mean, std = calibration(run, model, ranked[kept:])
    save_model(run, model, "reward", {"score_mean": mean, "score_std": std, "holdout_accuracy": accuracy})
    run.say(f"reward   : orders {100 * accuracy['accuracy']:.1f} % of held-out pairs as the annotator")


def ppo_models(run: Run, scale: tuple[float, float]) -> ppo.Models:
    """Load actor, critic, reference and reward model; the last two are never trained."""
    sft_path, reward_path = run.needed("sft", "sft"), run.needed("reward", "reward")
    critic = load_model(run, reward_path if run.config.ppo.critic_init == "reward" else sft_path, ScalarModel)
    if run.config.ppo.critic_init == "reward":
        parallel.local_part(critic.score.weight).div_(scale[1])  # it starts in scaled units
    return ppo.Models(load_model(run, sft_path), critic, load_model(run, sft_path, frozen=True),
                      load_model(run, reward_path, ScalarModel, frozen=True))


def ptx_term(run: Run, examples: Sequence[data.TokenizedDialogue], step: int) -> Term:
    """Return PPO-ptx's extra term for optimizer step number `step`: the SFT loss on as many demonstrations as there are episodes."""
    def loss(model: nn.Module, batch: sft.Batch) -> tuple[Tensor, ppo.Stats]:
        total, stats = sft.loss(model, batch)
        return total, {"ptx_loss": stats["loss"]}
    config = run.config.ppo
    rows = torch.tensor(data.batch_indices(len(examples), config.minibatch_size, step, run.config.seed))
    parts = run.machine.microbatches(rows, config.microbatch_size)
    return Term(loss, [sft_batch(run, [examples[i] for i in part]) for part in parts], config.ptx_coef)


def run_ppo(run: Run) -> None:
    """ICE-GRT."""
    config, machine = run.config.ppo, run.machine
    if config.top_k or config.top_p < 1:
        run.say("ppo: with top_k or top_p responses are drawn from another distribution than the one that is scored; ratios and KL are biased")
    prompts, scale = training_prompts(run), score_scale(run)
    demonstrations = sft_examples(run) if config.ptx_coef else []
    models = ppo_models(run, scale)
    actor_optimizer, critic_optimizer = (parallel.adamw(model, config.weight_decay) for model in models[:2])
    trained = {"actor": (models.actor, actor_optimizer), "critic": (models.critic, critic_optimizer)}
    state = restore(run, "ppo", trained)
    controller = ppo.AdaptiveKLController(state.get("kl_coef", config.kl_coef), config.kl_target, config.kl_horizon)
    moments = ppo.RunningMoments(*state.get("moments", ()))
    optimizer_steps = config.epochs * config.batch_size // config.minibatch_size
    bar = run.bar("ppo", config.iterations, state.get("step", 0))
    for iteration in range(state.get("step", 0), config.iterations):
        began = time.perf_counter()
        rows = data.batch_indices(len(prompts), config.batch_size, iteration, run.config.seed)
        mine = machine.part(list(range(config.batch_size)))
        with machine.autocast():
            rollout = ppo.collect(models, [prompts[rows[i]] for i in mine], [iteration * config.batch_size + i for i in mine], config,
                                  run.config.data.max_response_tokens, run.tokenizer.eos_id, scale, seed=run.config.seed * 10 + 3,
                                  gathered=parallel.gathered, gather=partial(gather_rollouts, machine))
        rollout, stats = ppo.assign_credit(rollout, config, controller.kl_coef, machine.world, moments)
        rolled = time.perf_counter()
        lr, critic_lr = (lr_at(iteration, config.iterations, peak, config.lr_end, config.warmup) for peak in (config.lr, config.critic_lr))
        numbers = itertools.count(iteration * optimizer_steps)

        def update_actor(batches: Sequence[ppo.Rollout]) -> dict[str, float]:
            terms = [Term(partial(ppo.actor_loss, config=config, kl_coef=controller.kl_coef), batches)]
            if demonstrations:
                terms.append(ptx_term(run, demonstrations, next(numbers)))
            return update(models.actor, actor_optimizer, terms, lr, config.max_grad_norm, machine, "actor_grad_norm")

        def update_critic(batches: Sequence[ppo.Rollout]) -> dict[str, float]:
            terms = [Term(partial(ppo.critic_loss, config=config), batches)]
            return update(models.critic, critic_optimizer, terms, critic_lr, config.max_grad_norm, machine, "critic_grad_norm")

        steps = ppo.learn(rollout, config, update_actor if iteration >= config.critic_warmup else None, update_critic,
                          seed=run.config.seed * 100_000 + iteration, share=machine.microbatches)
        stats.update(summary(steps), kl_coef=controller.kl_coef, lr=lr, critic_lr=critic_lr,
                     seconds_rollout=rolled - began, seconds_update=time.perf_counter() - rolled)
        if config.kl_target > 0:
            controller.update(stats["kl"], config.batch_size)
        show_iteration(run, iteration + 1, rollout, stats, bar)
        every = max(1, run.config.checkpoint_every // optimizer_steps) if run.config.checkpoint_every else 0
        keep(run, "ppo", iteration + 1, config.iterations, every, trained, {"kl_coef": controller.kl_coef, "moments": list(vars(moments).values())})
    bar.close()
    save_model(run, models.actor, "ppo")


def gather_rollouts(machine: Machine, rollout: ppo.Rollout) -> list[ppo.Rollout]:
    """Hand every rank the rollouts of all, through the CPU: a pickled CUDA tensor would come back on its sender's device."""
    return [part.to(machine.device) for part in parallel.gather_objects(rollout.to(torch.device("cpu")))]


def summary(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average the statistics of an iteration's optimizer steps; of the largest ratio take the largest."""
    return {name: (max if name == "ratio_max" else statistics.mean)([step[name] for step in steps]) for name in steps[0]}


def show_iteration(run: Run, step: int, rollout: ppo.Rollout, stats: Mapping[str, float], bar: tqdm, n: int = 2) -> None:
    """Log an iteration's numbers, append its first episodes to samples.jsonl, move the bar."""
    tokens = rollout.attention_mask.sum().item()
    run.log("ppo", step, **stats, tokens_per_second=tokens / (stats["seconds_rollout"] + stats["seconds_update"]))
    if run.machine.is_main:
        with open(run.out / "samples.jsonl", "a", encoding="utf-8") as file:
            for b in range(min(n, len(rollout.scores))):
                mask = rollout.response_mask[b]
                prompt = run.tokenizer.decode(rollout.tokens[b][rollout.attention_mask[b] & ~mask].tolist())
                file.write(json.dumps({"stage": "ppo", "step": step, "prompt": prompt, "response": run.tokenizer.decode(rollout.tokens[b][mask].tolist()),
                                       "score": rollout.scores[b].item(), "cut_off": rollout.cut_off[b].item()}, ensure_ascii=False) + "\n")
    bar.set_postfix({"score": f"{stats['score_mean']:.2f}", "kl": f"{stats['kl']:.2f}", "length": f"{stats['response_length']:.1f}"}, refresh=False)
    bar.update()


def base_model(run: Run) -> nn.Module:
    """Return the model before any training: random weights on the embedded world."""
    config = run.config
    return parallel.build(Transformer, world_shape(config), config.seed, run.machine) if config.is_world else load_model(run, Path(config.model.path))


def run_eval(run: Run) -> None:
    """Compare the SFT and the PPO model on prompts none of the stages has seen."""
    config, began = run.config, time.perf_counter()
    if config.is_world:
        items: Sequence[Any] = (microcosm.items("eval", config.eval.in_domain, config.seed, 1.0)
                                + microcosm.items("eval", config.eval.general, config.seed, 0.0))
        prompts = world_prompts(run, items)
    else:
        items, prompts = held_out_prompts(run)
    reward_path = run.result("reward")
    trained = [name for name in ("sft", "ppo") if run.result(name)]
    if not trained:
        raise ValueError(f"{run.out} has neither an sft nor a ppo model to evaluate")
    answers, scores, values = {}, {}, {}
    for name in ("base", *trained):
        mine = answer(run, base_model(run) if name == "base" else load_model(run, run.needed(name, name)), prompts, temperature=0.0)
        answers[name] = [run.tokenizer.decode(ids) for part in parallel.gather_objects(mine) for ids in part]
        if config.is_world:
            values[name], scores[name] = world_values(items, answers[name])
        else:
            scores[name] = reward_scores(run, prompts, mine, reward_path) if reward_path else [0.0] * len(prompts)
            values[name] = {"in_domain": {"score": scores[name]}}
    contests, changed = {}, {}
    if len(trained) == 2:
        domain = [i for i, item in enumerate(items) if not getattr(item, "task", "")]
        contests["ppo_vs_sft"] = statistics.contest([statistics.prefer(scores["ppo"][i], scores["sft"][i]) for i in domain],
                                                    [(len(answers["ppo"][i]), len(answers["sft"][i])) for i in domain])
        changed = changes(values["ppo"], values["sft"])
    accuracy = read_json(reward_path / "config.json").get("holdout_accuracy", {}) if reward_path else {}
    results = {"models": {name: summarise(rows) for name, rows in values.items()}, "head_to_head": contests, "changes": changed,
               "reward_model": accuracy,
               "seconds": {**timings(run), "eval": round(time.perf_counter() - began, 2)}}
    if run.machine.is_main:
        telling = trained if config.is_world else answers  # random weights only babble
        examples = report.pick_examples(items, {name: answers[name] for name in telling}, scores, config.eval.show)
        (run.out / "eval.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        said = report.write_report(run.out, results, examples)
        print(report.table(results), "", report.examples_text(examples), "", said, sep="\n")


def reward_scores(run: Run, prompts: Sequence[list[int]], mine: Sequence[list[int]], reward_path: Path) -> list[float]:
    """Return the calibrated scores of all ranks' responses."""
    mean, std = score_scale(run)
    model = load_model(run, reward_path, ScalarModel)
    with parallel.gathered(model):
        raw = score_samples(run, model, run.machine.part(list(prompts)), mine)
    return [(score - mean) / std for part in parallel.gather_objects(raw) for score in part]


# ---------------------------------------------------------------------------------------------
# Main


RUNNERS = {"sft": run_sft, "sample": run_sample, "annotate": run_annotate, "reward": run_reward, "ppo": run_ppo, "eval": run_eval}


def main(args: Sequence[str]) -> None:
    """Run the stages asked for."""
    config = parse_args(args)
    if config.plan:
        return planner.main(config, planner.shapes(config))
    machine = parallel.start(config.dtype, config.parallel)
    check_ranks(config, machine.world)
    out = parallel.from_main(lambda: open_folder(config))
    parallel.from_main(lambda: prepare_tokenizer(config, out).path)
    run = Run(config, machine, out, prepare_tokenizer(config, out))
    if machine.is_main:
        record_config(config, out, machine.world)
    run.say(f"run folder: {out}   {machine.world} process(es) on {machine.device.type}, {str(machine.dtype).removeprefix('torch.')}")
    for stage in parallel.from_main(lambda: stages_to_run(config, out)):
        began = time.perf_counter()
        RUNNERS[stage](run)
        if machine.is_main:
            (out / "seconds.json").write_text(json.dumps({**timings(run), stage: round(time.perf_counter() - began, 2)}))
        if stage == "sample" and not config.is_world:
            break  # people's turn
    parallel.stop()


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(usage())
    else:
        try:
            main(sys.argv[1:])
        except (ValueError, OSError) as error:
            parallel.fail(f"train.py: error: {error}")
