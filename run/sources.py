"""Data of every stage: the embedded world, or files."""
from __future__ import annotations

import random
from functools import cache
from typing import Any, Sequence
from dataclasses import dataclass

import torch

import data
import formats
import microcosm
import reward
import sft
from formats.files import read_jsonl
from run.folder import Run, to_device


def messages_of(prompt: str) -> tuple[formats.Message, ...]:
    return (formats.Message("user", prompt),)


def preference_items(run: Run) -> list[microcosm.Item]:
    """Return the world's prompts whose responses are ranked."""
    return microcosm.items("preference", run.config.reward.sampled_prompts, run.config.seed, run.config.reward.in_domain_share)


def sft_examples(run: Run) -> list[data.TokenizedDialogue]:
    """Return the dialogues to imitate; the world's are imperfect by construction."""
    config = run.config
    if config.is_world:
        rng = random.Random(f"demonstrations {config.seed}")
        records = [formats.Dialogue((*messages_of(item.prompt), formats.Message("assistant", microcosm.demonstrate(item, rng))), item.task)
                   for item in microcosm.items("train", config.sft.examples, config.seed, config.sft.in_domain_share)]
    else:
        records, report = formats.read_dialogues(config.sft.data, config.data.skip_bad)
        run.say(f"sft data: {report}")
    examples, report = data.encode_sft(records, run.tokenizer, config.data.template,
                                       config.data.max_prompt_tokens + config.data.max_response_tokens)
    run.say(f"sft examples: {report}")
    return examples


@cache
def read_prompts(run: Run, name: str, files: tuple[str, ...]) -> tuple[list[formats.Prompt], list[list[int]]]:
    """Return the prompts of files and their token ids; several stages of a run ask for them."""
    config = run.config.data
    records, report = formats.read_prompts(files, config.skip_bad)
    run.say(f"{name} data: {report}")
    ids, records, report = data.encode_prompts(records, run.tokenizer, config.template, config.max_prompt_tokens, config.skip_bad)
    run.say(f"{name} prompts: {report}")
    return records, ids


def world_prompts(run: Run, items: Sequence[microcosm.Item]) -> list[list[int]]:
    return [data.encode_prompt(run.tokenizer, messages_of(item.prompt), run.config.data.template) for item in items]


def ppo_prompts(run: Run) -> tuple[list[formats.Prompt], list[list[int]]]:
    """Return the prompts of PPO's files and their token ids, in the order of the files."""
    config = run.config
    records, ids = read_prompts(run, "ppo", config.ppo.prompts)
    if len(ids) <= config.eval.holdout and not config.eval.prompts:
        raise ValueError(f"--ppo.prompts has {len(ids)} usable prompts and --eval.holdout={config.eval.holdout} of them are held out: lower it")
    return records, ids


def training_prompts(run: Run) -> list[list[int]]:
    """Return the prompts PPO trains on: the world's training split, or all in its files but those kept for evaluation."""
    config = run.config
    if config.is_world:
        return world_prompts(run, microcosm.items("train", config.ppo.iterations * config.ppo.batch_size, config.seed + 1_000_000,
                                                  config.ppo.in_domain_share))
    ids = ppo_prompts(run)[1]
    return ids if config.eval.prompts else ids[:len(ids) - config.eval.holdout]


def sft_batch(run: Run, examples: Sequence[data.TokenizedDialogue]) -> sft.Batch:
    tokens, attention_mask = data.pad([example.tokens for example in examples])
    return sft.Batch(*to_device(run, tokens, attention_mask, data.pad_masks([example.response_mask for example in examples])))


def reward_batch(run: Run, examples: Sequence[data.TokenizedRanking]) -> reward.Batch:
    """Lay out N prompts x G responses; a prompt with fewer than G gets one-token rows of rank NaN."""
    size = max(len(example.responses) for example in examples)
    rows, ranks = [], torch.full((len(examples), size), torch.nan)
    for n, example in enumerate(examples):
        texts = [example.prompt + response for response in example.responses]
        rows += texts + [example.prompt[:1]] * (size - len(texts))
        ranks[n, :len(texts)] = torch.tensor(example.ranks)
    return reward.Batch(*to_device(run, *data.pad(rows), ranks))


def rankings(run: Run) -> tuple[list[data.TokenizedRanking], list[str]]:
    """Return the rankings that hold a pair, and each one's task, shuffled."""
    config = run.config
    if config.reward.data:
        records, report = formats.read_rankings(config.reward.data, config.data.skip_bad)
        run.say(f"reward data: {report}")
        ranked, report = data.encode_rankings(records, run.tokenizer, config.data.template,
                                              config.data.max_prompt_tokens + config.data.max_response_tokens)
        run.say(f"reward examples: {report}")
        tasks = [""] * len(ranked)
    else:
        ranked, tasks = [], []
        for row in read_jsonl(run.needed("ranked.jsonl", "annotate")):
            distinct = {tuple(ids): rank for ids, rank in zip(row["response_ids"], row["ranks"])}
            if len(set(distinct.values())) > 1:
                ranked.append(data.TokenizedRanking(row["prompt_ids"], [list(ids) for ids in distinct], list(distinct.values())))
                tasks.append(row["task"])
    order = data.epoch_order(len(ranked), config.seed, 0)
    return [ranked[i] for i in order], [tasks[i] for i in order]


def held_out_prompts(run: Run) -> tuple[list[Any], list[list[int]]]:
    """Return the real prompts of the evaluation, as things with a prompt and an answer, and their token ids."""
    config = run.config
    if config.eval.prompts:
        records, ids = read_prompts(run, "eval", config.eval.prompts)
    elif config.ppo.prompts:
        records, ids = (part[-config.eval.holdout:] for part in ppo_prompts(run))
    else:
        raise ValueError("the evaluation needs prompts: give --eval.prompts=FILE")
    return [Shown(record.messages[-1].content, record.answer) for record in records], ids


@dataclass(frozen=True)
class Shown:
    """A real prompt as the evaluation shows it."""
    prompt: str
    answer: str | None
