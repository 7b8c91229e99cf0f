"""PPO's mathematics against float64 per-sample loops, and its conventions."""

import copy
import math
from dataclasses import replace

import pytest
import torch

import ppo
from model import Generation, token_logprobs
from episodes import Four, collect
from ppo import (
    AdaptiveKLController,
    PPOConfig,
    Rollout,
    final_scores,
    gae,
    kl_penalty,
    masked_mean,
    policy_loss,
    shape_rewards,
    value_loss,
    whiten,
)
from reward import RunningMoments
from rollout import lay_out, merge

CONFIG = PPOConfig(batch_size=6, minibatch_size=3, microbatch_size=2, epochs=2)
EOS = 12  # one prompt holds it: only sampled ones may end an episode
PROMPTS = [[1, 5], [1, 6, 7, 8], [1, 9], [1, 3, 3], [1, 11], [1, 12, 13]]


def grid(lengths=((2, 4), (3, 1), (1, 6)), width: int = 9) -> torch.Tensor:
    """Response masks for (prompt, response) lengths."""
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for b, (prompt, response) in enumerate(lengths):
        mask[b, prompt : prompt + response] = True
    return mask


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.line(5)
def test_gae_against_the_definition():
    """A_t = sum over l of (gamma lambda)^l delta_{t+l}, in float64, one row at a time, no padding."""
    mask, gamma, lam = grid(), 0.9, 0.8
    rewards, values = (
        noise(3, 9),
        noise(3, 9, seed=1),
    )  # noise stands in the padding too, and must not matter
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for b in range(3):
        r, v = rewards[b][mask[b]].double().tolist(), values[b][mask[b]].double().tolist() + [0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        expected = [
            sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(r)))
            for t in range(len(r))
        ]
        torch.testing.assert_close(
            advantages[b][mask[b]].double(),
            torch.tensor(expected, dtype=torch.float64),
            atol=1e-6,
            rtol=0,
        )
        torch.testing.assert_close(
            returns[b][mask[b]].double(),
            torch.tensor([a + x for a, x in zip(expected, v)], dtype=torch.float64),
            atol=1e-6,
            rtol=0,
        )
    assert advantages[~mask].abs().max() == 0 and returns[~mask].abs().max() == 0


@pytest.mark.line(5)
def test_gae_by_hand():
    mask = torch.tensor([[False, True, True]])
    advantages, returns = gae(
        torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.0, 0.5, 0.25]]), mask, 1.0, 0.5
    )
    assert advantages.tolist() == [[0.0, 0.125, 0.75]]  # 1 - .25 = .75;  .25 - .5 + .5 * .75 = .125
    assert returns.tolist() == [[0.0, 0.625, 1.0]]


@pytest.mark.line(3)
def test_rewards_land_on_the_last_response_token():
    mask = grid()
    rewards = shape_rewards(torch.tensor([1.0, 2.0, 3.0]), torch.ones(3, 9), mask, kl_coef=0.1)
    assert rewards[0].tolist() == pytest.approx([0, 0, -0.1, -0.1, -0.1, 0.9, 0, 0, 0])
    assert rewards[1].tolist() == pytest.approx([0, 0, 0, 1.9, 0, 0, 0, 0, 0])
    assert rewards[2].tolist() == pytest.approx([0, -0.1, -0.1, -0.1, -0.1, -0.1, 2.9, 0, 0])


@pytest.mark.line(8)
def test_kl_estimators():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    exact = (p * (p / q).log()).sum()
    lp, lq = p.log(), q.log()
    torch.testing.assert_close((p * kl_penalty(lp, lq, "k1")).sum(), exact)
    torch.testing.assert_close(
        (p * kl_penalty(lp, lq, "k3")).sum(), exact
    )  # unbiased too: E[q/p - 1] = 0
    assert (kl_penalty(lp, lq, "k3") >= 0).all() and (kl_penalty(lp, lq, "k1") < 0).any()
    torch.testing.assert_close(kl_penalty(lp, lq, "k2"), 0.5 * (lp - lq) ** 2)
    torch.testing.assert_close(kl_penalty(lp, lq, "abs"), (lp - lq).abs())
    with pytest.raises(ValueError, match="k4"):
        kl_penalty(lp, lq, "k4")


@pytest.mark.line(8)
def test_nothing_is_clamped():
    """Log-ratios of any size go through every estimator, and a negative k1 is paid out as what it is."""
    logprobs, ref = torch.tensor([[-60.0, -1.0]]), torch.tensor([[-1.0, -60.0]])
    assert kl_penalty(logprobs, ref, "k1").tolist() == [[-59.0, 59.0]] and kl_penalty(
        logprobs, ref, "abs"
    ).tolist() == [[59.0, 59.0]]
    assert kl_penalty(logprobs, ref, "k2").tolist() == [[59.0**2 / 2] * 2]
    assert kl_penalty(logprobs, ref, "k3")[0].tolist() == pytest.approx([math.exp(59) - 60, 58.0])
    rewards = shape_rewards(
        torch.tensor([100.0]),
        kl_penalty(logprobs, ref, "k1"),
        torch.tensor([[True, True]]),
        kl_coef=2.0,
    )
    assert rewards.tolist() == [[118.0, -18.0]]


@pytest.mark.line(9)
def test_gradient_of_the_penalty_as_a_loss():
    """Summed over all tokens, k2's gradient on the policy's own samples is that of KL(pi || ref); k1's is zero, k3's another one."""
    theta, ref = noise(7).double().requires_grad_(), noise(7, seed=1).double().log_softmax(0)
    log_pi = theta.log_softmax(0)
    (exact,) = torch.autograd.grad((log_pi.exp() * (log_pi - ref)).sum(), theta, retain_graph=True)
    expected = {
        kind: torch.autograd.grad(
            (log_pi.exp().detach() * kl_penalty(log_pi, ref, kind)).sum(), theta, retain_graph=True
        )[0]
        for kind in ("k1", "k2", "k3")
    }
    torch.testing.assert_close(expected["k2"], exact)
    assert expected["k1"].abs().max() < 1e-12 and (expected["k3"] - exact).abs().max() > 0.1


@pytest.mark.line(11)
def test_whitening():
    mask, x = grid(), noise(3, 9) * 4 + 7
    valid = x[mask].double()
    expected = (valid - valid.mean()) / valid.var(correction=0).sqrt()
    whitened = whiten(x, mask)
    torch.testing.assert_close(whitened[mask].double(), expected, atol=1e-5, rtol=0)
    assert whitened[~mask].abs().max() == 0 and abs(whitened[mask].mean()) < 1e-6
    kept = whiten(x, mask, shift_mean=False)
    torch.testing.assert_close(kept[mask].mean(), x[mask].mean())
    torch.testing.assert_close(whiten(x.where(mask, torch.nan), mask), whitened)
    one = torch.zeros(3, 9, dtype=torch.bool).index_put(
        (torch.tensor([1]), torch.tensor([3])), torch.tensor(True)
    )
    assert torch.equal(whiten(x, one), torch.zeros(3, 9))


@pytest.mark.line(11)
def test_whitening_over_parts_is_global():
    mask, x = grid(), noise(3, 9)
    parts = [(x[:1], mask[:1]), (x[1:], mask[1:])]
    sums: list[list[torch.Tensor]] = [[], []]
    for part in parts:  # first pass: what each rank would contribute
        whiten(*part, reduce=lambda t: sums[0].append(t) or t)
    first = torch.stack(sums[0][::2]).sum(0)
    mean = first[1] / first[0]
    second = sum((p - mean).square().where(m, 0.0).sum() for p, m in parts)
    answers = iter([first, second, first, second])
    torch.testing.assert_close(
        torch.cat([whiten(*part, reduce=lambda t: next(answers)) for part in parts]),
        whiten(x, mask),
    )


def test_masked_mean_of_nothing():
    assert (
        masked_mean(torch.full((2, 2), torch.nan), torch.zeros(2, 2, dtype=torch.bool)).item()
        == 0.0
    )


@pytest.mark.line(16)
def test_policy_loss_against_loops():
    mask, c = grid(), 0.2
    old, new, adv = noise(3, 9) * 0.3, noise(3, 9, seed=1) * 0.3, noise(3, 9, seed=2)
    loss, stats = policy_loss(new, old, adv, mask, c)
    total, clipped, kl, ratios = 0.0, 0, 0.0, []
    for b, t in mask.nonzero().tolist():
        log_ratio, a = (new[b, t] - old[b, t]).double().item(), adv[b, t].double().item()
        ratio = math.exp(log_ratio)
        bounded = min(max(ratio, 1 - c), 1 + c)
        total -= min(ratio * a, bounded * a)
        clipped += bounded * a < ratio * a
        kl += ratio - 1 - log_ratio
        ratios.append(ratio)
    assert loss.item() == pytest.approx(total, abs=1e-5)
    assert (
        stats["clip_fraction"][0].item() == clipped > 0
        and stats["clip_fraction"][1].item() == mask.sum()
    )
    assert stats["approx_kl"][0].item() == pytest.approx(kl, abs=1e-5)
    assert stats["ratio_max"].item() == pytest.approx(max(ratios), abs=1e-5)


@pytest.mark.line(16)
def test_clipped_tokens_have_no_gradient_and_padding_none():
    mask = torch.tensor([[True, True, True, False]])
    new = torch.tensor([[0.5, -0.5, 0.5, 0.5]], requires_grad=True)
    policy_loss(new, torch.zeros(1, 4), torch.tensor([[1.0, 1.0, -1.0, 1.0]]), mask, 0.2)[
        0
    ].backward()
    ratio = math.exp(0.5), math.exp(-0.5)
    assert new.grad.tolist()[0] == pytest.approx([0.0, -ratio[1], ratio[0], 0.0])


@pytest.mark.line(16)
def test_value_loss_against_loops():
    mask, c = grid(), 0.2
    v, old, target = noise(3, 9), noise(3, 9, seed=1), noise(3, 9, seed=2)
    loss, _ = value_loss(v, old, target, mask, c)
    total = 0.0
    for b, t in mask.nonzero().tolist():
        x, o, r = (y[b, t].double().item() for y in (v, old, target))
        near = o + min(max(x - o, -c), c)
        total += 0.5 * max((x - r) ** 2, (near - r) ** 2)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert value_loss(v, old, target, mask, 0)[0].item() == pytest.approx(
        (0.5 * (v - target)[mask] ** 2).sum().item(), rel=1e-5
    )


@pytest.mark.line(16)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_losses_see_no_padding(poison):
    mask, xs = grid(), [noise(3, 9, seed=i) * 0.3 for i in range(3)]
    poisoned = [x.where(mask, poison) for x in xs]
    for loss in (policy_loss, value_loss):
        new = poisoned[0].clone().requires_grad_()
        total, stats = loss(new, *poisoned[1:], mask, 0.2)
        expected, expected_stats = loss(*xs, mask, 0.2)
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(stats, expected_stats)
        (gradient,) = torch.autograd.grad(total, new)
        assert gradient.isfinite().all() and gradient[~mask].abs().max() == 0


@pytest.mark.line(10)
def test_adaptive_controller():
    controller = AdaptiveKLController(0.1, target=6.0, horizon=10_000)
    controller.update(12.0, 256)
    assert controller.kl_coef == pytest.approx(
        0.1 * (1 + 0.2 * 256 / 10_000)
    )  # the error of 1 is clipped to .2
    controller.update(5.7, 256)
    assert controller.kl_coef == pytest.approx(
        0.1 * (1 + 0.2 * 256 / 10_000) * (1 - 0.05 * 256 / 10_000)
    )


def rollout_of(actor, critic) -> Rollout:
    models = Four(actor, critic, copy.deepcopy(actor), copy.deepcopy(critic))
    return collect(
        models,
        PROMPTS,
        list(range(6)),
        CONFIG,
        max_new_tokens=8,
        eos_id=EOS,
        scale=(0.5, 2.0),
        seed=18,
    )


@pytest.mark.line(2)
def test_masks_come_from_lengths():
    """Token 0, which pads, and EOS may stand anywhere in a prompt; a response may be its EOS alone."""
    generation = Generation([[EOS], [0, 7, 0, EOS]], [[-0.5], [-1.0, -2.0, -3.0, -4.0]])
    laid_out = lay_out([[1, EOS, 0], [0, 5]], generation, torch.device("cpu"))
    tokens, logprobs = laid_out["tokens"], laid_out["sampler_logprobs"]
    attention, response = laid_out["attention_mask"], laid_out["response_mask"]
    assert tokens.tolist() == [[1, EOS, 0, EOS, 0, 0], [0, 5, 0, 7, 0, EOS]]
    assert attention.int().tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert response.int().tolist() == [[0, 0, 0, 1, 0, 0], [0, 0, 1, 1, 1, 1]]
    assert logprobs.tolist() == [[0, 0, 0, -0.5, 0, 0], [0, 0, -1, -2, -3, -4]]


@pytest.mark.line(7)
def test_penalty_for_answers_cut_off():
    """Scores .5 and 3, the second cut off; clip, then penalty: by hand."""
    cut_off, scores = torch.tensor([False, True]), torch.tensor([0.5, 3.0])
    rollout = Rollout(
        *[torch.zeros(2, 1)] * 5, scores=scores, cut_off=cut_off, sampler_logprobs=torch.zeros(2, 1)
    )

    def final(**switches):
        return final_scores(rollout, replace(CONFIG, eos_penalty=0.75, **switches)).tolist()

    assert (
        final(missing_eos="subtract") == [0.5, 2.25]
        and final(missing_eos="override") == [0.5, -0.75]
        and final(missing_eos="off") == [0.5, 3.0]
    )
    assert final(missing_eos="subtract", score_clip=1.0) == [0.5, 0.25], (
        "the penalty is not clipped away"
    )


def test_running_moments_are_those_of_all_scores_so_far():
    moments, batches = RunningMoments(), [noise(5) * 3 + 2, noise(1, seed=1), noise(20, seed=2) - 1]
    for n, batch in enumerate(batches, 1):
        rescaled = moments.rescale(batch)
        scores = torch.cat(batches[:n]).double()
        expected = (batch - scores.mean()) / scores.std(correction=0)
        torch.testing.assert_close(rescaled, expected.float())
    assert (moments.count, moments.mean) == (26, pytest.approx(scores.mean().item(), abs=1e-7))


@pytest.mark.line(14)
def test_a_sampler_that_disagrees_is_seen(actor, critic):
    rollout = rollout_of(actor, critic)
    assert ppo.assign_credit(rollout, CONFIG, 0.1)[1]["rollout_logprob_diff"] < 1e-4
    b, t = rollout.response_mask.nonzero()[3].tolist()
    rollout.sampler_logprobs[b, t] += 0.25
    assert ppo.assign_credit(rollout, CONFIG, 0.1)[1]["rollout_logprob_diff"] == pytest.approx(
        0.25, abs=1e-4
    )


@pytest.mark.line(1, 2, 3, 4, 14)
def test_rollout_against_one_row_at_a_time(actor, critic):
    rollout = rollout_of(actor, critic)
    assert rollout.cut_off.any() and not rollout.cut_off.all(), (
        "the test needs both kinds of endings"
    )
    for b, prompt in enumerate(PROMPTS):
        row = rollout.tokens[b][rollout.attention_mask[b]]
        response = row[len(prompt) :]
        assert row[: len(prompt)].tolist() == prompt and rollout.response_mask[b].sum() == len(
            response
        )
        assert (response[-1] == EOS) != rollout.cut_off[b] and (response[:-1] != EOS).all()
        logprobs = token_logprobs(actor, row[None])[0, len(prompt) :]
        torch.testing.assert_close(
            rollout.logprobs[b][rollout.response_mask[b]], logprobs, atol=1e-5, rtol=0
        )
        score = (critic(row[None])[0, -1].item() - 0.5) / 2.0
        assert rollout.scores[b].item() == pytest.approx(score, abs=1e-5)
        values = critic(row[None])[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(
            rollout.values[b][rollout.response_mask[b]], values, atol=1e-5, rtol=0
        )
    assert (rollout.logprobs - rollout.sampler_logprobs).abs().max() < 1e-5


def test_credit(actor, critic):
    rollout, stats = ppo.assign_credit(rollout_of(actor, critic), CONFIG, kl_coef=0.1)
    mask = rollout.response_mask
    assert stats["kl"] == pytest.approx(0, abs=1e-5), "actor and reference are still equal"
    totals = rollout.scores - CONFIG.eos_penalty * rollout.cut_off
    torch.testing.assert_close(rollout.rewards.sum(1), totals, atol=1e-5, rtol=0)
    assert rollout.advantages[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert stats["response_length"] == pytest.approx(mask.sum().item() / 6)


def test_merge_widens_to_the_longest(actor, critic):
    whole = rollout_of(actor, critic)
    narrow = [whole.rows(torch.tensor([i])) for i in range(6)]
    narrow = [
        Rollout(
            **{
                k: v[:, :8]
                if v is not None and v.dim() == 2 and not part.attention_mask[0, 8:].any()
                else v
                for k, v in vars(part).items()
            }
        )
        for part in narrow
    ]
    merged = merge(narrow)
    assert all(
        torch.equal(getattr(merged, name)[:, :width], getattr(whole, name)[:, :width])
        for name in ("tokens", "logprobs", "response_mask")
        for width in [whole.tokens.size(1)]
    )


@pytest.mark.line(18)
@pytest.mark.parametrize("epochs,minibatch", [(1, 6), (1, 2), (2, 3), (3, 1)])
def test_every_episode_is_seen_once_an_epoch(actor, critic, epochs, minibatch):
    """epochs * batch_size / minibatch_size optimizer steps for actor and critic each, in a fresh order every epoch."""
    config, seen = (
        replace(CONFIG, epochs=epochs, minibatch_size=minibatch),
        {"actor": [], "critic": []},
    )
    rollout, _ = ppo.assign_credit(rollout_of(actor, critic), config, kl_coef=0.1)
    rollout = replace(rollout, scores=torch.arange(6.0))  # names the episodes

    def record(name):
        return lambda batches, step: (
            seen[name].append([int(x) for batch in batches for x in batch.scores]) or {}
        )

    steps = ppo.learn(rollout, config, [record("actor"), record("critic")], seed=0)
    assert (
        len(steps) == len(seen["actor"]) == epochs * 6 // minibatch
        and seen["actor"] == seen["critic"]
    )
    orders = [
        sum(seen["actor"][i : i + 6 // minibatch], []) for i in range(0, len(steps), 6 // minibatch)
    ]
    assert (
        all(sorted(order) == list(range(6)) for order in orders)
        and len({tuple(order) for order in orders}) == epochs
    )


def test_without_an_actor_update_only_the_critic_learns(actor, critic):
    rollout, _ = ppo.assign_credit(rollout_of(actor, critic), CONFIG, kl_coef=0.1)
    assert ppo.learn(
        rollout, CONFIG, [lambda batches, step: {"seen": len(batches), "step": step}], seed=0
    ) == [{"seen": 2, "step": i} for i in range(4)]


@pytest.mark.parametrize(
    "bad",
    [
        {"minibatch_size": 4},
        {"kl_in": "loss", "kl_kind": "k1"},
        {"advantage": "group"},
        {"kl_target": 1.0, "kl_horizon": 1},
    ],
)
def test_impossible_settings(bad):
    assert len(list(replace(CONFIG, **bad).problems())) == 1 and not list(CONFIG.problems())
