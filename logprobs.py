"""What a model says of tokens: their log-probabilities, values and scores.

Dimensions: B sequences, T padded tokens, M of them scored, D model, V vocabulary.
"""
from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Mask = Tensor | None  # (B, T) bool; what None means, each docstring says

# ---------------------------------------------------------------------------------------------
# The one shift: what a model says at t - 1 speaks of token t
#
# A model that has read tokens 0 .. t - 1 says at t - 1 what comes next. The algorithm, though,
# keeps everything about token t in column t: its log-probability, and the value of the state in
# which it was chosen. These functions cross from one way of counting to the other, and nothing
# outside of them shifts anything.

def finite(x: Tensor) -> Tensor:
    """Return what a model said; ValueError if it is no number."""
    # a token drawn from NaN would be an answer like any other, and a score of NaN might win
    if not x.isfinite().all():
        raise ValueError("the model answers NaN: its weights are damaged or have diverged, or "
                         "bfloat16 overflows: try float32, by --dtype (train.py, eval.py run) or "
                         "without a GPU (CUDA_VISIBLE_DEVICES= eval.py ...)")
    return x


def check_predecessors(response_mask: Tensor) -> None:
    """Raise ValueError if the first token of a row, which nothing predicts, is to be scored."""
    if response_mask[:, 0].any():
        raise ValueError("the first token of a row has no predecessor, so nothing predicts it")


def all_real(tokens: Tensor, attention_mask: Mask) -> Tensor:
    """Return (B, T) bool: True where a token is real."""
    return torch.ones_like(tokens).bool() if attention_mask is None else attention_mask


def read_tokens(model: nn.Module | Tensor, tokens: Tensor, attention_mask: Mask,
                response_mask: Mask, temperature: float, with_entropy: bool
                ) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return log-probabilities and entropies of M tokens, (M,), and the (B, T) mask of these."""
    if response_mask is None:
        # all real tokens but the first of each row, which is the first that the mask counts
        real = all_real(tokens, attention_mask)
        response_mask = real & (real.cumsum(1) > 1)
    check_predecessors(response_mask)
    where = response_mask.roll(-1, dims=1)  # from the tokens to the positions that predict them
    targets = tokens[response_mask]  # (M,)
    if isinstance(model, Tensor):
        return *logprobs_of_logits(model[where], targets, temperature), response_mask
    read = partial(read_logprobs, targets=targets, temperature=temperature,
                   with_entropy=with_entropy)
    return *model(tokens, attention_mask, where, read), response_mask


def lay_out(values: Tensor, mask: Tensor) -> Tensor:
    """Put the values of a mask's True places, (M,), back on the (B, T) grid; zero elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def token_logprobs(model: nn.Module | Tensor, tokens: Tensor, attention_mask: Mask = None,
                   response_mask: Mask = None, temperature: float = 1.0) -> Tensor:
    """Score tokens under softmax(logits / temperature).

    model: a Transformer, or its logits (B, T, V).
    tokens: (B, T) int64.   attention_mask: (B, T) bool, True = real token; None: all real.
    response_mask: (B, T) bool, tokens to score; None: every real token but the first of its row.
    Returns: (B, T) float32, log-probability of token t given those before it [nats], else 0.
    """
    logprobs, _, scored = read_tokens(model, tokens, attention_mask, response_mask, temperature,
                                      with_entropy=False)
    return lay_out(logprobs, scored)


def token_logprobs_and_entropy(model: nn.Module | Tensor, tokens: Tensor,
                               attention_mask: Mask = None, response_mask: Mask = None,
                               temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Do `token_logprobs`, and return alike the entropy each token was drawn with [nats]."""
    logprobs, entropy, scored = read_tokens(model, tokens, attention_mask, response_mask,
                                            temperature, with_entropy=True)
    return lay_out(logprobs, scored), lay_out(entropy, scored)


def token_values(critic: nn.Module, tokens: Tensor, attention_mask: Mask,
                 response_mask: Tensor) -> Tensor:
    """Return (B, T) float32: the value of the state before token t, zero outside the response."""
    check_predecessors(response_mask)
    # the critic's word after token t - 1, moved from column t - 1 to t
    return critic(tokens, attention_mask, response_mask.roll(-1, dims=1)).roll(1, dims=1)


def last_scores(reward_model: nn.Module, tokens: Tensor, attention_mask: Mask) -> Tensor:
    """Return (B,) float32: the scalar at each row's last real token, wherever the padding is."""
    # no shift here: the score is of all that was read, the last token included
    columns = torch.arange(tokens.size(1), device=tokens.device)
    real = all_real(tokens, attention_mask)
    last = columns.where(real, -1).amax(1, keepdim=True)  # (B, T) -> (B, 1)
    scalars = reward_model(tokens, attention_mask, columns == last)
    return scalars.gather(1, last)[:, 0]


# ---------------------------------------------------------------------------------------------
# Log-probabilities without the logits of all tokens at once
#
# With a vocabulary of 100,000 the logits of 4,000 tokens are 1.6 GB, and a plain log-softmax holds
# three such tensors by the time of the backward. Here they are made and read some rows at a time,
# and made again for the backward, unless they all fit into one chunk.

# Numbers in the logits of one chunk: 128 MB in float32. Each chunk adds to the gradient of the
# whole head, so with small ones that would take longer than the products (4 times at 2 MB).
CHUNK = 2 ** 25


def log_distributions(logits: Tensor, temperature: float) -> Tensor:
    """Return log softmax(logits / temperature), (M, V) float32."""
    # float32 before the softmax, always: in bfloat16 log-probabilities are off by up to 0.03
    logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    return F.log_softmax(logits, dim=-1)


def pick(distributions: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probability of each row's target, (M, V), (M,) -> (M,) [nats]."""
    return distributions.gather(1, targets[:, None])[:, 0]


def entropy_of(distributions: Tensor) -> Tensor:
    """Return the entropy of log-distributions, (M, V) -> (M,) [nats]."""
    return -(distributions.exp() * distributions).sum(-1)


def logprobs_of_logits(logits: Tensor, targets: Tensor, temperature: float
                       ) -> tuple[Tensor, Tensor]:
    """Do `read_logprobs` from logits (M, V) that are there already."""
    distributions = log_distributions(logits, temperature)
    return pick(distributions, targets), entropy_of(distributions)


class ReadLogprobs(torch.autograd.Function):
    """What `read_logprobs` does, with its gradient.

    For a token's log-probability l and entropy H, p being the probabilities of its V candidates:
    dl / dlogits = onehot(token) - p,  dH / dlogits = -p (log p + H),  both over the temperature.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor, targets: Tensor, temperature: float,
                with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        """Make the logits of some rows, read them, let them go."""
        # autocast does not reach the backward, so here both passes cast by themselves
        device = states.device.type
        is_cast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_cast else states.dtype
        states, head_cast = states.to(dtype), head.to(dtype)
        rows = max(CHUNK // len(head), 1)
        logprobs, entropies = [], []
        for part, wanted in zip(states.split(rows), targets.split(rows)):
            # (rows, D) @ (D, V) -> (rows, V)
            distributions = log_distributions(F.linear(part, head_cast), temperature)
            logprobs.append(pick(distributions, wanted))
            entropies.append(entropy_of(distributions) if with_entropy else None)
        # what fits into one chunk is kept for the backward, not made again
        kept = distributions if len(targets) <= rows else None
        ctx.save_for_backward(states, head, targets, kept)
        ctx.dtype, ctx.rows, ctx.temperature = dtype, rows, temperature
        ctx.set_materialize_grads(False)  # None for an entropy that nobody uses
        return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None

    @staticmethod
    def backward(ctx: Any, by_logprob: Tensor | None, by_entropy: Tensor | None) -> tuple:
        """Make the logits of some rows again, and of their gradient those of states and head."""
        states, head, targets, kept = ctx.saved_tensors
        if by_logprob is None:
            by_logprob = torch.zeros_like(by_entropy)
        head_cast = head.to(ctx.dtype)
        # float32, because it is a sum over chunks
        head_gradient = torch.zeros_like(head, dtype=torch.float32)
        states_gradient = torch.empty_like(states)
        for start in range(0, len(targets), ctx.rows):
            part = slice(start, start + ctx.rows)
            distributions = kept
            if kept is None:
                logits = F.linear(states[part], head_cast)
                distributions = log_distributions(logits, ctx.temperature)
            # in place where it can be: every (rows, V) tensor is a pass through memory
            gradient = distributions.exp()  # p, to begin with
            by_entropies = 0
            if by_entropy is not None:
                entropies = entropy_of(distributions)[:, None]
                by_entropies = gradient * (distributions + entropies) * by_entropy[part, None]
            weights = by_logprob[part, None]
            gradient.mul_(-weights).scatter_add_(1, targets[part, None], weights)
            gradient -= by_entropies
            if ctx.temperature != 1:
                gradient /= ctx.temperature
            gradient = gradient.to(ctx.dtype)
            states_gradient[part] = gradient @ head_cast  # (rows, V) @ (V, D) -> (rows, D)
            head_gradient += gradient.T @ states[part]    # (V, rows) @ (rows, D) -> (V, D)
        return states_gradient, head_gradient.to(head.dtype), None, None, None


def read_logprobs(states: Tensor, head: Tensor, targets: Tensor, temperature: float,
                  with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Return the log-probability of each target, and the entropy it was drawn with.

    states: (M, D).   head: (V, D).   targets: (M,) int64.
    Returns: (M,) float32 [nats]; (M,) float32 [nats], or None if not asked for.
    """
    return ReadLogprobs.apply(states, head, targets, temperature, with_entropy)
