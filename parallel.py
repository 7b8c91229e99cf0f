"""The machine: process group, sharding, gathering, sharded checkpoints. Nothing here knows of RLHF.

Every multi-process run is fully sharded (FSDP2); one process uses no process group and plain modules.
The silent trap of FSDP2 is a parameter left unsharded by a forward without backward: an optimizer built
or stepped then works on the wrong tensors without an error. So `reshard` runs before either.
"""
from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from model import Block, ModelConfig, random_weights
from weights import Weights, check_weights, materialize, read_safetensors, write_safetensors

# Below this many parameters the whole model is one sharded unit: gathering block by block would cost
# more in messages than it saves in memory.
BLOCKWISE_ABOVE = 20_000_000
LAUNCHER = os.getppid()  # torchrun, if it started us; read early, while it surely lives


@dataclass(frozen=True)
class ParallelConfig:
    replicas: int = 1                   # groups of ranks that each hold all shards (HSDP): as many as there are nodes, or 1
    activation_checkpointing: bool = False  # keep only the blocks' inputs for the backward pass and compute the rest again
    offload_frozen: bool = False        # reference and reward model wait in CPU memory while they are not used


@dataclass(frozen=True)
class Machine:
    """This process's place in the run."""
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype  # of forwards and backwards; trained parameters and optimizers are float32 always
    config: ParallelConfig = ParallelConfig()
    mesh: DeviceMesh | None = None  # (shards,) or (replicas, shards); None: one process

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def shards(self) -> int:
        """Ranks that hold one model together; the first so many of all ranks are one such group."""
        return self.world // self.config.replicas

    def share(self, rows: Tensor, size: int) -> list[Tensor]:
        """Cut the rows of a global batch, (n,) int64, into this rank's micro-batches of at most `size` rows."""
        return list(rows[self.rank::self.world].split(size))

    def slice(self, rows: list) -> list:
        """Return this rank's contiguous part of a list; the ranks' parts in order are the list."""
        return rows[len(rows) * self.rank // self.world:len(rows) * (self.rank + 1) // self.world]

    def autocast(self) -> Any:
        """Return the context of a forward: under FSDP the parameters are cast, in one process the operations."""
        if self.world > 1 or self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def start(dtype: str, config: ParallelConfig = ParallelConfig()) -> Machine:
    """Join the process group that torchrun describes, if it started us. dtype: auto | float32 | bfloat16."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world % config.replicas:
        raise ValueError(f"--parallel.replicas={config.replicas} does not divide {world} processes")
    if config.offload_frozen and world == 1:
        raise ValueError("--parallel.offload_frozen needs several processes: one process holds plain modules")
    mesh = None
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        dist.barrier()  # a rank that fails right away would else tear the others' connections down while they are being made
        sizes, names = ((config.replicas, world // config.replicas), ("replicas", "shards")) if config.replicas > 1 else ((world,), ("shards",))
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
    if dtype == "auto":
        dtype = "bfloat16" if cuda else "float32"
    return Machine(rank, world, device, getattr(torch, dtype), config, mesh)


def stop() -> None:
    """Leave the process group; with several processes, the program ends here.

    Gloo's threads can abort a Python that takes itself apart while they still hold tensors (pytorch pull request
    179291), and torchrun would then report a finished run as failed. So it does not take itself apart.
    """
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while another still waits for it
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def fail(message: str) -> NoReturn:
    """Print one line and exit with status 2.

    torchrun answers any failed worker with pages of traceback of its own, under which that line would be
    lost. So where it launched us on this machine alone, it is ended first, by a signal it does not handle.
    """
    if int(os.environ.get("RANK", 0)):  # as a rule all ranks fail alike, and the main one speaks; after the start one may fail alone
        deadline = time.monotonic() + (15 if dist.is_initialized() else 5)
        while os.getppid() == LAUNCHER and time.monotonic() < deadline:
            time.sleep(0.05)
        if os.getppid() != LAUNCHER or not dist.is_initialized():
            os._exit(2)
    sys.stdout.flush()  # os._exit would lose what is still in the buffer of a pipe or a file
    print(message, file=sys.stderr, flush=True)
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        os.kill(LAUNCHER, signal.SIGUSR1)
    os._exit(2)  # not sys.exit: other ranks may wait in a collective that will never complete


def all_sum(x: Tensor) -> Tensor:
    """Sum x over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def all_max(x: Tensor) -> Tensor:
    """Take the maximum of x over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def gather_objects(x: Any) -> list[Any]:
    """Hand every rank the x of all ranks, in rank order. Only between processes of one run: it pickles."""
    if not dist.is_initialized():
        return [x]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, x)
    return everyone


def from_main(make: Callable[[], Any]) -> Any:
    """Call `make` on rank 0 alone and hand its result, or its ValueError, to every rank."""
    if not dist.is_initialized():
        return make()
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [make()]
        except (ValueError, OSError) as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


# ---------------------------------------------------------------------------------------------
# Models

def build(kind: type[nn.Module], config: ModelConfig, weights: Weights | int, machine: Machine,
          frozen: bool = False) -> nn.Module:
    """Build a model, sharded when there are several processes, and fill it.

    weights: those of files, memory-mapped (each rank reads only its part), or a seed to draw them from.
    frozen: never trained; its shards are held in the dtype of forwards, which rounds nothing that a forward would not.
    """
    with torch.device("meta"):
        model = kind(config).requires_grad_(not frozen)
    if isinstance(weights, Weights):
        check_weights(model, weights)
        tensors: Iterable[tuple[str, Tensor]] = ((name, weights[name]) for name, _ in model.named_parameters())
    else:
        tensors = random_weights(model, weights)
    model.model.recompute = machine.config.activation_checkpointing
    if machine.world > 1:
        shard(model.to(machine.dtype) if frozen else model, machine, offload=frozen and machine.config.offload_frozen)
    materialize(model, torch.device("cpu") if frozen and machine.config.offload_frozen else machine.device)
    parameters = dict(model.named_parameters())
    for name, tensor in tensors:
        local_part(parameters[name]).copy_(split_like(tensor, parameters[name]))
    return model


def shard(model: nn.Module, machine: Machine, offload: bool) -> None:
    """Split every parameter over the ranks of a replica (FSDP2), block by block when that pays."""
    # rotary angles and caches travel as arguments: cast_forward_inputs would round them to bfloat16
    policy = MixedPrecisionPolicy(machine.dtype, torch.float32, cast_forward_inputs=False)
    where = CPUOffloadPolicy(pin_memory=machine.device.type == "cuda") if offload else OffloadPolicy()
    if sum(p.numel() for p in model.parameters()) > BLOCKWISE_ABOVE:
        for block in model.modules():
            if isinstance(block, Block):
                fully_shard(block, mesh=machine.mesh, mp_policy=policy, offload_policy=where)
    fully_shard(model, mesh=machine.mesh, mp_policy=policy, offload_policy=where)


def local_part(x: Tensor) -> Tensor:
    """Return the part of a parameter, gradient or optimizer state that lives on this rank."""
    x = x.detach()
    return x.to_local() if isinstance(x, DTensor) else x


def split_like(full: Tensor, parameter: Tensor) -> Tensor:
    """Return this rank's part of a full tensor, by the parameter's sharding, without communication."""
    if not isinstance(parameter, DTensor):
        return full
    for axis, placement in enumerate(parameter.placements):
        if placement.is_shard():
            parts, place = full.chunk(parameter.device_mesh.size(axis), placement.dim), parameter.device_mesh.get_local_rank(axis)
            full = parts[place] if place < len(parts) else full.narrow(placement.dim, 0, 0)
    return full


def reshard(model: nn.Module) -> nn.Module:
    """Make every parameter a shard again after forwards without backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model


def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Gather the weights one parameter at a time; every rank has to go through all of them, and none has to keep any."""
    for name, parameter in reshard(model).named_parameters():
        yield name, parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold the whole model on every rank, so that each can generate at its own pace, without collectives."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
    if sharded:  # one forward through the root gathers every unit, and leaves it so
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device))
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(True, recurse=False)
        reshard(model)


def adamw(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """Build the optimizer: decay on matrices only, betas (0.9, 0.95), eps 1e-5 (InstructGPT, LLaMA 2)."""
    parameters = list(reshard(model).parameters())
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-5, fused=True)


def grad_square_sum(model: nn.Module) -> Tensor:
    """Return this rank's share of the squared gradient norm, float32; replicas, which hold equal gradients, share equally."""
    parameters = list(model.parameters())
    replicas = parameters[0].device_mesh.size(0) if isinstance(parameters[0], DTensor) and parameters[0].device_mesh.ndim == 2 else 1
    return torch.nn.utils.get_total_norm([local_part(p.grad) for p in parameters]).float().square() / replicas


# ---------------------------------------------------------------------------------------------
# Checkpoints: one safetensors file per rank and one state.json, in a folder that appears whole

def save_checkpoint(path: Path, trained: Mapping[str, tuple[nn.Module, torch.optim.Optimizer]], state: dict, machine: Machine) -> None:
    """Write models, optimizers and `state` (plain JSON), each rank its shards, then rename into place."""
    partial = path.with_name(path.name + ".partial")
    if machine.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    gather_objects(None)
    tensors, steps = {}, {}
    for key, (model, optimizer) in trained.items():
        for name, parameter in reshard(model).named_parameters():
            tensors[f"{key}/weights/{name}"] = local_part(parameter)
            moments = optimizer.state.get(parameter)
            if moments:
                tensors[f"{key}/exp_avg/{name}"] = local_part(moments["exp_avg"])
                tensors[f"{key}/exp_avg_sq/{name}"] = local_part(moments["exp_avg_sq"])
                steps[key] = float(moments["step"])
    if machine.rank < machine.shards:  # the other replicas hold the same
        write_safetensors(partial / f"rank{machine.rank:05d}.safetensors", tensors)
    gather_objects(None)
    if machine.is_main:
        (partial / "state.json").write_text(json.dumps({**state, "shards": machine.shards, "optimizer_steps": steps}))
        os.rename(partial, path)
        for old in path.parent.iterdir():  # only the newest whole one is of use
            if old != path:
                shutil.rmtree(old)
    gather_objects(None)


def load_checkpoint(path: Path, trained: Mapping[str, tuple[nn.Module, torch.optim.Optimizer]]) -> dict:
    """Fill models and optimizers, written by any number of ranks, and return the state."""
    state = json.loads((path / "state.json").read_text())
    files = [read_safetensors(path / f"rank{rank:05d}.safetensors") for rank in range(state["shards"])]

    def part(key: str, parameter: Tensor) -> Tensor:
        return split_like(torch.cat([file[key] for file in files]), parameter)

    for key, (model, optimizer) in trained.items():
        for name, parameter in reshard(model).named_parameters():
            local_part(parameter).copy_(part(f"{key}/weights/{name}", parameter))
            if key in state["optimizer_steps"]:
                optimizer.state[parameter] = {"step": torch.tensor(state["optimizer_steps"][key]),
                                              "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
                for moment in ("exp_avg", "exp_avg_sq"):
                    local_part(optimizer.state[parameter][moment]).copy_(part(f"{key}/{moment}/{name}", parameter))
    return state
