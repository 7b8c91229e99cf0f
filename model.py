"""A LLaMA and what is asked of it: logits, log-probabilities, values, scores, samples.

Dimensions: B sequences, T padded tokens, N real tokens of all B rows laid end to end, M of them
scored, D model, V vocabulary; R rows that are still being generated. The layers are in llama/.
Modules carry Hugging Face's names, so a `state_dict()` *is* a Hugging Face checkpoint.
"""
from __future__ import annotations

import hashlib
import math
import operator
from typing import Callable, Iterator, NamedTuple, Sequence

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# all the names of the architecture are known by this module's name, used here or not
from llama.blocks import Block, Cache, Grid, ModelConfig, RMSNorm, Rope, rope_table, rotate

Mask = Tensor | None                       # (B, T) bool; what None means, each docstring says
Stop = Callable[[list[int]], bool] | None  # is an answer over with these tokens?


def derive(seed: int, *what: str | int) -> int:
    """Return the seed, in [0, 2**63), of one stream of noise: of what, under the run's seed."""
    # A hash, because arithmetic collides: by seed * 1000 + row, row 1000 of seed 0 would get the
    # noise of row 0 of seed 1. Of plain numbers, so that numpy's 3 is 3, and 3.0 a TypeError.
    key = [part if isinstance(part, str) else operator.index(part) for part in (seed, *what)]
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


# ---------------------------------------------------------------------------------------------
# The models
#
# The grid is what callers see, packing is what runs. The real tokens are pulled out of the
# caller's (B, T) grid into one stream of N, so that no linear layer ever touches padding. Only
# attention sees a grid again, a compact one: every row moved to the left edge. There a column is
# a position, and plain causal attention is right whether the caller padded left, right or both,
# since padding only stands after the tokens that might look at it.
#
# So there are two index spaces, both (N,) int64 and flat, row * T + column:
#
#     places: where the tokens stand in the caller's grid
#     slots:  where they stand in the compact grid
#
#     caller's grid    compact grid      packed   a b c d e
#         . . a b          a b . .       places   2 3 4 5 6
#         c d e .          c d e .       slots    0 1 4 5 6

class Trunk(nn.Module):
    """Embedding, blocks and final norm: all that language model and scalar model share."""
    recompute = False  # activation checkpointing: backward computes the inside of a block again

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, tokens: Tensor, attention_mask: Mask) -> tuple[Tensor, Tensor | None]:
        """Return the hidden states (N, D) of the real tokens, and their places; None: all."""
        batch, time = tokens.shape
        places = slots = None
        flat = tokens.flatten()  # (B, T) -> (B * T,)
        if attention_mask is not None:
            places = attention_mask.flatten().nonzero()[:, 0]
            flat = flat[places]  # (B * T,) -> (N,)
            # a token's position is how many real tokens of its row stand before it
            positions = (attention_mask.cumsum(1) - 1).flatten()[places]
            slots = places // time * time + positions
        rope = rope_table(torch.arange(time, device=tokens.device), self.config)
        return self.run(flat, rope, Grid(batch, time, slots)), places

    def run(self, flat: Tensor, rope: Rope, grid: Grid,
            caches: Sequence[Cache] | None = None) -> Tensor:
        """Map packed tokens (N,) to hidden states (N, D), through the caches when there are any."""
        x = self.embed_tokens(flat)
        recompute = self.recompute and torch.is_grad_enabled()
        for i, layer in enumerate(self.layers):
            cache = caches[i] if caches else None
            if recompute:
                x = checkpoint(layer, x, rope, grid, cache, use_reentrant=False)
            else:
                x = layer(x, rope, grid, cache)
        return self.norm(x)


def unpack(x: Tensor, shape: torch.Size, places: Tensor | None) -> Tensor:
    """Lay outputs, (N, C), out on the caller's grid, (B, T, C), zero where there is no token."""
    if places is None:
        places = torch.arange(shape.numel(), device=x.device)
    row = places // shape[1]
    column = places % shape[1]
    # written into a fresh grid of the full shape: FSDP wants no view from a forward
    return x.new_zeros(*shape, x.size(-1)).index_put((row, column), x)


class Transformer(nn.Module):
    """A LLaMA language model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, attention_mask: Mask = None, where: Mask = None) -> Tensor:
        """Compute next-token logits.

        tokens: (B, T) int64; what stands in padded places does not matter.
        attention_mask: (B, T) bool, True = real token, contiguous in its row; None: all real.
        where: (B, T) bool, a subset of the real tokens: only their logits are computed.
        Returns: (B, T, V) logits, zero where padded; with `where` (M, V), in reading order.
        """
        hidden, places = self.model(tokens, attention_mask)
        if where is None:
            return unpack(self.lm_head(hidden), tokens.shape, places)
        # logits of all tokens would be the largest tensor of the program: a loss names its own
        wanted = where.flatten() if places is None else where.flatten()[places]  # (N,) bool
        return self.lm_head(hidden[wanted.nonzero()[:, 0]])  # (N, D) -> (M, D) -> (M, V)


class ScalarModel(nn.Module):
    """A LLaMA that reads one number off every position: reward model and critic."""
    offset: float = 0.0  # added to every real token's scalar; no parameter, so in no file

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.score = nn.Linear(config.dim, 1, bias=False)

    def forward(self, tokens: Tensor, attention_mask: Mask = None) -> Tensor:
        """Return (B, T) float32: the scalar after reading token t, zero where padded."""
        hidden, places = self.model(tokens, attention_mask)
        # outside autocast: bfloat16 would round scores and values to 8 bits
        with torch.autocast(tokens.device.type, enabled=False):
            scalars = F.linear(hidden.float(), self.score.weight.float()) + self.offset  # (N, 1)
        # (N, 1) -> (B, T, 1) -> (B, T), which is a view: hence the clone
        return unpack(scalars, tokens.shape, places)[:, :, 0].clone()


def random_weights(model: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Draw every weight of a model, which may be on the meta device; yield (name, float32)."""
    for name, parameter in model.named_parameters():
        yield name, random_weight(name, parameter.shape, model.config, seed)


def random_weight(name: str, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """Draw one weight, float32, scaled so that activations start with unit size at any width.

    Norms are 1. Matrices are N(0, 1/fan_in), those that write into the residual stream smaller by
    sqrt(2 L) (GPT-2). The scalar head is N(0, 1/(D + 1)) (Stiennon et al. 2020).
    """
    if len(shape) == 1:
        return torch.ones(shape)
    variance = 1 / (shape[1] + 1) if name == "score.weight" else 1 / shape[1]
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        variance /= 2 * config.n_layers
    # a stream for every name: what one tensor gets does not depend on the others, and a fresh
    # head is no copy of the first row of the embedding
    generator = torch.Generator().manual_seed(derive(seed, name))
    return torch.randn(*shape, generator=generator) * math.sqrt(variance)


def init_weights(model: nn.Module, seed: int) -> None:
    """Fill a model in place with `random_weights`."""
    # tied embeddings are one parameter with two names in a state_dict: the second is missing
    weights = dict(random_weights(model, seed))
    model.load_state_dict(weights, strict=not model.config.tie_embeddings)


# ---------------------------------------------------------------------------------------------
# The one shift: what a model says at t - 1 speaks of token t
#
# A model that has read tokens 0 .. t - 1 says at t - 1 what comes next. The algorithm, though,
# keeps everything about token t in column t: its log-probability, and the value of the state in
# which it was chosen. These functions cross from one way of counting to the other, and nothing
# outside of them shifts anything.

def check_predecessors(response_mask: Tensor) -> None:
    """Raise ValueError if the first token of a row, which nothing predicts, is to be scored."""
    if response_mask[:, 0].any():
        raise ValueError("the first token of a row has no predecessor, so nothing predicts it")


def response_distributions(model: nn.Module | Tensor, tokens: Tensor, attention_mask: Mask,
                           response_mask: Mask, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the log-distributions, (M, V), of M tokens, and the (B, T) mask of these."""
    if response_mask is None:
        # all real tokens but the first of each row, which is the first that the mask counts
        everything = torch.ones_like(tokens, dtype=torch.bool)
        real = everything if attention_mask is None else attention_mask
        response_mask = real & (real.cumsum(1) > 1)
    check_predecessors(response_mask)
    where = response_mask.roll(-1, dims=1)  # from the tokens to the positions that predict them
    logits = model[where] if isinstance(model, Tensor) else model(tokens, attention_mask, where)
    # float32 before the softmax, always: in bfloat16 log-probabilities are off by up to 0.03
    return F.log_softmax(logits.float() / temperature, dim=-1), response_mask


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
    distributions, scored = response_distributions(model, tokens, attention_mask, response_mask,
                                                   temperature)
    chosen = distributions.gather(1, tokens[scored][:, None])  # (M, V) -> (M, 1)
    return lay_out(chosen[:, 0], scored)


def token_logprobs_and_entropy(model: nn.Module | Tensor, tokens: Tensor,
                               attention_mask: Mask = None, response_mask: Mask = None,
                               temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Do `token_logprobs`, and return alike the entropy each token was drawn with [nats]."""
    distributions, scored = response_distributions(model, tokens, attention_mask, response_mask,
                                                   temperature)
    chosen = distributions.gather(1, tokens[scored][:, None])  # (M, V) -> (M, 1)
    entropy = -(distributions.exp() * distributions).sum(-1)   # (M, V) -> (M,)
    return lay_out(chosen[:, 0], scored), lay_out(entropy, scored)


def token_values(critic: nn.Module, tokens: Tensor, attention_mask: Mask,
                 response_mask: Tensor) -> Tensor:
    """Return (B, T) float32: the value of the state before token t, zero outside the response."""
    check_predecessors(response_mask)
    # the critic's word after token t - 1, moved from column t - 1 to t; what the roll carries
    # around from the last column to the first is no value of anything, and masked
    return critic(tokens, attention_mask).roll(1, dims=1).where(response_mask, 0.0)


def last_scores(reward_model: nn.Module, tokens: Tensor, attention_mask: Tensor) -> Tensor:
    """Return (B,) float32: the scalar at each row's last real token, wherever the padding is."""
    # no shift here: the score is of all that was read, the last token included
    scalars = reward_model(tokens, attention_mask)
    columns = torch.arange(tokens.size(1), device=tokens.device)
    last = columns.where(attention_mask, -1).amax(1, keepdim=True)  # (B, T) -> (B, 1)
    return scalars.gather(1, last)[:, 0]


# ---------------------------------------------------------------------------------------------
# Sampling
#
# A token is drawn by inverting the cumulative distribution at a number from [0, 1), and there is
# one such number for every (row, position), fixed by the seed. So neither the batch that a prompt
# is generated in, nor the number of processes, nor rows that end early change what is drawn.

class Generation(NamedTuple):
    """New tokens of every prompt, its EOS included, and their log-probabilities.

    These are under softmax(logits / temperature), whatever top-k and top-p left out.
    """
    tokens: list[list[int]]
    logprobs: list[list[float]]


class Step(NamedTuple):
    """One new token for each of the R prompts that had not ended before."""
    rows: Tensor      # (R,) int64, which prompts
    tokens: Tensor    # (R,) int64
    logprobs: Tensor  # (R,) float32


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set to -inf all but the top_k largest, then all outside the smallest set with mass >= top_p.

    logits: (B, V), as the result.   top_k: 0 keeps all; what ties with the last one stays.
    """
    # in this order, as everywhere: top_p is a share of what top_k has left
    if 0 < top_k < logits.size(-1):
        smallest = logits.topk(top_k).values[:, -1:]  # (B, k) -> (B, 1)
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        # a token stays while those before it do not reach top_p: so the first one always does
        outside = probabilities.cumsum(-1) - probabilities >= top_p
        # argsort inverts the order: from sorted columns back to those of the vocabulary
        logits = logits.masked_fill(outside.gather(1, order.argsort(-1)), -torch.inf)
    return logits


def choose(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int,
           top_p: float) -> tuple[Tensor, Tensor]:
    """Pick one token per row by inverting the cumulative distribution at uniforms (B,) in [0, 1).

    logits: (B, V).   Returns: (B,) int64; (B,) float32 log-probabilities before top-k and top-p.
    """
    # in float32, and at the temperature at which PPO scores the same tokens later
    logits = logits.float() / (temperature or 1.0)
    if temperature == 0.0:
        tokens = logits.argmax(-1)
    else:
        cdf = filter_logits(logits, top_k, top_p).softmax(-1).cumsum(-1)
        # the smallest token whose cumulated probability exceeds the uniform; scaled by the total,
        # else rounding in the sum could select past the last possible token
        thresholds = uniforms[:, None] * cdf[:, -1:]  # (B, 1)
        tokens = torch.searchsorted(cdf, thresholds, right=True)[:, 0]
        tokens = tokens.clamp(max=logits.size(-1) - 1)
    logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])  # (B, V) -> (B, 1)
    return tokens, logprobs[:, 0]


def row_uniforms(seed: int, rows: Sequence[int], length: int) -> Tensor:
    """Return (B, length) float32 noise in [0, 1), row i a function of (seed, rows[i]) alone."""
    # Philox takes all 63 bits as its key. torch's generator on the CPU looks at 32 bits of a seed,
    # so among 100,000 rows two would probably get the same noise.
    streams = [numpy.random.Philox(key=derive(seed, row)) for row in rows]
    noise = [numpy.random.Generator(stream).random(length, numpy.float32) for stream in streams]
    return torch.from_numpy(numpy.stack(noise))


def check_lengths(model: Transformer, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Raise ValueError for an empty prompt, or one that outgrows the model's context."""
    longest = max(len(prompt) for prompt in prompts)
    if not all(prompts):
        raise ValueError("a prompt is empty: it needs at least the BOS token")
    if longest + max_new_tokens > model.config.max_seq_len:
        raise ValueError(f"the longest prompt has {longest} tokens and {max_new_tokens} new ones "
                         f"are asked for, but the context is {model.config.max_seq_len}")


@torch.no_grad()
def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int,
             temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
             eos_id: int | None = None, seed: int = 0, rows: Sequence[int] | None = None,
             batch_size: int = 1024, stop: Stop = None) -> Generation:
    """Continue every prompt until its EOS or max_new_tokens.

    temperature: 0.0 is greedy.   eos_id: None never stops.
    rows: global index of each prompt (default 0..B-1): the noise of a row depends on (seed, its
        index), so neither batch nor rank count changes a sample.
    batch_size: prompts generated at once, which bounds the cache's memory.
    stop: called with a row's new tokens after each one; True ends the row as EOS does.
    Raises ValueError for an empty prompt, or one that with max_new_tokens exceeds the context.
    """
    generation = Generation([[] for _ in prompts], [[] for _ in prompts])
    if prompts:
        check_lengths(model, prompts, max_new_tokens)
    rows = range(len(prompts)) if rows is None else rows
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        noise = row_uniforms(seed, rows[batch], max_new_tokens)
        steps = generation_steps(model, prompts[batch], max_new_tokens, temperature, top_k, top_p,
                                 eos_id, noise, stop)
        # a list, so that all steps run first: to read numbers is to wait for the device
        for step in list(steps):
            for row, token, logprob in zip(*(column.tolist() for column in step)):
                generation.tokens[start + row].append(token)
                generation.logprobs[start + row].append(logprob)
    return generation


@torch.no_grad()
def stream(model: Transformer, prompt: list[int], max_new_tokens: int, temperature: float = 1.0,
           eos_id: int | None = None, seed: int = 0, row: int = 0) -> Iterator[int]:
    """Yield one by one the tokens that `generate` returns for this prompt and row."""
    check_lengths(model, [prompt], max_new_tokens)
    noise = row_uniforms(seed, [row], max_new_tokens)
    for step in generation_steps(model, [prompt], max_new_tokens, temperature, 0, 1.0, eos_id,
                                 noise):
        yield step.tokens.item()


def generation_steps(model: Transformer, prompts: list[list[int]], max_new_tokens: int,
                     temperature: float, top_k: int, top_p: float, eos_id: int | None,
                     noise: Tensor, stop: Stop = None) -> Iterator[Step]:
    """Yield token after token of all prompts; noise: (B, max_new_tokens) float32 in [0, 1)."""
    device = model.lm_head.weight.device
    noise = noise.to(device)
    lengths = [len(prompt) for prompt in prompts]
    logits, caches = prefill(model, prompts, lengths, max(lengths) + max_new_tokens)
    # The batch holds some of the prompts, and some of its rows may have ended. To drop these
    # copies the cache, so it waits until it pays; then the tail of long answers is cheap.
    rows = torch.arange(len(prompts), device=device)  # which prompts the batch holds
    active = rows                                     # which rows of the batch go on
    positions = torch.tensor(lengths, device=device)  # where the next token of a row stands
    written = torch.zeros_like(noise, dtype=torch.int64)  # the answers so far, for `stop`
    for n in range(max_new_tokens):
        # 1. a token for every row of the batch, by the noise of its prompt
        tokens, logprobs = choose(logits, noise[rows, n], temperature, top_k, top_p)
        yield Step(rows[active], tokens[active], logprobs[active])
        if n + 1 == max_new_tokens:
            return

        # 2. rows that end with it are active no longer, and leave the batch now or later
        if eos_id is not None:
            active = active[tokens[active] != eos_id]
        if stop:
            written[rows, n] = tokens
            answers = written[rows[active], :n + 1].tolist()
            going_on = [not stop(answer) for answer in answers]
            active = active[torch.tensor(going_on, dtype=torch.bool, device=device)]
        if len(active) == 0:
            return
        if len(active) <= 0.85 * len(rows):
            rows = rows[active]
            tokens = tokens[active]
            positions = positions[active]
            for cache in caches:
                cache.keep(active)
            active = torch.arange(len(rows), device=device)

        # 3. the model reads it, the tokens before it stand in the cache
        rope = rope_table(positions[:, None], model.config)  # (B,) -> (B, T = 1): each row its own
        grid = Grid(len(tokens), 1, None, None, positions)
        logits = model.lm_head(model.model.run(tokens, rope, grid, caches))
        positions = positions + 1


def prefill(model: Transformer, prompts: list[list[int]], lengths: list[int],
            slots: int) -> tuple[Tensor, list[Cache]]:
    """Read the prompts; return the logits after each one's last token, (B, V), and the caches."""
    # the prompts are packed already, and their compact grid is written down from their lengths
    device = model.lm_head.weight.device
    time = max(lengths)
    stands = [row * time + t for row, length in enumerate(lengths) for t in range(length)]
    grid = Grid(len(prompts), time, torch.tensor(stands, device=device))
    flat = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    caches = [Cache(slots) for _ in model.model.layers]
    rope = rope_table(torch.arange(time, device=device), model.config)
    hidden = model.model.run(flat, rope, grid, caches)
    # each prompt's last token, by its index in the stream of N
    ends = torch.tensor(lengths, device=device).cumsum(0) - 1
    return model.lm_head(hidden[ends]), caches  # (N, D) -> (B, D) -> (B, V)
