"""A model that is asked: choices as branches of one tree, generation, programs."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Iterable, Iterator, NamedTuple, Sequence

import numpy
import torch
from torch import Tensor
from tqdm import tqdm

import parallel
from benchmarks import sandbox
from benchmarks.questions import Request
from benchmarks.tasks import Task
from data import Tokenizer
from model import Grid, Transformer, generate, rope_table

LOGITS_ROWS = 1024          # positions whose logits over the vocabulary are held at once


class Tree(NamedTuple):
    """Several inputs with one beginning, as one row: the beginning (branch 0), then the rest of each (branches 1, 2, ...)."""
    tokens: list[int]
    positions: list[int]
    branches: list[int]
    reads: list[tuple[int, int]]        # slot whose logits predict a token, and that token, request after request
    owners: list[tuple[int, int]]       # (index of a request, how many of the reads are its)


def grow_trees(requests: Sequence[Request], first: int, context_size: int) -> list[Tree]:
    """Lay the requests of one question out as one tree, or one each where they have too little in common.

    first: index of the first request.   An input longer than the model's context loses tokens on the left.
    """
    inputs = [(*r.context, *r.continuation)[-(context_size + 1):][:-1] for r in requests]
    common = next((i for i, column in enumerate(zip(*inputs)) if len(set(column)) > 1), min(map(len, inputs)))
    if len(inputs) > 1 and 2 * common < min(map(len, inputs)):
        return [tree for i, request in enumerate(requests) for tree in grow_trees([request], first + i, context_size)]
    tree = Tree(list(inputs[0][:common]), list(range(common)), [0] * common, [], [])
    for i, (ids, request) in enumerate(zip(inputs, requests)):
        shift = len(tree.tokens) - common
        tree.tokens.extend(ids[common:])
        tree.positions.extend(range(common, len(ids)))
        tree.branches.extend([i + 1] * (len(ids) - common))
        start = len(ids) - len(request.continuation)
        tree.reads.extend((slot if slot < common else slot + shift, token) for slot, token in enumerate(request.continuation, start))
        tree.owners.append((first + i, len(request.continuation)))
    return [tree]


@torch.inference_mode()
def read_trees(model: Transformer, trees: Sequence[Tree]) -> list[tuple[float, bool]]:
    """Return for every read of the trees the token's log-probability [nats] and whether it is the most probable one."""
    device, rows, time = model.lm_head.weight.device, len(trees), max(len(tree.tokens) for tree in trees)

    def grid(values: Sequence[list[int]]) -> Tensor:  # (B, T) int64
        return torch.tensor([row + [0] * (time - len(row)) for row in values], device=device)
    valid = torch.tensor([row * time + t for row, tree in enumerate(trees) for t in range(len(tree.tokens))], device=device)
    branches, mask = grid([tree.branches for tree in trees]), None
    if branches.any():  # a token sees the beginning and what precedes it in its own branch
        same = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])  # (B, query, key)
        mask = (same & torch.ones(time, time, dtype=torch.bool, device=device).tril())[:, None]
    rope = rope_table(grid([tree.positions for tree in trees]), model.config)
    flat = grid([tree.tokens for tree in trees]).flatten()[valid]
    hidden = model.model.run(flat, rope, Grid(rows, time, valid, mask))
    starts = numpy.cumsum([0, *(len(tree.tokens) for tree in trees)])
    slots = torch.tensor([start + slot for start, tree in zip(starts.tolist(), trees) for slot, _ in tree.reads], device=device)
    targets = torch.tensor([token for tree in trees for _, token in tree.reads], device=device)
    results = []
    for slot, target in zip(slots.split(LOGITS_ROWS), targets.split(LOGITS_ROWS)):
        slot, row = slot.unique(return_inverse=True)  # the first tokens of all choices are predicted by one position
        logits = model.lm_head(hidden[slot]).float()
        chosen = logits[row, target] - logits.logsumexp(1)[row]
        results += zip(chosen.tolist(), (logits.argmax(1)[row] == target).tolist())
    return results


@dataclass(frozen=True)
class Engine:
    """A model and how it is asked."""
    model: Transformer
    tokenizer: Tokenizer
    machine: parallel.Machine
    batch_tokens: int                   # slots of a batch, padding included
    samples: int = 1                    # generations per code problem: one is greedy, several are drawn at temperature 0.8, top_p 0.95
    seed: int = 0

    @property
    def context_size(self) -> int:
        return self.model.config.max_seq_len

    def batches(self, lengths: Sequence[int], name: str) -> Iterator[list[int]]:
        """Yield this rank's share of things by index, similar lengths together, as many as fit into a batch; shows progress."""
        mine = sorted(range(len(lengths)), key=lambda i: -lengths[i])[self.machine.rank::self.machine.world]
        with tqdm(total=len(mine), desc=name, disable=not self.machine.is_main, leave=False) as bar:
            while mine:
                size = max(self.batch_tokens // lengths[mine[0]], 1)
                yield mine[:size]
                bar.update(len(mine[:size]))
                mine = mine[size:]

    def score(self, questions: Sequence[Sequence[Request]], name: str) -> list[list[tuple[float, bool]]]:
        """Return for every question and request its log-likelihood [nats] and whether greedy decoding would produce it."""
        firsts = numpy.cumsum([0, *map(len, questions)]).tolist()
        trees = [tree for first, requests in zip(firsts, questions) for tree in grow_trees(requests, first, self.context_size)]
        found = {}
        for batch in self.batches([len(tree.tokens) for tree in trees], name):
            reads = iter(read_trees(self.model, [trees[i] for i in batch]))
            for index, count in (owner for i in batch for owner in trees[i].owners):
                logprobs, greedy = zip(*(next(reads) for _ in range(count)))
                found[index] = sum(logprobs), all(greedy)
        scores = {index: score for part in parallel.gather_objects(found) for index, score in part.items()}
        if any(math.isnan(logprob) for logprob, _ in scores.values()):
            raise ValueError(f"{name}: the model answers NaN; its weights are damaged, or it overflows: try --dtype=float32")
        return [[scores[i] for i in range(first, first + len(requests))] for first, requests in zip(firsts, questions)]

    def write(self, prompts: Sequence[Sequence[int]], task: Task, name: str) -> list[list[str]]:
        """Return `samples` continuations of every prompt, cut at the first stop string; the harness stops at the text of EOS, too."""
        until = (*task.until, "</s>")
        window = max(len(stop.encode()) for stop in until) + 1  # tokens: none is shorter than a byte, and one may lose its space
        rows = [prompt for prompt in prompts for _ in range(self.samples)]

        def stopped(ids: list[int]) -> bool:
            text = self.tokenizer.decode(ids[-window:])
            return any(stop in text for stop in until)
        found = {}
        for batch in self.batches([len(row) + task.max_new_tokens for row in rows], name):
            temperature, top_p = (0.0, 1.0) if self.samples == 1 else (0.8, 0.95)
            written = generate(self.model, [list(rows[i]) for i in batch], task.max_new_tokens, temperature, top_p=top_p,
                               eos_id=self.tokenizer.eos_id, seed=self.seed, rows=batch, stop=stopped)
            found.update(zip(batch, map(self.tokenizer.decode, written.tokens)))
        texts = {index: text for part in parallel.gather_objects(found) for index, text in part.items()}
        cut = [cut_text(texts[i], until) for i in range(len(rows))]
        return [cut[i:i + self.samples] for i in range(0, len(cut), self.samples)]

    def check(self, programs: Sequence[str], name: str) -> list[bool]:
        """Run generated programs, each rank its share; return which of them pass."""
        mine = self.machine.part(list(programs))

        def bar(verdicts: Iterable[bool]) -> Iterable[bool]:
            return tqdm(verdicts, name, len(mine), leave=False, disable=not self.machine.is_main)
        return [verdict for part in parallel.gather_objects(sandbox.check_all(mine, bar)) for verdict in part]


def cut_text(text: str, until: Sequence[str]) -> str:
    """Cut a text at whichever stop string comes first."""
    for stop in until:
        text = text.split(stop)[0]
    return text
