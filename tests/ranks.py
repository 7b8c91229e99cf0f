"""What test_parallel.py and test_sharing.py run in processes of their own: the steps of all stages, or what is held how.

    ranks.py steps     FOLDER SETTINGS LIMIT...  optimizer steps, a checkpoint, a PPO iteration
    ranks.py precision FOLDER SETTINGS           one step of 1e-6: dtypes, gradients, weights
    ranks.py gathering FOLDER SETTINGS           which weights are gathered when, and how often
    ranks.py stopping  FOLDER SETTINGS           what each rank says of a step that is not finite
    ranks.py sharing   FOLDER SETTINGS           the demonstrations of FOLDER/data.jsonl: who reads, who holds what
    ranks.py killed    FOLDER SETTINGS           the same; the rank that reads is killed while it does

SETTINGS: a ParallelConfig as JSON, and "dtype". What came out is written to FOLDER, of `steps` to
FOLDER/LIMIT for every limit on micro-batches: ROWS or ROWS,TOKENS.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import data
import parallel
import ppo
import reward
import sft
import train
from data import open_tokenizer
from episodes import Four, collect
from model import ModelConfig, ScalarModel, Transformer, token_logprobs
from parallel import Machine
from run.checkpoints import MOMENTS, load_checkpoint, save_checkpoint
from run import sharing as memory
from run.folder import Run
from run.health import NotFinite
from run.settings import parse_args
from run.sources import Files
from train import Term, gather_rollouts, update
from weights.files import write_safetensors

CONFIG = ModelConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=61, ffn_dim=64, max_seq_len=64
)
EOS = 12


def rows_of(n: int, seed: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        length = int(torch.randint(3, 14, (1,), generator=g))
        rows.append([1] + torch.randint(3, 61, (length,), generator=g).tolist())
    return rows


def sft_batches(machine: Machine, size: int, tokens: int = 0) -> list[sft.Batch]:
    rows = rows_of(8, 0)
    batches = []
    for part in machine.microbatches([len(row) for row in rows], size, tokens):
        tokens, mask = data.pad([rows[i] for i in part])
        # rows 0 and 4 have nothing to train on: with four ranks, rank 0 has no valid token at all
        empty = torch.isin(part, torch.tensor([0, 4]))
        response = mask & (mask.cumsum(1) > 2) & ~empty[:, None]
        batches.append(sft.Batch(tokens, mask, response))
    return batches


def reward_batches(machine: Machine, size: int, tokens: int = 0) -> list[reward.Batch]:
    rows = rows_of(24, 1)  # row 3 * i + g: prompt i with its response g
    ranks = torch.randint(1, 4, (8, 3), generator=torch.Generator().manual_seed(2)).float()
    batches = []
    lengths = [sum(len(row) for row in rows[3 * i:3 * i + 3]) for i in range(8)]
    for part in machine.microbatches(lengths, size, tokens):
        tokens, mask = data.pad([rows[3 * i + g] for i in part for g in range(3)])
        batches.append(reward.Batch(tokens, mask, ranks[part]))
    return batches


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in parallel.full_weights(model)}


class Fit(NamedTuple):
    """Something to train: a kind of model, this rank's micro-batches, and their loss."""

    kind: type[nn.Module]
    batches: Callable[..., list]
    loss: Callable


FITS = {
    "sft": Fit(Transformer, sft_batches, sft.loss),
    "reward": Fit(ScalarModel, reward_batches, reward.loss),
}


# ---------------------------------------------------------------------------------------------
# steps


def steps(out: Path, limits: tuple[int, ...], machine: Machine) -> None:
    """Take the steps with micro-batches of so many rows and tokens; write what came to `out`."""
    results: dict[str, dict[str, Tensor]] = {}
    numbers = {}
    for name, fit in FITS.items():
        model = parallel.build(fit.kind, CONFIG, 0, machine)
        optimizer = parallel.adamw(model, 0.1)
        terms = [Term(fit.loss, fit.batches(machine, *limits))]
        numbers[name] = [update(model, optimizer, terms, 1e-3, 0.5, machine) for _ in range(2)]
        results[name] = weights_of(model)
        if name == "sft":
            numbers["after"] = resume(out, model, optimizer, terms, machine)
    rollout, models, numbers["ppo"] = iterate(machine, *limits)
    results["actor"] = weights_of(models.actor)
    results["critic"] = weights_of(models.critic)
    if machine.is_main:
        out.mkdir(parents=True, exist_ok=True)
        weights = {
            f"{name}.{key}": tensor
            for name, tensors in results.items()
            for key, tensor in tensors.items()
        }
        write_safetensors(out / "weights.safetensors", {**weights, "tokens": rollout.tokens})
        (out / "numbers.json").write_text(json.dumps(numbers))


def resume(
    out: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    terms: list[Term],
    machine: Machine,
) -> dict[str, float]:
    """Take one more step, and the same one from a checkpoint with a model of other weights."""
    path = out / "checkpoints" / "1"
    save_checkpoint(path, {"model": (model, optimizer)}, {"kl_coef": 0.3}, machine)
    straight = update(model, optimizer, terms, 1e-3, 0.5, machine)
    fresh = parallel.build(Transformer, CONFIG, 5, machine)
    fresh_optimizer = parallel.adamw(fresh, 0.1)
    state = load_checkpoint(path, {"model": (fresh, fresh_optimizer)})
    assert state["kl_coef"] == 0.3
    assert update(fresh, fresh_optimizer, terms, 1e-3, 0.5, machine) == straight
    resumed, expected = weights_of(fresh), weights_of(model)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    for key, state in optimizer.state_dict()["state"].items():
        for name, value in fresh_optimizer.state_dict()["state"][key].items():
            assert (value.dtype, value.device) == (state[name].dtype, state[name].device), name
    return straight


def iterate(machine: Machine, size: int, tokens: int = 0) -> tuple[ppo.Rollout, Four, list[dict]]:
    """Run one PPO iteration; return its rollout, the models, the numbers of rollout and steps."""
    config = ppo.PPOConfig(batch_size=8, minibatch_size=4, microbatch_size=size,
                           microbatch_tokens=tokens, epochs=2)
    models = Four(
        actor=parallel.build(Transformer, CONFIG, 0, machine),
        critic=parallel.build(ScalarModel, CONFIG, 1, machine),
        ref=parallel.build(Transformer, CONFIG, 0, machine, frozen=True),
        reward_model=parallel.build(ScalarModel, CONFIG, 1, machine, frozen=True),
    )
    prompts = [row[:4] for row in rows_of(8, 3)]
    mine = machine.part(range(8))
    with machine.autocast():
        rollout = collect(
            models, [prompts[i] for i in mine], list(mine), config, 10, EOS, (0.0, 1.0), seed=0,
            gathered=parallel.gathered, gather=partial(gather_rollouts, machine),
            share=machine.own_microbatches)
    rollout, stats = ppo.assign_credit(rollout, config, 0.1, machine.world)

    def updating(model: nn.Module, loss: Callable) -> Callable:
        optimizer = parallel.adamw(model, 0.0)
        return lambda batches, step: update(model, optimizer, [Term(loss, batches)], 1e-3, 1.0, machine)

    update_actor = updating(models.actor, partial(ppo.actor_loss, config=config, kl_coef=0.1))
    update_critic = updating(models.critic, partial(ppo.critic_loss, config=config))
    taken = ppo.learn(rollout, config, [update_actor, update_critic], seed=0,
                      share=machine.microbatches)
    return rollout, models, [stats, *taken]


# ---------------------------------------------------------------------------------------------
# precision


def dtypes(tensors) -> list[str]:
    return sorted({str(tensor.dtype) for tensor in tensors})


def precision(out: Path, machine: Machine) -> None:
    """Take one step of 1e-6 per kind of model; write what is held in which dtype, and the outcome.

    Every rank has one micro-batch, so a gradient is exactly one sum over the ranks.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict] = {}
    for name, fit in FITS.items():
        model = parallel.build(fit.kind, CONFIG, 0, machine)
        optimizer = parallel.adamw(model, 0.0)
        gradients: dict[str, Tensor] = {}

        def look(*_) -> None:
            """Gather the gradients, reduced and not yet used."""
            for key, parameter in model.named_parameters():
                grad = parameter.grad
                gradients[key] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()

        optimizer.register_step_pre_hook(look)
        before = weights_of(model)
        terms = [Term(fit.loss, fit.batches(machine, 8))]
        stats = update(model, optimizer, terms, 1e-6, 1e9, machine)
        after = weights_of(model)
        moments = [state[key] for state in optimizer.state.values() for key in MOMENTS]
        numbers[name] = {
            "stats": stats,
            "parameters": dtypes(model.parameters()),
            "moments": dtypes(moments),
            "gradients": dtypes(gradients.values()),
        }
        for key in before:
            tensors[f"{name}.before.{key}"] = before[key]
            tensors[f"{name}.after.{key}"] = after[key]
            tensors[f"{name}.grad.{key}"] = gradients[key]

    frozen = parallel.build(Transformer, CONFIG, 0, machine, frozen=True)
    tokens, mask = data.pad(rows_of(8, 0))
    with torch.no_grad(), machine.autocast():
        tensors["frozen.logprobs"] = token_logprobs(
            frozen, tokens, mask, mask & (mask.cumsum(1) > 1)
        )
    numbers["frozen"] = {"parameters": dtypes(frozen.parameters())}
    numbers["ppo"] = {"stats": iterate(machine, 8)[2]}
    if machine.is_main:
        write_safetensors(out / "tensors.safetensors", tensors)
        (out / "numbers.json").write_text(json.dumps(numbers))


# ---------------------------------------------------------------------------------------------
# gathering


class Gatherings(TorchDispatchMode):
    """Counts all-gathers while it is entered."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "allgather" in str(func)
        return func(*args, **(kwargs or {}))


def gathering(out: Path, machine: Machine) -> None:
    """Write how often a step gathers before and after `gathered`, and what a forward leaves."""
    model = parallel.build(Transformer, CONFIG, 0, machine)
    frozen = parallel.build(Transformer, CONFIG, 0, machine, frozen=True)
    optimizer = parallel.adamw(model, 0.0)
    terms = [Term(sft.loss, sft_batches(machine, 2))]
    tokens, mask = data.pad(rows_of(8, 0))

    def gatherings(step: Callable[[], object]) -> int:
        with Gatherings() as watch:
            step()
        return watch.count

    def sharded(some: nn.Module) -> bool:
        return all(isinstance(parameter, DTensor) for parameter in some.parameters())

    def forward(some: nn.Module) -> None:
        with torch.no_grad():
            some(tokens, mask)

    step = partial(update, model, optimizer, terms, 1e-3, 1.0, machine)
    numbers = {"before": gatherings(step)}
    with parallel.gathered(model):
        numbers["inside"] = gatherings(lambda: forward(model))
    numbers["after"] = gatherings(step)
    with parallel.gathered(frozen):
        forward(frozen)
    forward(frozen)
    numbers["frozen model is sharded"] = sharded(frozen)
    forward(model)
    numbers["trained model is sharded"] = sharded(model)
    numbers["after reshard"] = sharded(parallel.reshard(model))
    if machine.is_main:
        (out / "numbers.json").write_text(json.dumps(numbers))


# ---------------------------------------------------------------------------------------------
# stopping


def stopping(out: Path, machine: Machine) -> None:
    """Write what each rank says of a NaN in one row, of one rank, of one micro-batch."""
    model = parallel.build(Transformer, CONFIG, 0, machine)
    optimizer = parallel.adamw(model, 0.0)
    update(model, optimizer, [Term(sft.loss, sft_batches(machine, 2))], 1e-3, 1.0, machine)
    batches = sft_batches(machine, 2)

    def odd(model: nn.Module, batch: sft.Batch) -> tuple[Tensor, ppo.Stats]:
        total, stats = sft.loss(model, batch)
        return (total * float("nan") if batch is batches[-1] and machine.rank else total), stats

    try:
        update(model, optimizer, [Term(odd, batches)], 1e-3, 1.0, machine)
    except NotFinite as error:
        found = parallel.gather_objects([str(error), error.rows])
    if machine.is_main:
        expected = [row[mask].tolist() for row, mask in zip(*sft_batches(
            Machine(1, 2, machine.device, machine.dtype), 2)[-1][:2])]
        (out / "numbers.json").write_text(json.dumps({"found": found, "expected": expected}))


# ---------------------------------------------------------------------------------------------
# sharing, killed


class Read(Files):
    """Demonstrations of a file, counted as they are read."""

    reads = 0
    kills_after = 0

    def dialogues(self):
        for record in super().dialogues():
            self.reads += 1
            if self.reads == self.kills_after:
                (self.run.out / "held").write_text("{open} {names}".format(**memory_files()))
                os.kill(os.getpid(), signal.SIGKILL)
            yield record


def memory_files() -> dict[str, int]:
    """Return how many files of shared memory this process has open, has mapped, and how many names those have."""
    opened = []
    for number in os.listdir("/proc/self/fd"):
        try:
            if "memfd:demonstrations" in os.readlink(f"/proc/self/fd/{number}"):
                opened.append(os.stat(f"/proc/self/fd/{number}").st_nlink)
        except FileNotFoundError:  # that of the listing itself
            pass
    with open("/proc/self/maps") as maps:
        mapped = sum("memfd:demonstrations" in line for line in maps)
    return {"open": len(opened), "mapped": mapped, "names": sum(opened)}


def open_data(out: Path, machine: Machine, name: str) -> Read:
    """Open a source of demonstrations whose ranks say all the time that they are at work."""
    flags = [f"--model={out / 'model'}", f"--out={out / 'run'}", f"--sft.data={out / name}", "--stages=sft",
             "--data.template=plain", "--data.max_prompt_tokens=60", "--data.max_response_tokens=40"]
    talkative = replace(machine, config=parallel.ParallelConfig(timeout=1e-9))
    config = parse_args(flags, train.STAGES)
    return Read(Run(config, talkative, out, open_tokenizer(out / "model")))


def sharing(out: Path, machine: Machine) -> None:
    """Write what each rank gets and reads, together with a neighbour and without."""
    source = open_data(out, machine, "data.jsonl")
    examples = source.demonstrations()
    found = {"shared": list(examples), "reads": source.reads, **memory_files()}
    try:
        open_data(out, machine, "bad.jsonl").demonstrations()
    except ValueError as error:
        found["error"] = str(error)
    memory.neighbourhood = lambda machine: str(machine.rank)
    alone = open_data(out, machine, "data.jsonl")
    found |= {"alone": list(alone.demonstrations()), "reads alone": alone.reads}
    (out / f"{machine.rank}.json").write_text(json.dumps(found))


def killed(out: Path, machine: Machine) -> None:
    source = open_data(out, machine, "data.jsonl")
    source.kills_after = 20
    source.demonstrations()


def main(command: str, folder: str, settings: str, *limits: str) -> None:
    torch.set_num_threads(1)
    values = json.loads(settings)
    dtype = values.pop("dtype", "float32")
    machine = parallel.start(dtype, parallel.ParallelConfig(**values))
    parallel.BLOCKWISE_ABOVE = 0  # every block a unit of its own, as in large models
    if command == "steps":
        for limit in limits:
            steps(Path(folder, limit), tuple(map(int, limit.split(","))), machine)
    else:
        {"precision": precision, "gathering": gathering, "stopping": stopping, "sharing": sharing,
         "killed": killed}[command](Path(folder), machine)
    parallel.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
