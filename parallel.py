"""The machine: process group, sharding, gathering. It knows nothing of RLHF.

One process uses no process group and plain modules. Several share every model (FSDP2):

    parameters at rest   each rank holds some rows: float32 if trained, else in the forwards' dtype
    forward, backward    the rows of all ranks are gathered, cast, used and let go, block by block
    gradients            are summed over the ranks in float32; each rank keeps the rows it holds
    optimizer step       every rank steps its own rows, so Adam's moments are sharded as well
"""
from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NoReturn, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from data import cut
from formats import harmless
from model import Block, ModelConfig
from weights.initial import random_weights
from weights import Weights, check_weights, materialize

# Up to this many parameters the whole model is one sharded unit: gathering block by block would
# cost more in messages than it saves in memory.
BLOCKWISE_ABOVE = 20_000_000

# torchrun, if it started us; read early, while it surely lives.
LAUNCHER = os.getppid()


# What a rank gathers in place of a result that is still to come.
AT_WORK = "at work"


@dataclass(frozen=True)
class ParallelConfig:
    replicas: int = 1               # groups of ranks that each hold all shards: one per node, or 1
    activation_checkpointing: bool = False  # keep the blocks' inputs alone, compute the rest again
    offload_frozen: bool = False    # reference and reward model wait in CPU memory when not in use
    timeout: float = 30.0           # of waiting for a rank that does not answer [minutes]


@dataclass(frozen=True)
class Machine:
    """This process's place in the run."""
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype  # of forwards and backwards; trained parameters and optimizers are float32
    config: ParallelConfig = ParallelConfig()
    mesh: DeviceMesh | None = None  # (shards,) or (replicas, shards); None: one process
    peers: tuple[tuple[str, int], ...] = ()  # host and process of every rank

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def shards(self) -> int:
        """Ranks that hold one model together; the first so many of all ranks are one such group."""
        return self.world // self.config.replicas

    def microbatches(self, lengths: Sequence[int], size: int, tokens: int = 0) -> list[Tensor]:
        """Cut a global batch, which all ranks know, into this rank's micro-batches (`data.cut`)."""
        return cut(lengths, size, tokens, self.world)[self.rank::self.world]

    def own_microbatches(self, lengths: Sequence[int], size: int, tokens: int = 0) -> list[Tensor]:
        """Cut this rank's own rows, as many as every rank has, into micro-batches (`data.cut`)."""
        # Sharded forwards are collectives: all ranks take as many steps as one of them needs.
        steps, needed = 0, 1
        while needed > steps:
            steps = needed
            parts = cut(lengths, size, tokens, least=min(steps, len(lengths)))
            needed = int(all_max(torch.tensor(len(parts))))
        return parts

    def part(self, items: Sequence) -> Sequence:
        """Return this rank's contiguous part of a sequence; in rank order they are the whole."""
        # Multiplied before divided: parts differ by at most one item, and none is left over.
        first = len(items) * self.rank // self.world
        end = len(items) * (self.rank + 1) // self.world
        return items[first:end]

    def autocast(self) -> Any:
        """Return the context in which forwards run."""
        # Under FSDP parameters are cast as they are gathered; in one process each operation casts.
        if self.world > 1 or self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


# ---------------------------------------------------------------------------------------------
# Processes

def start(dtype: str, config: ParallelConfig = ParallelConfig()) -> Machine:
    """Join the process group that torchrun describes, if it started us.

    dtype: auto | float32 | bfloat16, of forwards; auto is bfloat16 on a GPU.
    """
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world % config.replicas:
        raise ValueError(f"--parallel.replicas={config.replicas} does not divide {world} processes")
    if config.offload_frozen and world == 1:
        raise ValueError("--parallel.offload_frozen needs several processes: one has plain modules")

    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    keep_freed_memory()
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    mesh = None
    patience = timedelta(minutes=config.timeout)
    end_with_launcher()
    if world > 1:
        # Gloo beside NCCL: rollouts and plain objects travel between the ranks' CPUs.
        store, *_ = next(dist.rendezvous("env://", timeout=patience))
        # When torchrun starts the processes again, it still holds the addresses of those before.
        store = dist.PrefixStore(f"start {restarts()}", store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=patience,
                                store=store, rank=rank, world_size=world)
        # A rank that fails right away would tear the others' connections down while they are made.
        dist.barrier()
        mesh = make_mesh(device, world, config.replicas)
    if dtype == "auto":
        dtype = "bfloat16" if cuda else "float32"
    peers = tuple(gather_objects((platform.node(), os.getpid())))
    return Machine(rank, world, device, getattr(torch, dtype), config, mesh, peers)


def make_mesh(device: torch.device, world: int, replicas: int) -> DeviceMesh:
    """Lay the ranks out: in a row, or as a table whose rows each hold a whole model."""
    if replicas == 1:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shards",))
    # (replicas, shards): neighbouring ranks, which share a node, share a row, so that gathering
    # stays within nodes and only gradients cross between them.
    shape = (replicas, world // replicas)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicas", "shards"))


def keep_freed_memory() -> None:
    """Let freed memory wait for the next tensor instead of going back to the system."""
    # Every step needs the same large tensors again. glibc would map each of them anew, and the
    # system fill it with zeros, page by page: up to a third of the time of a step on a CPU.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(-4, 0)            # M_MMAP_MAX: no allocation gets a mapping of its own
        mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: nothing is given back


def end_with_launcher() -> None:
    """Have the system end this process when torchrun, which started it, is gone."""
    # An orphan would wait in a collective for ever, and hold its GPU.
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl and "TORCHELASTIC_RUN_ID" in os.environ:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        # It may have gone before that; an orphan's parent is the first process of the system.
        if os.getppid() != LAUNCHER or LAUNCHER == 1 and not is_torchrun(1):
            os._exit(2)


def stop(launcher_too: bool = False) -> None:
    """Leave the process group; with several processes, the program ends here.

    launcher_too: torchrun was asked to stop, and would report that as a failure, in pages.
    """
    if dist.is_initialized():
        # Nobody leaves while another still waits for it.
        dist.barrier()
        dist.destroy_process_group()
        # Gloo's threads can abort a Python that takes itself apart while they still hold tensors
        # (pytorch pull request 179291), and torchrun would report a finished run as failed. So it
        # does not take itself apart; what is still in the buffer of a pipe has to be written first.
        sys.stdout.flush()
        sys.stderr.flush()
        if launcher_too:
            leave(0)
        os._exit(0)


def fail(message: str) -> NoReturn:
    """Print one line and exit with status 2, all ranks together."""
    if int(os.environ.get("RANK", 0)):
        wait_for_the_main_rank()
    sys.stdout.flush()
    print(harmless(message), file=sys.stderr, flush=True)
    leave(2)


def fail_alone(message: str) -> NoReturn:
    """Print one line and exit with status 2, because of a rank that is lost.

    Another try may do better, so torchrun stays if it has one left (--max-restarts).
    """
    print(harmless(message), file=sys.stderr, flush=True)
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > restarts():
        os._exit(2)
    leave(2)


def restarts() -> int:
    """Return how often torchrun has started these processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def leave(status: int) -> NoReturn:
    """End this process at once, and torchrun with it."""
    # torchrun answers any failed worker with pages of traceback of its own, under which what was
    # said would be lost. So where it launched us on this machine alone, it is ended first, by a
    # signal that it does not handle.
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if "TORCHELASTIC_RUN_ID" in os.environ and alone and is_torchrun(LAUNCHER):
        os.kill(LAUNCHER, signal.SIGUSR1)
    # Not sys.exit: other ranks may wait in a collective that will never complete.
    os._exit(status)


def wait_for_the_main_rank() -> None:
    """Let rank 0 speak, since as a rule all ranks fail alike; return only if it does not."""
    deadline = time.monotonic() + (15 if dist.is_initialized() else 5)
    while os.getppid() == LAUNCHER and time.monotonic() < deadline:
        time.sleep(0.05)
    # It spoke, and the launcher is gone; or nothing has begun that one rank could fail at alone.
    if os.getppid() != LAUNCHER or not dist.is_initialized():
        os._exit(2)


def is_lost(error: RuntimeError) -> bool:
    """Return whether an error is that another rank does not answer."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def is_torchrun(process: int) -> bool:
    """Return whether a process is torchrun itself."""
    # A person's own program, say a notebook, can launch workers as well (elastic_launch): from the
    # environment it looks the same, and it must survive them.
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        # No /proc on this system: pages of traceback do less harm than ending the wrong program.
        return False
    interpreter, *words = command.split("\0")
    # Python runs the word after -m, or the first that is no flag; the rest are its arguments.
    for before, word in zip(["", *words], words):
        if before == "-m":
            return word in ("torch.distributed.run", "torch.distributed.launch")
        if not word.startswith("-"):
            return Path(word).name == "torchrun"
    return False


def all_sum(x: Tensor) -> Tensor:
    """Sum x over all ranks, in place."""
    # Counts, loss sums and squared norms go through here, so that no number depends on the ranks.
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def all_max(x: Tensor) -> Tensor:
    """Take the maximum of x over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def gather_objects(x: Any) -> list[Any]:
    """Hand every rank the x of all ranks, in rank order."""
    # It pickles, which is safe only because all ranks are processes of one run.
    if not dist.is_initialized():
        return [x]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, x)
    return everyone


def from_main(make: Callable[[], Any]) -> Any:
    """Call `make` on rank 0 alone and hand its result, or its ValueError, to every rank."""
    if not dist.is_initialized():
        return make()
    outcome: list[Any] = [attempt(make) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def on_all(make: Callable[[], Any]) -> list[Any]:
    """Call `make` on every rank; hand all results, or the first ValueError, to every rank.

    One that takes long gathers AT_WORK now and then, or the others would take it for lost.
    """
    own = attempt(make)
    while AT_WORK in (outcomes := gather_objects(own)):
        pass
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes


def attempt(make: Callable[[], Any]) -> Any:
    """Return what `make` returns, or its error."""
    # An error has to travel as a result does: else the other ranks would wait for it for ever.
    try:
        return make()
    except (ValueError, OSError) as error:
        return error


# ---------------------------------------------------------------------------------------------
# Models

def build(kind: type[nn.Module], config: ModelConfig, weights: Weights | int, machine: Machine,
          frozen: bool = False) -> nn.Module:
    """Build a model, sharded when there are several processes, and fill it.

    weights: those of files, memory-mapped (each rank reads only its part), or a seed to draw from.
    frozen: never trained; its shards are held in the dtype of forwards.
    """
    # 1. Shapes alone: no rank ever holds a whole model that it is about to split.
    with torch.device("meta"):
        model = kind(config).requires_grad_(not frozen)
    model.model.recompute = machine.config.activation_checkpointing
    if isinstance(weights, Weights):
        check_weights(model, weights)
        tensors: Iterable = ((name, weights[name]) for name, _ in model.named_parameters())
    else:
        tensors = random_weights(model, weights)

    # 2. Split. Trained parameters stay float32, whatever forwards use: a step of 1e-6 on a weight
    #    of 1 is lost in bfloat16, whose next number is 1.0078. Frozen ones take no steps, and
    #    holding them in the forwards' dtype rounds nothing that a forward would not round.
    offload = frozen and machine.config.offload_frozen
    if frozen:
        cast_frozen(model, machine)
    if machine.world > 1:
        shard(model, machine, offload)

    # 3. Memory for this rank's part, and its content.
    materialize(model, torch.device("cpu") if offload else machine.device)
    parameters = dict(model.named_parameters())
    for name, tensor in tensors:
        local_part(parameters[name]).copy_(split_like(tensor, parameters[name]))
    return model


def cast_frozen(model: nn.Module, machine: Machine) -> None:
    """Hold weights that are never trained in the dtype in which forwards use them."""
    # Those that a trained model's forward casts, so that both say the same of equal weights: under
    # FSDP all, in one process what autocast would cast anew in every forward.
    if machine.world > 1:
        model.to(machine.dtype)
        return
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.to(machine.dtype)


def shard(model: nn.Module, machine: Machine, offload: bool) -> None:
    """Split every parameter over the ranks of a replica (FSDP2), block by block when that pays."""
    # Forwards and backwards run in machine.dtype. Gradients are summed in float32: in bfloat16 the
    # small ones of many ranks would be rounded away as they are added. Rotary angles and caches
    # travel as arguments, which cast_forward_inputs would round too, and writes to a cast copy of a
    # cache would be lost.
    policy = MixedPrecisionPolicy(machine.dtype, torch.float32, cast_forward_inputs=False)
    pin = machine.device.type == "cuda"
    where = CPUOffloadPolicy(pin_memory=pin) if offload else OffloadPolicy()
    units = [model]
    if sum(p.numel() for p in model.parameters()) > BLOCKWISE_ABOVE:
        # From the inside out: the root takes what no block has taken (embeddings, head, last norm).
        units = [module for module in model.modules() if isinstance(module, Block)] + [model]
    for unit in units:
        fully_shard(unit, mesh=machine.mesh, mp_policy=policy, offload_policy=where,
                    reshard_after_forward=lets_go(unit, model))


def lets_go(unit: nn.Module, model: nn.Module) -> bool:
    """Return whether a sharded unit of a model gives its gathered weights up after a forward."""
    # All do but the root of a trained model. Its weights are the last that a forward uses and the
    # first that the backward needs: keeping them saves a gathering per micro-batch. A frozen model
    # has no backward, and would keep them for nothing.
    trained = any(p.requires_grad for p in model.parameters())
    return not (unit is model and trained)


def local_part(x: Tensor) -> Tensor:
    """Return the part of a parameter, gradient or optimizer state that lives on this rank."""
    x = x.detach()
    return x.to_local() if isinstance(x, DTensor) else x


def split_like(full: Tensor, parameter: Tensor) -> Tensor:
    """Return this rank's part of a full tensor, sharded as the parameter is; nothing is sent."""
    if not isinstance(parameter, DTensor):
        return full
    for axis, placement in enumerate(parameter.placements):
        if placement.is_shard():
            # (rows, ...) -> (this rank's rows, ...); with fewer rows than ranks the last get none
            parts = full.chunk(parameter.device_mesh.size(axis), placement.dim)
            place = parameter.device_mesh.get_local_rank(axis)
            full = parts[place] if place < len(parts) else full.narrow(placement.dim, 0, 0)
    return full


def reshard(model: nn.Module) -> nn.Module:
    """Make every parameter a shard again after forwards without backward; return the model."""
    # The silent trap of FSDP2: a forward without backward may leave parameters gathered. An
    # optimizer that is built or stepped then works on copies, without an error, and the model never
    # learns; and the memory stays taken. So everything here that touches parameters comes through
    # this function, and whoever scores with a trained model calls it afterwards.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model


def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Gather the weights one parameter at a time."""
    # Each is a collective: every rank has to go through all of them, but none has to keep any.
    for name, parameter in reshard(model).named_parameters():
        weight = parameter.detach()
        yield name, weight.full_tensor() if isinstance(weight, DTensor) else weight


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold the whole model on every rank for a while."""
    # Ranks stop generating at different lengths. With every weight at hand a forward needs no
    # collective, so that each can go at its own pace and none waits for the others' longest answer.
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
    if units:
        # One forward through the root gathers every unit, and leaves it so.
        token = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
        with torch.no_grad():
            model(token)
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(lets_go(unit, model), recurse=False)
        reshard(model)


def adamw(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """Build the optimizer: betas (0.9, 0.95) and eps 1e-5, as InstructGPT and LLaMA 2."""
    # The learning rate is set before every step. Norms, which have one axis, do not decay.
    parameters = list(reshard(model).parameters())
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-5, fused=True)


def square_sum(gradients: Sequence[Tensor], machine: Machine) -> Tensor:
    """Return what this rank's parts add to the squared gradient norm of the model, float32."""
    own = torch.nn.utils.get_total_norm(gradients).float().square()
    # Replicas hold equal gradients, which would else count once for each of them.
    return own / machine.config.replicas
