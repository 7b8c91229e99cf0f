"""One PPO iteration, by this code and by TRL's PPOTrainer (1.12, the last that has one).

    python speed/versus.py ppo                           both in turn: speed/versus.py
    python speed/iteration.py ours --minibatches=4       one of them alone: seconds, peak memory
    python speed/iteration.py trl --minibatches=4

64 prompts of 32 tokens, an answer to each, scores, 4 epochs. Actor, critic, reference and reward
model are of versus.py's shape, random, in float32. Answers are 48 tokens long, or end where they
are told to, after 16 on average. Both sides take the settings that are theirs by default, but
TRL's two that would slow it down on a CPU: gradient checkpointing and bfloat16. Our learning rate
is 0, so that all iterations are alike.
"""
from __future__ import annotations

import argparse
import io
import os
import resource
import sys
import tempfile
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn

import parallel
import ppo
import rollout
import train
from formats import Prompt
from model import ModelConfig, ScalarModel, Transformer, generate
from reward import Scale, model_reward
from weights.initial import init_weights

BATCH, PROMPT, RESPONSE, EPOCHS = 64, 32, 48, 4
TOKENS = 2048  # of our micro-batches: as fast as any, and less memory than the whole batch needs
PAD, EOS = 0, 2
NEVER = -1  # an id that is never drawn: no answer of ours ends by chance


def shape(vocab_size: int = 4096) -> ModelConfig:
    return ModelConfig(dim=288, n_layers=6, n_heads=6, n_kv_heads=6, vocab_size=vocab_size,
                       ffn_dim=768, max_seq_len=4096)


def draw_prompts() -> list[list[int]]:
    g = torch.Generator().manual_seed(0)
    return torch.randint(3, shape().vocab_size, (BATCH, PROMPT), generator=g).tolist()


def ragged() -> EndOurs:
    """Return what ends ragged answers, after 16 tokens on average."""
    return EndOurs(16, RESPONSE)


# ---------------------------------------------------------------------------------------------
# Ours

class EndOurs:
    """Force the end of each of our answers where it is to be: `stop` of generate.

    An answer's first token says how long it will be: so all agree on that, in whatever order and
    company the answers are written.
    """

    def __init__(self, mean: float, longest: int) -> None:
        g = torch.Generator().manual_seed(1)
        drawn = torch.empty(shape().vocab_size).geometric_(1 / mean, generator=g)
        self.lengths = drawn.clamp(1, longest).int().tolist()  # by first token

    def __call__(self, answer: list[int]) -> bool:
        return len(answer) >= self.lengths[answer[0]]

    def foretell(self, model: Transformer, prompts: list[list[int]]) -> Tensor:
        """Return after how many tokens each answer will end, (B,) int64."""
        return torch.tensor([self.lengths[first] for first, in generate(model, prompts, 1).tokens])


def made(kind: type[nn.Module], seed: int) -> nn.Module:
    model = kind(shape())
    init_weights(model, seed)
    return model


class Halves(NamedTuple):
    """An iteration of this code, as train.py does it."""
    roll_out: Callable[[], ppo.Rollout]
    learn: Callable[[ppo.Rollout], Any]


def halves(models: ppo.Models, judge: ScalarModel, rows: list[list[int]], response: int,
           config: ppo.PPOConfig, machine: parallel.Machine) -> Halves:
    """Return an iteration with these prompts. judge: the reward model."""
    prompts = [Prompt((), "", ids=tuple(ids)) for ids in rows]
    score = model_reward(judge, Scale(), config.microbatch_size, config.microbatch_tokens)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable,
             batches: Sequence[ppo.Rollout], number: int) -> dict[str, float]:
        return train.update(model, optimizer, [train.Term(loss, batches)], 0.0, 1.0, machine)

    updates = [partial(step, model, parallel.adamw(model, 0.0), loss) for model, loss in (
        (models.actor, partial(ppo.actor_loss, config=config, kl_coef=0.05)),
        (models.critic, partial(ppo.critic_loss, config=config)))]

    def roll_out() -> ppo.Rollout:
        with machine.autocast():
            episodes = ppo.collect(models, prompts, range(len(rows)), config, score, response,
                                   (NEVER,), 0)
        return ppo.assign_credit(episodes, config, 0.05)[0]

    return Halves(roll_out,
                  lambda episodes: ppo.learn(episodes, config, updates, 0, machine.microbatches))


def ours(minibatches: int, is_ragged: bool) -> Callable[[], Any]:
    """Return what runs one iteration of this code."""
    size = BATCH // minibatches
    config = ppo.PPOConfig(batch_size=BATCH, minibatch_size=size, microbatch_size=size,
                           microbatch_tokens=TOKENS, epochs=EPOCHS)
    machine = parallel.Machine(0, 1, torch.device("cpu"), torch.float32)
    models = ppo.Models(made(Transformer, 0), made(Transformer, 1).requires_grad_(False),
                        made(ScalarModel, 2))
    judge = made(ScalarModel, 3).requires_grad_(False)
    both = halves(models, judge, draw_prompts(), RESPONSE, config, machine)

    def iteration() -> None:
        # no flag ends an answer after so many tokens
        rollout.generate = partial(generate, stop=ragged()) if is_ragged else generate
        both.learn(both.roll_out())

    return iteration


# ---------------------------------------------------------------------------------------------
# TRL's

class EndTheirs:
    """Force the end of each answer of transformers' where it is to be: a logits processor."""

    def __init__(self, lengths: Tensor, prompt: int) -> None:
        self.ends = lengths + prompt - 1

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        over = self.ends <= ids.size(1)
        only_end = torch.full_like(scores[0], -torch.inf).index_fill(0, torch.tensor(EOS), 0.0)
        return torch.where(over[:, None], only_end, scores)


def llama_config() -> Any:
    from transformers import LlamaConfig
    config = shape()
    return LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.dim, num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads, intermediate_size=config.ffn_dim,
        max_position_embeddings=config.max_seq_len, rms_norm_eps=config.norm_eps,
        bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD, num_labels=1)


def tokenizer() -> Any:
    """Return a tokenizer that TRL can ask for the ids of padding and EOS, which is all it needs."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    vocabulary = {f"<{i}>": i for i in range(shape().vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<1>")),
        pad_token=f"<{PAD}>", eos_token=f"<{EOS}>")


def trl(minibatches: int, is_ragged: bool) -> Callable[[], Any]:
    """Return what runs one iteration of TRL's trainer, which counts rows alone."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LogitsProcessorList
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    config = llama_config()
    policy = LlamaForCausalLM(config)
    settings = PPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=BATCH, total_episodes=BATCH,
        gradient_accumulation_steps=1, num_mini_batches=minibatches, num_ppo_epochs=EPOCHS,
        local_rollout_forward_batch_size=BATCH, response_length=RESPONSE, num_sample_generations=0,
        stop_token_id=EOS if is_ragged else None, gradient_checkpointing=False, bf16=False,
        use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no")
    rows = [{"input_ids": ids} for ids in draw_prompts()]
    trainer = PPOTrainer(
        settings, tokenizer(), policy, LlamaForCausalLM(config),
        LlamaForSequenceClassification(config), rows, LlamaForSequenceClassification(config),
        data_collator=lambda part: {"input_ids": torch.tensor([row["input_ids"] for row in part])})
    if is_ragged:
        lengths = ragged().foretell(made(Transformer, 0), draw_prompts())  # as ours are
        ends = LogitsProcessorList([EndTheirs(lengths, PROMPT)])
        policy.generate = partial(policy.generate, logits_processor=ends)

    def iteration() -> None:
        with redirect_stdout(io.StringIO()):  # its log
            trainer.train()

    return iteration


SIDES = {"ours": ours, "trl": trl}


def main() -> None:
    """Run an iteration of one side twice; print the second's time, and memory."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--minibatches", type=int, default=1)
    parser.add_argument("--ragged", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.side == "ours":
        parallel.keep_freed_memory()
    iteration = SIDES[options.side](options.minibatches, options.ragged)
    before = memory()
    for _ in range(2):  # Adam's moments are there from the second on
        began = time.process_time()
        iteration()
    print(f"{time.process_time() - began:.2f} CPU seconds; memory {before:.0f} MB with all models, "
          f"{memory():.0f} MB at the peak")


def memory() -> float:
    """Return the largest resident memory of this process until now [MB]."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


if __name__ == "__main__":
    main()
