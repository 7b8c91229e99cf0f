"""Where each stage's data comes from: the embedded world, or files.

    demonstrations  -> SFT                      prompts to sample from -> rankings -> reward model
    prompts to train on -> PPO                  prompts held out -> evaluation

World and Files answer the same questions. What is held out is chosen once, written to
heldout.jsonl, and handed to no stage but the evaluation: not to SFT, not to the sampling, not to
PPO.
"""
from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, Iterator, NamedTuple, Sequence

import torch

import data
import formats
import microcosm
import reward
import sft
from data import TokenizedDialogue, TokenizedDialogues, TokenizedRanking
from formats import BadRow, Dialogue, Message, Prompt
from formats.files import read_jsonl, write_jsonl
from formats.parsers import any_prompt, make_example, prompt_field
from formats.records import prompt_key, without_repeats
from formats.rows import get
from model import derive
from run.folder import Run
from run.rankings import check_drawn, check_ranks, check_rows
from run.sharing import shared, with_word


class Ranked(NamedTuple):
    """A ranking, and the general task of its prompt; "" is the domain itself."""
    ranking: TokenizedRanking
    task: str


class Source(ABC):
    """What both kinds of data have in common. Subclasses say where records come from."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.config = run.config

    @abstractmethod
    def choose_heldout(self) -> None:
        """Write heldout.jsonl; the main rank does so before any stage begins."""

    @abstractmethod
    def dialogues(self) -> Iterator[Dialogue]:
        """Yield the demonstrations."""

    @abstractmethod
    def prompts_to_sample(self) -> list[Prompt]:
        """Return the prompts whose responses are ranked."""

    @abstractmethod
    def prompts_to_train(self) -> list[Prompt]:
        """Return the prompts PPO samples from; [] if the run has none."""

    def encode(self, records: Sequence[Prompt], name: str) -> list[Prompt]:
        """Fill in the ids of prompts."""
        config = self.config.data
        prompts, report = data.encode_prompts(records, self.run.tokenizer, config.template,
                                              config.max_prompt_tokens, config.skip_bad)
        if not self.config.is_world:  # of whose prompts there is nothing to tell
            self.run.say(f"{name} prompts: {report}")
        return prompts

    def heldout(self) -> list[Prompt]:
        """Return the prompts of the evaluation, which no stage has seen."""
        path = self.run.result("heldout.jsonl")
        if path is None:
            raise ValueError("the evaluation needs prompts that no stage has seen: give --eval."
                             "prompts=FILE, or --ppo.prompts=FILE with --eval.holdout above 0")
        rows = read_jsonl(path)
        if not rows:
            raise ValueError(f"{path}: holds no prompt: put it back from a copy")
        return self.encode([prompt_of(row, f"{path}:{n}") for n, row in enumerate(rows, 1)], "eval")

    def demonstrations(self) -> Sequence[TokenizedDialogue]:
        """Return the dialogues to imitate, as ids; one process of a machine encodes for all."""
        return shared(self.run.machine, self.encode_dialogues)

    def encode_dialogues(self, examples: TokenizedDialogues) -> None:
        """Append the dialogues to imitate."""
        records = with_word(self.run.machine, self.dialogues())
        _, report = data.encode_sft(records, self.run.tokenizer, self.config.data.template,
                                    self.config.longest, examples)
        self.run.say(f"sft examples: {report}")

    def rankings(self) -> list[Ranked]:
        """Return the rankings that hold a pair, shuffled."""
        found = self.given_rankings() if self.config.reward.data else self.own_rankings()
        return [found[i] for i in data.epoch_order(len(found), self.config.seed, 0)]

    def given_rankings(self) -> list[Ranked]:
        """Read the rankings of --reward.data."""
        config = self.config
        records, report = formats.read_rankings(config.reward.data, config.data.skip_bad)
        self.run.say(f"reward data: {report}")
        ranked, report = data.encode_rankings(self.without_heldout(records, "reward data"),
                                              self.run.tokenizer, config.data.template,
                                              config.longest)
        self.run.say(f"reward examples: {report}")
        return [Ranked(ranking, "") for ranking in ranked]

    def own_rankings(self) -> list[Ranked]:
        """Read what the annotate stage left: the very ids that were sampled, equal ones once."""
        path = self.run.needed("ranked.jsonl", "annotate")
        rows, given = read_jsonl(path), path.with_name("to_rank.jsonl")
        check_rows(rows, path, len(read_jsonl(given)) if given.exists() else len(rows))
        found = [ranked_of(row, f"{path}:{number}") for number, row in enumerate(rows, 1)]
        return [one for one in found if len(set(one.ranking.ranks)) > 1]

    def without_heldout(self, records: Sequence[Any], name: str) -> list[Any]:
        """Drop the records whose prompt is held out for the evaluation."""
        kept = [record for record in records if prompt_key(record) not in self.heldout_keys]
        self.say_left_out(name, len(records) - len(kept))
        return kept

    def say_left_out(self, name: str, rows: int) -> None:
        if rows:
            self.run.say(f"{name}: {rows} rows left out, their prompts are "
                         "held out for the evaluation (heldout.jsonl)")

    @cached_property
    def heldout_keys(self) -> set[str]:
        path = self.run.result("heldout.jsonl")
        rows = read_jsonl(path) if path else []
        return {prompt_key(prompt_of(row, str(path))) for row in rows}


def hold_out(ranked: Sequence[Ranked], share: float) -> tuple[list[Ranked], list[Ranked]]:
    """Split rankings, by prompt, into those for measuring accuracy and those to train on.

    Else a prompt that was drawn twice would be trained on and count as unseen.
    """
    # the rankings are shuffled, so the first prompts are any prompts
    prompts = list(dict.fromkeys(tuple(ranking.prompt) for ranking, _ in ranked))
    chosen = set(prompts[:max(1, round(share * len(prompts)))])
    held = [one for one in ranked if tuple(one.ranking.prompt) in chosen]
    rest = [one for one in ranked if tuple(one.ranking.prompt) not in chosen]
    if not rest:
        raise ValueError(f"{len(ranked)} rankings with a pair are too few to train on and to hold "
                         f"out {len(held)}")
    return held, rest


def prompt_row(prompt: Prompt) -> dict[str, Any]:
    """Return a prompt as an object of a JSON file; `prompt_of` reads it back."""
    return {"prompt": prompt_field(prompt.messages), "answer": prompt.answer, "task": prompt.task}


def prompt_of(row: dict[str, Any], source: str) -> Prompt:
    """Read a prompt that `prompt_row` wrote; ValueError if it is none any more."""
    try:
        messages = make_example(any_prompt(row)).prompt
        answer = None if row.get("answer") is None else get(row, "answer")
        return Prompt(messages, source, answer, get(row, "task"))
    except BadRow as fault:
        raise ValueError(f"{source}: {fault}") from None


def ranked_of(row: dict[str, Any], source: str) -> Ranked:
    """Read a row of ranked.jsonl, equal responses once; ValueError if it is none any more."""
    check_drawn(row, source)
    check_ranks(row, source)
    is_whole = row["prompt_ids"] and all(row["response_ids"]) and isinstance(row.get("task"), str)
    if not is_whole:
        raise ValueError(f"{source}: a prompt and responses with ids are needed, and a \"task\"")
    ranks = {tuple(ids): rank for ids, rank in zip(row["response_ids"], row["ranks"])}
    responses = [list(ids) for ids in ranks]
    return Ranked(TokenizedRanking(row["prompt_ids"], responses, list(ranks.values())), row["task"])


# ---------------------------------------------------------------------------------------------
# The embedded world

def world_prompt(item: microcosm.Item, number: int) -> Prompt:
    """Return an item of the world as a prompt."""
    source = f"{item.task or 'advertisement'} {number}"
    return Prompt((Message("user", item.prompt),), source, item.answer, item.task)


class World(Source):
    """Data of the embedded world: every split is a pure function of the seed, and they share no
    prompt (microcosm.SPLITS)."""

    def prompts_of(self, split: str, n: int, in_domain_share: float, seed: int) -> list[Prompt]:
        items = microcosm.items(split, n, seed, in_domain_share)
        return [world_prompt(item, number) for number, item in enumerate(items, 1)]

    def choose_heldout(self) -> None:
        path = self.run.out / "heldout.jsonl"
        if path.exists():
            return
        config = self.config
        items = microcosm.evaluation_items(config.eval.in_domain, config.eval.general, config.seed)
        write_jsonl(path, [prompt_row(world_prompt(item, n)) for n, item in enumerate(items, 1)])

    def dialogues(self) -> Iterator[Dialogue]:
        """Draw demonstrations; they are imperfect by construction."""
        config = self.config
        rng = random.Random(f"demonstrations {config.seed}")
        for item in microcosm.items("train", config.sft.examples, config.seed,
                                    config.sft.in_domain_share):
            answer = Message("assistant", microcosm.demonstrate(item, rng))
            yield Dialogue((Message("user", item.prompt), answer), item.task)

    def prompts_to_sample(self) -> list[Prompt]:
        config = self.config.reward
        return self.encode(self.prompts_of("preference", config.sampled_prompts,
                                           config.in_domain_share, self.config.seed), "sample")

    def prompts_to_train(self) -> list[Prompt]:
        config = self.config.ppo
        n = config.iterations * config.batch_size // config.responses_per_prompt
        # other prompts than those of the demonstrations, from the same split
        seed = derive(self.config.seed, "ppo prompts")
        return self.encode(self.prompts_of("train", n, config.in_domain_share, seed), "ppo")


# ---------------------------------------------------------------------------------------------
# Files

class Files(Source):
    """Data from files that people bring."""

    @cached_property
    def records(self) -> list[Prompt]:
        """The prompts of --ppo.prompts, in the order of the files."""
        if not self.config.ppo.prompts:
            return []
        records, report = formats.read_prompts(self.config.ppo.prompts, self.config.data.skip_bad)
        self.run.say(f"ppo data: {report}")
        return records

    @cached_property
    def training_prompts(self) -> list[Prompt]:
        """Those of them that are not held out, encoded."""
        return self.encode(self.without_heldout(self.records, "ppo data"), "ppo")

    def choose_heldout(self) -> None:
        """Hold out --eval.prompts; else those of --ppo.prompts whose hashes are smallest.

        A hash of the text: the choice does not depend on the order of files, equal prompts are
        chosen or left together, and it is made once, so that no later run on this one leaks.
        """
        config = self.config
        if config.eval.prompts:
            chosen, report = formats.read_prompts(config.eval.prompts, config.data.skip_bad)
            self.run.say(f"eval data: {report}")
        elif self.run.result("heldout.jsonl") or not self.records or not config.eval.holdout:
            return
        else:
            chosen = smallest_hashes(self.records, config.eval.holdout)
            if self.run.result("sft"):
                self.run.say("eval data: held out only now, after SFT, which may have seen them: "
                             "give --ppo.prompts with the first stage")
        prompts = without_repeats(chosen)
        if len(prompts) < len(chosen):
            self.run.say(f"eval data: {len(chosen) - len(prompts)} repeated prompts left out")
        write_jsonl(self.run.out / "heldout.jsonl", map(prompt_row, prompts))

    def dialogues(self) -> Iterator[Dialogue]:
        """Read them one by one: of a large file no more is in memory at a time."""
        config = self.config
        report = formats.Report()
        left_out = 0
        for record in formats.stream_dialogues(config.sft.data, config.data.skip_bad, report):
            if prompt_key(record) in self.heldout_keys:
                left_out += 1
            else:
                yield record
        self.run.say(f"sft data: {report}")
        self.say_left_out("sft data", left_out)

    def prompts_to_sample(self) -> list[Prompt]:
        return self.training_prompts[:self.config.reward.sampled_prompts]

    def prompts_to_train(self) -> list[Prompt]:
        return self.training_prompts if self.config.ppo.prompts else []


def smallest_hashes(records: Sequence[Prompt], n: int) -> list[Prompt]:
    """Choose n different prompts by a hash of their text, which spreads them evenly."""
    distinct = {prompt_key(record): record for record in without_repeats(records)}
    if len(distinct) <= n:
        raise ValueError(f"--ppo.prompts has {len(distinct)} different prompts and --eval.holdout="
                         f"{n} of them are held out: lower it")
    by_hash = sorted(distinct, key=lambda key: hashlib.sha256(key.encode()).digest())
    return [distinct[key] for key in by_hash[:n]]


def open_source(run: Run) -> Source:
    return World(run) if run.config.is_world else Files(run)


# ---------------------------------------------------------------------------------------------
# Examples to batches

def sft_batch(examples: Sequence[TokenizedDialogue], device: torch.device) -> sft.Batch:
    """Lay dialogues out on one grid."""
    tokens, attention_mask = data.pad([example.tokens for example in examples])
    response_mask = data.pad_masks([example.response_mask for example in examples])
    return sft.Batch(tokens.to(device), attention_mask.to(device), response_mask.to(device))


def reward_batch(examples: Sequence[TokenizedRanking], device: torch.device) -> reward.Batch:
    """Lay out N prompts x G responses; a prompt with fewer gets one-token rows of rank NaN."""
    size = max(len(example.responses) for example in examples)
    ranks = torch.full((len(examples), size), torch.nan)
    rows: list[list[int]] = []
    for n, example in enumerate(examples):
        given = [example.prompt + response for response in example.responses]
        missing = size - len(given)
        rows += given + [example.prompt[:1]] * missing
        ranks[n, :len(given)] = torch.tensor(example.ranks)
    tokens, attention_mask = data.pad(rows)
    return reward.Batch(tokens.to(device), attention_mask.to(device), ranks.to(device))
