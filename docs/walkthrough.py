"""One prompt followed through one iteration of PPO, with its numbers (see walkthrough.md).

    python docs/walkthrough.py                       small random models, seed 0
    python docs/walkthrough.py --run=runs/001        the models of a finished run
    python docs/walkthrough.py --advantage=group     groups in place of the critic
"""
from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Sequence

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
import microcosm
import parallel
import ppo
from formats import Message, Prompt
from formats.files import read_json
from model import ModelConfig, ScalarModel, Transformer, token_logprobs, token_values
from reward import Scale, model_reward
from train import Term, update
from weights import load_pretrained
from weights.initial import init_weights

SIZE = 4     # episodes of the iteration; the first is the one that is followed
FIRST = 346  # its number, which seeds its noise: the random actor ends this answer by itself


def random_world() -> tuple[data.Tokenizer, ppo.Models, ppo.Score]:
    """Make four small models of random weights; the reference is another draw than the actor."""
    with tempfile.NamedTemporaryFile(suffix=".model") as file:
        microcosm.train_tokenizer(file.name, 512)
        tokenizer = data.open_tokenizer(file.name)
    shape = ModelConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=2, vocab_size=512, ffn_dim=64,
                        max_seq_len=128)
    made = [kind(shape) for kind in (Transformer, Transformer, ScalarModel, ScalarModel)]
    for seed, model in enumerate(made):
        init_weights(model, seed)
    actor, ref, critic, reward_model = made
    return tokenizer, ppo.Models(actor, ref, critic), model_reward(reward_model, Scale(), SIZE)


def world_of(run: Path) -> tuple[data.Tokenizer, ppo.Models, ppo.Score]:
    """Load a run of the embedded world: the actor as PPO left it, the critic as it starts."""
    content = read_json(run / "reward" / "config.json")
    scale = Scale(content["score_mean"], content["score_std"])
    critic, reward_model = (load_pretrained(run / "reward", kind=ScalarModel) for _ in range(2))
    critic.score.weight.data /= scale.std
    critic.offset = -scale.mean / scale.std
    models = ppo.Models(load_pretrained(run / "ppo"), load_pretrained(run / "sft"), critic)
    return data.open_tokenizer(run / "ppo"), models, model_reward(reward_model, scale, SIZE)


def prompts_of(tokenizer: data.Tokenizer, size: int) -> list[Prompt]:
    """Return the prompt of every episode, each as often as there are responses to it."""
    items = microcosm.items("train", SIZE // size, seed=0, in_domain_share=1.0)
    records = [Prompt((Message("user", item.prompt),), "microcosm") for item in items]
    prompts, _ = data.encode_prompts(records, tokenizer, "plain", max_tokens=96)
    return [prompt for prompt in prompts for _ in range(size)]


def print_table(columns: dict[str, Sequence]) -> None:
    """Print columns under their names, numbers with four digits."""
    print("".join(f"{name:>10}" for name in columns).rstrip())
    for row in zip(*columns.values(), strict=True):
        print("".join(f"{x:10.4f}" if isinstance(x, float) else f"{x!s:>10}" for x in row))


def print_tokens(tokenizer: data.Tokenizer, rollout: ppo.Rollout, grids: dict) -> None:
    """Print what (B, T) grids hold of the first response; None has no column."""
    mask = rollout.response_mask[0]
    pieces = [tokenizer.piece(i) for i in rollout.tokens[0][mask].tolist()]
    columns = {name: x[0][mask].tolist() for name, x in grids.items() if x is not None}
    print_table({"t": mask.nonzero()[:, 0].tolist(), "token": pieces, **columns})


def print_rollout(tokenizer: data.Tokenizer, prompt: Prompt, config: ppo.PPOConfig,
                  rollout: ppo.Rollout) -> None:
    """Print the prompt, its response, the grid of all episodes, all numbers (steps 1 to 5)."""
    response = rollout.tokens[0][rollout.response_mask[0]].tolist()
    print(f"0  prompt    {prompt.text}\n   its ids   {' '.join(map(str, prompt.ids))}")
    print(f"1  response  {data.decode_response(tokenizer, response, 'plain')!r}\n   its ids   "
          f"{' '.join(map(str, response))}\n   the grid, {SIZE} x {rollout.tokens.size(1)}: "
          "p prompt, r response, e its EOS, . padding")
    ends = rollout.response_mask & (rollout.tokens == tokenizer.eos_id)
    kinds = rollout.attention_mask.long() + rollout.response_mask + ends  # (B, T), 0 to 3
    for row in kinds.tolist():
        print("             " + "".join(".pre"[kind] for kind in row))
    print("2, 3  the scores of the episodes, and what they pay")
    print_table({"episode": range(SIZE), "score": rollout.scores.tolist(), "cut off":
                 rollout.cut_off.tolist(), "pays": ppo.final_scores(rollout, config).tolist()})
    raw, _ = ppo.assign_credit(rollout, replace(config, whiten_advantages="off"), config.kl_coef)
    print("2 to 5  the first response, token by token")
    print_tokens(tokenizer, rollout, {
        "logprob": rollout.logprobs, "ref": rollout.ref_logprobs, "kl": rollout.logprobs -
        rollout.ref_logprobs, "value": rollout.values, "reward": rollout.rewards,
        "advantage": raw.advantages, "return": rollout.returns, "whitened": rollout.advantages})


def print_update(tokenizer: data.Tokenizer, models: ppo.Models, config: ppo.PPOConfig,
                 rollout: ppo.Rollout) -> None:
    """Take one optimizer step of what is trained, and print what it changed (step 6)."""
    actor_loss = partial(ppo.actor_loss, kl_coef=config.kl_coef)
    learners = [("actor_grad_norm", models.actor, actor_loss, config.lr)]
    if models.critic:
        learners.append(("critic_grad_norm", models.critic, ppo.critic_loss, config.critic_lr))
    before, after = {}, {}
    for name, model, loss, lr in learners:
        terms = [Term(partial(loss, config=config), [rollout])]
        optimizer = parallel.adamw(model, weight_decay=0.0)
        # the second time at a learning rate of 0: a look, and no step
        for stats, rate in ((before, lr), (after, 0.0)):
            stats |= update(model, optimizer, terms, rate, 1.0, parallel.start("float32"), name)
    print("6  the losses before and after one optimizer step")
    print_table({"before": list(before.values()), "after": list(after.values()),
                 "": [f"  {name}" for name in before]})
    episode = rollout.tokens, rollout.attention_mask, rollout.response_mask
    logprobs = token_logprobs(models.actor, *episode)
    print_tokens(tokenizer, rollout, {
        "logprob": logprobs, "ratio": (logprobs - rollout.logprobs).exp(),
        "value": token_values(models.critic, *episode) if models.critic else None})


def main() -> None:
    """Print one iteration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder of a run of the embedded world")
    parser.add_argument("--advantage", choices=ppo.ADVANTAGES, default="gae")
    options = parser.parse_args()
    tokenizer, models, score = world_of(options.run) if options.run else random_world()
    size = 1 if options.advantage == "gae" else SIZE  # of a group
    config = ppo.PPOConfig(batch_size=SIZE, minibatch_size=SIZE, advantage=options.advantage,
                           responses_per_prompt=size)
    models = models if config.has_critic else models._replace(critic=None)
    prompts = prompts_of(tokenizer, size)
    rollout = ppo.collect(models, prompts, range(FIRST, FIRST + SIZE), config, score,
                          32 if options.run else 6, tokenizer.eos_ids, 0)
    rollout, _ = ppo.assign_credit(rollout, config, config.kl_coef)
    print_rollout(tokenizer, prompts[0], config, rollout)
    print_update(tokenizer, models, config, rollout)


if __name__ == "__main__":
    main()
