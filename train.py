"""ICE-GRT end to end: SFT, sampling, ranking, reward model, PPO, evaluation.

    python train.py                                 one process
    torchrun --nproc_per_node=8 train.py            the same experiment, sharded over 8
    python train.py --help                          every knob, its default and its unit

This file owns the machine: configuration, optimizer steps, schedules, checkpoints, logs and the loop of
every stage. The algorithms are in sft.py, reward.py and ppo.py; they are handed models, batches and
callables, and know nothing of ranks or files.
"""
from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple, Sequence, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from tqdm import tqdm

import chat
import data
import eval as evaluation
import microcosm
import parallel
import plan
import ppo
import reward
import sft
from data import DataConfig, Tokenizer
from eval import EvalConfig
from model import ModelConfig, ScalarModel, Source, Transformer, generate, read_config, read_json, read_weights, save_pretrained
from parallel import Machine, ParallelConfig
from ppo import PPOConfig
from reward import RewardConfig
from sft import SFTConfig

STAGES = ("sft", "sample", "annotate", "reward", "ppo", "eval")


# ---------------------------------------------------------------------------------------------
# Configuration and command line

@dataclass(frozen=True)
class ModelSection:
    path: str = ""                      # model folder (Hugging Face or Meta layout, with tokenizer.model); "": the shape below, from scratch
    dim: int = 64                       # width of the embedded world's model; it and all below are ignored when a folder is given
    n_layers: int = 2                   # transformer blocks
    n_heads: int = 4                    # query heads per block
    n_kv_heads: int = 4                 # key and value heads per block: fewer than n_heads is grouped-query attention
    ffn_dim: int = 192                  # width of the feed-forward layer
    vocab_size: int = 640               # sentencepiece pieces, trained at the start of the run
    max_seq_len: int = 128              # context [tokens]


@dataclass(frozen=True)
class Config:
    model: ModelSection = field(default_factory=ModelSection)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    out: str = ""                       # run folder; "": a fresh runs/NNN
    base: str = ""                      # folder of another run whose finished stages this one starts from
    seed: int = 0                       # of weights, data order, sampling and the embedded world
    stages: tuple[str, ...] = STAGES    # a contiguous part of the recipe; earlier results are found in out or base
    resume: bool = False                # continue the run in `out` where it stopped
    dtype: str = "auto"                 # auto | float32 | bfloat16: of forwards; parameters are float32 always
    plan: bool = False                  # print every stage's peak memory for --model (a folder, 7b, 13b, 34b or 70b) and stop
    ranks: int = 8                      # processes that --plan plans for
    gpu_memory: float = 80.0            # of one GPU, for --plan [GB]
    checkpoint_every: int = 200         # optimizer steps between resumable checkpoints, PPO's counted as they come; 0: never

    @property
    def is_world(self) -> bool:
        """Whether this is the embedded default, all data its own."""
        return not self.model.path


# Defaults that change with --model=DIR: what a pretrained LLaMA of 7 to 13 billion parameters needs. The
# paper prints no table; these are the settings that published LLaMA PPO runs agree on.
PRETRAINED_DEFAULTS = {
    "data.template": "alpaca", "data.max_prompt_tokens": 512, "data.max_response_tokens": 512,
    "sft.epochs": 3.0, "sft.batch_size": 128, "sft.microbatch_size": 4, "sft.lr": 2e-5, "sft.weight_decay": 0.0,
    "reward.epochs": 1.0, "reward.batch_size": 64, "reward.microbatch_size": 1, "reward.generation_batch": 32, "reward.lr": 1e-5, "reward.weight_decay": 0.0,
    "ppo.iterations": 200, "ppo.batch_size": 512, "ppo.minibatch_size": 128, "ppo.microbatch_size": 4, "ppo.generation_batch": 32, "ppo.epochs": 1,
    "ppo.lr": 1e-6, "ppo.critic_lr": 5e-6, "ppo.kl_coef": 0.02, "ppo.warmup": 0.03,
}


PER_CALL = ("out", "stages", "resume", "plan", "ranks", "gpu_memory")  # flags that one command's call does not hand on to the next


def parse_value(text: str, hint: Any, flag: str) -> Any:
    """Read a flag's value by its type; ValueError names flag and type."""
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        return tuple(parse_value(part, item, flag) for part in text.split(",") if part)
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{flag}={text}: expected true or false")
        return text.lower() == "true"
    try:
        return hint(text)
    except ValueError:
        raise ValueError(f"{flag}={text}: expected {hint.__name__}")


def flag_types() -> dict[str, Any]:
    """Return every flag's name and type, sections flattened: 'ppo.kl_coef' -> float."""
    flags: dict[str, Any] = {}
    for name, hint in get_type_hints(Config).items():
        if dataclasses.is_dataclass(hint):
            flags.update({f"{name}.{key}": inner for key, inner in get_type_hints(hint).items()})
        else:
            flags[name] = hint
    return flags


def flatten(config: Config) -> dict[str, Any]:
    """Return a config as {'ppo.kl_coef': 0.1, ...}."""
    return {flag: getattr(getattr(config, flag.split(".")[0]), flag.split(".")[1]) if "." in flag else getattr(config, flag)
            for flag in flag_types()}


def unflatten(values: Mapping[str, Any]) -> Config:
    """Build a config from flat values; missing ones take their defaults."""
    sections: dict[str, Any] = {}
    for flag, value in values.items():
        name, _, key = flag.partition(".")
        if key:
            sections.setdefault(name, {})[key] = value
        else:
            sections[name] = value
    hints = get_type_hints(Config)
    return Config(**{name: hints[name](**value) if dataclasses.is_dataclass(hints[name]) else value for name, value in sections.items()})


def config_from_file(path: str) -> dict[str, Any]:
    """Read the flat values in a run's config.json; ValueError for keys this version does not have."""
    values = read_json(Path(path)).get("config")
    if not isinstance(values, dict):
        raise ValueError(f"{path}: has no \"config\" object: give the config.json of a run folder")
    unknown = sorted(set(values) - set(flag_types()))
    if unknown:
        raise ValueError(f"{path}: unknown setting {unknown[0]!r}")
    return {flag: tuple(value) if isinstance(value, list) else value for flag, value in values.items()}


def parse_args(args: Sequence[str]) -> Config:
    """Read --section.name=value flags; raises ValueError for anything it does not know.

    What is not given is taken from the run in --out (when continuing it), then from the one in --base, then
    from the defaults, so that a later stage never runs with other settings than the stages it builds on.
    """
    types, given = flag_types(), {}
    for arg in args:
        name, equals, text = arg.partition("=")
        flag = name.removeprefix("--")
        if not name.startswith("--") or not equals and types.get(flag) is not bool:
            raise ValueError(f"cannot read {arg!r}: flags are written --section.name=value (see --help)")
        flag = "model.path" if flag == "model" else flag
        if flag not in types and flag != "config":
            near = [known for known in types if known.split(".")[-1] == flag.split(".")[-1]]
            raise ValueError(f"unknown flag --{flag}" + (f" (did you mean --{near[0]}?)" if near else " (see --help)"))
        given[flag] = text if flag == "config" else parse_value(text if equals else "true", types[flag], f"--{flag}")
    sources = [given.pop("config", "")] + [f"{given[key]}/config.json" for key in ("out", "base") if given.get(key)]
    source = next((path for i, path in enumerate(sources) if path and (i == 0 or Path(path).exists())), None)
    values = {flag: value for flag, value in config_from_file(source).items() if flag not in PER_CALL} if source else {}
    if not values and given.get("model.path"):
        values = dict(PRETRAINED_DEFAULTS)
    config = unflatten({**values, **given})
    return config if config.plan else check(config)


def world_shape(config: Config, **own: int) -> ModelConfig:
    """Return the shape of the embedded world's model, with the nonzero sizes of `own` in place of the actor's."""
    m = config.model
    shape = {"dim": m.dim, "n_layers": m.n_layers, "n_heads": m.n_heads, "ffn_dim": m.ffn_dim, **{k: v for k, v in own.items() if v}}
    heads = shape["n_heads"] if own.get("n_heads") else m.n_kv_heads
    return ModelConfig(n_kv_heads=heads, vocab_size=m.vocab_size, max_seq_len=m.max_seq_len, **shape)


def plan_shapes(config: Config) -> tuple[ModelConfig, ModelConfig]:
    """Return the shapes of the actor, and of reward model and critic, for --plan."""
    if config.is_world:
        return world_shape(config), reward_shape(config) or world_shape(config)
    return plan.named_shape(config.model.path), plan.named_shape(config.reward.model or config.model.path)


def reward_shape(config: Config) -> ModelConfig | None:
    """Return the reward model's own shape on the embedded world; None if it has the actor's."""
    r = config.reward
    own = {"dim": r.dim, "n_layers": r.n_layers, "n_heads": r.n_heads, "ffn_dim": r.ffn_dim}
    return world_shape(config, **own) if any(own.values()) else None


def check(config: Config) -> Config:
    """Refuse impossible combinations in one line each."""
    order = [STAGES.index(stage) if stage in STAGES else -1 for stage in config.stages]
    if not order or -1 in order or order != list(range(order[0], order[0] + len(order))):
        raise ValueError(f"--stages={','.join(config.stages)}: give a contiguous part of {','.join(STAGES)}")
    if config.dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"--dtype={config.dtype}: use auto, float32 or bfloat16")
    if config.base and not Path(config.base, "config.json").exists():
        raise ValueError(f"--base={config.base}: not the folder of a run, it has no config.json")
    if config.resume and not config.out:
        raise ValueError("--resume needs --out=FOLDER: the run to continue")
    if len(config.reward.temperatures) < 2:
        raise ValueError("--reward.temperatures: ranking needs at least two responses per prompt")
    longest = config.data.max_prompt_tokens + config.data.max_response_tokens
    context = (world_shape(config) if config.is_world else read_config(config.model.path)).max_seq_len
    if longest > context:
        raise ValueError(f"--data.max_prompt_tokens + --data.max_response_tokens = {longest} exceeds the model's context of {context}")
    if reward_shape(config) and not config.is_world:
        raise ValueError("--reward.dim and the like shape the embedded world's reward model; with --model give --reward.model=DIR")
    if not config.is_world:
        needed = [("sft", "sft.data", config.sft.data), ("ppo", "ppo.prompts", config.ppo.prompts)]
        needed += [("ppo", "sft.data", config.sft.data)] if config.ppo.ptx_coef else []
        for stage, flag, files in needed:
            if stage in config.stages and not files:
                raise ValueError(f"--model is given, so stage {stage} needs --{flag}=FILE")
    elif config.sft.data or config.reward.data or config.ppo.prompts or config.eval.prompts:
        raise ValueError("data files need a model to train: give --model=DIR")
    for flag, files in (("sft.data", config.sft.data), ("reward.data", config.reward.data), ("ppo.prompts", config.ppo.prompts),
                        ("eval.prompts", config.eval.prompts)):
        for file in files:  # now, not when their stage begins hours later
            if not Path(file).is_file() or not Path(file).stat().st_size:
                raise ValueError(f"--{flag}={file}: {'the file is empty' if Path(file).is_file() else 'no such file'}")
    return config


def check_ranks(config: Config, world: int) -> None:
    """Refuse batch sizes that the ranks cannot share evenly."""
    for flag in ("sft.batch_size", "reward.batch_size", "ppo.batch_size", "ppo.minibatch_size"):
        if flatten(config)[flag] % world:
            raise ValueError(f"--{flag}={flatten(config)[flag]} cannot be shared by {world} processes: make it a multiple of {world}")


def usage() -> str:
    """List every flag with its default, the default under --model=DIR where it differs, and its comment in the source."""
    lines = [__doc__.strip(), "", "--model=DIR is short for --model.path=DIR; --config=FILE starts from the config.json of another run.", ""]
    comments = {}
    for name, hint in {"": Config, **get_type_hints(Config)}.items():
        if dataclasses.is_dataclass(hint):
            for line in inspect.getsource(hint).splitlines():
                code, _, comment = line.partition("  # ")
                comments[f"{name}.{code.split(':')[0].strip()}".removeprefix(".")] = comment.strip()
    for flag, value in flatten(Config()).items():
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        pretrained = f" [{PRETRAINED_DEFAULTS[flag]} with --model]" if flag in PRETRAINED_DEFAULTS else ""
        lines.append(f"  --{flag + '=' + str(shown):34}{pretrained} {comments.get(flag, '')}".rstrip())
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# A run: its folder, its log, its optimizer steps

@dataclass(frozen=True)
class Run:
    """What every stage needs: the settings, this process, and where results are."""
    config: Config
    machine: Machine
    out: Path
    tokenizer: Tokenizer

    def result(self, name: str) -> Path | None:
        """Return where an earlier stage's result is: in this run's folder, in its base's, or further down; None if nowhere."""
        folders, base = [self.out], self.config.base
        while base and Path(base) not in folders:
            folders.append(Path(base))
            base = config_from_file(f"{base}/config.json").get("base", "")
        return next((folder / name for folder in folders if (folder / name).exists()), None)

    def needed(self, name: str, stage: str) -> Path:
        found = self.result(name)
        if found is None:
            raise ValueError(f"{self.out / name} does not exist: run --stages={stage} first, or name a run that has it with --base=FOLDER")
        return found

    def log(self, stage: str, step: int, **numbers: float) -> None:
        """Append one line to metrics.jsonl."""
        if self.machine.is_main:
            with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": stage, "step": step, **numbers}) + "\n")

    def say(self, text: str) -> None:
        if self.machine.is_main:
            tqdm.write(text)

    def bar(self, stage: str, total: int, start: int = 0) -> tqdm:
        return tqdm(total=total, initial=start, desc=f"{stage:<9}", disable=not self.machine.is_main, dynamic_ncols=True, mininterval=0.5)


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
        batches = [make_batch([examples[i] for i in part]) for part in run.machine.share(rows, config.microbatch_size)]
        lr = lr_at(step, steps, config.lr, config.lr_end, config.warmup)
        stats = update(model, optimizer, [Term(loss, batches)], lr, config.max_grad_norm, run.machine)
        tokens = parallel.all_sum(torch.tensor(float(sum(batch.attention_mask.sum() for batch in batches)))).item()
        stats["tokens_per_second"] = tokens / (time.perf_counter() - began)
        run.log(name, step + 1, **stats, lr=lr)
        bar.set_postfix({**{key: f"{stats[key]:.3f}" for key in show}, "tokens/s": tqdm.format_sizeof(stats["tokens_per_second"])}, refresh=False)
        bar.update()
        keep(run, name, step + 1, steps, run.config.checkpoint_every, {"model": (model, optimizer)}, {})
    bar.close()


def keep(run: Run, stage: str, step: int, steps: int, every: int, trained: Mapping, state: dict) -> None:
    """Save a resumable checkpoint every `every` steps."""
    if every and step % every == 0 and step < steps:
        parallel.save_checkpoint(run.out / "checkpoints" / stage / f"{step:06d}", trained, {**state, "step": step}, run.machine)


def restore(run: Run, stage: str, trained: Mapping) -> dict:
    """Load the newest checkpoint of a stage when resuming; drop log lines written after it. {} if there is none."""
    if not run.config.resume:
        return {}
    folders = sorted(p for p in (run.out / "checkpoints" / stage).glob("*") if p.suffix != ".partial")
    state = parallel.load_checkpoint(folders[-1], trained) if folders else {}
    for name in ("metrics.jsonl", "samples.jsonl"):
        if run.machine.is_main and (run.out / name).exists():
            lines = evaluation.read_jsonl(run.out / name)
            evaluation.write_jsonl(run.out / name, [line for line in lines if line["stage"] != stage or line["step"] <= state.get("step", 0)])
    return state


def save_model(run: Run, model: nn.Module, name: str, extra: Mapping | None = None) -> None:
    """Write a model folder in the Hugging Face layout; the stage's checkpoint has served."""
    weights = parallel.full_weights(model)
    if run.machine.is_main:
        save_pretrained(model, run.out / name, run.tokenizer, weights, extra)
        shutil.rmtree(run.out / "checkpoints" / name, ignore_errors=True)
    for _ in weights:  # the other ranks take part in gathering what the main one writes
        pass
    parallel.gather_objects(None)


def load_model(run: Run, path: Path, kind: type[nn.Module] = Transformer, frozen: bool = False) -> nn.Module:
    """Load a model folder, sharded; a scalar model from a language model gets a fresh head."""
    weights = read_weights(path)
    config = read_config(path)
    if kind is ScalarModel and "score.weight" not in weights:
        head = torch.randn(1, config.dim, generator=torch.Generator().manual_seed(run.config.seed)) / (config.dim + 1) ** 0.5
        weights.sources["score.weight"] = Source(path, tuple(head.shape), head.dtype, lambda: head)
    return parallel.build(kind, config, weights, run.machine, frozen)


def to_device(run: Run, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(run.machine.device) for tensor in tensors)


# ---------------------------------------------------------------------------------------------
# Data of every stage: the embedded world, or files

def messages_of(prompt: str) -> tuple[data.Message, ...]:
    return (data.Message("user", prompt),)


def preference_items(run: Run) -> list[microcosm.Item]:
    """Return the world's prompts whose responses are ranked."""
    return microcosm.items("preference", run.config.reward.sampled_prompts, run.config.seed, run.config.reward.in_domain_share)


def sft_examples(run: Run) -> list[data.TokenizedDialogue]:
    """Return the dialogues to imitate; the world's are imperfect by construction."""
    config = run.config
    if config.is_world:
        rng = random.Random(f"demonstrations {config.seed}")
        records = [data.Dialogue((*messages_of(item.prompt), data.Message("assistant", microcosm.demonstrate(item, rng))), item.task)
                   for item in microcosm.items("train", config.sft.examples, config.seed, config.sft.in_domain_share)]
    else:
        records, report = data.read_dialogues(config.sft.data, config.data.skip_bad)
        run.say(f"sft data: {report}")
    examples, report = data.encode_sft(records, run.tokenizer, config.data.template,
                                       config.data.max_prompt_tokens + config.data.max_response_tokens)
    run.say(f"sft examples: {report}")
    return examples


@cache
def read_prompts(run: Run, name: str, files: tuple[str, ...]) -> tuple[list[data.Prompt], list[list[int]]]:
    """Return the prompts of files and their token ids; several stages of a run ask for them."""
    config = run.config.data
    records, report = data.read_prompts(files, config.skip_bad)
    run.say(f"{name} data: {report}")
    ids, records, report = data.encode_prompts(records, run.tokenizer, config.template, config.max_prompt_tokens, config.skip_bad)
    run.say(f"{name} prompts: {report}")
    return records, ids


def world_prompts(run: Run, items: Sequence[microcosm.Item]) -> list[list[int]]:
    return [data.encode_prompt(run.tokenizer, messages_of(item.prompt), run.config.data.template) for item in items]


def ppo_prompts(run: Run) -> tuple[list[data.Prompt], list[list[int]]]:
    """Return the prompts of PPO's files and their token ids, in the order of the files."""
    config = run.config
    records, ids = read_prompts(run, "ppo", config.ppo.prompts)
    if len(ids) <= config.eval.holdout and not config.eval.prompts:
        raise ValueError(f"--ppo.prompts has {len(ids)} usable prompts and --eval.holdout={config.eval.holdout} of them are held out: lower it")
    return records, ids


def training_prompts(run: Run) -> list[list[int]]:
    """Return the prompts PPO trains on: the world's training split, or all in its files but those kept for evaluation."""
    config = run.config
    if config.is_world:
        return world_prompts(run, microcosm.items("train", config.ppo.iterations * config.ppo.batch_size, config.seed + 1_000_000,
                                                  config.ppo.in_domain_share))
    ids = ppo_prompts(run)[1]
    return ids if config.eval.prompts else ids[:len(ids) - config.eval.holdout]


def sft_batch(run: Run, examples: Sequence[data.TokenizedDialogue]) -> sft.Batch:
    tokens, attention_mask = data.pad([example.tokens for example in examples])
    return sft.Batch(*to_device(run, tokens, attention_mask, data.pad_masks([example.response_mask for example in examples])))


def reward_batch(run: Run, examples: Sequence[data.TokenizedRanking]) -> reward.Batch:
    """Lay out N prompts x G responses; a prompt with fewer than G gets one-token rows of rank NaN."""
    size = max(len(example.responses) for example in examples)
    rows, ranks = [], torch.full((len(examples), size), torch.nan)
    for n, example in enumerate(examples):
        texts = [example.prompt + response for response in example.responses]
        rows += texts + [example.prompt[:1]] * (size - len(texts))
        ranks[n, :len(texts)] = torch.tensor(example.ranks)
    return reward.Batch(*to_device(run, *data.pad(rows), ranks))


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
    mine = run.machine.slice(list(range(len(prompts))))
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
        evaluation.write_jsonl(run.out / "to_rank.jsonl", (
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
        rows = evaluation.read_jsonl(path)
        if config.is_world:
            for row, item in zip(rows, preference_items(run), strict=True):
                row["ranks"] = row["ranks"] or microcosm.annotate(item, row["responses"], config.seed, config.reward.noise)
        for number, row in enumerate(rows, 1):
            ranks = row.get("ranks")
            if not isinstance(ranks, list) or len(ranks) != len(row["responses"]) or not all(isinstance(r, (int, float)) for r in ranks):
                raise ValueError(f"{path}:{number}: \"ranks\" must be a list of {len(row['responses'])} numbers, 1 is best: rank this prompt first")
        evaluation.write_jsonl(run.out / "ranked.jsonl", rows)
        return sum(len(set(row["ranks"])) > 1 for row in rows)
    informative = parallel.from_main(rank)
    run.say(f"annotate : {informative} prompts have a pair of differently ranked responses")


def rankings(run: Run) -> tuple[list[data.TokenizedRanking], list[str]]:
    """Return the rankings that hold a pair, and each one's task, shuffled."""
    config = run.config
    if config.reward.data:
        records, report = data.read_rankings(config.reward.data, config.data.skip_bad)
        run.say(f"reward data: {report}")
        ranked, report = data.encode_rankings(records, run.tokenizer, config.data.template,
                                              config.data.max_prompt_tokens + config.data.max_response_tokens)
        run.say(f"reward examples: {report}")
        tasks = [""] * len(ranked)
    else:
        ranked, tasks = [], []
        for row in evaluation.read_jsonl(run.needed("ranked.jsonl", "annotate")):
            distinct = {tuple(ids): rank for ids, rank in zip(row["response_ids"], row["ranks"])}
            if len(set(distinct.values())) > 1:
                ranked.append(data.TokenizedRanking(row["prompt_ids"], [list(ids) for ids in distinct], list(distinct.values())))
                tasks.append(row["task"])
    order = data.epoch_order(len(ranked), config.seed, 0)
    return [ranked[i] for i in order], [tasks[i] for i in order]


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
    mine, size = run.machine.slice(list(range(len(held_out)))), run.config.reward.microbatch_size
    with parallel.gathered(model), run.machine.autocast():
        for kind in (0, 1):
            rows = [i for i in mine if (tasks[i] == "ad") == kind]
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
        return chat.score_rows(model, rows, run.config.ppo.microbatch_size)


def answer(run: Run, model: nn.Module, prompts: Sequence[list[int]], temperature: float, seed: int = 0) -> list[list[int]]:
    """Return one response of `model` to each of this rank's part of the prompts."""
    mine = run.machine.slice(list(range(len(prompts))))
    with parallel.gathered(model), run.machine.autocast():
        return generate(model, [prompts[i] for i in mine], run.config.data.max_response_tokens, temperature,
                        eos_id=run.tokenizer.eos_id, seed=seed, rows=mine, batch_size=run.config.ppo.generation_batch).tokens


def calibration(run: Run, model: nn.Module, fallback: Sequence[data.TokenizedRanking]) -> tuple[float, float]:
    """Return mean and standard deviation of the scores of SFT samples on PPO's prompts; of ranked responses if there are no prompts."""
    config = run.config
    if config.is_world or config.ppo.prompts:
        prompts = training_prompts(run)[:512]
        responses = answer(run, load_model(run, run.needed("sft", "sft")), prompts, config.ppo.temperature, seed=config.seed * 10 + 2)
        prompts = run.machine.slice(prompts)
    else:
        pairs = [(ranking.prompt, response) for ranking in fallback[:512] for response in ranking.responses]
        prompts, responses = (run.machine.slice(list(part)) for part in zip(*pairs))
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
    parts = run.machine.share(rows, config.microbatch_size)
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
        mine = machine.slice(list(range(config.batch_size)))
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
                          seed=run.config.seed * 100_000 + iteration, share=machine.share)
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
    return {name: (max if name == "ratio_max" else evaluation.mean)([step[name] for step in steps]) for name in steps[0]}


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
            values[name], scores[name] = evaluation.world_values(items, answers[name])
        else:
            scores[name] = reward_scores(run, prompts, mine, reward_path) if reward_path else [0.0] * len(prompts)
            values[name] = {"in_domain": {"score": scores[name]}}
    contests, changes = {}, {}
    if len(trained) == 2:
        domain = [i for i, item in enumerate(items) if getattr(item, "task", "ad") == "ad"]
        contests["ppo_vs_sft"] = evaluation.contest([evaluation.prefer(scores["ppo"][i], scores["sft"][i]) for i in domain],
                                                    [(len(answers["ppo"][i]), len(answers["sft"][i])) for i in domain])
        changes = evaluation.changes(values["ppo"], values["sft"])
    accuracy = read_json(reward_path / "config.json").get("holdout_accuracy", {}) if reward_path else {}
    results = {"models": {name: evaluation.summarise(rows) for name, rows in values.items()}, "head_to_head": contests, "changes": changes,
               "reward_model": accuracy,
               "seconds": {**timings(run), "eval": round(time.perf_counter() - began, 2)}}
    if run.machine.is_main:
        telling = trained if config.is_world else answers  # random weights only babble
        examples = evaluation.pick_examples(items, {name: answers[name] for name in telling}, scores, config.eval.show)
        (run.out / "eval.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        report = evaluation.write_report(run.out, results, examples)
        print(evaluation.table(results), "", evaluation.examples_text(examples), "", report, sep="\n")


def held_out_prompts(run: Run) -> tuple[list[Any], list[list[int]]]:
    """Return the real prompts of the evaluation, as things with a prompt and an answer, and their token ids."""
    config = run.config
    if config.eval.prompts:
        records, ids = read_prompts(run, "eval", config.eval.prompts)
    elif config.ppo.prompts:
        records, ids = (part[-config.eval.holdout:] for part in ppo_prompts(run))
    else:
        raise ValueError("the evaluation needs prompts: give --eval.prompts=FILE")
    return [Shown(record.messages[-1].content, record.answer) for record in records], ids


@dataclass(frozen=True)
class Shown:
    """A real prompt as the evaluation shows it."""
    prompt: str
    answer: str | None


def reward_scores(run: Run, prompts: Sequence[list[int]], mine: Sequence[list[int]], reward_path: Path) -> list[float]:
    """Return the calibrated scores of all ranks' responses."""
    mean, std = score_scale(run)
    model = load_model(run, reward_path, ScalarModel)
    with parallel.gathered(model):
        raw = score_samples(run, model, run.machine.slice(list(prompts)), mine)
    return [(score - mean) / std for part in parallel.gather_objects(raw) for score in part]


# ---------------------------------------------------------------------------------------------
# Main

RESULTS = {"sft": "sft", "sample": "to_rank.jsonl", "annotate": "ranked.jsonl", "reward": "reward", "ppo": "ppo", "eval": "eval.json"}
RUNNERS = {"sft": run_sft, "sample": run_sample, "annotate": run_annotate, "reward": run_reward, "ppo": run_ppo, "eval": run_eval}


def timings(run: Run) -> dict[str, float]:
    """Return the wall seconds of every finished stage."""
    path = run.out / "seconds.json"
    return read_json(path) if path.exists() else {}


def stages_to_run(config: Config, out: Path) -> list[str]:
    """Drop stages that are not needed; refuse to overwrite a result."""
    stages = [stage for stage in config.stages if not (config.reward.data and stage in ("sample", "annotate"))]
    done = [stage for stage in stages if (out / RESULTS[stage]).exists()]
    if config.resume:
        return [stage for stage in stages if stage not in done or stage == "eval"]
    if done and done != ["eval"]:
        raise ValueError(f"{out / RESULTS[done[0]]} exists: name a fresh --out, or continue with --resume")
    return stages


def open_folder(config: Config) -> Path:
    """Make the run folder: the one asked for, or the first free runs/NNN."""
    if config.out:
        stages_to_run(config, Path(config.out))
        Path(config.out).mkdir(parents=True, exist_ok=True)
        return Path(config.out)
    for number in range(1, 10_000):
        out = Path("runs") / f"{number:03d}"
        try:
            out.mkdir(parents=True)
        except FileExistsError:
            continue
        return out
    raise ValueError("runs/ is full: give --out=FOLDER")


def record_config(config: Config, out: Path, world: int) -> None:
    """Write config.json: everything needed to repeat the run."""
    here = Path(__file__).parent
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True).stdout.strip() or None
    content = {"config": {**flatten(config), "out": str(out)}, "processes": world, "git": revision,
               "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    (out / "config.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def prepare_tokenizer(config: Config, out: Path) -> Tokenizer:
    """Open the model's tokenizer, or train the embedded world's at the start of the run."""
    if not config.is_world:
        return chat.open_tokenizer(Path(config.model.path))
    path = out / "tokenizer.model"
    if not path.exists():
        partial_path = out / "tokenizer.partial"
        try:
            microcosm.train_tokenizer(partial_path, config.model.vocab_size)
        except RuntimeError as error:
            raise ValueError(f"--model.vocab_size={config.model.vocab_size}: {str(error).splitlines()[-1]}")
        os.rename(partial_path, path)
    return Tokenizer(path)


def main(args: Sequence[str]) -> None:
    """Run the stages asked for."""
    config = parse_args(args)
    if config.plan:
        return plan.main(config, plan_shapes(config))
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
