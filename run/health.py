"""When numbers go wrong: what stops a run, and what it warns of, each with what to try."""
from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence

import torch
from torch import nn

import parallel
from formats.files import write_jsonl
from parallel import Machine
from run.folder import Run
from run.models import pays_by_function


# ---------------------------------------------------------------------------------------------
# What is not finite stops the run before the optimizer step that would spread it

class NotFinite(ValueError):
    """A step that must not be taken.   rows: ids of this rank's samples that make it so."""

    def __init__(self, why: str, where: str, step: int, rows: Sequence[Sequence[int]] = ()) -> None:
        super().__init__(f"stopped before optimizer step {step}, as its {where} is not finite: "
                         f"{why}")
        self.step = step
        self.rows = rows


def not_finite(model: nn.Module, optimizer: torch.optim.Optimizer, terms: Sequence[Any],
               machine: Machine, where: str) -> NotFinite:
    """Find out why a step's gradient is not finite; all ranks call it, and all say the same.

    terms: of the step's loss, train.Term.   where: the name of the gradient's norm.
    """
    step = 1 + max((int(state["step"]) for state in optimizer.state.values()), default=0)
    optimizer.zero_grad()
    # 1  the weights, which were so before: then no sample and no rate of this step is to blame
    broken = sum(not parallel.local_part(p).isfinite().all() for p in model.parameters())
    if total(broken, machine):
        remedy = ("the step before it spoilt them; lower the learning rate" if step > 1 else
                  "the model it starts from is damaged or has diverged; start from another")
        return NotFinite(f"the weights were not so before it: {remedy}", where, step)
    # 2  the loss of some samples
    rows: list[Sequence[int]] = []
    samples = 0
    with torch.no_grad(), machine.autocast():
        for term in terms:
            for batch in term.batches:
                is_bad = not term.loss(model, batch)[0].isfinite()
                found, size = bad_rows(model, batch)
                rows += found if is_bad else []
                samples += size
    bad = total(len(rows), machine)
    if bad:
        return NotFinite(f"the weights are, but not the loss of {bad} of "
                         f"{total(samples, machine)} samples; look for what is odd about these, "
                         "and with bfloat16 try --dtype=float32", where, step, rows)
    # 3  neither: backwards through finite numbers overflowed
    return NotFinite("weights and losses are, but going backwards through them overflows; lower "
                     "the learning rate", where, step)


def total(count: int, machine: Machine) -> int:
    """Sum a count over all ranks."""
    return int(parallel.all_sum(torch.tensor(float(count), device=machine.device)).item())


def bad_rows(model: nn.Module, batch: Any) -> tuple[list[list[int]], int]:
    """Return the ids of the samples of a micro-batch that the model answers with NaN or infinity.

    All of them if it answers none so: then what they are held against is not finite. Also how many
    samples there are.
    """
    tokens = getattr(batch, "tokens", torch.zeros(1, 0, dtype=torch.int64))
    if not tokens.numel():
        return [[]], 1
    mask = batch.attention_mask
    is_bad = ~model(tokens, mask).isfinite().flatten(1).all(1)
    if not is_bad.any():
        is_bad = torch.ones_like(is_bad)
    return [tokens[row][mask[row]].tolist() for row in is_bad.nonzero()[:, 0]], len(tokens)


@contextmanager
def told(run: Run, stage: str) -> Iterator[None]:
    """Say of a step that must not be taken where it is, and write its samples down."""
    try:
        yield
    except NotFinite as error:
        found = [{"stage": stage, "step": error.step, "rank": rank,
                  "text": run.tokenizer.decode(list(ids))}
                 for rank, rows in enumerate(parallel.gather_objects(error.rows)) for ids in rows]
        where = ""
        if found:
            path = run.out / "not_finite.jsonl"
            if run.machine.is_main:
                write_jsonl(path, found)
            ranks = ", ".join(str(rank) for rank in sorted({row["rank"] for row in found}))
            where = f"; they are in {path}, of rank {ranks}"
        raise ValueError(f"{stage}: {error}{where}") from None


# ---------------------------------------------------------------------------------------------
# What is finite and yet no good sign

class Sign(NamedTuple):
    """A statistic that tells of trouble."""
    name: str
    is_bad: Callable[[float, float], bool]  # of its value, and of the stage's first
    text: str                               # what it means and what to try; {0:.3g} is the value


# The default run stays far from all of these (at most 3 nats, 0 % cut off, 0.12 nats of entropy,
# a score of 1.2), and without any KL penalty it comes to 30 nats.
SIGNS = (
    Sign("loss", lambda x, first: x > 2 * first + 0.5,
         "the loss is {0:.3g}, more than twice what it began with: the learning rate is too high"),
    Sign("kl", lambda x, first: x > 50,
         "{0:.3g} nats of KL per response: the policy is far from where the reward model is right; "
         "raise --ppo.kl_coef or lower --ppo.lr"),
    Sign("first_ratio_max", lambda x, first: x > 1.5,
         "a ratio of {0:.3g} before anything was learnt from the rollout, where it should be 1: "
         "old and new log-probabilities are computed differently; try --dtype=float32"),
    Sign("entropy", lambda x, first: x < 0.01,
         "an entropy of {0:.2g} nats per token: all samples are alike, so nothing is left to "
         "compare; raise --ppo.kl_coef or --ppo.entropy_coef, or lower --ppo.lr"),
    Sign("cut_off", lambda x, first: x > 0.5,
         "a share of {0:.2g} of the responses reaches the limit without an end: raise "
         "--data.max_response_tokens or --ppo.eos_penalty, or train SFT longer"),
    Sign("score_mean", lambda x, first: abs(x) > 5,
         "a mean score of {0:.3g} deviations from the SFT model's: the reward model was never "
         "shown such answers; read samples.jsonl, raise --ppo.kl_coef"),
)


class Watch:
    """Looks at the numbers of a stage, and says once each what is no good sign."""

    def __init__(self, run: Run, stage: str) -> None:
        self.run = run
        self.stage = stage
        self.first: dict[str, float] = {}
        self.said: set[str] = set()

    def look(self, step: int, stats: Mapping[str, float]) -> None:
        for name, is_bad, text in SIGNS:
            if name not in stats or name in self.said or name == "score_mean" and self.is_raw:
                continue
            if is_bad(stats[name], self.first.setdefault(name, stats[name])):
                self.said.add(name)
                self.run.say(f"{self.stage}, step {step}: {text.format(stats[name])}")

    @property
    def is_raw(self) -> bool:
        """Whether scores have no scale to be held against."""
        return self.run.config.ppo.score_scale != "calibrated" or pays_by_function(self.run)
