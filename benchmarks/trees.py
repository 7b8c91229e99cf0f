"""The choices of one question as branches of one tree, so that what they share is computed once.

    requests -> grow_trees -> Tree -> read_trees -> Likelihood of every request
"""
from __future__ import annotations

from itertools import accumulate, chain, groupby
from typing import Iterator, NamedTuple, Sequence

import torch
from torch import Tensor

from benchmarks.items import Likelihood
from benchmarks.questions import Request
from model import Group, Layout, Transformer

LOGITS_ROWS = 1024          # positions whose logits over the vocabulary are held at once

# "The Colosseum stands" goes on with " in Rome" or with " on the sea". Two rows of a batch would
# both compute the context, which is most of the work. As a tree it stands there once, and one row
# holds all:
#
#                       in  (Rome)              slot      0    1    2         3       4     5    6
#                     /                         token    <s>  The  Colosseum stands  in    on   the
#    The ... stands -                           position  0    1    2         3       4     4    5
#                     \                         branch    0    0    0         0       1     2    2
#                       on  the  (sea)          read                        in, on  Rome  the  sea
#
# The position is what the rotary embedding sees: both branches go on at 4. A choice's last token is
# only predicted, never read, so it has no slot. "read" says which tokens' probabilities the logits
# of a slot give.
#
# The mask keeps the branches apart. A token sees the trunk (branch 0) and its own branch up to
# itself; with the usual causal mask alone "on" would have seen "in", and the second choice would be
# scored as the end of "The Colosseum stands in on the sea":
#
#     query \ key    0 1 2 3 | 4 | 5 6
#     4  in          x x x x | x | . .
#     5  on          x x x x | . | x .
#     6  the         x x x x | . | x x


class Read(NamedTuple):
    """A token to predict, and the slot whose logits predict it."""
    slot: int
    token: int


class Tree(NamedTuple):
    """Several inputs with one beginning, as one row: that (branch 0), then the rest of each."""
    tokens: list[int]
    positions: list[int]
    branches: list[int]
    reads: dict[int, list[Read]]        # index of a request -> its continuation's tokens


def input_ids(request: Request, context_size: int) -> list[int]:
    """Return what the model reads of a request; one too long for it loses tokens on the left."""
    ids = [*request.context, *request.continuation]
    kept = ids[-(context_size + 1):]    # one more than fits, because the last is only predicted
    return kept[:-1]


def common_length(rows: Sequence[list[int]]) -> int:
    """Return how many ids all rows begin with."""
    for i, column in enumerate(zip(*rows)):
        if len(set(column)) > 1:
            return i
    return min(map(len, rows))


def grow_trees(requests: Sequence[Request], first: int, context_size: int) -> list[Tree]:
    """Lay the requests of a question out as one tree, or one each where they share little.

    first: index of the first request.
    """
    inputs = [input_ids(request, context_size) for request in requests]
    common = common_length(inputs)
    # Where options stand at the context's beginning there is hardly a trunk: a tree would be one
    # long row whose attention is nearly all masked, and attention grows with the square of the
    # length.
    if 2 * common < min(map(len, inputs)):
        return [
            grow_tree({first + i: request}, [ids], len(ids))
            for i, (request, ids) in enumerate(zip(requests, inputs))
        ]
    return [grow_tree(dict(enumerate(requests, first)), inputs, common)]


def grow_tree(requests: dict[int, Request], inputs: Sequence[list[int]], common: int) -> Tree:
    """Make one tree. requests: by index; inputs: their ids, which agree in the first `common`."""
    trunk = inputs[0][:common]
    tree = Tree(list(trunk), list(range(common)), [0] * common, {})
    for branch, ((index, request), ids) in enumerate(zip(requests.items(), inputs), 1):
        shift = len(tree.tokens) - common       # from a position in the branch to its slot
        tree.tokens.extend(ids[common:])
        tree.positions.extend(range(common, len(ids)))
        tree.branches.extend([branch] * (len(ids) - common))

        # The logits at position t predict the token at t + 1: the first token of every choice is
        # read off the context's last token, which all choices share.
        start = len(ids) - len(request.continuation)
        tree.reads[index] = [
            Read(position if position < common else position + shift, token)
            for position, token in enumerate(request.continuation, start)
        ]
    return tree


def tree_mask(branches: Tensor) -> Tensor | None:
    """Return which key each query sees, (B, 1, T, T) bool, for branches (B, T); None: causal."""
    if not branches.any():
        return None
    time = branches.size(1)
    key = branches[:, None, :]                                          # (B, 1, T)
    query = branches[:, :, None]                                        # (B, T, 1)
    causal = torch.ones(time, time, dtype=torch.bool, device=branches.device).tril()
    visible = ((key == 0) | (key == query)) & causal                    # (B, T, T)
    return visible[:, None]                                             # one mask for all heads


@torch.inference_mode()
def read_trees(model: Transformer, trees: Sequence[Tree]) -> dict[int, Likelihood]:
    """Return the likelihood of every request of the trees, by its index."""
    device = model.lm_head.weight.device
    trees = sorted(trees, key=lambda tree: len(tree.tokens))            # as every stream stands
    groups = []
    for length, same in groupby(trees, lambda tree: len(tree.tokens)):
        branches = torch.tensor([tree.branches for tree in same], device=device)    # (rows, T)
        groups.append(Group(len(branches), length, tree_mask(branches)))
    flat, positions = (
        torch.tensor(list(chain.from_iterable(rows)), device=device)                # (N,)
        for rows in ([tree.tokens for tree in trees], [tree.positions for tree in trees])
    )
    hidden = model.model.run(flat, Layout(positions, groups))           # (N, D)

    # A tree's slots follow one another in the stream, so a read's place is the tree's start
    # plus its slot.
    starts = accumulate((len(tree.tokens) for tree in trees), initial=0)
    reads = [
        Read(start + read.slot, read.token)
        for start, tree in zip(starts, trees)
        for request in tree.reads.values()
        for read in request
    ]
    found = read_logits(model, hidden, reads)
    likelihoods = {}
    for tree in trees:
        for index, request in tree.reads.items():
            read = [next(found) for _ in request]
            logprob = sum(one.logprob for one in read)
            likelihoods[index] = Likelihood(logprob, all(one.is_greedy for one in read))
    return likelihoods


def read_logits(model: Transformer, hidden: Tensor, reads: Sequence[Read]) -> Iterator[Likelihood]:
    """Yield the likelihood of every read's token. hidden: (N, D), the places that `slot` names."""
    for start in range(0, len(reads), LOGITS_ROWS):
        part = reads[start:start + LOGITS_ROWS]
        slots = torch.tensor([read.slot for read in part], device=hidden.device)        # (R,)
        targets = torch.tensor([read.token for read in part], device=hidden.device)     # (R,)

        # All choices' first tokens are predicted by one place: its logits are computed once.
        places, row = slots.unique(return_inverse=True)                 # (P,), and (R,) into it
        logits = model.lm_head(hidden[places]).float()                  # (P, V)
        logprobs = logits[row, targets] - logits.logsumexp(1)[row]      # (R,)
        is_greedy = logits.argmax(1)[row] == targets                    # (R,)
        yield from map(Likelihood, logprobs.tolist(), is_greedy.tolist())
