"""The ranking loss against per-pair float64 loops, and the reward model's readout and scale."""

import math

import pytest
import torch

import reward
from reward import Batch, RewardConfig, better, calibrate, pair_accuracy, ranking_loss


def oracle(scores: list[list[float]], ranks: list[list[float]]) -> tuple[float, int]:
    total, prompts = 0.0, 0
    for s, r in zip(scores, ranks):
        terms = [
            math.log1p(math.exp(-(s[i] - s[j])))
            for i in range(len(s))
            for j in range(len(s))
            if r[i] < r[j]
        ]
        if terms:
            total, prompts = total + sum(terms) / len(terms), prompts + 1
    return total, prompts


@pytest.mark.line(19)
def test_ranking_loss_against_loops():
    g = torch.Generator().manual_seed(0)
    scores, ranks = (
        torch.randn(20, 5, generator=g) * 3,
        torch.randint(1, 5, (20, 5), generator=g).float(),
    )
    ranks[3] = 2.0  # all tied: no pair
    total, prompts = ranking_loss(scores, ranks)
    expected, n = oracle(scores.double().tolist(), ranks.tolist())
    assert (total.item(), prompts.item()) == (pytest.approx(expected, rel=1e-6), n) and n == 19


@pytest.mark.line(19)
def test_two_responses_are_bradley_terry():
    total, prompts = ranking_loss(torch.tensor([[0.3, 1.1]]), torch.tensor([[2.0, 1.0]]))
    assert total.item() == pytest.approx(math.log(1 + math.exp(-0.8))) and prompts.item() == 1


@pytest.mark.line(19)
def test_order_of_responses_does_not_matter():
    g = torch.Generator().manual_seed(1)
    scores, ranks, order = (
        torch.randn(4, 5, generator=g),
        torch.rand(4, 5, generator=g),
        torch.tensor([4, 2, 0, 1, 3]),
    )
    torch.testing.assert_close(
        ranking_loss(scores, ranks)[0], ranking_loss(scores[:, order], ranks[:, order])[0]
    )


@pytest.mark.line(19)
def test_missing_responses_give_no_pair():
    scores, ranks = torch.tensor([[0.1, 0.7, 0.4]]), torch.tensor([[1.0, 2.0, 3.0]])
    padded = (
        torch.cat((scores, torch.tensor([[9.0]])), 1),
        torch.cat((ranks, torch.tensor([[torch.nan]])), 1),
    )
    torch.testing.assert_close(ranking_loss(*padded), ranking_loss(scores, ranks))
    assert better(padded[1]).sum() == 3


@pytest.mark.line(19)
def test_wrong_order_has_the_larger_gradient():
    """-log(sigmoid + eps), which some write, loses its gradient exactly where the pair is badly wrong."""
    scores = torch.tensor([[-40.0, 40.0]], requires_grad=True)
    ranking_loss(scores, torch.tensor([[1.0, 2.0]]))[0].backward()
    assert scores.grad[0, 0].item() == pytest.approx(-1.0)


def test_pair_accuracy():
    right, pairs = pair_accuracy(
        torch.tensor([[3.0, 2.0, 2.0, 5.0]]), torch.tensor([[1.0, 2.0, 3.0, 3.0]])
    )
    assert (right.item(), pairs.item()) == (
        2.5,
        5,
    )  # 3>2, 3>2 right; 3<5, 2<5 wrong; 2=2 half; the tied last two no pair


@pytest.mark.line(4)
def test_group_scores_and_padding(critic):
    tokens = torch.tensor(
        [[1, 2, 3, 4, 0, 0], [1, 2, 5, 0, 0, 0], [1, 9, 9, 9, 9, 9], [1, 0, 0, 0, 0, 0]]
    )
    mask = torch.tensor(
        [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]],
        dtype=torch.bool,
    )
    batch = Batch(tokens, mask, torch.tensor([[1.0, 2.0], [1.0, torch.nan]]))
    scores = reward.group_scores(critic, batch)
    assert scores[0, 1].item() == pytest.approx(critic(tokens[1:2, :3])[0, -1].item(), abs=1e-5)
    wider = Batch(
        torch.nn.functional.pad(tokens, (0, 4), value=7),
        torch.nn.functional.pad(mask, (0, 4)),
        batch.ranks,
    )
    torch.testing.assert_close(reward.group_scores(critic, wider), scores)
    assert batch.count.item() == 1


def test_sampling_uses_every_setting(actor):
    config = RewardConfig(temperatures=(0.01, 1.0, 1.0))
    groups = reward.sample(actor, [[1, 4], [1, 6, 7]], [0, 1], config, 10, eos_ids=(2,), seed=0)
    assert [len(group) for group in groups] == [3, 3]
    assert groups[0][1] != groups[0][2], "equal settings draw different noise"
    assert reward.sample(actor, [[1, 6, 7]], [1], config, 10, eos_ids=(2,), seed=0) == groups[1:], (
        "a sample belongs to its row"
    )


@pytest.mark.line(20)
def test_calibrate():
    mean, std = calibrate([1.0, 2.0, 3.0, 6.0])
    assert (mean, std) == (3.0, pytest.approx(math.sqrt(3.5)))
    with pytest.raises(ValueError, match="same score"):
        calibrate([0.5, 0.5, 0.5])
