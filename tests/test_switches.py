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
from run import checkpoints, folder, settings, sources
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


# By stage: what a short run of it needs.
SHORT = {
    "sft": ["--stages=sft", "--sft.examples=96", "--sft.batch_size=32", "--sft.epochs=1"],
    "sample": ["--stages=sample", "--reward.sampled_prompts=8"],
    "annotate": ["--stages=annotate"],
    "top": ["--stages=top", "--sft.batch_size=8"],
    "reward": ["--stages=reward", "--reward.epochs=1", "--reward.batch_size=8"],
    "ppo": ["--stages=ppo", "--ppo.iterations=2", "--data.max_response_tokens=8"],
    "eval": ["--stages=eval", "--eval.in_domain=8", "--eval.general=12"],
}

# stage, flag, and where its effect must show: a number of metrics.jsonl, or a file
REACHES = [
    ("sft", "sft.examples=128", "lr"), ("sft", "sft.in_domain_share=0.1", "loss"),
    ("sft", "sft.epochs=2", "lr"), ("sft", "sft.batch_size=16", "lr"), ("sft", "sft.lr=1e-3", "lr"),
    ("sft", "sft.lr_end=0.5", "lr"), ("sft", "sft.warmup=0.7", "lr"),
    ("sft", "sft.weight_decay=50", "loss"), ("sft", "sft.max_grad_norm=1e-6", "loss"),
    ("sample", "reward.sampled_prompts=9", "to_rank.jsonl"),
    ("sample", "reward.in_domain_share=0.1", "to_rank.jsonl"),
    ("sample", "reward.temperatures=0.7,1,1,1,1.2", "to_rank.jsonl"),
    ("sample", "reward.top_p=0.5", "to_rank.jsonl"), ("sample", "seed=3", "to_rank.jsonl"),
    ("sample", "data.max_response_tokens=5", "to_rank.jsonl"),
    ("annotate", "reward.noise=0.5", "ranked.jsonl"), ("annotate", "seed=3", "ranked.jsonl"),
    ("top", "top.epochs=1", "lr"), ("top", "top.lr=1e-4", "lr"), ("top", "sft.lr_end=0.5", "lr"),
    ("top", "reward.holdout=0.6", "lr"),
    ("reward", "reward.holdout=0.6", "lr"), ("reward", "reward.epochs=2", "lr"),
    ("reward", "reward.batch_size=4", "lr"), ("reward", "reward.lr=1e-4", "lr"),
    ("reward", "reward.lr_end=0.5", "lr"), ("reward", "reward.warmup=0.9", "lr"),
    ("reward", "reward.weight_decay=50", "loss"), ("reward", "reward.max_grad_norm=1e-6", "loss"),
    ("reward", "reward.dim=16", "loss"),
    ("ppo", "ppo.critic_init=actor", "value_loss"), ("ppo", "ppo.ptx_coef=0.5", "ptx_loss"),
    ("ppo", "ppo.score_scale=running", "reward_mean"), ("ppo", "ppo.score_scale=none", "score_mean"),
    ("ppo", "ppo.score_clip=0.2", "reward_mean"), ("ppo", "ppo.missing_eos=override", "reward_mean"),
    ("ppo", "ppo.entropy_coef=0.5", "actor_grad_norm"),
    ("ppo", "ppo.loss_average=sequences", "actor_grad_norm"),
    ("ppo", "ppo.whiten_advantages=off", "actor_grad_norm"),
    ("ppo", "ppo.value_clip_range=0", "value_loss"), ("ppo", "ppo.kl_kind=k3", "reward_mean"),
    ("ppo", "ppo.clip_range=0.001", "clip_fraction"), ("ppo", "ppo.temperature=0.5", "entropy"),
    ("ppo", "ppo.in_domain_share=0.1", "score_mean"), ("ppo", "ppo.epochs=3", "approx_kl"),
    ("ppo", "ppo.minibatch_size=16", "approx_kl"), ("ppo", "ppo.lr=1e-3", "approx_kl"),
    ("ppo", "ppo.critic_lr=1e-2", "critic_lr"), ("ppo", "ppo.lr_end=0.5", "critic_lr"),
    ("ppo", "ppo.warmup=1", "lr"), ("ppo", "ppo.weight_decay=100", "value_loss"),
    ("ppo", "ppo.max_grad_norm=1e-6", "approx_kl"), ("ppo", "ppo.reward=function", "score_mean"),
    ("ppo", "ppo.kl_coef=3", "reward_mean"), ("ppo", "ppo.gamma=0.5", "return_mean"),
    ("ppo", "ppo.gae_lambda=0.5", "return_mean"), ("ppo", "ppo.eos_penalty=3", "reward_mean"),
    ("ppo", "ppo.top_k=2", "score_mean"), ("ppo", "ppo.top_p=0.5", "score_mean"),
    ("ppo", "ppo.responses_per_prompt=4", "score_mean"), ("ppo", "seed=3", "score_mean"),
    ("eval", "eval.in_domain=9", "eval.json"), ("eval", "eval.general=14", "eval.json"),
    ("eval", "eval.reference=ppo", "eval.json"), ("eval", "eval.best_of=2", "eval.json"), ("eval", "eval.models=sft", "eval.json"),
    ("eval", "eval.show=1", "report.md"), ("eval", "data.max_response_tokens=1", "eval.json"),
]


def effects(base: Path, out: Path, stage: str, *flags: str) -> dict[str, object]:
    """Run a stage; return what it logged, by number, and what it left, by file."""
    train.main([f"--base={base}", f"--out={out}", *SHORT[stage], *flags])
    rows = metrics(out) if (out / "metrics.jsonl").exists() else []
    assert all(math.isfinite(value) for row in rows for value in row.values())
    found = {name: [row.get(name) for row in rows] for row in rows for name in row}
    for name in ("to_rank.jsonl", "ranked.jsonl", "report.md", "eval.json"):
        if (out / name).exists():
            text = (out / name).read_text()
            found[name] = text
    if "eval.json" in found:
        results = json.loads(found["eval.json"])
        results.pop("seconds")
        found["eval.json"] = results
        # the examples alone: the rest tells times
        found["report.md"] = found["report.md"].partition("## Examples")[2]
    return found


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory) -> dict[str, dict[str, object]]:
    """What every stage does without further flags."""
    out = tmp_path_factory.mktemp("plain")
    return {stage: effects(base, out / stage, stage) for stage in SHORT}


@pytest.mark.parametrize("stage,flag,seen", REACHES, ids=[flag for _, flag, _ in REACHES])
def test_every_switch_reaches_the_run(base, plain, tmp_path, stage, flag, seen):
    """It changes the number it should act on, and no switch stops a run."""
    switched = effects(base, tmp_path / "run", stage, f"--{flag}")
    assert switched[seen] and switched[seen] != plain[stage].get(seen)


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
    run_tokenizer = data.open_tokenizer(base / "tokenizer.model")
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
    keep = checkpoints.keep

    def killed(run, stage, step, *rest):
        keep(run, stage, step, *rest)
        if step == 3:
            checkpoints.settle(run)
            raise KeyboardInterrupt
    monkeypatch.setattr(train, "keep", killed)
    with pytest.raises(KeyboardInterrupt):
        ppo(base, tmp_path / "killed", *flags, "--checkpoint_every=8")
    assert golden.lines(tmp_path / "killed" / "samples.jsonl")[-1]["step"] == 3
    assert [path.name for path in (tmp_path / "killed/checkpoints/ppo").iterdir()] == ["000002"]
    monkeypatch.undo()
    resumed = ppo(base, tmp_path / "killed", *flags, "--checkpoint_every=8", "--resume")
    assert resumed[0] == whole[0] and equal(resumed[1], whole[1]) and len({row["kl_coef"] for row in whole[0]}) == 4
    # the kill came after an iteration that no checkpoint holds: it is taken and logged again, once
    rows = [golden.lines(tmp_path / "killed" / name) for name in ("metrics.jsonl", "samples.jsonl")]
    assert [row["step"] for row in rows[0]] == [1, 2, 3, 4]
    assert [row["step"] for row in rows[1]] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert rows[1] == golden.lines(tmp_path / "whole" / "samples.jsonl")


# ---------------------------------------------------------------------------------------------
# Sharded: killed and resumed

KILLER = """
import os, sys
sys.path.insert(0, {root!r})
import train
from run.checkpoints import settle
keep = train.keep
def killed(run, stage, step, *rest):
    keep(run, stage, step, *rest)
    if (stage, step) == ({stage!r}, {step}):
        settle(run)
        os._exit(0)  # without a word, all ranks at once
train.keep = killed
train.main(sys.argv[1:])
"""


# Batches so small that each stage needs several, none of them full.
SMALL = ["--sft.microbatch_size=9", "--reward.microbatch_size=3", "--reward.generation_batch=7",
         "--ppo.microbatch_size=3", "--ppo.microbatch_tokens=60", "--ppo.generation_batch=5",
         "--checkpoint_every=3"]


def torchrun(script: str, *flags: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, script, *golden.FLAGS, *SMALL, *flags], cwd=ROOT,
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """The run of `base` by two processes in small batches."""
    out = tmp_path_factory.mktemp("sharded") / "whole"
    torchrun("train.py", f"--out={out}")
    return out


def results_of(out: Path) -> dict:
    results = json.loads((out / "eval.json").read_text())
    results.pop("seconds")
    return results


def flat(content: object, where: str = "") -> dict[str, object]:
    """Return the leaves of a JSON object by their path."""
    if isinstance(content, dict):
        children = content.items()
    elif isinstance(content, list):
        children = enumerate(content)
    else:
        return {where: content}
    found = {}
    for key, child in children:
        found |= flat(child, f"{where}/{key}")
    return found


def assert_close(a: object, b: object) -> None:
    """Compare JSON objects, their numbers to rounding."""
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for key, value in a.items():
        is_number = isinstance(value, float)
        assert b[key] == (pytest.approx(value, abs=1e-4, rel=1e-3) if is_number else value), key


@pytest.mark.line(17)
@pytest.mark.parametrize("name", ["to_rank.jsonl", "ranked.jsonl", "heldout.jsonl",
                                  "answers.jsonl", "samples.jsonl", "metrics.jsonl"])
def test_two_processes_leave_the_lines_of_one(base, sharded, name):
    """Whoever draws, ranks, scores and answers, and in batches of whatever size."""
    if name == "metrics.jsonl":
        assert_close(metrics(sharded), metrics(base))
    else:
        assert_close(golden.lines(sharded / name), golden.lines(base / name))


@pytest.mark.line(17)
def test_two_processes_leave_the_numbers_of_one(base, sharded):
    assert_close(results_of(sharded), results_of(base))
    scales = [json.loads((out / "reward" / "config.json").read_text()) for out in (base, sharded)]
    assert_close(*scales)
    assert 0 < scales[0]["holdout_accuracy"]["accuracy"] < 1 and scales[0]["score_std"] != 1


@pytest.mark.line(25)
def test_sharded_resume_is_exact(base, sharded, tmp_path):
    """Two processes, killed within PPO and resumed by two: the same bytes; by one: the same numbers
    to rounding."""
    script = tmp_path / "killer.py"
    script.write_text(KILLER.format(root=str(ROOT), stage="ppo", step=2))
    torchrun(str(script), f"--out={tmp_path / 'two'}")
    assert not (tmp_path / "two" / "ppo").exists()
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    torchrun("train.py", f"--out={tmp_path / 'two'}", "--resume")
    train.main([*golden.FLAGS, f"--out={tmp_path / 'one'}", "--resume"])

    assert metrics(tmp_path / "two") == metrics(sharded)
    assert results_of(tmp_path / "two") == results_of(sharded)
    for stage in ("sft", "reward", "ppo"):
        file = Path(stage, "model.safetensors")
        assert (tmp_path / "two" / file).read_bytes() == (sharded / file).read_bytes()
    assert_close(metrics(tmp_path / "one"), metrics(sharded))
