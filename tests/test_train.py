"""The command: its flags, the files it leaves, resuming, and what it says to input it cannot use."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import golden
import train
from model import Transformer
from weights.loading import load_pretrained
from weights.export import save_pretrained
from run import checkpoints, progress, settings

ROOT = Path(__file__).parents[1]


def differences(a, b, where: str = "") -> list[str]:
    """List where result a differs from b by more than rounding on another processor; a may know more than b."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() >= b.keys():
        return [text for key in b for text in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [text for i in range(len(a)) for text in differences(a[i], b[i], f"{where}/{i}")]
    if isinstance(a, float) and isinstance(b, (int, float)):
        return (
            [] if math.isclose(a, b, rel_tol=2e-3, abs_tol=2e-4) else [f"{where}: {a} is not {b}"]
        )
    return [] if a == b else [f"{where}: {a!r} is not {b!r}"]


def test_golden_run(finished):
    assert not differences(finished[1], json.loads(golden.FILE.read_text()))


def test_twice_is_the_same_to_the_last_digit(finished, tmp_path):
    assert golden.tiny_run(tmp_path / "b") == finished[1], (
        "checkpoints do not disturb a run, and it repeats"
    )


def test_another_seed_is_another_run(finished, tmp_path):
    assert golden.tiny_run(tmp_path / "b", "--seed=1") != finished[1]


@pytest.mark.line(25)
@pytest.mark.parametrize("stage,step", [("sft", 24), ("reward", 4), ("ppo", 2)])
def test_resume_is_exact(finished, tmp_path, monkeypatch, stage, step):
    """Killed right after a step, at a checkpoint or past it, a resumed run ends as the run that was never killed."""
    keep = checkpoints.keep

    def killed(run, name, number, *rest):
        keep(run, name, number, *rest)
        if (name, number) == (stage, step):
            checkpoints.settle(run)
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "keep", killed)
    with pytest.raises(KeyboardInterrupt):
        golden.tiny_run(tmp_path / "b", "--checkpoint_every=3")
    monkeypatch.undo()
    assert golden.tiny_run(tmp_path / "b", "--checkpoint_every=3", "--resume") == finished[1]


def test_files_of_a_run(finished):
    out, _ = finished
    assert {path.name for path in out.iterdir() if path.suffix != ".png"} == {
        "config.json",
        "metrics.jsonl",
        "samples.jsonl",
        "to_rank.jsonl",
        "ranked.jsonl",
        "tokenizer.model",
        "sft",
        "top",
        "reward",
        "ppo",
        "heldout.jsonl",
        "answers.jsonl",
        "eval.json",
        "report.md",
        "seconds.json",
        "checksums.json",
    }
    for name in ("sft", "reward", "ppo"):
        assert {path.name for path in (out / name).iterdir()} >= {
            "config.json",
            "model.safetensors",
            "tokenizer.model",
        }
    rows = golden.lines(out / "metrics.jsonl")
    assert {row["stage"] for row in rows} == {"sft", "top", "reward", "ppo"}
    for name in ("loss", "tokens_per_second", "grad_norm", "lr"):
        assert all(name in row for row in rows if row["stage"] != "ppo")
    wanted = {
        "score_mean",
        "score_std",
        "kl",
        "kl_per_token",
        "kl_coef",
        "entropy",
        "response_length",
        "cut_off",
        "approx_kl",
        "clip_fraction",
        "ratio_max",
        "value_loss",
        "explained_variance",
        "advantage_mean",
        "advantage_std",
        "actor_grad_norm",
        "critic_grad_norm",
        "rollout_logprob_diff",
        "seconds_rollout",
        "seconds_update",
        "tokens_per_second",
        "lr",
    }
    assert wanted <= rows[-1].keys()
    assert all(row["rollout_logprob_diff"] < 1e-4 for row in rows if row["stage"] == "ppo")
    results = json.loads((out / "eval.json").read_text())
    assert (
        list(results["models"]) == ["sft", "top", "best-of-5", "ppo"]
        and len(results["models"]["ppo"]["general"]["tasks"]) == 12
    )
    assert results["head_to_head"]["ppo_vs_sft"].keys() >= {"win", "tie", "loss"} and results[
        "reward_model"
    ].keys() == {"accuracy", "in_domain", "general"}
    assert results["seconds"].keys() == set(train.STAGES)


def test_another_run_can_build_on_the_stages_of_this_one(finished, tmp_path):
    out, numbers = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    train.main([f"--base={out}", f"--out={tmp_path / 'b'}", "--stages=ppo,eval", "--ppo.kl_coef=0"])
    config = json.loads((tmp_path / "b" / "config.json").read_text())["config"]
    assert (
        config["model.dim"] == 32 and config["ppo.kl_coef"] == 0 and config["ppo.iterations"] == 3
    )
    results = json.loads((tmp_path / "b" / "eval.json").read_text())
    assert results["models"]["sft"] == numbers["eval"]["models"]["sft"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    train.main([f"--base={tmp_path / 'b'}", f"--out={tmp_path / 'd'}", "--stages=eval"])
    assert json.loads((tmp_path / "d" / "eval.json").read_text())["models"] == results["models"], (
        "a base's base counts too"
    )
    train.main([f"--config={out / 'config.json'}", f"--out={tmp_path / 'c'}", "--stages=sft"])
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            load_pretrained(out / "sft").parameters(),
            load_pretrained(tmp_path / "c" / "sft").parameters(),
        )
    )


def test_a_smaller_reward_model_gets_its_own_sft(finished, tmp_path):
    out, _ = finished
    train.main(
        [
            f"--base={out}",
            f"--out={tmp_path / 'b'}",
            "--stages=reward,ppo",
            "--reward.dim=16",
            "--reward.n_layers=1",
            "--reward.n_heads=2",
        ]
    )
    assert json.loads((tmp_path / "b" / "reward" / "config.json").read_text())["hidden_size"] == 16
    assert json.loads((tmp_path / "b" / "ppo" / "config.json").read_text())["hidden_size"] == 32


# ---------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_rows_of_like_length_share_a_microbatch(finished, tmp_path, monkeypatch, stage):
    """Whatever order and micro-batches the rows of a step have, the step is the same."""
    update = train.update
    masks, steps = [], []  # of every micro-batch of a step; losses and norms of every run

    def look(model, optimizer, terms, *rest):
        masks.append([batch.attention_mask for batch in terms[0].batches])
        return update(model, optimizer, terms, *rest)

    monkeypatch.setattr(train, "update", look)
    tokens = 150 if stage == "sft" else 500
    for limits in ([], ["microbatch_size=5"], [f"microbatch_tokens={tokens}"]):
        masks.clear()
        out = tmp_path / str(len(steps))
        train.main([f"--base={finished[0]}", f"--out={out}", f"--stages={stage}",
                    f"--{stage}.batch_size=16", *(f"--{stage}.{limit}" for limit in limits),
                    f"--{stage}.epochs=0.1" if stage == "sft" else "--reward.epochs=2"])
        rows = golden.lines(out / "metrics.jsonl")
        steps.append([x for row in rows for x in (row["loss"], row["grad_norm"])])
        if limits == ["microbatch_size=5"]:
            widths = [[mask.size(1) for mask in step] for step in masks]
            assert all(widths == sorted(widths) for widths in widths)
            assert any(widths[0] < 0.9 * widths[-1] for widths in widths), "or nothing is tested"
    assert len(steps[0]) > 6 and steps[1:] == [pytest.approx(steps[0], rel=2e-3)] * 2
    assert all(1 < len(step) < 16 and max(mask.sum() for mask in step) <= tokens for step in masks)


def test_flags_are_frozen():
    """Flags are an interface: whoever changes one changes flags.txt with it, and sees that scripts will break."""
    now = [
        f"--{flag}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for flag, value in settings.flatten(settings.Config()).items()
    ]
    now += [
        f"with --model: --{flag}={settings.shown(value)}"
        for flag, value in settings.PRETRAINED_DEFAULTS.items()
    ]
    assert now == Path(__file__).with_name("flags.txt").read_text().splitlines()


def test_help_explains_every_flag():
    lines = settings.usage(train.__doc__, train.STAGES).splitlines()
    for flag in settings.flag_types():
        (line,) = [line for line in lines if line.strip().startswith(f"--{flag}=")]
        assert len(line.split(None, 1)) == 2 and re.search("[a-z]{4}", line.split(None, 1)[1]), (
            f"--{flag} has no comment"
        )


def test_values_are_read_by_type():
    config = settings.parse_args(
        [
            "--ppo.kl_coef=0.5",
            "--seed=7",
            "--reward.temperatures=0.5,1",
            "--data.skip_bad=True",
            "--stages=ppo,eval",
        ],
        train.STAGES,
    )
    assert (config.ppo.kl_coef, config.seed, config.reward.temperatures, config.data.skip_bad) == (
        0.5,
        7,
        (0.5, 1.0),
        True,
    )
    assert config.stages == ("ppo", "eval")
    assert settings.unflatten(settings.flatten(config)) == config


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--ppo.kl_cof=1"], "unknown flag --ppo.kl_cof"),
        (["--kl_coef=1"], "did you mean --ppo.kl_coef"),
        (["ppo.kl_coef=1"], "flags are written"),
        (["--ppo.kl_coef", "1"], "flags are written"),
        (["--ppo.kl_coef=high"], "expected float"),
        (["--seed=1.5"], "expected int"),
        (["--data.skip_bad=1"], "expected true or false"),
        (["--ppo.kl_in=loss"], "use k2"),
        (["--ppo.whiten_advantages=local"], "use global, rank or off"),
        (["--ppo.kl_kind=k9"], "use k1, k2, k3 or abs"),
        (["--stages=ppo,sft"], "in this order"),
        (["--stages=train"], "give some of sft,sample,annotate,top,reward,ppo,eval"),
        (["--ppo.minibatch_size=48"], "must be a multiple"),
        (["--ppo.temperature=0"], "outside (0, 100]"),
        (["--resume"], "--resume needs --out"),
        (["--dtype=half"], "use auto, float32 or bfloat16"),
        (["--reward.temperatures=1"], "at least two"),
        (["--config=none.json"], "none.json"),
        (["--base=none"], "--base=none: not the folder of a run"),
        (["--model=no/such", "--sft.data=x"], "no/such"),
        (["--sft.data=x.json"], "give --model=DIR"),
        (["--model.n_heads=3"], "n_heads"),
    ],
)
def test_impossible_flags(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        train.main(flags)
    assert message in str(error.value)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize(
    "name,batch,epochs",
    [("sft", "sft", "sft"), ("reward", "reward", "reward"), ("top", "sft", "top"), ("reward_sft", "sft", "sft")],
)
def test_too_few_steps_are_told(name, batch, epochs):
    said = []
    run = SimpleNamespace(say=said.append)
    progress.tell_of_few_steps(run, name, 100, 10)
    assert not said
    progress.tell_of_few_steps(run, name, 100, 9)
    assert said == [f"{name}: 100 examples are 9 optimizer steps, from which little is learnt: lower "
                    f"--{batch}.batch_size or raise --{epochs}.epochs"]
    flags = settings.flag_types()
    assert f"{batch}.batch_size" in flags and f"{epochs}.epochs" in flags


# ---------------------------------------------------------------------------------------------
# Input that cannot be used: one line, status 2, nothing touched


@pytest.fixture(scope="module")
def files(finished, tmp_path_factory) -> Path:
    """A model folder (the tiny run's), data for it, and ways in which each can be wrong."""
    folder = tmp_path_factory.mktemp("files")
    shutil.copytree(finished[0] / "sft", folder / "model")
    (folder / "nomodel").mkdir()
    rows = [{"prompt": f"Copy: cat dog {i}", "response": f"cat dog {i}"} for i in range(80)]
    (folder / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "empty.jsonl").write_text("")
    (folder / "bad.jsonl").write_text(
        '{"prompt": "Copy: cat dog", "response": "cat dog"}\n{"prompt": "Copy'
    )
    (folder / "long.jsonl").write_text(
        '{"prompt": "Copy: cat dog"}\n{"prompt": "Copy:' + " cat" * 500 + '"}\n'
    )
    shutil.copytree(folder / "model", folder / "small")
    save_pretrained(
        Transformer(replace(load_pretrained(folder / "model").config, vocab_size=600)),
        folder / "small",
    )
    return folder


REAL = [
    "--model={f}/model",
    "--sft.data={f}/good.jsonl",
    "--ppo.prompts={f}/good.jsonl",
    "--data.template=plain",
    "--data.max_prompt_tokens=60",
    "--data.max_response_tokens=12",
]
BAD_INPUT = [
    (["--sft.data={f}/none.jsonl"], "--sft.data={f}/none.jsonl: no such file"),
    (["--ppo.prompts={f}/empty.jsonl"], "--ppo.prompts={f}/empty.jsonl: the file is empty"),
    (["--sft.data={f}/bad.jsonl"], "{f}/bad.jsonl:2: "),
    (["--model={f}/nomodel"], "{f}/nomodel"),
    (["--model={f}/small"], "640 pieces, the model only 600"),
    (["--data.max_prompt_tokens=512"], "exceeds the context of the model: 128"),
    (
        ["--stages=ppo", "--base={run}", "--ppo.prompts={f}/long.jsonl"],
        "{f}/long.jsonl:2: a prompt of",
    ),
    (["--sft.dat=x"], "unknown flag --sft.dat"),
]


@pytest.mark.parametrize("flags,message", BAD_INPUT, ids=[message for _, message in BAD_INPUT])
def test_bad_input_gets_one_line(finished, files, tmp_path, flags, message):
    out = tmp_path / "out"
    flags = [text.format(f=files, run=finished[0]) for text in [*REAL, f"--out={out}", *flags]]
    done = subprocess.run(
        [sys.executable, "train.py", *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert message.format(f=files) in done.stderr.splitlines()[-1] and done.stderr.splitlines()[
        -1
    ].startswith("train.py: error: ")
    assert not (out / "sft").exists()


def test_a_run_never_overwrites(finished):
    out, _ = finished
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for flags in ([], ["--stages=sft"], ["--stages=ppo,eval"], ["--seed=4"]):
        with pytest.raises(
            ValueError, match="exists: name a fresh --out, or continue with --resume"
        ):
            train.main([f"--out={out}", *flags])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_without_a_name_a_run_takes_a_fresh_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train.main([*golden.FLAGS, "--stages=sft", "--sft.examples=64", "--sft.epochs=1"])
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["001", "002"]


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--sft.batch_size=63"], "cannot be shared by 2 processes"),
        (["--ppo.kl=1"], "unknown flag --ppo.kl"),
    ],
)
def test_torchrun_shows_one_line_too(tmp_path, flags, message):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "train.py",
            f"--out={tmp_path / 'a'}",
            *flags,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "train.py: error: " in line]
    assert message in line and not (tmp_path / "a").exists()


# ---------------------------------------------------------------------------------------------
# Real input


def test_people_rank(finished, files, tmp_path):
    """Given files instead of the world: sampling stops for people, and their ranks are read back."""
    out = tmp_path / "real"
    flags = [text.format(f=files) for text in REAL] + [
        f"--out={out}",
        "--sft.batch_size=16",
        "--reward.batch_size=4",
        "--ppo.batch_size=8",
        "--ppo.minibatch_size=8",
        "--ppo.iterations=2",
        "--sft.lr=1e-3",
        "--eval.holdout=8",
        "--reward.sampled_prompts=20",
    ]
    train.main(flags)
    assert not (out / "ranked.jsonl").exists()
    with pytest.raises(ValueError, match=r"to_rank.jsonl:1: \"ranks\" must be a list of 5 numbers"):
        train.main([f"--out={out}", "--stages=annotate,reward,ppo,eval"])
    rows = golden.lines(out / "to_rank.jsonl")
    for i, row in enumerate(rows):
        row["ranks"] = [1 + len(set(text)) * i % 3 for text in row["responses"]]
        row["ranks"][0] = 9
    (out / "to_rank.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train.main([f"--out={out}", "--stages=annotate,reward,ppo,eval"])
    results = json.loads((out / "eval.json").read_text())
    assert results["models"]["ppo"]["in_domain"]["n"] == 8
