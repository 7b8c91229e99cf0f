"""Settings: every flag with its default, the command line, and what is refused before any work."""
from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping, Sequence, get_args, get_origin, get_type_hints

from data import DataConfig
from eval import EvalConfig
from formats.files import read_json
from model import ModelConfig
from parallel import ParallelConfig
from ppo import PPOConfig
from reward import RewardConfig
from sft import SFTConfig
from weights import read_config

STAGES = ("sft", "sample", "annotate", "reward", "ppo", "eval")


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
