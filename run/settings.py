"""Settings: every flag with its default, the command line, what is refused before any work.

A section of Config is a frozen dataclass beside the code that it steers (sft.SFTConfig and the
like). The comment after a field is its help, so it is written once; a switch with several values
takes them from the dictionary it chooses from, a number its range from RANGES.
"""
from __future__ import annotations

import dataclasses
import inspect
import json
import os
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import (Any, Callable, Collection, Iterable, Iterator, Mapping, Sequence, get_args,
                    get_origin, get_type_hints)

import ppo
from data import AUTO, TEMPLATES, DataConfig
from eval import EvalConfig
from evaluation.flags import is_in
from formats import harmless
from formats.files import read_json
from model import ModelConfig
from parallel import ParallelConfig
from ppo import PPOConfig, one_of
from reward import RewardConfig
from run import continuing
from run.continuing import PER_CALL, shown
from run.written import is_whole
from sft import SFTConfig, TopConfig
from weights import read_config


@dataclass(frozen=True)
class ModelSection:
    path: str = ""                      # model folder with its tokenizer; "": the shape below
    dim: int = 64                       # width; all from here on is for the embedded world alone
    n_layers: int = 2                   # transformer blocks
    n_heads: int = 4                    # query heads per block
    n_kv_heads: int = 4                 # key and value heads: fewer is grouped-query attention
    ffn_dim: int = 192                  # width of the feed-forward layer
    vocab_size: int = 640               # sentencepiece pieces, trained at the start of the run
    max_seq_len: int = 160              # context [tokens]


@dataclass(frozen=True)
class ExportConfig:
    dtype: str = "auto"                 # of the weights in model folders; auto: those of --model


@dataclass(frozen=True)
class Config:
    model: ModelSection = field(default_factory=ModelSection)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    top: TopConfig = field(default_factory=TopConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    out: str = ""                       # run folder; "": a fresh runs/NNN
    base: str = ""                      # folder of a run whose finished stages this one builds on
    seed: int = 0                       # of weights, data order, sampling and the embedded world
    stages: tuple[str, ...] = ()        # some of the recipe's, in its order; none: all
    resume: bool = False                # continue the run in `out` where it stopped, as it began
    resume_with_changes: bool = False   # likewise, but settings of what is not done yet may change
    dtype: str = "auto"                 # of forwards; parameters are float32 always
    plan: bool = False                  # print every stage's peak memory for --model, and stop
    ranks: int = 8                      # processes that --plan plans for
    gpu_memory: float = 80.0            # of one GPU, for --plan [GB]
    checkpoint_every: int = 200         # optimizer steps between resumable checkpoints; 0: never
    checkpoint_minutes: float = 0.0     # a checkpoint after so long, too [minutes]; 0: never
    checkpoint_keep: int = 2            # checkpoints of a stage that stay, in case one is damaged

    @property
    def is_world(self) -> bool:
        """Whether this is the embedded default, all data its own."""
        return not self.model.path

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its response."""
        return self.data.max_prompt_tokens + self.data.max_response_tokens


# Defaults that change with --model=DIR: what a pretrained LLaMA of 7 to 13 billion parameters
# needs. The paper prints no table; these are the settings that published LLaMA PPO runs agree on.
PRETRAINED_DEFAULTS = {
    # baselines cost a model's training and many samples: asked for by name
    "stages": ("sft", "sample", "annotate", "reward", "ppo", "eval"), "eval.best_of": 0,
    "data.template": AUTO, "data.max_prompt_tokens": 512, "data.max_response_tokens": 512,
    # a forward takes four rows of full length, or as many short ones as have their tokens
    "sft.microbatch_size": 128, "reward.microbatch_size": 64, "ppo.microbatch_size": 128,
    "sft.microbatch_tokens": 4096, "reward.microbatch_tokens": 5120, "ppo.microbatch_tokens": 4096,
    "sft.epochs": 3.0, "sft.batch_size": 128, "sft.lr": 2e-5,
    "sft.weight_decay": 0.0, "top.epochs": 1.0, "top.lr": 2e-6,
    "reward.epochs": 1.0, "reward.batch_size": 64, "reward.generation_batch": 32,
    "reward.lr": 1e-5, "reward.weight_decay": 0.0, "reward.noise": 0.0,
    "ppo.iterations": 200, "ppo.batch_size": 512, "ppo.minibatch_size": 128,
    "ppo.generation_batch": 32, "ppo.epochs": 1, "ppo.lr": 1e-6, "ppo.critic_lr": 5e-6,
    "ppo.kl_coef": 0.02, "ppo.warmup": 0.03,
}

# What a switch can be, by flag.
CHOICES: dict[str, Collection[str]] = {
    "data.template": (AUTO, *TEMPLATES), "dtype": ("auto", "float32", "bfloat16"),
    "export.dtype": ("auto", "float32", "bfloat16", "float16"),
    **{f"ppo.{name}": choices for name, choices in ppo.CHOICES.items()},
}

# What a number can be: an interval, whose round brackets leave that end out, and flags. A name
# without its section stands for that flag in all of them; of a list every number is looked at.
RANGES = {
    "[0, 9e18]": "seed",
    "[1, 500]": "model.n_layers",
    "[1, 1e6]": """model.dim model.n_heads model.n_kv_heads model.ffn_dim model.vocab_size
        max_seq_len max_prompt_tokens max_response_tokens batch_size minibatch_size
        microbatch_size generation_batch ppo.epochs iterations responses_per_prompt replicas
        ranks checkpoint_keep""",
    "[1, 1e9]": "examples sampled_prompts kl_horizon eval.in_domain",
    "[0, 500]": "reward.n_layers",
    "[0, 1e6]": """microbatch_tokens reward.dim reward.n_heads reward.ffn_dim noise top_k
        critic_warmup kl_coef kl_target value_clip_range score_clip eos_penalty entropy_coef
        ptx_coef eval.general eval.holdout show best_of""",
    "[0, 1e9]": "checkpoint_every checkpoint_minutes",
    "[0, 1]": "in_domain_share warmup lr_end gamma gae_lambda",
    "[0, 100]": "lr critic_lr weight_decay temperatures",
    "(0, 1)": "reward.holdout",
    "(0, 1]": "top_p",
    "(0, 100]": "ppo.temperature",
    "(0, 1e4]": "epochs",
    "(0, 1e6]": "clip_range gpu_memory timeout",
    "(0, 1e9]": "max_grad_norm",
}

# Files that a flag names, so that a missing one is told now and not hours later.
DATA_FLAGS = ("sft.data", "reward.data", "ppo.prompts", "eval.prompts")


# ---------------------------------------------------------------------------------------------
# Flags: a flat view of the config, 'ppo.kl_coef' -> 0.3

def flag_types() -> dict[str, Any]:
    """Return every flag's name and type."""
    flags: dict[str, Any] = {}
    for name, hint in get_type_hints(Config).items():
        if dataclasses.is_dataclass(hint):
            flags.update({f"{name}.{key}": type_ for key, type_ in get_type_hints(hint).items()})
        else:
            flags[name] = hint
    return flags


def flatten(config: Config) -> dict[str, Any]:
    """Return a config as {'ppo.kl_coef': 0.3, ...}."""
    flat = {}
    for flag in flag_types():
        section, _, key = flag.rpartition(".")
        flat[flag] = getattr(getattr(config, section) if section else config, key)
    return flat


def unflatten(values: Mapping[str, Any]) -> Config:
    """Build a config from flat values; missing ones take their defaults."""
    hints = get_type_hints(Config)
    sections: dict[str, dict[str, Any]] = {}
    given: dict[str, Any] = {}
    for flag, value in values.items():
        section, _, key = flag.rpartition(".")
        if section:
            sections.setdefault(section, {})[key] = value
        else:
            given[key] = value
    built = {name: hints[name](**fields) for name, fields in sections.items()}
    return Config(**given, **built)


def numbers_of(hint: Any) -> type | None:
    """Return int or float for a flag that is such a number, or a list of them; else None."""
    item = get_args(hint)[0] if get_origin(hint) is tuple else hint
    return item if item in (int, float) else None


def range_of(flag: str) -> str:
    """Return the interval of a numeric flag: what RANGES says of it, or of its name."""
    intervals = {name: interval for interval, names in RANGES.items() for name in names.split()}
    return intervals.get(flag) or intervals[flag.rpartition(".")[2]]


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
        raise ValueError(f"{flag}={text}: expected {hint.__name__}") from None


def of_type(value: Any, hint: Any) -> Any:
    """Return a value of a JSON file as the type of its flag; ValueError if it is of another."""
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(of_type(item, get_args(hint)[0]) for item in value)
    # type, not isinstance: true is no number
    if hint is float and type(value) is int and abs(value) < 2 ** 63:
        return float(value)
    if type(value) is not hint:
        raise ValueError
    return value


def config_from_file(path: str | Path) -> dict[str, Any]:
    """Read the flat values of a run's config.json.

    A run of another version may have settings that this one does not know: those at their default
    are named and left, those that were changed are refused.
    """
    content = read_json(Path(path))
    if not isinstance(content.get("config"), dict):
        raise ValueError(f'{path}: has no "config" object: give the config.json of a run folder')
    if "crc32" in content and not is_whole(content):
        raise ValueError(f'{path}: is not what was written: put it back from a copy; if it is '
                         'meant to be so, take its "crc32" out')
    changed = content.get("not_default") if isinstance(content.get("not_default"), list) else []
    types = flag_types()
    values: dict[str, Any] = {}
    problems = []
    for flag, value in content["config"].items():
        if flag not in types:
            told = f"{path}: this version has no setting {flag}={json.dumps(value)[:80]}"
            if flag in changed:
                problems.append(f"{told}, which the run had changed: go on with the version that "
                                f"wrote it (git {content.get('git')}), or take it out of the file")
            elif os.environ.get("RANK", "0") == "0":
                print(harmless(f"{told}: left out"), file=sys.stderr)
            continue
        try:
            values[flag] = of_type(value, types[flag])
        except ValueError:
            wanted = getattr(types[flag], "__name__", str(types[flag]))
            problems.append(f"{path}: {flag}: {json.dumps(value)[:80]}: expected {wanted}")
    refuse(problems)
    return values


def parse_flags(args: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Read --section.name=value; also return a line for all that is no flag, or not of its type."""
    types = {**flag_types(), "config": str}
    given: dict[str, Any] = {}
    problems: list[str] = []
    for arg in args:
        name, equals, text = arg.partition("=")
        flag = name.removeprefix("--")
        flag = "model.path" if flag == "model" else flag
        if not name.startswith("--") or not equals and types.get(flag) is not bool:
            problems.append(f"cannot read {arg!r}: flags are written --section.name=value "
                            "(see --help)")
        elif flag not in types:
            near = [known for known in types if known.split(".")[-1] == flag.split(".")[-1]]
            advice = f"did you mean --{near[0]}?" if near else "see --help"
            problems.append(f"unknown flag --{flag} ({advice})")
        else:
            try:
                given[flag] = parse_value(text if equals else "true", types[flag], f"--{flag}")
            except ValueError as error:
                problems.append(str(error))
    return given, problems


def refuse(problems: Iterable[str]) -> None:
    """Raise ValueError if there is any problem: all of them, a line each."""
    found = "\n  ".join(problems)
    if found:
        raise ValueError(found)


def parse_args(args: Sequence[str], stages: Mapping[str, Any]) -> Config:
    """Read the command line. stages: the recipe's by name, in order, each with its .result.

    What is not given is taken from --config, else from the run in --out (when continuing it), else
    from the one in --base, else from the defaults: a later stage never runs with other settings
    than the stages it builds on.
    """
    given, wrong = parse_flags(args)
    file = given.pop("config", "")
    runs = {key: Path(given[key], "config.json") for key in ("out", "base") if given.get(key)}
    earlier = {key: config_from_file(path) for key, path in runs.items() if path.exists()}
    found = [config_from_file(file)] if file else list(earlier.values())
    values: dict[str, Any] = {}
    if found:
        values = {flag: value for flag, value in found[0].items() if flag not in PER_CALL}
    elif given.get("model.path"):
        values = dict(PRETRAINED_DEFAULTS)
    values.update(given)
    values["stages"] = values.get("stages") or tuple(stages)
    values["resume"] = values.get("resume_with_changes") or values.get("resume", False)
    if values.get("data.template") == AUTO and "out" in earlier:
        values["data.template"] = earlier["out"].get("data.template", AUTO)  # as it turned out
    # first what a setting cannot be by itself, then what settings cannot be together
    refuse([*wrong, *impossible(values)])
    config = unflatten(values)
    if config.plan:
        refuse(config.ppo.problems())
    else:
        refuse([*contradictions(config, stages), *run_problems(config, stages, earlier.get("out"))])
    return config


def run_problems(config: Config, stages: Mapping[str, Any],
                 recorded: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield what cannot be done in the folder of the run. recorded: its settings, if it has any."""
    if config.out and set(config.stages) <= set(stages):
        old = None if recorded is None else flatten(unflatten(recorded))
        yield from continuing.problems(stages, config, old, flatten(config))


def comments_of(section: type) -> dict[str, str]:
    """Return the comment after every field of a dataclass, those of its bases included."""
    comments: dict[str, str] = {}
    for parent in reversed(section.__mro__):
        if dataclasses.is_dataclass(parent):
            for line in inspect.getsource(parent).splitlines():
                code, _, comment = line.partition("  # ")
                comments.setdefault(code.split(":")[0].strip(), comment.strip())
    return comments


def usage(intro: str, stages: Collection[str]) -> str:
    """List every flag: its default, the one under --model=DIR, what it is, what it can be."""
    lines = [intro.strip(), "", "--model=DIR is short for --model.path=DIR; --config=FILE starts "
             "from the config.json of another run.",
             "Of a number [0, 1] is its range; a round bracket leaves that end out.",
             f"Stages: {', '.join(stages)}.", ""]
    sections = {"": Config, **get_type_hints(Config)}
    types = flag_types()
    for flag, value in flatten(Config()).items():
        section, _, key = flag.rpartition(".")
        text = comments_of(sections[section])[key]
        if flag in CHOICES:
            text = f"{' | '.join(CHOICES[flag])}: {text}"
        elif numbers_of(types[flag]):
            text = f"{range_of(flag)}: {text}"
        if flag in PRETRAINED_DEFAULTS:
            text = f"[{shown(PRETRAINED_DEFAULTS[flag])} with --model] {text}"
        lines.append(f"  --{f'{flag}={shown(value)}':34} {text}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# Shapes

def world_shape(config: Config) -> ModelConfig:
    """Return the shape of the embedded world's model."""
    m = config.model
    return ModelConfig(dim=m.dim, n_layers=m.n_layers, n_heads=m.n_heads, n_kv_heads=m.n_kv_heads,
                       vocab_size=m.vocab_size, ffn_dim=m.ffn_dim, max_seq_len=m.max_seq_len)


# Sizes that the reward model of the embedded world may have for itself.
OWN_SIZES = ("dim", "n_layers", "n_heads", "ffn_dim")


def reward_shape(config: Config) -> ModelConfig | None:
    """Return the reward model's own shape on the embedded world; None if it has the actor's."""
    own = {name: getattr(config.reward, name) for name in OWN_SIZES if getattr(config.reward, name)}
    if not own:
        return None
    if "n_heads" in own:
        own["n_kv_heads"] = own["n_heads"]
    return dataclasses.replace(world_shape(config), **own)


# ---------------------------------------------------------------------------------------------
# What is refused before any work, in one line each, all at once

def impossible(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a setting, by flag, cannot be, whatever the others are."""
    types = flag_types()
    for flag, value in values.items():
        if flag in CHOICES and value not in CHOICES[flag]:
            yield f"--{flag}={value}: use {one_of(CHOICES[flag])}"
        if numbers_of(types[flag]):
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(is_in(number, range_of(flag)) for number in numbers):
                yield f"--{flag}={shown(value)}: outside {range_of(flag)}"


def contradictions(config: Config, stages: Collection[str]) -> Iterator[str]:
    """Yield what settings cannot be together, and what they name that is not there."""
    yield from stage_problems(config, stages)
    yield from folder_problems(config)
    if len(config.reward.temperatures) < 2:
        yield "--reward.temperatures: ranking needs at least two responses per prompt"
    yield from config.ppo.problems()
    yield from shape_problems(config)
    yield from data_problems(config)


def stage_problems(config: Config, stages: Collection[str]) -> Iterator[str]:
    """Yield unknown stages, and stages out of the recipe's order."""
    order = list(stages)
    unknown = [stage for stage in config.stages if stage not in order]
    in_order = sorted(set(config.stages) - set(unknown), key=order.index)
    if unknown or list(config.stages) != in_order:
        yield (f"--stages={','.join(config.stages)}: give some of {','.join(order)}, "
               "each once and in this order")


def folder_problems(config: Config) -> Iterator[str]:
    """Yield a base that is no run, and resuming what has no name."""
    if config.base and not Path(config.base, "config.json").exists():
        yield f"--base={config.base}: not the folder of a run, it has no config.json"
    if config.resume and not config.out:
        yield "--resume needs --out=FOLDER: the run to continue"


def shape_problems(config: Config) -> Iterator[str]:
    """Yield shapes that cannot be, and lengths beyond the context of the models."""
    if not config.is_world and any(getattr(config.reward, name) for name in OWN_SIZES):
        yield ("--reward.dim and the like shape the embedded world's reward model; "
               "with --model give --reward.model=DIR")
    readers: dict[str, Callable[[], ModelConfig | None]] = {
        "the model": partial(world_shape, config) if config.is_world else
        partial(read_config, config.model.path)}
    if config.reward.model:
        readers[f"--reward.model={config.reward.model}"] = partial(read_config, config.reward.model)
    elif config.is_world:
        readers["the reward model"] = partial(reward_shape, config)
    for name, read in readers.items():
        try:
            shape = read()
        except ValueError as error:
            yield f"{name}: {error}"
        else:
            if shape and config.longest > shape.max_seq_len:
                yield ("--data.max_prompt_tokens + --data.max_response_tokens = "
                       f"{config.longest} exceeds the context of {name}: "
                       f"{shape.max_seq_len} tokens")


def data_problems(config: Config) -> Iterator[str]:
    """Yield stages without data, and files that are not there or empty."""
    flat = flatten(config)
    if config.is_world and any(flat[flag] for flag in DATA_FLAGS):
        yield "data files need a model to train: give --model=DIR"
    needs = [("sft", "sft.data"), ("ppo", "ppo.prompts"), ("sample", "ppo.prompts")]
    if config.ppo.ptx_coef:
        needs.append(("ppo", "sft.data"))
    for stage, flag in needs:
        idle = stage == "sample" and config.reward.data
        if not config.is_world and stage in config.stages and not flat[flag] and not idle:
            yield f"--model is given, so stage {stage} needs --{flag}=FILE"
    files = [(flag, file) for flag in DATA_FLAGS for file in flat[flag]]
    if config.reward.function:
        files.append(("reward.function", config.reward.function))
    for flag, file in files:
        if not Path(file).is_file():
            yield f"--{flag}={file}: no such file"
        elif not Path(file).stat().st_size:
            yield f"--{flag}={file}: the file is empty"
    if config.ppo.reward == "function" and not config.reward.function and not config.is_world:
        yield "--ppo.reward=function needs --reward.function=FILE.py"


def check_ranks(config: Config, world: int) -> None:
    """Refuse batch sizes that the ranks cannot share evenly."""
    flat = flatten(config)
    sizes = ("sft.batch_size", "reward.batch_size", "ppo.batch_size", "ppo.minibatch_size")
    refuse(f"--{flag}={flat[flag]} cannot be shared by {world} processes: "
           f"make it a multiple of {world}" for flag in sizes if flat[flag] % world)
