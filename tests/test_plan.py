"""The plan against what real runs allocate, and against itself where it extrapolates."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import parallel
import ppo
import reward
import sft
import train
from model import ModelConfig, ScalarModel, Transformer
from run import settings
from run import planner
from run.checkpoints import MOMENTS
from weights import save_pretrained

ROOT = Path(__file__).parents[1]
SHAPE = ModelConfig(
    dim=128, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=900, ffn_dim=352, max_seq_len=256
)
PROMPT, RESPONSE = 60, 68


GROUPS = {"ppo.advantage": "group", "ppo.responses_per_prompt": 4}  # no critic


def tiny_planner(**flags) -> planner.Planner:
    """Return a planner for one process in float32 with full-length micro-batches of three."""
    values = {
        "ranks": 1,
        "dtype": "float32",
        "data.max_prompt_tokens": PROMPT,
        "data.max_response_tokens": RESPONSE,
        "sft.microbatch_size": 3,
        "ppo.microbatch_size": 3,
        "reward.microbatch_size": 1,
        "reward.temperatures": (1.0, 1.0, 1.0),
        **flags,
    }
    return planner.Planner(settings.unflatten(values), SHAPE, SHAPE)


def peak_of(step) -> int:
    """Return the highest sum of what `step` allocates and has not freed yet [bytes]."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        step()
    total = peak = 0
    events = profiler.profiler.kineto_results.events()
    events = [event for event in events if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def full_grid(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and the mask of a response that fills the row's end."""
    tokens = torch.randint(3, SHAPE.vocab_size, (rows, PROMPT + RESPONSE))
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, PROMPT:] = True
    return tokens, mask


def real_loss(stage: str):
    """Return the kind of model and the real loss of a micro-batch with content."""
    tokens, mask = full_grid(3)
    if stage == "sft":
        return Transformer, lambda model: sft.loss(model, sft.Batch(tokens, None, mask))[0]
    if stage == "reward":
        batch = reward.Batch(tokens, torch.ones_like(mask), torch.tensor([[1.0, 2.0, 3.0]]))
        return ScalarModel, lambda model: reward.loss(model, batch)[0]
    grid = torch.zeros(tokens.shape)
    rollout = ppo.Rollout(
        tokens=tokens,
        attention_mask=None,
        response_mask=mask,
        logprobs=grid,
        ref_logprobs=grid,
        sampler_logprobs=grid,
        values=grid,
        scores=torch.zeros(3),
        cut_off=mask[:, 0],
        rewards=grid,
        advantages=grid,
        returns=grid,
        weights=mask.float(),
    )
    return Transformer, lambda model: ppo.actor_loss(model, rollout, ppo.PPOConfig(), 0.1)[0]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo update"])
def test_plan_is_what_a_real_run_allocates(stage, recompute):
    """Activations and logits within 10 %; parameters, gradients and Adam's moments to the byte."""
    planned = planner.STAGES[stage](
        tiny_planner(**{"parallel.activation_checkpointing": recompute})
    )
    kind, loss = real_loss(stage)
    with torch.device("cpu"):
        model = kind(SHAPE)
    model.model.recompute = recompute
    optimizer = parallel.adamw(model, 0.0)
    loss(model).backward()
    gradients = sum(p.grad.nbytes for p in model.parameters())
    optimizer.step()
    states = optimizer.state.values()
    moments = sum(state[key].nbytes for state in states for key in MOMENTS)
    if stage != "ppo update":  # there all four models count
        assert planned.parameters == sum(p.nbytes for p in model.parameters())
        assert planned.gradients == gradients
        assert planned.optimizer == moments
    real = peak_of(lambda: loss(model).backward())
    assert planned.activations + planned.logits == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("rows,tokens,group,grid", [
    (3, 0, 1, (3, 128, 204)), (3, 1000, 1, (3, 128, 204)), (9, 384, 1, (3, 128, 384)),
    (9, 300, 1, (3, 100, 300)), (9, 128, 1, (1, 128, 128)), (9, 129, 1, (2, 64, 128)),
    (9, 5, 1, (1, 128, 68)), (1, 129, 1, (1, 128, 68)), (9, 1152, 3, (3, 128, 1152)),
    (2, 1152, 3, (2, 128, 408))])
def test_the_plan_counts_the_smaller_limit(rows, tokens, group, grid):
    """Of rows and tokens; a row that is longer than its limit still has to fit alone."""
    section = sft.SFTConfig(microbatch_size=rows, microbatch_tokens=tokens)
    assert tiny_planner().largest(section, group) == grid


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo update"])
def test_the_plan_counts_tokens(stage):
    section = stage.split()[0]
    few = tiny_planner(**{f"{section}.microbatch_size": 1})
    both = tiny_planner(**{f"{section}.microbatch_size": 9, f"{section}.microbatch_tokens": 5})
    assert planner.STAGES[stage](few) == planner.STAGES[stage](both)


@pytest.mark.parametrize(
    "flags",
    [
        {"ranks": 1},
        {"ranks": 8},
        {"ranks": 8, "parallel.activation_checkpointing": True, "parallel.replicas": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("stage", ["ppo rollout", "ppo update"])
def test_a_few_blocks_foretell_many(monkeypatch, stage, flags):
    """Seven blocks, all simulated, and four and five of them carried on."""
    monkeypatch.setattr(parallel, "BLOCKWISE_ABOVE", 1_000)
    config = settings.unflatten(
        {
            "data.max_prompt_tokens": PROMPT,
            "data.max_response_tokens": RESPONSE,
            "ppo.batch_size": 32,
            **flags,
        }
    )
    shape = replace(SHAPE, n_layers=7)
    few = planner.plan_stage(stage, config, shape, shape)
    monkeypatch.setattr(planner, "FEW", 7)
    assert sum(few) == pytest.approx(sum(planner.plan_stage(stage, config, shape, shape)), rel=0.01)


def test_shards_are_arithmetic():
    """Seven ranks: every parameter's rows are split, rounded up."""
    with planner.fake_group(7):
        planned = planner.Planner(settings.unflatten({"ranks": 7}), SHAPE, SHAPE)
        with torch.device("meta"):
            expected = sum(
                -(-p.shape[0] // 7) * p[0].numel() * 4 for p in Transformer(SHAPE).parameters()
            )
        assert planned.held(Transformer, SHAPE) == expected


def bytes_of(kind, shape: ModelConfig) -> int:
    """Return the bytes of a whole model in float32."""
    return 4 * planner.parameters_of(kind, shape)


@pytest.mark.parametrize("stage", ["ppo rollout", "ppo update"])
def test_no_critic_is_no_memory(stage):
    """Parameters and moments go; the actor's step, the peak, has its gradients either way."""
    before = planner.STAGES[stage](tiny_planner())
    after = planner.STAGES[stage](tiny_planner(**GROUPS))
    critic = bytes_of(ScalarModel, SHAPE)
    assert before.parameters - after.parameters == critic
    assert before.optimizer - after.optimizer == 2 * critic
    assert sum(before) - sum(after) == 3 * critic


def test_no_critic_is_no_gradient_of_a_critic():
    """A critic of more blocks than the actor: its step is the peak, until it is gone."""
    whole = tiny_planner()
    whole.judge = replace(SHAPE, n_layers=8)
    critic, actor = bytes_of(ScalarModel, whole.judge), bytes_of(Transformer, SHAPE)
    before = planner.STAGES["ppo update"](whole)
    without = tiny_planner(**GROUPS)
    without.judge = whole.judge
    after = planner.STAGES["ppo update"](without)
    assert (before.gradients, after.gradients) == (critic, actor)
    stays = [
        sum(parts) - parts.activations - parts.logits - parts.gradients for parts in (before, after)
    ]
    assert stays[0] - stays[1] == 3 * critic


@pytest.mark.parametrize(
    "chosen,function,stages,there",
    [
        ("auto", "", ("ppo",), True),
        ("auto", "mine.py", ("sft", "ppo"), False),
        ("auto", "mine.py", ("sft", "reward", "ppo"), True),
        ("model", "mine.py", ("ppo",), True),
        ("function", "mine.py", ("sft", "reward", "ppo"), False),
    ],
)
def test_a_reward_function_is_no_memory(monkeypatch, chosen, function, stages, there):
    flags = {"stages": stages, "ppo.reward": chosen, "reward.function": function}
    everything = tiny_planner().ppo_base()
    planned = tiny_planner(**flags).ppo_base()
    missing = 0 if there else bytes_of(ScalarModel, SHAPE)
    assert everything.parameters - planned.parameters == missing
    assert everything.optimizer == planned.optimizer, "a reward model is frozen"
    measured = []
    monkeypatch.setattr(
        planner, "measure", lambda kind, *_: measured.append(kind) or planner.Usage()
    )
    tiny_planner(**flags, **GROUPS).ppo_rollout()
    assert (ScalarModel in measured) == there, (
        "with neither there is nobody to read values or scores"
    )


def test_only_what_runs_is_planned(monkeypatch, capsys):
    monkeypatch.setattr(planner, "plan_stage", lambda *_: planner.Parts(0))
    planner.main(settings.unflatten({"ranks": 2, "stages": ("ppo",)}), (SHAPE, SHAPE))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("fits")]
    assert [line.split("  ")[0] for line in lines] == ["ppo rollout", "ppo update"]


def command(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "train.py", "--plan", *flags], cwd=ROOT, capture_output=True, text=True
    )


def test_thirteen_billion_parameters_on_eight_gpus():
    done = command(
        "--model=13b",
        "--ranks=8",
        "--gpu_memory=80",
        "--parallel.activation_checkpointing=true",
        "--parallel.offload_frozen=true",
        "--ppo.generation_batch=8",
    )
    assert done.returncode == 0 and done.stdout.count("  fits") == 4, done.stdout + done.stderr
    # weights of 2 bytes after SFT, reward and PPO; actor and critic with two moments each, float32, three times
    actor = 13_015_864_320
    scalar = actor - 31_999 * 5_120  # one row in place of the head
    bytes_ = 2 * (2 * actor + scalar) + 3 * 12 * (actor + scalar)
    assert f"with weights of 2 bytes in the model folders: {bytes_ / 1e9:.1f} GB." in done.stdout


def test_advice_fits_when_taken():
    done = command("--model=7b", "--ranks=4", "--gpu_memory=80")
    lines = done.stdout.splitlines()
    advice = [line.split("fits with ")[1].split() for line in lines if "fits with" in line]
    assert advice and "does not fit" in done.stdout
    config = settings.parse_args(["--plan", "--model=7b", "--ranks=4", *advice[-1]], train.STAGES)
    parts = planner.plan_stage("ppo update", config, planner.SIZES["7b"], planner.SIZES["7b"])
    assert sum(parts) <= 80e9 - planner.RESERVE


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--model=9b"], "neither a model folder nor one of 7b, 13b, 34b, 70b"),
        (["--model=7b", "--ranks=0"], "--ranks=0"),
        (["--model=7b", "--ranks=6", "--parallel.replicas=4"], "multiple of --parallel.replicas=4"),
    ],
)
def test_bad_plans(flags, message):
    done = command(*flags)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_run_that_does_not_fit_on_the_disk_is_refused(tmp_path, monkeypatch):
    """SFT, reward and PPO of the embedded world: four bytes a weight, and three checkpoints of actor and critic."""
    config = settings.parse_args([], train.STAGES)
    shape = settings.world_shape(config)
    actor, scalar = (planner.parameters_of(kind, shape) for kind in (Transformer, ScalarModel))
    needed = planner.disk_bytes(config, shape, shape)
    assert needed == 4 * (3 * actor + scalar) + 3 * 12 * (actor + scalar)
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=needed))
    planner.check_disk(config, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=needed - 1))
    with pytest.raises(ValueError, match="GB are free on its disk"):
        planner.check_disk(config, tmp_path)


@pytest.mark.parametrize("dtype,size", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_plan_knows_how_a_folder_stores_its_weights(tmp_path, dtype, size):
    save_pretrained(Transformer(settings.world_shape(settings.Config())), tmp_path, dtype=dtype)
    for flags, expected in ([], size), (["--export.dtype=float16"], 2), (["--export.dtype=float32"], 4):
        config = settings.parse_args(["--plan", f"--model={tmp_path}", *flags], train.STAGES)
        assert planner.itemsize_of(config) == expected
