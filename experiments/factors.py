"""What the ablations vary: the paper's factors, as tables of switches of train.py.

A variant is the default run with some switches changed. The first of a factor is what the others
are compared with.
"""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One way to run the recipe.

    model: whose answers count; it decides on the stages that are run (jobs.PATHS).
    patches: changes for which there is no switch, of forks/ or patches/.
    processes: of PPO; more than one is a torchrun.
    """
    switches: str = ""
    model: str = "ppo"
    patches: tuple[str, ...] = ()
    processes: int = 1


@dataclass(frozen=True)
class Factor:
    """A question, and the variants that answer it. plot: the picture beside the usual one."""
    question: str
    variants: dict[str, Variant]
    seeds: int = 3
    plot: str = ""               # kl | budget | methods


DEFAULT = Variant()
GROUPS = "--ppo.responses_per_prompt=4"
DPO = Variant("--reward.lr=1e-4", "dpo", ("dpo",))

# Width, layers, heads and feed-forward width of reward model and critic, by their size relative to
# the actor's 189,000 parameters.
SIZES = {
    "1/12 of the actor": "--reward.dim=16 --reward.n_layers=1 --reward.n_heads=2 "
                         "--reward.ffn_dim=48",
    "1/3": "--reward.dim=32 --reward.n_layers=2 --reward.n_heads=4 --reward.ffn_dim=96",
    "3 x": "--reward.dim=96 --reward.n_layers=3 --reward.n_heads=4 --reward.ffn_dim=288",
}
WEAK = "--ppo.kl_coef=0.03"

# Without Adam the size of a gradient is the size of a step. The norm is not clipped either: it
# would absorb the scale just as well.
SGD = "--ppo.lr=0.05 --ppo.critic_lr=0.003 --ppo.max_grad_norm=1000"
RAW = "--ppo.score_scale=none --ppo.kl_coef=4.5"  # the default's 0.15 in units 30 times smaller
OFF = "--ppo.whiten_advantages=off"


def sized() -> dict[str, Variant]:
    """Return the sizes, the actor's own first; then the extreme ones with a weak penalty."""
    found = {"as the actor (default)": DEFAULT}
    found |= {size: Variant(shape) for size, shape in SIZES.items()}
    found["as the actor, weak KL"] = Variant(WEAK)
    for size in ("1/12 of the actor", "3 x"):
        found[f"{size}, weak KL"] = Variant(f"{SIZES[size]} {WEAK}")
    return found


def budgets() -> dict[str, Variant]:
    """Return the methods at four numbers of ranked prompts."""
    found = {}
    # an epoch of few rankings is few steps: twice as many epochs, smaller batches
    more = "--reward.epochs=4 --reward.batch_size=16 --top.epochs=4"
    for n in (9000, 1000, 300, 100):
        few = "" if n == 9000 else f"--reward.sampled_prompts={n} {more}"
        found[f"PPO, {n}"] = Variant(few)
        found[f"top-ranked SFT, {n}"] = Variant(few, "top")
        found[f"DPO, {n}"] = Variant(f"{few} {DPO.switches}".strip(), "dpo", ("dpo",))
        found[f"best of 5, {n}"] = Variant(few, "best-of-5")
    return found


FACTORS = {
    "methods": Factor(
        "Which method makes most of the same rankings?", {
            "PPO": DEFAULT,
            "SFT": Variant(model="sft"),
            "top-ranked SFT": Variant(model="top"),
            "top-ranked SFT, two rounds": Variant(model="top2"),
            "best of 5": Variant(model="best-of-5"),
            "DPO": DPO,
            "GRPO": Variant(f"--ppo.advantage=group {GROUPS}"),
            "RLOO": Variant(f"--ppo.advantage=leave_one_out {GROUPS}"),
        }, seeds=5, plot="methods"),
    "kl": Factor(
        "What does the KL penalty do?", {
            "0.15 (default)": DEFAULT,
            "off": Variant("--ppo.kl_coef=0"),
            "0.03": Variant(WEAK),
            "0.75": Variant("--ppo.kl_coef=0.75"),
            "adaptive, 2 nats": Variant(f"{WEAK} --ppo.kl_target=2 --ppo.kl_horizon=1000"),
        }, plot="kl"),
    "advantage": Factor(
        "When does advantage normalization matter?", {
            "global (default)": DEFAULT,
            "off": Variant(OFF),
            "per rank, two ranks": Variant("--ppo.whiten_advantages=rank", processes=2),
            "raw scores x 10, global": Variant(RAW, patches=("scores10",)),
            "raw scores x 10, off": Variant(f"{RAW} {OFF}", patches=("scores10",)),
            "cold critic, global": Variant("--ppo.critic_init=actor"),
            "cold critic, off": Variant(f"--ppo.critic_init=actor {OFF}"),
            "SGD, global": Variant(SGD, patches=("sgd",)),
            "SGD, off": Variant(f"{SGD} {OFF}", patches=("sgd",)),
            "SGD, raw x 10, global": Variant(f"{SGD} {RAW}", patches=("scores10", "sgd")),
            "SGD, raw x 10, off": Variant(f"{SGD} {RAW} {OFF}", patches=("scores10", "sgd")),
        }),
    "budget": Factor(
        "How many rankings does each method need?", budgets(), plot="budget"),
    "data": Factor(
        "Which data are appropriate?", {
            "blended SFT, in-domain RLHF (default)": DEFAULT,
            # the default's own 24,000 and 16,000 demonstrations, as many steps
            "SFT in-domain only": Variant("--sft.in_domain_share=1 --sft.examples=24000 "
                                          "--sft.epochs=6.67"),
            "SFT general only": Variant("--sft.in_domain_share=0 --sft.examples=16000 "
                                        "--sft.epochs=10"),
            "RLHF blended": Variant("--ppo.in_domain_share=0.7"),
            "RLHF general only": Variant("--ppo.in_domain_share=0"),
            "annotators without error": Variant("--reward.noise=0"),
            "annotators with six times the error": Variant("--reward.noise=0.3"),
        }),
    "reward_size": Factor(
        "What does the size of the reward model do, and what the scale of its scores?", {
            **sized(),
            "scores as they are": Variant("--ppo.score_scale=none --ppo.kl_coef=0.45"),
            "scores clipped at 1": Variant("--ppo.score_clip=1"),
            "running scale": Variant("--ppo.score_scale=running"),
        }),
}
