"""A model that is asked: likelihoods of continuations, generated texts, programs that are run."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Iterable, Iterator, Sequence

from tqdm import tqdm

import parallel
from benchmarks import sandbox
from benchmarks.items import Likelihood
from benchmarks.questions import Request
from benchmarks.tasks import Task
from benchmarks.trees import grow_trees, read_trees
from data import Tokenizer, decode_response, end_ids
from model import Transformer, generate


@dataclass(frozen=True)
class Engine:
    """A model and how it is asked."""
    model: Transformer
    tokenizer: Tokenizer
    machine: parallel.Machine
    batch_tokens: int                   # slots of a batch, padding included
    samples: int = 1                    # programs per code problem: 1 is greedy, more are drawn
    seed: int = 0
    template: str = "plain"             # of dialogues: the one that the model was trained with

    @property
    def context_size(self) -> int:
        return self.model.config.max_seq_len

    def batches(self, lengths: Sequence[int], name: str) -> Iterator[list[int]]:
        """Yield this rank's share of things by index, as many as fit into a batch; shows progress.

        Similar lengths go together, so that little is padded, and every rank gets as many long ones
        as the others.
        """
        longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        mine = longest_first[self.machine.rank::self.machine.world]
        with tqdm(total=len(mine), desc=name, disable=not self.machine.is_main, leave=False) as bar:
            while mine:
                size = max(self.batch_tokens // lengths[mine[0]], 1)
                batch = mine[:size]
                yield batch
                bar.update(len(batch))
                mine = mine[size:]

    def score(self, questions: Sequence[Sequence[Request]], name: str) -> list[list[Likelihood]]:
        """Return the likelihood of every question's every request."""
        numbered: list[list[int]] = []      # of each question, the indices of its requests
        trees = []
        count = 0
        for requests in questions:
            numbered.append(list(range(count, count + len(requests))))
            trees += grow_trees(requests, count, self.context_size)
            count += len(requests)

        found: dict[int, Likelihood] = {}
        for batch in self.batches([len(tree.tokens) for tree in trees], name):
            found |= read_trees(self.model, [trees[i] for i in batch])
        everything = merged(found)
        if any(math.isnan(one.logprob) for one in everything.values()):
            raise ValueError(
                f"{name}: the model answers NaN; its weights are damaged, "
                "or it overflows: try --dtype=float32"
            )
        return [[everything[i] for i in indices] for indices in numbered]

    def write(self, prompts: Sequence[Sequence[int]], task: Task, name: str) -> list[list[str]]:
        """Return `samples` continuations of every prompt, cut at the first stop string."""
        # the harness stops at the text of EOS, too, should a model spell it out
        until = (*task.until, self.tokenizer.piece(self.tokenizer.eos_id))
        # The last so many tokens hold a stop string that has just been completed: none of its
        # tokens is shorter than a byte, and decoding may take the first one's space away.
        window = max(len(stop.encode()) for stop in until) + 1

        def stopped(ids: list[int]) -> bool:
            text = self.tokenizer.decode(ids[-window:])
            return any(stop in text for stop in until)

        rows = [list(prompt) for prompt in prompts for _ in range(self.samples)]
        # One program is the most probable one; for pass@k they must differ, drawn as Chen et al.
        # 2021 do.
        temperature, top_p = (0.0, 1.0) if self.samples == 1 else (0.8, 0.95)
        found: dict[int, str] = {}
        for batch in self.batches([len(row) + task.max_new_tokens for row in rows], name):
            written = generate(
                self.model, [rows[i] for i in batch], task.max_new_tokens, temperature, top_p=top_p,
                eos_id=self.ends_of(task), seed=self.seed, rows=batch, stop=stopped,
            )
            for i, ids in zip(batch, written.tokens):
                found[i] = cut_text(self.decode(ids, task), until)

        texts = merged(found)
        in_order = [texts[i] for i in range(len(rows))]
        return [in_order[i:i + self.samples] for i in range(0, len(rows), self.samples)]

    def ends_of(self, task: Task) -> tuple[int, ...]:
        """Return what ends an answer."""
        is_spoken_to = task.is_dialogue
        return end_ids(self.tokenizer, self.template) if is_spoken_to else self.tokenizer.eos_ids

    def decode(self, ids: Sequence[int], task: Task) -> str:
        """Return the text of ids written: an answer in the model's template, or a continuation."""
        if task.is_dialogue:
            return decode_response(self.tokenizer, ids, self.template)
        return self.tokenizer.decode(ids)

    def check(self, programs: Sequence[sandbox.Program], name: str) -> list[bool]:
        """Run generated programs, each rank its share; return which of them pass."""
        mine = self.machine.part(list(programs))

        def bar(verdicts: Iterable[bool]) -> Iterable[bool]:
            return tqdm(verdicts, name, len(mine), leave=False, disable=not self.machine.is_main)
        parts = parallel.gather_objects(sandbox.check_all(mine, bar))
        return [verdict for part in parts for verdict in part]


def merged(found: dict[int, Any]) -> dict[int, Any]:
    """Return what all ranks have found, by index."""
    parts = parallel.gather_objects(found)
    return {index: value for part in parts for index, value in part.items()}


def cut_text(text: str, until: Sequence[str]) -> str:
    """Cut a text at whichever stop string comes first."""
    for stop in until:
        text = text.split(stop)[0]
    return text
