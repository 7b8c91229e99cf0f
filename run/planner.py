"""Plan before you rent: the peak memory of every stage on every rank, found without a GPU.

The real modules, losses and FSDP wrapping run on fake tensors, which have a shape and no content,
in a fake process group. Two models of a few blocks are simulated; every further block costs what
the last one did, so large ones follow exactly.

What lives through a stage is arithmetic: parameters, gradients, Adam's two moments. What comes and
goes is measured as the highest total of all storages while a micro-batch runs: activations (with
the blocks gathered for them), logits, KV cache. The batch is the worst case: every prompt and every
response has its full length.
"""
from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import parallel
import ppo
import reward
import sft
from model import (ModelConfig, ScalarModel, Transformer, generation_steps, token_logprobs)
from parallel import Machine
from run.folder import export_dtype
from run.settings import Config, reward_shape, world_shape
from weights import read_config

GIB = 2 ** 30
RESERVE = 4 * GIB  # CUDA's context, NCCL's buffers, fragmentation: not simulated
LLAMA = ModelConfig(
    dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, vocab_size=32_000, ffn_dim=11_008,
    max_seq_len=4096)
SIZES = {
    "7b": LLAMA,
    "13b": replace(LLAMA, dim=5120, n_layers=40, n_heads=40, n_kv_heads=40, ffn_dim=13_824),
    "34b": replace(LLAMA, dim=8192, n_layers=48, n_heads=64, n_kv_heads=8, ffn_dim=22_016,
                   max_seq_len=16_384, rope_theta=1e6),
    "70b": replace(LLAMA, dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_dim=28_672),
}
FEW = 4  # blocks of the smaller of the two models that are simulated in place of a large one


class Parts(NamedTuple):
    """Peak bytes on one rank, by what they are for."""
    parameters: int
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    cache: int = 0


# ---------------------------------------------------------------------------------------------
# What comes and goes: measured

class Usage(NamedTuple):
    """Bytes alive at one moment."""
    others: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        return self.others + self.logits

    def __sub__(self, base: Usage) -> Usage:
        return Usage(self.others - base.others, self.logits - base.logits)


class Known(NamedTuple):
    """A storage that was seen, and is not kept alive by that."""
    reference: StorageWeakRef
    is_logits: bool  # it holds a number for every piece of the vocabulary


class Meter(TorchDispatchMode):
    """Adds up the storages of fake tensors after every operation; remembers the highest total."""

    def __init__(self, count: int, vocab_size: int) -> None:
        """count: True slots of the batch's masks, which have no content to count them in."""
        super().__init__()
        self.count = count
        self.vocab_size = vocab_size
        self.storages: dict[int, Known] = {}
        self.base = self.peak = Usage()

    def usage(self) -> Usage:
        """Return the bytes alive now."""
        sizes = {False: 0, True: 0}
        for key, known in list(self.storages.items()):
            storage = None
            if not known.reference.expired():
                storage = torch.UntypedStorage._new_with_weak_ptr(known.reference.cdata)
            if storage is None:
                del self.storages[key]
            else:
                # FSDP resizes storages, so each is asked every time.
                sizes[known.is_logits] += storage.nbytes()
        return Usage(others=sizes[False], logits=sizes[True])

    def start(self) -> None:
        """Measure from here: what is alive now does not count."""
        self.base = self.peak = self.usage()

    def above_start(self) -> Usage:
        """Return the bytes at the peak beyond those at the start."""
        return self.peak - self.base

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run one operation on shapes, and take note of the storages it made."""
        result = self.shape_of_result(func, args, kwargs or {})
        before = len(self.storages)
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor):  # a DTensor's outer shape is no memory
                storage = tensor.untyped_storage()
                is_logits = tensor.dim() > 1 and tensor.shape[-1] == self.vocab_size
                self.storages.setdefault(storage._cdata, Known(StorageWeakRef(storage), is_logits))
        if len(self.storages) > before:  # a view makes no storage
            self.peak = max(self.peak, self.usage(), key=lambda usage: usage.total)
        return result

    def shape_of_result(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Run one operation; where its shape hangs on content, answer with the worst case."""
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:
            return 0
        if func is aten.nonzero.default:
            # mask of any shape -> (count, axes of the mask)
            mask = args[0]
            return torch.empty(self.count, mask.dim(), dtype=torch.int64, device=mask.device)
        if func is aten.index.Tensor:
            x, (mask, *_) = args
            if mask is not None and mask.dtype == torch.bool:
                # the mask's axes -> (count,); further axes stay
                shape = (self.count, *x.shape[mask.dim():])
                return torch.empty(shape, dtype=x.dtype, device=x.device)
        return func(*args, **kwargs)


@contextlib.contextmanager
def fake_group(world: int) -> Iterator[None]:
    """Be rank 0 of `world` processes that do not exist; collectives return at once."""
    if world == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def wrapped_as(kind: type[nn.Module], shape: ModelConfig) -> Iterator[None]:
    """Wrap every model block by block, or every one whole, as one of this shape would be."""
    threshold = parallel.BLOCKWISE_ABOVE
    blockwise = parameters_of(kind, shape) > threshold
    parallel.BLOCKWISE_ABOVE = -1 if blockwise else float("inf")
    try:
        yield
    finally:
        parallel.BLOCKWISE_ABOVE = threshold


# Does one micro-batch with a model: returns a loss, or None for a forward without backward.
MicroBatch = Callable[[nn.Module], Tensor | None]


def simulate(
    kind: type[nn.Module], shape: ModelConfig, machine: Machine, count: int, run: MicroBatch
) -> Usage:
    """Return the bytes that come and go while `run` does one micro-batch on such a model."""
    with FakeTensorMode(allow_non_fake_inputs=True), Meter(count, shape.vocab_size) as meter:
        model = kind(shape)
        model.model.recompute = machine.config.activation_checkpointing
        if machine.world > 1:
            parallel.shard(model, machine, offload=False)
        for _ in range(2):  # the second finds the gradients of the first
            meter.start()
            with machine.autocast():
                loss = run(model)
            if loss is not None:
                loss.backward()
            del loss
        return meter.above_start()


def measure(
    kind: type[nn.Module], shape: ModelConfig, machine: Machine, count: int, run: MicroBatch
) -> Usage:
    """Return the same as `simulate`, of a model of any depth, in the time of a shallow one.

    count: True slots of the batch's mask.
    """
    # The few blocks are wrapped as the many would be.
    with wrapped_as(kind, shape):
        if shape.n_layers <= FEW + 1:
            return simulate(kind, shape, machine, count, run)
        few = simulate(kind, replace(shape, n_layers=FEW), machine, count, run)
        more = simulate(kind, replace(shape, n_layers=FEW + 1), machine, count, run)
    # Every further block adds what the last one did.
    added = more - few
    missing = shape.n_layers - FEW
    return Usage(few.others + added.others * missing, few.logits + added.logits * missing)


# ---------------------------------------------------------------------------------------------
# What stays: arithmetic

def parameters_of(kind: type[nn.Module], shape: ModelConfig) -> int:
    """Count the parameters of a model of this shape."""
    with torch.device("meta"):
        return sum(p.numel() for p in kind(shape).parameters())


def shard_bytes(
    kind: type[nn.Module], shape: ModelConfig, machine: Machine, frozen: bool
) -> int:
    """Return the bytes of rank 0's shards."""
    with torch.device("meta"):
        model = kind(shape)
    if frozen:
        parallel.cast_frozen(model, machine)
    total = 0
    for parameter in model.parameters():
        # FSDP splits rows and rounds up: (rows, ...) -> (ceil(rows / shards), ...)
        rows = -(-parameter.size(0) // machine.shards)
        total += rows * (parameter.numel() // parameter.size(0)) * parameter.dtype.itemsize
    return total


def has_reward_model(config: Config) -> bool:
    """Return whether a reward model scores PPO's responses, and not a person's function alone."""
    if config.ppo.reward == "auto":
        return not config.reward.function or "reward" in config.stages
    return config.ppo.reward != "function"


# ---------------------------------------------------------------------------------------------
# The stages

class Grid(NamedTuple):
    """A micro-batch of full rows: how many, how long, and how many of their tokens are scored."""
    batch: int
    time: int
    responses: int


def rollout_of(size: Grid) -> ppo.Rollout:
    """Return (batch, time) full-length episodes; attention_mask None: every token is real."""
    grid = torch.zeros(size.batch, size.time)
    mask = torch.zeros(size.batch, size.time, dtype=torch.bool)
    return ppo.Rollout(
        tokens=mask.long(), attention_mask=None, response_mask=mask,
        logprobs=grid, ref_logprobs=grid, sampler_logprobs=grid, values=grid,
        scores=grid[:, 0], cut_off=mask[:, 0],
        rewards=grid, advantages=grid, returns=grid, weights=grid)


class Planner:
    """The stages of one setting: each method returns the bytes at the stage's peak."""

    def __init__(self, config: Config, shape: ModelConfig, judge: ModelConfig) -> None:
        """shape: the actor's and the reference's; judge: the reward model's and the critic's."""
        self.config = config
        self.shape = shape
        self.judge = judge
        self.prompt = config.data.max_prompt_tokens
        self.response = config.data.max_response_tokens
        self.time = self.prompt + self.response

        # One replica is planned: to keep several alike, gradients are added up in place.
        shards = config.ranks // config.parallel.replicas
        dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
        mesh = None
        if shards > 1:
            mesh = init_device_mesh("cpu", (shards,), mesh_dim_names=("shards",))
        alone = replace(config.parallel, replicas=1)
        self.machine = Machine(0, shards, torch.device("cpu"), dtype, alone, mesh)

    def held(self, kind: type[nn.Module], shape: ModelConfig, frozen: bool = False) -> int:
        """Return the bytes of a model's shards that stay on the GPU.

        Gradients have as many, Adam's moments twice as many.
        """
        if frozen and self.config.parallel.offload_frozen:
            return 0
        return shard_bytes(kind, shape, self.machine, frozen)

    def train(
        self, kind: type[nn.Module], shape: ModelConfig, count: int, loss: MicroBatch
    ) -> Parts:
        """Plan an optimizer step of one model that is alone on the GPU."""
        held = self.held(kind, shape)
        usage = measure(kind, shape, self.machine, count, loss)
        return Parts(parameters=held, gradients=held, optimizer=2 * held,
                     activations=usage.others, logits=usage.logits)

    def largest(self, section: sft.SFTConfig | reward.RewardConfig | ppo.PPOConfig,
                group: int = 1) -> Grid:
        """Return the largest micro-batch that a section allows. group: rows that stay together."""
        batch, tokens = section.microbatch_size, section.microbatch_tokens
        time, responses = self.time, batch * group * self.response
        if tokens:
            # One more than fit at full length: a little shorter, they are that many tokens.
            batch = min(batch, -(-tokens // (group * time)))
            if batch > 1:  # one alone may be longer
                time = min(time, tokens // (group * batch))
            # Where prompts are short, nearly all may be responses.
            responses = min(responses, max(tokens, group * self.response), batch * group * time)
        return Grid(batch, time, responses)

    def sft(self) -> Parts:
        grid = self.largest(self.config.sft)

        def loss(model: nn.Module) -> Tensor:
            mask = torch.zeros(grid.batch, grid.time, dtype=torch.bool)
            loss_sum, _ = sft.loss(model, sft.Batch(mask.long(), None, mask))
            return loss_sum

        return self.train(Transformer, self.shape, grid.responses, loss)

    def reward(self) -> Parts:
        group = len(self.config.reward.temperatures)
        grid = self.largest(self.config.reward, group)

        def loss(model: nn.Module) -> Tensor:
            # (batch prompts x group responses, time): all responses of a prompt in one forward
            mask = torch.zeros(grid.batch * group, grid.time, dtype=torch.bool)
            ranks = torch.zeros(grid.batch, group)
            loss_sum, _ = reward.loss(model, reward.Batch(mask.long(), None, ranks))
            return loss_sum

        return self.train(ScalarModel, self.judge, grid.batch * group, loss)  # a score a row

    def ppo_base(self) -> Parts:
        """Return what PPO's models hold all the time; no gradients, which come and go."""
        trained = self.held(Transformer, self.shape)
        frozen = self.held(Transformer, self.shape, frozen=True)
        if self.config.ppo.has_critic:
            trained += self.held(ScalarModel, self.judge)
        if has_reward_model(self.config):
            frozen += self.held(ScalarModel, self.judge, frozen=True)
        return Parts(parameters=trained + frozen, optimizer=2 * trained)

    def ppo_rollout(self) -> Parts:
        """Plan the larger of sampling and of reading log-probabilities, values and scores."""
        phases = [self.sampling(), self.reading(Transformer, self.shape, self.read_logprobs)]
        if self.config.ppo.has_critic or has_reward_model(self.config):
            phases.append(self.reading(ScalarModel, self.judge, self.read_values))
        return max(phases, key=sum)

    def sampling(self) -> Parts:
        """Plan sampling, with the actor gathered whole."""
        config = self.config.ppo
        episodes = -(-config.batch_size // self.config.ranks)  # of this rank
        batch = min(config.generation_batch, episodes)

        @torch.no_grad()
        def sample(model: nn.Module) -> None:
            prompts = [[1] * self.prompt] * batch
            noise = torch.zeros(batch, self.response)
            with parallel.gathered(model):
                steps = generation_steps(
                    model, prompts, self.response, config.temperature, config.top_k, config.top_p,
                    None, noise)
                # The prompt's forward, then a token's: all later ones are like it.
                next(steps)
                next(steps)

        usage = measure(Transformer, self.shape, self.machine, batch * self.response, sample)
        cache = batch * self.time * self.cache_bytes()
        return self.ppo_base()._replace(
            activations=usage.others - cache, logits=usage.logits, cache=cache)

    def cache_bytes(self) -> int:
        """Return the bytes of the actor's cache per token: keys and values of all blocks."""
        width = self.shape.n_kv_heads * self.shape.head_size
        return 2 * self.shape.n_layers * width * self.machine.dtype.itemsize

    def reading(self, kind: type[nn.Module], shape: ModelConfig, read: MicroBatch) -> Parts:
        """Plan a forward over finished episodes."""
        count = self.largest(self.config.ppo).responses
        usage = measure(kind, shape, self.machine, count, read)
        return self.ppo_base()._replace(activations=usage.others, logits=usage.logits)

    @torch.no_grad()
    def read_logprobs(self, model: nn.Module) -> None:
        rollout = rollout_of(self.largest(self.config.ppo))
        token_logprobs(model, rollout.tokens, None, rollout.response_mask,
                       self.config.ppo.temperature)

    @torch.no_grad()
    def read_values(self, model: nn.Module) -> None:
        rollout = rollout_of(self.largest(self.config.ppo))
        ppo.token_values(model, rollout.tokens, None, rollout.response_mask)

    def ppo_update(self) -> Parts:
        """Plan the larger of the actor's and the critic's optimizer steps."""
        config = self.config.ppo
        grid = self.largest(config)

        def actor_loss(model: nn.Module) -> Tensor:
            loss_sum, _ = ppo.actor_loss(model, rollout_of(grid), config, 0.1)
            return loss_sum

        def critic_loss(model: nn.Module) -> Tensor:
            loss_sum, _ = ppo.critic_loss(model, rollout_of(grid), config)
            return loss_sum

        steps = [self.step(Transformer, self.shape, actor_loss)]
        if self.config.ppo.has_critic:
            steps.append(self.step(ScalarModel, self.judge, critic_loss))
        return max(steps, key=sum)

    def step(self, kind: type[nn.Module], shape: ModelConfig, loss: MicroBatch) -> Parts:
        """Plan one model's optimizer step beside all that PPO holds."""
        # A step ends by letting its gradients go: those of two models are never there at once.
        return self.reading(kind, shape, loss)._replace(gradients=self.held(kind, shape))


# By name; the first word is the stage of a run, as --stages knows it.
STAGES: dict[str, Callable[[Planner], Parts]] = {
    "sft": Planner.sft,
    "reward": Planner.reward,
    "ppo rollout": Planner.ppo_rollout,
    "ppo update": Planner.ppo_update,
}


def plan_stage(stage: str, config: Config, shape: ModelConfig, judge: ModelConfig) -> Parts:
    """Return the bytes at the peak of one of STAGES."""
    with fake_group(config.ranks // config.parallel.replicas):
        return STAGES[stage](Planner(config, shape, judge))


# ---------------------------------------------------------------------------------------------
# Advice, and the command

def get_flag(config: Config, flag: str) -> Any:
    """Return the value of a flag, "section.name" or "name"."""
    section, _, key = flag.rpartition(".")
    return getattr(getattr(config, section) if section else config, key)


def set_flag(config: Config, flag: str, value: Any) -> Config:
    """Return the config with one flag set."""
    section, _, key = flag.rpartition(".")
    if not section:
        return replace(config, **{key: value})
    return replace(config, **{section: replace(getattr(config, section), **{key: value})})


def savings(stage: str, config: Config) -> Iterator[tuple[str, Any]]:
    """Yield what makes a stage smaller, as flags and values, the cheapest first."""
    section = stage.split()[0]
    if stage != "ppo rollout":
        yield "parallel.activation_checkpointing", True
    if section == "ppo" and config.ranks > 1:
        yield "parallel.offload_frozen", True
    if stage == "ppo rollout":
        for size in (16, 8, 4, 1):
            if size < config.ppo.generation_batch:
                yield "ppo.generation_batch", size
    else:
        yield f"{section}.microbatch_size", 1
    for times in (2, 4, 8, 16):
        yield "ranks", config.ranks * times


def advise(
    stage: str, config: Config, shape: ModelConfig, judge: ModelConfig, room: float
) -> str:
    """Add one saving after the other until the stage fits; return the flags."""
    flags: dict[str, str] = {}
    for flag, value in savings(stage, config):
        if get_flag(config, flag) == value:
            continue
        config = set_flag(config, flag, value)
        flags[flag] = str(value).lower()
        if sum(plan_stage(stage, config, shape, judge)) <= room:
            return "fits with " + " ".join(f"--{flag}={value}" for flag, value in flags.items())
    return "does not fit 16 times as many ranks either: take a smaller model"


def heading(config: Config, shape: ModelConfig, judge: ModelConfig, room: float) -> str:
    """Return what stands above the table."""
    sizes = f"Actor of {parameters_of(Transformer, shape) / 1e9:.2f}"
    judges = ["reward model"] * has_reward_model(config) + ["critic"] * config.ppo.has_critic
    if judges:
        billions = parameters_of(ScalarModel, judge) / 1e9
        sizes += f", {' and '.join(judges)} of {billions:.2f}"
    columns = "".join(f"{name:>12}" for name in Parts._fields)
    return (
        f"Peak memory of one of {config.ranks} ranks in GiB; {config.gpu_memory:g} GB less a "
        f"reserve of {RESERVE // GIB} GiB for CUDA, NCCL and fragmentation is "
        f"{room / GIB:.1f} GiB.\n"
        f"{sizes} billion parameters; every prompt {config.data.max_prompt_tokens} and every "
        f"response {config.data.max_response_tokens} tokens long.\n"
        "Activations are counted with the weights gathered for them.\n\n"
        f"{'':12}{columns}{'peak':>9}")


def disk_bytes(config: Config, shape: ModelConfig, judge: ModelConfig) -> int:
    """Return what a run's model folders and its largest checkpoints take on the disk."""
    actor, scalar = parameters_of(Transformer, shape), parameters_of(ScalarModel, judge)
    size = {"sft": actor, "top": actor, "reward": scalar, "ppo": actor}
    trained = {**size, "ppo": actor + scalar * config.ppo.has_critic}
    stages = [stage for stage in config.stages if stage in size]
    folders = itemsize_of(config) * sum(size[stage] for stage in stages)
    # a checkpoint holds weights and two moments in float32; the oldest stays until it is whole
    saves = config.checkpoint_every or config.checkpoint_minutes
    kept = config.checkpoint_keep + 1 if saves else 0
    return folders + kept * 12 * max((trained[stage] for stage in stages), default=0)


def itemsize_of(config: Config) -> int:
    """Return the bytes of a weight in a run's model folders."""
    if config.export.dtype == "auto" and config.model.path.lower() in SIZES:
        return 2  # a name in place of a folder: models of these sizes come in bfloat16
    return export_dtype(config).itemsize


def check_disk(config: Config, folder: Path) -> None:
    """Refuse a run whose models do not fit on the disk: hours later they would not be saved."""
    needed = disk_bytes(config, *shapes(config))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{folder}: {free / 1e9:.1f} GB are free on its disk, and the models and "
                         f"checkpoints of this run take {needed / 1e9:.1f} GB: free some, name "
                         "another --out, keep fewer with --checkpoint_keep=1, or none with "
                         "--checkpoint_every=0")


def main(config: Config, shapes: tuple[ModelConfig, ModelConfig]) -> None:
    """Print the plan of every stage. shapes: of the actor, and of reward model and critic."""
    if config.ranks < 1 or config.ranks % config.parallel.replicas:
        raise ValueError(f"--ranks={config.ranks} must be a positive multiple of "
                         f"--parallel.replicas={config.parallel.replicas}")
    room = config.gpu_memory * 1e9 - RESERVE
    print(heading(config, *shapes, room), flush=True)
    for stage in STAGES:
        if stage.split()[0] not in config.stages:
            continue
        parts = plan_stage(stage, config, *shapes)
        fits = sum(parts) <= room
        columns = "".join(f"{part / GIB:12.1f}" for part in parts)
        verdict = "fits" if fits else "does not fit"
        print(f"{stage:12}{columns}{sum(parts) / GIB:9.1f}  {verdict}", flush=True)
        if not fits:
            print(f"{'':12}{advise(stage, config, *shapes, room)}", flush=True)
    print(f"\nOn the disk, with weights of {itemsize_of(config)} bytes in the model folders: "
          f"{disk_bytes(config, *shapes) / 1e9:.1f} GB.")


def named_shape(name: str) -> ModelConfig:
    """Return the shape of a named size, or of the model in a folder."""
    if name.lower() in SIZES:
        return SIZES[name.lower()]
    if not Path(name).is_dir():
        raise ValueError(f"--model={name}: neither a model folder nor one of {', '.join(SIZES)}")
    return read_config(name)


def shapes(config: Config) -> tuple[ModelConfig, ModelConfig]:
    """Return the shapes of the actor, and of reward model and critic, that --plan speaks of."""
    if config.is_world:
        shape = world_shape(config)
        return shape, reward_shape(config) or shape
    return named_shape(config.model.path), named_shape(config.reward.model or config.model.path)
