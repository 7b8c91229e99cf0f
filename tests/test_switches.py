"""Runs of the command: each switch does what it says, the reward's scale never matters, bfloat16 follows float32,
a killed sharded run ends as the one that was not."""
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import golden
import parallel
import train
from model import ScalarModel, generate
from run import folder, settings, sources
from weights.loading import load_pretrained
from weights.files import read_safetensors
from weights.export import save_pretrained

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A finished tiny run to build on."""
    out = tmp_path_factory.mktemp("runs") / "base"
    golden.tiny_run(out)
    return out


def metrics(out: Path) -> list[dict]:
    """Return the numbers of metrics.jsonl, without times."""
    return [{k: v for k, v in row.items() if k != "stage" and "second" not in k} for row in golden.lines(out / "metrics.jsonl")]


def ppo(base: Path, out: Path, *flags: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Run PPO alone; return its metrics without times, and the actor's weights."""
    train.main([f"--base={base}", f"--out={out}", "--stages=ppo", *flags])
    return metrics(out), read_safetensors(out / "ppo" / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_learning_rate_zero_and_critic_warmup_leave_the_actor_alone(base, tmp_path):
    sft = read_safetensors(base / "sft" / "model.safetensors")
    rows, weights = ppo(base, tmp_path / "zero", "--ppo.lr=0")
    assert equal(weights, sft) and all(abs(row["kl"]) < 1e-5 for row in rows)
    rows, weights = ppo(base, tmp_path / "warm", "--ppo.critic_warmup=2")
    assert all(abs(row["kl"]) < 1e-5 for row in rows) and not equal(weights, sft)
    assert ["approx_kl" in row for row in rows] == [False, False, True] and all("value_loss" in row for row in rows)


@pytest.mark.line(24)
def test_the_critics_gradient_does_not_touch_the_actor(base, tmp_path):
    """In one iteration the advantages are fixed; with a shared optimizer or norm the critic's loss would still show."""
    one = ["--ppo.iterations=1", "--ppo.max_grad_norm=0.1"]
    first, second = (ppo(base, tmp_path / name, *one, flag) for name, flag in (("a", "--ppo.value_clip_range=0"), ("b", "--ppo.value_clip_range=0.01")))
    assert equal(first[1], second[1]) and first[0][0]["critic_grad_norm"] != second[0][0]["critic_grad_norm"]


@pytest.mark.parametrize("flag,seen", [
    ("--ppo.critic_init=actor", "value_loss"), ("--ppo.ptx_coef=0.5", "ptx_loss"), ("--ppo.score_scale=running", "reward_mean"),
    ("--ppo.score_scale=none", "score_mean"), ("--ppo.score_clip=0.2", "reward_mean"), ("--ppo.missing_eos=override", "reward_mean"),
    ("--ppo.entropy_coef=0.5", "actor_grad_norm"), ("--ppo.loss_average=sequences", "actor_grad_norm"), ("--ppo.whiten_advantages=off", "actor_grad_norm"),
    ("--ppo.value_clip_range=0", "value_loss"), ("--ppo.kl_kind=k3", "reward_mean"), ("--ppo.clip_range=0.001", "clip_fraction"), ("--ppo.temperature=0.5", "entropy")])
def test_every_switch_reaches_the_run(base, tmp_path, flag, seen):
    """It changes the number it should act on, and no switch stops a run."""
    def numbers(*flags: str) -> list[dict]:
        return ppo(base, tmp_path / str(len(flags)), "--ppo.iterations=2", "--data.max_response_tokens=8", *flags)[0]
    plain, switched = numbers(), numbers(flag)
    assert [row.get(seen) for row in plain] != [row[seen] for row in switched]
    assert all(math.isfinite(value) for row in switched for value in row.values() if isinstance(value, float))


@pytest.mark.line(10)
def test_adaptive_kl_coef_follows_the_logged_kl(base, tmp_path):
    target = 1.1 * ppo(base, tmp_path / "fixed")[0][1]["kl"]  # so that the second error is not clipped
    rows, _ = ppo(base, tmp_path / "adaptive", f"--ppo.kl_target={target}", "--ppo.kl_horizon=100")
    errors = [max(-0.2, min(0.2, row["kl"] / target - 1)) for row in rows[:-1]]
    assert errors == [-0.2, pytest.approx(-1 / 11)]
    for before, error, after in zip(rows, errors, rows[1:]):
        assert after["kl_coef"] == pytest.approx(before["kl_coef"] * (1 + error * 16 / 100))


@pytest.mark.line(12)
def test_filters_are_warned_about(base, tmp_path, capsys):
    ppo(base, tmp_path / "a", "--ppo.top_p=0.9", "--ppo.iterations=1")
    assert "drawn from another distribution than the one that is scored" in capsys.readouterr().out


@pytest.mark.line(20)
def test_scores_of_the_sft_model_have_mean_0_and_deviation_1(base, tmp_path):
    """Fresh samples of the SFT model, read one row at a time; calibrated on 320 prompts."""
    out = tmp_path / "many"
    train.main([f"--base={base}", f"--out={out}", "--stages=reward", "--ppo.iterations=20"])
    config = settings.parse_args([f"--out={out}", "--stages=eval"], train.STAGES)
    machine = parallel.Machine(0, 1, torch.device("cpu"), torch.float32)
    run = folder.Run(config, machine, out, folder.prepare_tokenizer(config, out))
    prompts = [list(p.ids) for p in sources.open_source(run).prompts_to_train()[:300]]
    answers = generate(load_pretrained(base / "sft"), prompts, config.data.max_response_tokens,
                       eos_id=run.tokenizer.eos_id, seed=999).tokens
    model = load_pretrained(out / "reward", kind=ScalarModel)
    with torch.no_grad():
        rows = [torch.tensor([p + a]) for p, a in zip(prompts, answers)]
        raw = torch.stack([model(row)[0, -1] for row in rows])
    scale = json.loads((out / "reward" / "config.json").read_text())
    scores = (raw - scale["score_mean"]) / scale["score_std"]
    assert abs(scores.mean().item()) < 3 / 300 ** 0.5 and abs(scores.std().item() - 1) < 0.2
    assert abs(raw.mean().item()) > 0.2 or abs(raw.std().item() - 1) > 0.2, (
        "the raw scores need the calibration, or nothing is tested")


@pytest.mark.line(20)
def test_a_reward_model_ten_times_as_large_gives_the_same_run(base, tmp_path):
    """The scale is taken out of the scores and out of the critic that starts from them."""
    other = tmp_path / "base"
    shutil.copytree(base, other)
    model = load_pretrained(other / "reward", kind=ScalarModel)
    with torch.no_grad():
        model.score.weight *= 10
    scale = json.loads((base / "reward" / "config.json").read_text())
    run_tokenizer = data.Tokenizer(base / "tokenizer.model")
    save_pretrained(model, other / "reward", run_tokenizer, None, {"score_mean": scale["score_mean"] * 10, "score_std": scale["score_std"] * 10})
    first, second = ppo(base, tmp_path / "a"), ppo(other, tmp_path / "b")
    for x, y in zip(first[0], second[0]):
        assert x == pytest.approx(y, abs=1e-4, rel=1e-3)
    assert all(torch.allclose(first[1][k], second[1][k], atol=1e-5) for k in first[1])


@pytest.mark.line(15)
def test_bfloat16_run_follows_the_float32_run(base, tmp_path):
    """Every loss of SFT within 3 %, at the end within 1 %; weights are saved as float32."""
    train.main([*golden.FLAGS, f"--out={tmp_path / 'a'}", "--stages=sft", "--dtype=bfloat16"])
    exact = [row["loss"] for row in golden.lines(base / "metrics.jsonl") if row["stage"] == "sft"]
    rounded = [row["loss"] for row in golden.lines(tmp_path / "a" / "metrics.jsonl")]
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.03) and rounded[-1] == pytest.approx(exact[-1], rel=0.01)
    assert {x.dtype for x in read_safetensors(tmp_path / "a" / "sft" / "model.safetensors").values()} == {torch.float32}
    rows, _ = ppo(base, tmp_path / "b", "--dtype=bfloat16")
    plain, _ = ppo(base, tmp_path / "c")
    assert all(row["rollout_logprob_diff"] < 0.2 for row in rows) and abs(rows[0]["kl"]) < 1e-4
    assert rows[0]["entropy"] == pytest.approx(plain[0]["entropy"], rel=0.1)


@pytest.mark.line(25)
def test_resume_restores_what_adapts(base, tmp_path, monkeypatch):
    """kl_coef, the running moments of the reward, the cursor into the demonstrations, the warm-up's count."""
    flags = ["--ppo.kl_target=0.05", "--ppo.kl_horizon=100", "--ppo.score_scale=running", "--ppo.ptx_coef=0.5", "--ppo.critic_warmup=1", "--ppo.iterations=4"]
    whole = ppo(base, tmp_path / "whole", *flags)
    keep = folder.keep

    def killed(run, stage, step, *rest):
        keep(run, stage, step, *rest)
        if step == 3:
            raise KeyboardInterrupt
    monkeypatch.setattr(train, "keep", killed)
    with pytest.raises(KeyboardInterrupt):
        ppo(base, tmp_path / "killed", *flags, "--checkpoint_every=8")
    monkeypatch.undo()
    resumed = ppo(base, tmp_path / "killed", *flags, "--checkpoint_every=8", "--resume")
    assert resumed[0] == whole[0] and equal(resumed[1], whole[1]) and len({row["kl_coef"] for row in whole[0]}) == 4


# ---------------------------------------------------------------------------------------------
# Sharded: killed and resumed

KILLER = """
import os, sys
sys.path.insert(0, {root!r})
import train
keep = train.keep
def killed(run, stage, step, *rest):
    keep(run, stage, step, *rest)
    if (stage, step) == ({stage!r}, {step}):
        os._exit(0)  # without a word, all ranks at once
train.keep = killed
train.main(sys.argv[1:])
"""


def torchrun(script: str, *flags: str) -> None:
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, *golden.FLAGS, "--checkpoint_every=3", *flags],
                          cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.line(25)
def test_sharded_resume_is_exact(tmp_path):
    """Two processes, killed within PPO and resumed by two: the same bytes; by one: the same numbers to rounding."""
    torchrun("train.py", f"--out={tmp_path / 'whole'}")
    script = tmp_path / "killer.py"
    script.write_text(KILLER.format(root=str(ROOT), stage="ppo", step=2))
    torchrun(str(script), f"--out={tmp_path / 'two'}")
    assert not (tmp_path / "two" / "ppo").exists()
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    torchrun("train.py", f"--out={tmp_path / 'two'}", "--resume")
    train.main([*golden.FLAGS, f"--out={tmp_path / 'one'}", "--resume"])

    def numbers(name: str) -> tuple[list[dict], dict]:
        results = json.loads((tmp_path / name / "eval.json").read_text())
        results.pop("seconds")
        return metrics(tmp_path / name), results
    whole, two, one = (numbers(name) for name in ("whole", "two", "one"))
    assert two == whole
    for stage in ("sft", "reward", "ppo"):
        assert (tmp_path / "two" / stage / "model.safetensors").read_bytes() == (tmp_path / "whole" / stage / "model.safetensors").read_bytes()
    for x, y in zip(one[0], whole[0]):
        assert x == pytest.approx(y, abs=1e-4, rel=1e-3)
