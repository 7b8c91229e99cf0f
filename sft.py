"""ICE-Instruct: supervised fine-tuning on blended in-domain and general instructions.

    loss = - sum over response tokens of log pi(token | everything before it)

Only what the assistant says is trained on, its EOS included: without the EOS the policy never
learns to stop, and prompt tokens are the user's to write. The paper states no loss; this is
InstructGPT's.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from model import token_logprobs


@dataclass(frozen=True)
class SFTConfig:
    data: tuple[str, ...] = ()          # instruction files; none: the embedded world's
    examples: int = 40_000              # demonstrations drawn from the embedded world
    in_domain_share: float = 0.6        # of them about the domain, the rest over 12 general tasks
    epochs: float = 4.0                 # passes over the data
    batch_size: int = 128               # sequences per optimizer step, all ranks together
    microbatch_size: int = 128          # sequences per forward, per rank
    microbatch_tokens: int = 0          # real tokens per forward, at most; 0: rows count alone
    lr: float = 3e-3                    # peak learning rate; 0: nothing is learnt
    lr_end: float = 0.05                # last learning rate, as a share of the peak (linear decay)
    warmup: float = 0.03                # share of the steps over which the learning rate rises
    weight_decay: float = 0.1           # AdamW's, on matrices
    max_grad_norm: float = 1.0          # the gradient's global norm is clipped to it; 1e9: never


@dataclass(frozen=True)
class TopConfig:
    """SFT continued on the top-ranked answers; all that is not here is as in SFTConfig."""
    epochs: float = 2.0                 # passes over them
    lr: float = 3e-4                    # peak learning rate; 0: nothing is learnt


class Batch(NamedTuple):
    """B dialogues of T padded tokens, all (B, T).

    tokens: int64.   attention_mask: bool, True = real.   response_mask: bool, True = trained on.
    """
    tokens: Tensor
    attention_mask: Tensor
    response_mask: Tensor

    @property
    def count(self) -> Tensor:
        """Terms in the loss's sum: response tokens."""
        return self.response_mask.sum()


def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Return the negative log-likelihood of the response tokens, summed [nats], and stats.

    A sum, not a mean: the optimizer step divides it by the count of all its micro-batches and
    ranks, so that how a batch is cut up changes nothing. Stats are (sum, count).
    """
    # logprobs[:, t] speaks of token t and is 0 where response_mask is False: (B, T) -> ()
    logprobs = token_logprobs(model, batch.tokens, batch.attention_mask, batch.response_mask)
    total = -logprobs.sum()
    return total, {"loss": (total.detach(), batch.count)}
