"""What must not matter does not: padding and what stands in it, the order of episodes, how a batch is cut up, which
token is called pad, the precision. Every test compares two runs of the same iteration of PPO.
"""

import copy
from dataclasses import replace
from functools import partial
from typing import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import parallel
import ppo
from model import generate, token_logprobs
from episodes import Four
from episodes import collect as collect_episodes
from ppo import PPOConfig, Rollout
from test_oracle import noisy
from train import Term, update

EOS, KL_COEF = 12, 0.3
CONFIG = PPOConfig(batch_size=12, minibatch_size=12, microbatch_size=5, epochs=2)
PROMPTS = [[1, 5], [1, 6, 7, 8], [1, 9], [1, 3, 3], [1, 11], [1, 12, 13]] * 2
MACHINE = parallel.Machine(rank=0, world=1, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def models(actor, critic) -> Four:
    return Four(actor, critic, noisy(actor, 1, 0.02), noisy(critic, 2, 0.05))


def collect(models: Four, config: PPOConfig = CONFIG, eos_id: int = EOS) -> Rollout:
    return collect_episodes(models, PROMPTS, list(range(12)), config, 8, eos_id, (0.4, 0.5), seed=5)


def iterate(
    models: Four,
    config: PPOConfig = CONFIG,
    change: Callable[[Rollout], Rollout] = ppo.identity,
    lr: float = 5e-4,
    rollout: Rollout | None = None,
) -> tuple[Rollout, dict, list[dict], list[Tensor]]:
    """Run a PPO iteration on copies of the models; `change` acts on the rollout before credit is assigned."""
    actor, critic = copy.deepcopy(models.actor), copy.deepcopy(models.critic)
    rollout, stats = ppo.assign_credit(change(rollout or collect(models, config)), config, KL_COEF)
    losses = (
        partial(ppo.actor_loss, config=config, kl_coef=KL_COEF),
        partial(ppo.critic_loss, config=config),
    )
    optimizers = [parallel.adamw(model, 0.0) for model in (actor, critic)]
    updates = [
        lambda batches, step, i=i: update(
            (actor, critic)[i],
            optimizers[i],
            [Term(losses[i], batches)],
            lr,
            1.0,
            MACHINE,
            f"norm{i}",
        )
        for i in (0, 1)
    ]
    steps = ppo.learn(rollout, config, updates, seed=0, share=MACHINE.microbatches)
    return (
        rollout,
        stats,
        steps,
        [p.detach() for model in (actor, critic) for p in model.parameters()],
    )


def assert_same(a: tuple, b: tuple) -> None:
    """Compare statistics and final weights; not the grids, which may be laid out differently."""
    assert a[1] == pytest.approx(b[1], abs=1e-5, rel=1e-5)
    for x, y in zip(a[2], b[2]):
        assert x == pytest.approx(y, abs=1e-5, rel=1e-5)
    for x, y in zip(a[3], b[3]):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=0)


def widen(left: int, right: int, rollout: Rollout) -> Rollout:
    """Pad every grid with garbage: token 7, and numbers that would show."""

    def grid(x: Tensor) -> Tensor:
        if x.dim() == 1:
            return x
        return F.pad(
            x,
            (left, right),
            value=False if x.dtype == torch.bool else 7 if x.dtype == torch.int64 else 1e3,
        )

    return rollout.map(grid)


@pytest.mark.line(6)
@pytest.mark.parametrize("left,right", [(0, 4), (3, 0), (2, 5)])
def test_padding(models, left, right):
    plain, padded = iterate(models), iterate(models, change=partial(widen, left, right))
    assert_same(plain, padded)
    inner = slice(left, left + plain[0].tokens.size(1))
    for name in ("rewards", "advantages", "returns"):
        torch.testing.assert_close(
            getattr(padded[0], name)[:, inner], getattr(plain[0], name), atol=1e-6, rtol=0
        )


@pytest.mark.line(6, 16)
@pytest.mark.parametrize(
    "switches", [{}, {"kl_in": "loss", "kl_kind": "k2", "loss_average": "sequences"}], ids=str
)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_what_stands_in_the_padding(models, poison, switches):
    """NaN and infinities outside the response reach no loss, no gradient and no statistic."""

    def change(rollout: Rollout) -> Rollout:
        poisoned = {
            name: getattr(rollout, name).masked_fill(~rollout.response_mask, poison)
            for name in ("logprobs", "ref_logprobs", "values", "sampler_logprobs")
        }
        return replace(
            rollout, tokens=rollout.tokens.masked_fill(~rollout.attention_mask, 60), **poisoned
        )

    config = replace(CONFIG, **switches)
    assert_same(iterate(models, config), iterate(models, config, change))


@pytest.mark.line(6)
def test_order_of_episodes(models):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert_same(iterate(models), iterate(models, change=lambda rollout: rollout.rows(order)))


@pytest.mark.line(6, 17)
@pytest.mark.parametrize(
    "switches",
    [{}, {"loss_average": "sequences"}, {"kl_in": "loss", "kl_kind": "k2", "entropy_coef": 0.1}],
    ids=str,
)
def test_microbatches(models, switches):
    config = replace(CONFIG, microbatch_size=12, **switches)
    whole = iterate(models, config)
    for size in (1, 2, 4):
        assert_same(whole, iterate(models, replace(config, microbatch_size=size)))
    held = []  # rows and tokens of every forward
    for model in models:
        model.register_forward_pre_hook(lambda model, args: held.append((len(args[0]), args[1].sum())))
    for size, tokens in ((12, 1), (12, 20), (3, 40), (12, 70)):
        held.clear()
        limited = replace(config, microbatch_size=size, microbatch_tokens=tokens)
        assert_same(whole, iterate(models, limited, rollout=collect(models, limited)))
        assert all(rows == 1 or rows <= size and n <= tokens for rows, n in held) and len(held) > 12


@pytest.mark.line(6)
def test_one_episode_at_a_time(models):
    """Every number of the rollout, the sampled tokens included, is that of the episode alone."""
    together = collect(models)
    for i, prompt in enumerate(PROMPTS):
        alone = collect_episodes(models, [prompt], [i], CONFIG, 8, EOS, (0.4, 0.5), seed=5)
        width = alone.tokens.size(1)
        for name, x in vars(alone).items():
            if x is not None:
                y = getattr(together, name)[i : i + 1]
                torch.testing.assert_close(
                    x, y[:, :width] if y.dim() == 2 else y, atol=1e-5, rtol=0
                )


@pytest.mark.line(2, 6)
def test_pad_id_equal_to_eos_id(models):
    """Padded slots hold token 0. With 0 as EOS too, every response still has the length it was generated with."""
    with torch.no_grad():
        models.actor.lm_head.weight[0] = models.actor.lm_head.weight[
            EOS
        ]  # so that 0 is drawn now and then
    rollout = collect(models, eos_id=0)
    responses = generate(models.actor, PROMPTS, 8, eos_id=0, seed=5, rows=range(12)).tokens
    assert rollout.response_mask.sum(1).tolist() == [len(r) for r in responses]
    assert (
        rollout.cut_off.tolist() == [r[-1] != 0 for r in responses]
        and 0 < rollout.cut_off.sum() < 12
    )
    assert_same(
        iterate(models, rollout=rollout),
        iterate(
            models,
            rollout=replace(rollout, tokens=rollout.tokens.masked_fill(~rollout.attention_mask, 9)),
        ),
    )


@pytest.mark.line(13)
def test_learning_rate_zero_changes_nothing(models):
    _, _, steps, weights = iterate(models, replace(CONFIG, minibatch_size=4), lr=0.0)
    assert all(
        torch.equal(x, y)
        for x, y in zip(weights, (p for model in models[:2] for p in model.parameters()))
    )
    for step in steps:
        assert (
            step["ratio_max"] == pytest.approx(1, abs=1e-6)
            and step["clip_fraction"] == 0
            and step["approx_kl"] == pytest.approx(0, abs=1e-9)
        )


@pytest.mark.line(13)
def test_only_actor_and_critic_learn(models):
    before = [p.detach().clone() for model in models[2:] for p in model.parameters()]
    iterate(models)
    assert all(
        torch.equal(x, y) and y.grad is None
        for x, y in zip(before, (p for model in models[2:] for p in model.parameters()))
    )


@pytest.mark.line(15)
def test_bfloat16_follows_float32(models):
    """Forwards in bfloat16 move log-probabilities by hundredths of a nat at most, and everything between them stays float32."""
    exact = collect(models)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = {
            name: read(model)
            for name, read, model in (
                (
                    "logprobs",
                    lambda m: token_logprobs(
                        m, exact.tokens, exact.attention_mask, exact.response_mask
                    ),
                    models.actor,
                ),
                (
                    "values",
                    lambda m: ppo.token_values(
                        m, exact.tokens, exact.attention_mask, exact.response_mask
                    ),
                    models.critic,
                ),
            )
        }
    assert all(x.dtype == torch.float32 for x in rounded.values())
    for name, x in rounded.items():
        error = (x - getattr(exact, name)).abs().max().item()
        assert 0 < error < 0.05, f"{name} off by {error}"
    with torch.autocast("cpu", torch.bfloat16):
        rollout, stats = ppo.assign_credit(collect(models), CONFIG, KL_COEF)
    assert all(
        getattr(rollout, name).dtype == torch.float32
        for name in ("logprobs", "values", "scores", "rewards", "advantages", "returns")
    )
    assert abs(stats["advantage_mean"]) < 10 and stats["rollout_logprob_diff"] < 0.1
