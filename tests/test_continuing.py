"""A later call on a run's folder: resume means resume, and results keep the settings they were made with."""

import json
import shutil
from pathlib import Path

import pytest

import golden
import train
from run import continuing, opening, settings

FLAT = settings.flatten(settings.Config(stages=tuple(train.STAGES)))


def leave_run(folder: Path, *results: str, **more) -> Path:
    """Make what a run leaves: config.json with the default settings, and the names of results."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"config": FLAT, **more}))
    for result in results:
        (folder / result).touch()
    return folder


def call(*flags: str) -> settings.Config:
    return settings.parse_args(flags, train.STAGES)


RESULTS = {
    "sft": ["heldout.jsonl", "sft"],
    "ranked": ["heldout.jsonl", "sft", "to_rank.jsonl", "ranked.jsonl"],
    "reward": ["heldout.jsonl", "sft", "to_rank.jsonl", "ranked.jsonl", "top", "reward"],
}


@pytest.mark.parametrize("flag,old,new", [
    ("ppo.lr", "0.0004", "0.1"), ("seed", "0", "3"), ("reward.temperatures", "0.7,1.0,1.0,1.0,1.3",
                                                      "1.0,2.0"), ("dtype", "auto", "bfloat16"),
    ("ppo.kl_kind", "k1", "k3"), ("model.dim", "64", "32"), ("reward.function", "none", "f.py"),
    ("data.skip_bad", "False", "True"), ("base", "none", "BASE"), ("sft.epochs", "4.0", "5.0")])
def test_resume_with_another_flag_is_refused_by_name(tmp_path, flag, old, new):
    out = leave_run(tmp_path / "run")
    (tmp_path / "f.py").write_text("def score(prompt, response, answer): return 0.0\n")
    new = {"f.py": str(tmp_path / "f.py"), "BASE": str(leave_run(tmp_path / "base"))}.get(new, new)
    with pytest.raises(ValueError) as error:
        call(f"--out={out}", "--resume", f"--{flag}={new}")
    assert str(error.value).startswith(f"--{flag}={new}: the run in {out} has {old}: leave")
    assert "--resume_with_changes" in str(error.value) and "\n" not in str(error.value)
    config = call(f"--out={out}", "--resume_with_changes", f"--{flag}={new}")
    assert config.resume and settings.shown(settings.flatten(config)[flag]) == new


def test_all_changes_are_named_at_once(tmp_path):
    out = leave_run(tmp_path / "run", "sft")
    with pytest.raises(ValueError) as error:
        call(f"--out={out}", "--resume", "--ppo.lr=0.1", "--sft.lr=0.1", "--ppo.epochs=1")
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("flag", ["--checkpoint_every=7", "--ppo.microbatch_size=2", "--eval.show=1",
                                  "--sft.microbatch_size=2", "--reward.microbatch_tokens=99",
                                  "--reward.generation_batch=9",
                                  "--parallel.activation_checkpointing", "--ppo.lr=0.0004",
                                  "--stages=ppo", "--gpu_memory=9", "--data.template=auto"])
def test_what_cannot_change_a_result_may_be_given_to_resume(tmp_path, flag):
    """A run that ran out of memory goes on with smaller micro-batches; the same flags may be repeated."""
    out = leave_run(tmp_path / "run", *RESULTS["reward"])
    config = call(f"--out={out}", "--resume", flag)
    assert config.data.template == "plain", "auto is what it turned out to be"


@pytest.mark.parametrize("results,flag,made", [
    ("sft", "sft.lr=1", "sft"), ("sft", "seed=1", "sft"), ("sft", "model.dim=32", "sft"),
    ("sft", "eval.in_domain=7", "heldout.jsonl"), ("sft", "data.max_response_tokens=40", "sft"),
    ("ranked", "reward.temperatures=1,1", "to_rank.jsonl"), ("ranked", "reward.noise=1",
                                                             "ranked.jsonl"),
    ("ranked", "reward.sampled_prompts=50", "to_rank.jsonl"), ("reward", "reward.lr=1", "reward"),
    ("reward", "top.epochs=1", "top"), ("reward", "reward.holdout=0.2", "top")])
@pytest.mark.parametrize("resume", ["", "--resume", "--resume_with_changes"])
def test_a_finished_stage_keeps_its_settings(tmp_path, results, flag, made, resume):
    """Neither in silence nor by request: the file would say what is not so."""
    out = leave_run(tmp_path / "run", *RESULTS[results])
    with pytest.raises(ValueError) as error:
        call(f"--out={out}", f"--{flag}", "--stages=ppo", *([resume] if resume else []))
    assert f"and {made} is made with it: leave the flag out" in str(error.value)
    assert call(f"--base={out}", f"--{flag}", "--stages=ppo", f"--out={tmp_path / 'new'}")


@pytest.mark.parametrize("results,stages,flags", [
    ("sft", "sample,annotate,top,reward", "--reward.temperatures=1,1 --reward.lr=1 --top.lr=1"),
    ("ranked", "top,reward", "--reward.lr=1 --reward.holdout=0.3 --top.lr=1"),
    ("reward", "ppo", "--ppo.lr=1 --ppo.iterations=2 --ppo.kl_kind=k3 --dtype=bfloat16"),
    ("reward", "eval", "--eval.best_of=0 --eval.show=0 --export.dtype=bfloat16")])
def test_a_later_stage_may_have_settings_of_its_own(tmp_path, results, stages, flags):
    out = leave_run(tmp_path / "run", *RESULTS[results])
    config = call(f"--out={out}", f"--stages={stages}", *flags.split())
    assert ",".join(continuing.stages_to_run(train.STAGES, config, out)) == stages


def test_a_function_may_be_named_when_a_later_stage_needs_it(tmp_path):
    """People ranked; a function judges the evaluation. But who ranked is not changed."""
    out = leave_run(tmp_path / "run", *RESULTS["reward"])
    for name in "ab":
        (tmp_path / f"{name}.py").write_text("def score(prompt, response, answer): return 0.0\n")
    config = call(f"--out={out}", "--stages=ppo,eval", f"--reward.function={tmp_path / 'a.py'}")
    opening.record_config(config, out, 1)
    with pytest.raises(ValueError, match="ranked.jsonl is made with it"):
        call(f"--out={out}", "--stages=ppo,eval", f"--reward.function={tmp_path / 'b.py'}")


def test_only_a_run_is_resumed(tmp_path):
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    for folder in (missing, empty):
        with pytest.raises(ValueError, match=f"--resume: {folder} is no run to continue"):
            train.main([f"--out={folder}", "--resume"])
    assert not missing.exists() and not list(empty.iterdir())
    out = leave_run(tmp_path / "run", "sft")
    (out / "config.json").unlink()
    for flags in (["--stages=ppo"], ["--resume"]):
        with pytest.raises(ValueError, match="config.json"):
            train.main([f"--out={out}", *flags])
    assert [path.name for path in out.iterdir()] == ["sft"]


def test_what_changed_is_recorded(finished, tmp_path, capsys):
    """A refused call leaves config.json as it was; what was changed on the way stands in it."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / "ppo")
    before = (out / "config.json").read_bytes()
    for flag in ("--ppo.epochs=1", "--sft.epochs=9"):
        with pytest.raises(ValueError, match="leave the flag out"):
            train.main([f"--out={out}", "--stages=ppo", "--resume", flag])
    assert (out / "config.json").read_bytes() == before
    train.main([f"--out={out}", "--stages=ppo", "--resume_with_changes", "--ppo.epochs=1",
                "--ppo.critic_warmup=1"])
    content = json.loads((out / "config.json").read_text())
    assert content["changes"] == [{"ppo.epochs": [2, 1], "ppo.critic_warmup": [0, 1]}]
    assert content["config"]["ppo.epochs"] == 1
    assert {"ppo.epochs", "model.dim"} <= set(content["not_default"])
    assert "ppo.gamma" not in content["not_default"]
    assert len([row for row in golden.lines(out / "metrics.jsonl") if row["stage"] == "ppo"]) == 3
    capsys.readouterr()
    train.main([f"--out={out}", "--stages=sft,ppo", "--resume"])
    assert "nothing is left to do" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["changes"] == content["changes"]


def test_a_run_of_another_version(tmp_path, capsys):
    """Settings this version does not know: at their default they are named and left, else refused."""
    config = {**FLAT, "ppo.new": 2, "ppo.newer": [1]}
    del config["ppo.gamma"]
    for number, (changed, refused) in enumerate([([], ""), (["ppo.lr"], ""),
                                                 (["ppo.newer"], "ppo.newer=[1], which the run")]):
        out = leave_run(tmp_path / str(number), "sft", config=config, not_default=changed)
        if refused:
            with pytest.raises(ValueError) as error:
                call(f"--out={out}", "--resume")
            assert refused in str(error.value) and "ppo.new=2" not in str(error.value)
        else:
            assert call(f"--out={out}", "--resume").ppo.gamma == 1.0
            said = capsys.readouterr().err
            assert "no setting ppo.new=2: left out" in said and "ppo.newer=[1]: left out" in said
