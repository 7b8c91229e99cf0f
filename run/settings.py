"""Settings: every flag with its default, the command line, what is refused before any work.

A section of Config is a frozen dataclass beside the code that it steers (sft.SFTConfig and the
like). The comment after a field is its help, so it is written once; a switch with several values
takes them from the dictionary it chooses from.
"""
from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Collection, Mapping, Sequence, get_args, get_origin, get_type_hints

import ppo
from data import AUTO, TEMPLATES, DataConfig
from eval import EvalConfig
from formats.files import read_json
from model import ModelConfig
from parallel import ParallelConfig
from ppo import PPOConfig, one_of
from reward import RewardConfig
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
    resume: bool = False                # continue the run in `out` where it stopped
    dtype: str = "auto"                 # of forwards; parameters are float32 always
    plan: bool = False                  # print every stage's peak memory for --model, and stop
    ranks: int = 8                      # processes that --plan plans for
    gpu_memory: float = 80.0            # of one GPU, for --plan [GB]
    checkpoint_every: int = 200         # optimizer steps between resumable checkpoints; 0: never
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
    "sft.epochs": 3.0, "sft.batch_size": 128, "sft.microbatch_size": 4, "sft.lr": 2e-5,
    "sft.weight_decay": 0.0, "top.epochs": 1.0, "top.lr": 2e-6,
    "reward.epochs": 1.0, "reward.batch_size": 64, "reward.microbatch_size": 1,
    "reward.generation_batch": 32, "reward.lr": 1e-5, "reward.weight_decay": 0.0,
    "reward.noise": 0.0,
    "ppo.iterations": 200, "ppo.batch_size": 512, "ppo.minibatch_size": 128,
    "ppo.microbatch_size": 4, "ppo.generation_batch": 32, "ppo.epochs": 1, "ppo.lr": 1e-6,
    "ppo.critic_lr": 5e-6, "ppo.kl_coef": 0.02, "ppo.warmup": 0.03,
}

# What a switch can be, by flag.
CHOICES: dict[str, Collection[str]] = {
    "data.template": (AUTO, *TEMPLATES), "dtype": ("auto", "float32", "bfloat16"),
    "export.dtype": ("auto", "float32", "bfloat16", "float16"),
    **{f"ppo.{name}": choices for name, choices in ppo.CHOICES.items()},
}

# Flags that speak of one call of the command: a later call does not take them from this one's run.
PER_CALL = ("out", "stages", "resume", "plan", "ranks", "gpu_memory")

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


def config_from_file(path: str | Path) -> dict[str, Any]:
    """Read the flat values of a run's config.json.

    A run of another version may have settings that this one does not know: they are named and left.
    """
    values = read_json(Path(path)).get("config")
    if not isinstance(values, dict):
        raise ValueError(f'{path}: has no "config" object: give the config.json of a run folder')
    known = flag_types()
    for flag in sorted(values.keys() - known.keys()):
        if os.environ.get("RANK", "0") == "0":
            print(f"{path}: this version has no setting {flag}={values[flag]!r}: left out",
                  file=sys.stderr)
    return {flag: tuple(value) if isinstance(value, list) else value
            for flag, value in values.items() if flag in known}


def parse_flags(args: Sequence[str]) -> dict[str, Any]:
    """Read --section.name=value; ValueError for anything that is no flag."""
    types = {**flag_types(), "config": str}
    given: dict[str, Any] = {}
    for arg in args:
        name, equals, text = arg.partition("=")
        flag = name.removeprefix("--")
        flag = "model.path" if flag == "model" else flag
        if not name.startswith("--") or not equals and types.get(flag) is not bool:
            raise ValueError(f"cannot read {arg!r}: flags are written --section.name=value "
                             "(see --help)")
        if flag not in types:
            near = [known for known in types if known.split(".")[-1] == flag.split(".")[-1]]
            advice = f"did you mean --{near[0]}?" if near else "see --help"
            raise ValueError(f"unknown flag --{flag} ({advice})")
        given[flag] = parse_value(text if equals else "true", types[flag], f"--{flag}")
    return given


def parse_args(args: Sequence[str], stages: Collection[str]) -> Config:
    """Read the command line. stages: the names of the recipe's stages, in order.

    What is not given is taken from --config, else from the run in --out (when continuing it), else
    from the one in --base, else from the defaults: a later stage never runs with other settings
    than the stages it builds on.
    """
    given = parse_flags(args)
    file = given.pop("config", "")
    runs = [Path(given[key], "config.json") for key in ("out", "base") if given.get(key)]
    found = [file] if file else [path for path in runs if path.exists()]
    values: dict[str, Any] = {}
    if found:
        earlier = config_from_file(found[0])
        values = {flag: value for flag, value in earlier.items() if flag not in PER_CALL}
    elif given.get("model.path"):
        values = dict(PRETRAINED_DEFAULTS)
    values.update(given)
    values["stages"] = values.get("stages") or tuple(stages)
    config = unflatten(values)
    if not config.plan:
        check(config, stages)
    return config


def comments_of(section: type) -> dict[str, str]:
    """Return the comment after every field of a dataclass, those of its bases included."""
    comments: dict[str, str] = {}
    for parent in reversed(section.__mro__):
        if dataclasses.is_dataclass(parent):
            for line in inspect.getsource(parent).splitlines():
                code, _, comment = line.partition("  # ")
                comments.setdefault(code.split(":")[0].strip(), comment.strip())
    return comments


def shown(value: Any) -> str:
    """Write a flag's value as on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def usage(intro: str, stages: Collection[str]) -> str:
    """List every flag: its default, the one under --model=DIR, what it is, what it can be."""
    lines = [intro.strip(), "", "--model=DIR is short for --model.path=DIR; --config=FILE starts "
             "from the config.json of another run.", f"Stages: {', '.join(stages)}.", ""]
    sections = {"": Config, **get_type_hints(Config)}
    for flag, value in flatten(Config()).items():
        section, _, key = flag.rpartition(".")
        text = comments_of(sections[section])[key]
        if flag in CHOICES:
            text = f"{' | '.join(CHOICES[flag])}: {text}"
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


def reward_shape(config: Config) -> ModelConfig | None:
    """Return the reward model's own shape on the embedded world; None if it has the actor's."""
    own = {name: getattr(config.reward, name) for name in ("dim", "n_layers", "n_heads", "ffn_dim")}
    own = {name: size for name, size in own.items() if size}
    if not own:
        return None
    if "n_heads" in own:
        own["n_kv_heads"] = own["n_heads"]
    return dataclasses.replace(world_shape(config), **own)


# ---------------------------------------------------------------------------------------------
# What is refused before any work, in one line each

def check(config: Config, stages: Collection[str]) -> None:
    """Refuse what cannot be run."""
    flat = flatten(config)
    for flag, choices in CHOICES.items():
        if flat[flag] not in choices:
            raise ValueError(f"--{flag}={flat[flag]}: use {one_of(choices)}")
    check_stages(config, stages)
    check_folders(config)
    if len(config.reward.temperatures) < 2:
        raise ValueError("--reward.temperatures: ranking needs at least two responses per prompt")
    check_context(config)
    check_data(config)


def check_stages(config: Config, stages: Collection[str]) -> None:
    """Refuse unknown stages, and stages out of the recipe's order."""
    order = list(stages)
    unknown = [stage for stage in config.stages if stage not in order]
    in_order = sorted(set(config.stages) - set(unknown), key=order.index)
    if unknown or list(config.stages) != in_order:
        raise ValueError(f"--stages={','.join(config.stages)}: give some of {','.join(order)}, "
                         "each once and in this order")


def check_folders(config: Config) -> None:
    """Refuse a base that is no run, and resuming what has no name."""
    if config.base and not Path(config.base, "config.json").exists():
        raise ValueError(f"--base={config.base}: not the folder of a run, it has no config.json")
    if config.resume and not config.out:
        raise ValueError("--resume needs --out=FOLDER: the run to continue")


def check_context(config: Config) -> None:
    """Refuse lengths beyond the context of the actor's or the reward model."""
    shapes = {"the model": world_shape(config) if config.is_world else
              read_config(config.model.path)}
    if config.reward.model:
        shapes[f"--reward.model={config.reward.model}"] = read_config(config.reward.model)
    for name, shape in shapes.items():
        if config.longest > shape.max_seq_len:
            raise ValueError(f"--data.max_prompt_tokens + --data.max_response_tokens = "
                             f"{config.longest} exceeds the context of {name}: "
                             f"{shape.max_seq_len} tokens")
    if reward_shape(config) and not config.is_world:
        raise ValueError("--reward.dim and the like shape the embedded world's reward model; "
                         "with --model give --reward.model=DIR")


def check_data(config: Config) -> None:
    """Refuse stages without data, and files that are not there or empty."""
    flat = flatten(config)
    if config.is_world and any(flat[flag] for flag in DATA_FLAGS):
        raise ValueError("data files need a model to train: give --model=DIR")
    needs = [("sft", "sft.data"), ("ppo", "ppo.prompts"), ("sample", "ppo.prompts")]
    if config.ppo.ptx_coef:
        needs.append(("ppo", "sft.data"))
    for stage, flag in needs:
        idle = stage == "sample" and config.reward.data
        if not config.is_world and stage in config.stages and not flat[flag] and not idle:
            raise ValueError(f"--model is given, so stage {stage} needs --{flag}=FILE")
    files = [(flag, file) for flag in DATA_FLAGS for file in flat[flag]]
    if config.reward.function:
        files.append(("reward.function", config.reward.function))
    for flag, file in files:
        if not Path(file).is_file():
            raise ValueError(f"--{flag}={file}: no such file")
        if not Path(file).stat().st_size:
            raise ValueError(f"--{flag}={file}: the file is empty")
    if config.ppo.reward == "function" and not config.reward.function and not config.is_world:
        raise ValueError("--ppo.reward=function needs --reward.function=FILE.py")


def check_ranks(config: Config, world: int) -> None:
    """Refuse batch sizes that the ranks cannot share evenly."""
    flat = flatten(config)
    for flag in ("sft.batch_size", "reward.batch_size", "ppo.batch_size", "ppo.minibatch_size"):
        if flat[flag] % world:
            raise ValueError(f"--{flag}={flat[flag]} cannot be shared by {world} processes: "
                             f"make it a multiple of {world}")
