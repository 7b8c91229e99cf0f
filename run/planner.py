"""Plan before you rent: the peak memory of every stage on every rank, found without a GPU.

The real modules, losses and FSDP wrapping run on fake tensors, which have a shape and no content, in a fake process group. Two
models of a few blocks are simulated; every further block costs what the last one did, so large ones follow exactly.
What lives through a stage is arithmetic: parameters, gradients, Adam's two moments. What comes and goes is measured as
the highest total of all storages while a micro-batch runs: activations (with the blocks gathered for them), logits, KV cache.
The batch is the worst case: every prompt and every response has its full length.
"""
from __future__ import annotations

import contextlib
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
from model import ModelConfig, ScalarModel, Transformer, generation_steps
from parallel import Machine
from run.settings import Config, reward_shape, world_shape
from weights import read_config

GIB = 2 ** 30
RESERVE = 4 * GIB  # CUDA's context, NCCL's buffers, fragmentation: not simulated
LLAMA = ModelConfig(dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, vocab_size=32_000, ffn_dim=11_008, max_seq_len=4096)
SIZES = {
    "7b": LLAMA,
    "13b": replace(LLAMA, dim=5120, n_layers=40, n_heads=40, n_kv_heads=40, ffn_dim=13_824),
    "34b": replace(LLAMA, dim=8192, n_layers=48, n_heads=64, n_kv_heads=8, ffn_dim=22_016, max_seq_len=16_384, rope_theta=1e6),
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


class Meter(TorchDispatchMode):
    """Adds up the storages of fake tensors after every operation, and remembers the highest total.

    Fake tensors have no content, so whatever depends on it is answered with the worst case: a mask has `count` True slots.
    """

    def __init__(self, count: int, vocab_size: int) -> None:
        super().__init__()
        self.count, self.vocab_size = count, vocab_size
        self.storages: dict[int, tuple[StorageWeakRef, bool]] = {}  # with whether it holds something per piece of the vocabulary
        self.peak = self.base = (0, 0)

    def total(self) -> tuple[int, int]:
        """Return the bytes alive now that are not logits, and those that are. FSDP resizes storages, so each is asked every time."""
        sums = [0, 0]
        for key, (reference, is_logits) in list(self.storages.items()):
            storage = None if reference.expired() else torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self.storages[key]
            else:
                sums[is_logits] += storage.nbytes()
        return sums[0], sums[1]

    def start(self) -> None:
        """Measure from here: what is alive now does not count."""
        self.base = self.peak = self.total()

    def parts(self) -> tuple[int, int]:
        """Return the bytes at the peak beyond those at the start: without logits, logits."""
        return self.peak[0] - self.base[0], self.peak[1] - self.base[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run one operation on shapes, and take note of the storages it made."""
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:
            return 0
        if func is aten.nonzero.default:
            result = torch.empty(self.count, args[0].dim(), dtype=torch.int64, device=args[0].device)
        elif func is aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            result = torch.empty(self.count, *args[0].shape[args[1][0].dim():], dtype=args[0].dtype, device=args[0].device)
        else:
            result = func(*args, **(kwargs or {}))
        known = len(self.storages)
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor):  # a DTensor's outer shape is no memory
                storage = tensor.untyped_storage()
                self.storages.setdefault(storage._cdata, (StorageWeakRef(storage), tensor.dim() > 1 and tensor.shape[-1] == self.vocab_size))
        if len(self.storages) > known:  # not after views
            self.peak = max(self.peak, self.total(), key=sum)
        return result


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


def measure(kind: type[nn.Module], shape: ModelConfig, machine: Machine, count: int, run: Callable[[nn.Module], Tensor | None]) -> tuple[int, int]:
    """Return the bytes that come and go while `run` does one micro-batch, but for logits, and those of logits.

    run: returns a loss, or None for a forward without backward.   count: True slots of the batch's mask.
    """
    def simulate(layers: int) -> tuple[int, int]:
        """Run the micro-batch on a model of so many blocks."""
        with FakeTensorMode(allow_non_fake_inputs=True), Meter(count, shape.vocab_size) as meter:
            model = kind(replace(shape, n_layers=layers))
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
            return meter.parts()
    threshold = parallel.BLOCKWISE_ABOVE  # the few blocks are to be wrapped as the many would be
    try:
        parallel.BLOCKWISE_ABOVE = -1 if parameters_of(kind, shape) > threshold else float("inf")
        if shape.n_layers <= FEW + 1:
            return simulate(shape.n_layers)
        few, more = simulate(FEW), simulate(FEW + 1)
    finally:
        parallel.BLOCKWISE_ABOVE = threshold
    return tuple(a + (b - a) * (shape.n_layers - FEW) for a, b in zip(few, more))


def parameters_of(kind: type[nn.Module], shape: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in kind(shape).parameters())


def shard_bytes(kind: type[nn.Module], shape: ModelConfig, machine: Machine, dtype: torch.dtype) -> int:
    """Return the bytes of rank 0's shards: FSDP splits dimension 0, rounding up."""
    with torch.device("meta"):
        return sum(-(-p.size(0) // machine.shards) * (p.numel() // p.size(0)) for p in kind(shape).parameters()) * dtype.itemsize


# ---------------------------------------------------------------------------------------------
# The stages

def rollout_of(batch: int, time: int) -> ppo.Rollout:
    """Return a rollout of full-length episodes, attention_mask None: every token is real."""
    grid, mask = torch.zeros(batch, time), torch.zeros(batch, time, dtype=torch.bool)
    return ppo.Rollout(mask.long(), None, mask, grid, grid, grid, torch.zeros(batch), mask[:, 0], grid, grid, grid, grid, grid)


class Planner:
    """The stages of one setting. config: train.Config; shape, judge: of the actor and of reward model and critic."""

    def __init__(self, config: Any, shape: ModelConfig, judge: ModelConfig) -> None:
        self.config, self.shape, self.judge = config, shape, judge
        self.prompt, self.response = config.data.max_prompt_tokens, config.data.max_response_tokens
        self.time = self.prompt + self.response
        # one replica: to keep several alike, gradients are added up in place
        self.shards = config.ranks // config.parallel.replicas
        dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
        mesh = init_device_mesh("cpu", (self.shards,), mesh_dim_names=("shards",)) if self.shards > 1 else None
        self.machine = Machine(0, self.shards, torch.device("cpu"), dtype, replace(config.parallel, replicas=1), mesh)

    def held(self, kind: type[nn.Module], shape: ModelConfig, frozen: bool = False) -> int:
        """Return the bytes of a model's shards that stay on the GPU; gradients have as many, Adam's moments twice as many."""
        if frozen and self.config.parallel.offload_frozen:
            return 0
        return shard_bytes(kind, shape, self.machine, self.machine.dtype if frozen and self.machine.world > 1 else torch.float32)

    def train(self, kind: type[nn.Module], shape: ModelConfig, count: int, loss: Callable[[nn.Module], Tensor]) -> Parts:
        """Plan an optimizer step of one model that is alone on the GPU."""
        held = self.held(kind, shape)
        return Parts(held, held, 2 * held, *measure(kind, shape, self.machine, count, loss))

    def sft(self) -> Parts:
        batch = self.config.sft.microbatch_size

        def loss(model: nn.Module) -> Tensor:
            mask = torch.zeros(batch, self.time, dtype=torch.bool)
            return sft.loss(model, sft.Batch(mask.long(), None, mask))[0]
        return self.train(Transformer, self.shape, batch * self.response, loss)

    def reward(self) -> Parts:
        batch, group = self.config.reward.microbatch_size, len(self.config.reward.temperatures)

        def loss(model: nn.Module) -> Tensor:
            mask = torch.zeros(batch * group, self.time, dtype=torch.bool)
            return reward.loss(model, reward.Batch(mask.long(), mask, torch.zeros(batch, group)))[0]
        return self.train(ScalarModel, self.judge, batch * group * self.time, loss)

    def ppo_base(self) -> Parts:
        """Return what actor, critic, reference and reward model hold through all of PPO."""
        trained = self.held(Transformer, self.shape) + self.held(ScalarModel, self.judge)
        return Parts(trained + self.held(Transformer, self.shape, True) + self.held(ScalarModel, self.judge, True), optimizer=2 * trained)

    def ppo_rollout(self) -> Parts:
        """Plan the larger of: sampling with the actor gathered whole, reading log-probabilities, reading values and scores."""
        config = self.config.ppo
        batch, part = min(config.generation_batch, -(-config.batch_size // self.config.ranks)), config.microbatch_size

        @torch.no_grad()
        def sample(model: nn.Module) -> None:
            with parallel.gathered(model):
                steps = generation_steps(model, [[1] * self.prompt] * batch, self.response, config.temperature, config.top_k, config.top_p, None,
                                         torch.zeros(batch, self.response))
                next(steps), next(steps)

        @torch.no_grad()
        def score(model: nn.Module) -> None:
            rollout = rollout_of(part, self.time)
            ppo.token_logprobs(model, rollout.tokens, None, rollout.response_mask, config.temperature)

        @torch.no_grad()
        def judge(model: nn.Module) -> None:
            rollout = rollout_of(part, self.time)
            ppo.token_values(model, rollout.tokens, None, rollout.response_mask)
        cache = 2 * batch * self.time * self.shape.n_layers * self.shape.dim * self.shape.n_kv_heads // self.shape.n_heads * self.machine.dtype.itemsize
        working, logits = measure(Transformer, self.shape, self.machine, batch * self.response, sample)
        count = part * self.response
        found = [(working - cache, logits, cache), (*measure(Transformer, self.shape, self.machine, count, score), 0),
                 (*measure(ScalarModel, self.judge, self.machine, count, judge), 0)]
        activations, logits, cache = max(found, key=sum)
        return self.ppo_base()._replace(activations=activations, logits=logits, cache=cache)

    def ppo_update(self) -> Parts:
        """Plan the larger of the actor's and the critic's optimizer step, which follow each other."""
        config, part = self.config.ppo, self.config.ppo.microbatch_size
        found = []
        for kind, shape, loss in ((Transformer, self.shape, lambda model: ppo.actor_loss(model, rollout_of(part, self.time), config, 0.1)[0]),
                                  (ScalarModel, self.judge, lambda model: ppo.critic_loss(model, rollout_of(part, self.time), config)[0])):
            activations, logits = measure(kind, shape, self.machine, part * self.response, loss)
            found.append(self.ppo_base()._replace(gradients=self.held(kind, shape), activations=activations, logits=logits))
        return max(found, key=sum)


STAGES = {"sft": Planner.sft, "reward": Planner.reward, "ppo rollout": Planner.ppo_rollout, "ppo update": Planner.ppo_update}


def plan_stage(stage: str, config: Any, shape: ModelConfig, judge: ModelConfig) -> Parts:
    with fake_group(config.ranks // config.parallel.replicas):
        return STAGES[stage](Planner(config, shape, judge))


def changed(config: Any, flag: str, value: Any) -> Any:
    """Return the config with one flag set."""
    section, _, key = flag.rpartition(".")
    return replace(config, **{section: replace(getattr(config, section), **{key: value})} if section else {key: value})


def advise(stage: str, config: Any, shape: ModelConfig, judge: ModelConfig, room: float) -> str:
    """Add one switch after the other, the cheapest first, until the stage fits; return the flags."""
    section = stage.split()[0]
    tries: list[tuple[str, Any]] = [("parallel.offload_frozen", True)] if section == "ppo" and config.ranks > 1 else []
    if stage == "ppo rollout":
        tries += [("ppo.generation_batch", n) for n in (16, 8, 4, 1) if n < config.ppo.generation_batch]
    else:
        tries = [("parallel.activation_checkpointing", True)] + tries + [(f"{section}.microbatch_size", 1)]
    tries += [("ranks", config.ranks * more) for more in (2, 4, 8, 16)]
    flags: dict[str, Any] = {}
    for flag, value in tries:
        section, _, key = flag.rpartition(".")
        if getattr(getattr(config, section) if section else config, key) == value:
            continue
        config, flags[flag] = changed(config, flag, value), str(value).lower()
        if sum(plan_stage(stage, config, shape, judge)) <= room:
            return "fits with " + " ".join(f"--{flag}={value}" for flag, value in flags.items())
    return "does not fit 16 times as many ranks either: take a smaller model"


def main(config: Any, shapes: tuple[ModelConfig, ModelConfig]) -> None:
    """Print the plan of every stage. config: train.Config; shapes: of the actor, and of reward model and critic."""
    if config.ranks < 1 or config.ranks % config.parallel.replicas:
        raise ValueError(f"--ranks={config.ranks} must be a positive multiple of --parallel.replicas={config.parallel.replicas}")
    room = config.gpu_memory * 1e9 - RESERVE
    print(f"Peak memory of one of {config.ranks} ranks in GiB; {config.gpu_memory:g} GB less a reserve of {RESERVE // GIB} GiB for CUDA, NCCL and fragmentation is "
          f"{room / GIB:.1f} GiB.\nActor of {parameters_of(Transformer, shapes[0]) / 1e9:.2f}, reward model and critic of "
          f"{parameters_of(ScalarModel, shapes[1]) / 1e9:.2f} billion parameters; every prompt {config.data.max_prompt_tokens} and every response "
          f"{config.data.max_response_tokens} tokens long.\nActivations are counted with the weights gathered for them.\n\n{'':12}{''.join(f'{name:>12}' for name in Parts._fields)}{'peak':>9}", flush=True)
    for stage in STAGES:
        parts = plan_stage(stage, config, *shapes)
        verdict = "fits" if sum(parts) <= room else "does not fit"
        print(f"{stage:12}{''.join(f'{part / GIB:12.1f}' for part in parts)}{sum(parts) / GIB:9.1f}  {verdict}", flush=True)
        if sum(parts) > room:
            print(f"{'':12}{advise(stage, config, *shapes, room)}", flush=True)


def named_shape(name: str) -> ModelConfig:
    """Return the shape of a named size, or of the model in a folder."""
    if name.lower() in SIZES:
        return SIZES[name.lower()]
    if not Path(name).is_dir():
        raise ValueError(f"--model={name}: neither a model folder nor one of {', '.join(SIZES)}")
    return read_config(name)


def shapes(config: Config) -> tuple[ModelConfig, ModelConfig]:
    """Return the shapes of the actor, and of reward model and critic, for --"""
    if config.is_world:
        return world_shape(config), reward_shape(config) or world_shape(config)
    return named_shape(config.model.path), named_shape(config.reward.model or config.model.path)
