"""A language small enough to know the answer: PPO must arrive at pi(y) = pi_ref(y) exp(r(y) / kl_coef) / Z.

Two tokens out of six follow every prompt, and a reward is written down for each of the 36 answers. The policy that
maximises E[r] - kl_coef KL(pi || pi_ref) is then known in closed form (Ziegler et al. 2019, eq. 2; Korbak et al. 2022), and
the distance of the trained actor from it can be summed up exactly. Everything that PPO consists of has to be right for
it to get there: the sign and the place of the KL penalty, GAE, whitening, both clipped losses, the sampler.
"""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import parallel
import ppo
from model import ModelConfig, ScalarModel, Transformer, token_logprobs
from weights.initial import init_weights
from episodes import Four, collect
from ppo import PPOConfig
from train import Term, lr_at, update

LETTERS, PROMPT = 6, [5, 0]
ANSWERS = torch.cartesian_prod(torch.arange(LETTERS), torch.arange(LETTERS))  # (36, 2)
MACHINE = parallel.Machine(rank=0, world=1, device=torch.device("cpu"), dtype=torch.float32)
SHAPE = ModelConfig(
    dim=32, n_layers=1, n_heads=2, n_kv_heads=2, vocab_size=LETTERS, ffn_dim=64, max_seq_len=8
)


class Table(nn.Module):
    """A reward model that looks its scores up: (B, T) tokens -> (B, T), read at the last one."""

    def __init__(self, rewards: Tensor) -> None:
        super().__init__()
        self.rewards = rewards  # (36,)
        self.score = nn.Linear(1, 1)  # says where the model is

    def forward(self, tokens: Tensor, attention_mask: Tensor, where: Tensor) -> Tensor:
        return self.rewards[tokens[:, -2] * LETTERS + tokens[:, -1]][:, None].expand(tokens.shape)


@torch.no_grad()
def log_policy(model: nn.Module) -> Tensor:
    """Return (36,) float64, the log-probability of every answer, by enumeration."""
    tokens = torch.cat((torch.tensor(PROMPT).expand(len(ANSWERS), -1), ANSWERS), dim=1)
    return token_logprobs(model, tokens)[:, len(PROMPT) :].double().sum(1)


def distances(
    kl_coef: float, seed: int, iterations: int = 60, lr: float = 5e-4, **switches
) -> list[float]:
    """Train, and return KL(pi || optimum) before, after a third, and at the end [nats]."""
    config = PPOConfig(
        **{
            **dict(
                batch_size=512,
                minibatch_size=128,
                microbatch_size=512,
                epochs=2,
                kl_coef=kl_coef,
                eos_penalty=0.0,
                gae_lambda=1.0,
                value_clip_range=0.0,
            ),
            **switches,
        }
    )
    actor, ref, critic = Transformer(SHAPE), Transformer(SHAPE), ScalarModel(SHAPE)
    init_weights(actor, seed)
    init_weights(critic, seed + 100)
    with torch.no_grad():
        actor.lm_head.weight.mul_(1.5)  # a reference that is far from uniform
    ref.load_state_dict(actor.state_dict())
    rewards = 2 * torch.rand(len(ANSWERS), generator=torch.Generator().manual_seed(seed)) - 1
    models = Four(actor, critic, ref, Table(rewards))
    log_optimum = torch.log_softmax(log_policy(ref) + rewards / kl_coef, dim=0)
    optimizers = [parallel.adamw(model, 0.0) for model in (actor, critic)]
    losses = (
        partial(ppo.actor_loss, config=config, kl_coef=kl_coef),
        partial(ppo.critic_loss, config=config),
    )
    found = []
    for iteration in range(iterations + 1):
        if iteration in (0, iterations // 3, iterations):
            log_pi = log_policy(actor)
            found.append((log_pi.exp() * (log_pi - log_optimum)).sum().item())
        rows = [iteration * config.batch_size + i for i in range(config.batch_size)]
        rollout = collect(
            models, [PROMPT] * config.batch_size, rows, config, 2, -1, (0.0, 1.0), seed=seed
        )
        rollout, _ = ppo.assign_credit(rollout, config, kl_coef)
        now = lr_at(iteration, iterations, lr, 0.01, 0.0)
        ppo.learn(
            rollout,
            config,
            [
                lambda batches, step, i=i: update(
                    (actor, critic)[i], optimizers[i], [Term(losses[i], batches)], now, 1.0, MACHINE
                )
                for i in (0, 1)
            ],
            seed=iteration,
        )
    return found


@pytest.mark.parametrize("kl_coef,seed", [(0.5, 0), (1.0, 1), (2.0, 2)])
def test_ppo_arrives_at_the_optimum(kl_coef, seed):
    before, third, after = distances(kl_coef, seed)
    print(f"kl_coef {kl_coef}, seed {seed}: {before:.4f} -> {third:.4f} -> {after:.4f} nats")
    assert after < 0.01 and after < third and after < before / 5


def test_a_large_kl_coef_holds_the_policy_at_the_reference():
    """The optimum is then the reference itself; at a small coefficient the same steps lead far from there."""
    assert distances(1000.0, 0, iterations=20, lr=3e-4)[-1] < 0.005
    for seed in (0, 3):  # how far 20 iterations lead depends on the start that is drawn
        start, _, end = distances(0.1, seed, iterations=20, lr=3e-4)
        assert start > 5 and end < start / 10


@pytest.mark.parametrize(
    "switches",
    [
        {"whiten_advantages": "off"},
        {"gae_lambda": 0.95, "value_clip_range": 0.2},
        {"kl_in": "loss", "kl_kind": "k2", "whiten_advantages": "off"},
    ],
    ids=str,
)
def test_switches_that_leave_the_optimum_where_it_is(switches):
    before, _, after = distances(1.0, 0, **switches)
    assert after < 0.02 and after < before / 5


def test_whitening_moves_the_optimum_when_the_penalty_is_in_the_loss():
    """Whitened advantages are no longer in reward units, and kl_coef in the loss no longer means what it says."""
    before, _, after = distances(1.0, 0, kl_in="loss", kl_kind="k2", whiten_advantages="global")
    assert after > 0.1
