"""What test_parallel.py runs under one, two and four processes: an optimizer step of each stage, a whole PPO
iteration, a checkpoint. `ranks.py FOLDER SETTINGS SIZE...` writes what came out to FOLDER/SIZE for each micro-batch size; SETTINGS: ParallelConfig, as JSON."""
import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import data
import parallel
import ppo
import reward
import sft
from model import ModelConfig, ScalarModel, Transformer
from weights.files import write_safetensors
from train import Term, gather_rollouts, update

CONFIG = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=61, ffn_dim=64, max_seq_len=64)
EOS = 12


def rows_of(n: int, seed: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [[1] + torch.randint(3, 61, (int(torch.randint(3, 14, (1,), generator=g)),), generator=g).tolist() for _ in range(n)]


def sft_batches(machine: parallel.Machine, size: int) -> list[sft.Batch]:
    rows = rows_of(8, 0)
    batches = []
    for part in machine.share(torch.arange(8), size):
        tokens, mask = data.pad([rows[i] for i in part])
        # rows 0 and 2 have nothing to train on: with four ranks, rank 0 and 2 get one each
        response = mask & (mask.cumsum(1) > 2) & ~torch.isin(part, torch.tensor([0, 4]))[:, None]
        batches.append(sft.Batch(tokens, mask, response))
    return batches


def reward_batches(machine: parallel.Machine, size: int) -> list[reward.Batch]:
    rows, ranks = rows_of(24, 1), torch.randint(1, 4, (8, 3), generator=torch.Generator().manual_seed(2)).float()
    return [reward.Batch(*data.pad([rows[3 * i + g] for i in part for g in range(3)]), ranks[part]) for part in machine.share(torch.arange(8), size)]


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in parallel.full_weights(model)}


def steps(out: Path, size: int, machine: parallel.Machine) -> None:
    """Take the steps with micro-batches of `size` rows, and write weights and numbers to `out`."""
    results: dict[str, dict[str, torch.Tensor]] = {}
    numbers = {}
    for name, kind, batches, loss in (("sft", Transformer, sft_batches(machine, size), sft.loss),
                                      ("reward", ScalarModel, reward_batches(machine, size), reward.loss)):
        model = parallel.build(kind, CONFIG, 0, machine)
        optimizer = parallel.adamw(model, 0.1)
        numbers[name] = [update(model, optimizer, [Term(loss, batches)], 1e-3, 0.5, machine) for _ in range(2)]
        results[name] = weights_of(model)
        if name == "sft":
            parallel.save_checkpoint(out / "checkpoints" / "1", {"model": (model, optimizer)}, {"kl_coef": 0.3}, machine)
            numbers["after"] = update(model, optimizer, [Term(loss, batches)], 1e-3, 0.5, machine)
            fresh = parallel.build(kind, CONFIG, 5, machine)
            fresh_optimizer = parallel.adamw(fresh, 0.1)
            state = parallel.load_checkpoint(out / "checkpoints" / "1", {"model": (fresh, fresh_optimizer)})
            assert state["kl_coef"] == 0.3
            assert update(fresh, fresh_optimizer, [Term(loss, batches)], 1e-3, 0.5, machine) == numbers["after"]
            resumed, straight = weights_of(fresh), weights_of(model)
            assert all(torch.equal(resumed[k], straight[k]) for k in straight)

    config = ppo.PPOConfig(batch_size=8, minibatch_size=4, microbatch_size=size, epochs=2)
    models = ppo.Models(*(parallel.build(kind, CONFIG, seed, machine, frozen) for kind, seed, frozen in
                          ((Transformer, 0, False), (ScalarModel, 1, False), (Transformer, 0, True), (ScalarModel, 1, True))))
    optimizers = [parallel.adamw(model, 0.0) for model in models[:2]]
    prompts = [row[:4] for row in rows_of(8, 3)]
    mine = machine.slice(list(range(8)))
    rollout = ppo.collect(models, [prompts[i] for i in mine], mine, config, 10, EOS, (0.0, 1.0), seed=0,
                          gathered=parallel.gathered, gather=partial(gather_rollouts, machine))
    rollout, stats = ppo.assign_credit(rollout, config, 0.1, machine.world)
    losses = partial(ppo.actor_loss, config=config, kl_coef=0.1), partial(ppo.critic_loss, config=config)
    updates = [lambda batches, i=i: update(models[i], optimizers[i], [Term(losses[i], batches)], 1e-3, 1.0, machine) for i in (0, 1)]
    numbers["ppo"] = [stats, *ppo.learn(rollout, config, *updates, seed=0, share=machine.share)]
    results["actor"], results["critic"] = (weights_of(model) for model in models[:2])
    if machine.is_main:
        out.mkdir(parents=True, exist_ok=True)
        weights = {f"{name}.{key}": tensor for name, tensors in results.items() for key, tensor in tensors.items()}
        write_safetensors(out / "weights.safetensors", {**weights, "tokens": rollout.tokens})
        (out / "numbers.json").write_text(json.dumps(numbers))


if __name__ == "__main__":
    torch.set_num_threads(1)
    MACHINE = parallel.start("float32", parallel.ParallelConfig(**json.loads(sys.argv[2])))
    parallel.BLOCKWISE_ABOVE = 0  # every block a unit of its own, as in large models
    for text in sys.argv[3:]:
        steps(Path(sys.argv[1], text), int(text), MACHINE)
    parallel.stop()
