"""Settings: which of several sources a value is taken from, and that no flag is dead."""
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import model
import train
from formats.files import read_jsonl
from run import settings

SMALLEST = ["--model.dim=32", "--model.n_layers=1", "--model.n_heads=2", "--model.n_kv_heads=1",
            "--model.ffn_dim=32", "--sft.examples=64", "--sft.batch_size=16", "--sft.epochs=1",
            "--data.max_response_tokens=6", "--reward.sampled_prompts=24", "--reward.batch_size=8",
            "--reward.epochs=1", "--ppo.iterations=2", "--ppo.batch_size=8",
            "--ppo.minibatch_size=4", "--ppo.epochs=1", "--eval.in_domain=6", "--eval.general=12",
            "--reward.holdout=0.3", "--checkpoint_every=1"]


# ---------------------------------------------------------------------------------------------
# Precedence

def leave_run(folder: Path, **values: Any) -> Path:
    """Write the config.json of a run that had these settings; "__" stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = settings.flatten(settings.Config())
    flat |= {name.replace("__", "."): value for name, value in values.items()}
    (folder / "config.json").write_text(json.dumps({"config": flat}))
    return folder


@pytest.fixture
def runs(tmp_path) -> dict[str, str]:
    """Flags that name three earlier runs, which tell themselves apart by kl_coef."""
    return {"base": f"--base={leave_run(tmp_path / 'base', ppo__kl_coef=2.0, seed=2)}",
            "out": f"--out={leave_run(tmp_path / 'out', ppo__kl_coef=3.0, seed=3)}",
            "config": f"--config={leave_run(tmp_path / 'file', ppo__kl_coef=4.0) / 'config.json'}",
            "given": "--ppo.kl_coef=5", "fresh": f"--out={tmp_path / 'fresh'}"}


@pytest.mark.parametrize("names,kl_coef", [
    ([], 0.15), (["base"], 2.0), (["out"], 3.0), (["config"], 4.0), (["given"], 5.0),
    (["out", "base"], 3.0), (["base", "out"], 3.0), (["fresh", "base"], 2.0),
    (["base", "config"], 4.0), (["config", "out"], 4.0), (["base", "out", "config"], 4.0),
    (["given", "base", "out", "config"], 5.0), (["base", "given"], 5.0)], ids=str)
def test_the_nearest_setting_counts(runs, names, kl_coef):
    """The command line, then --config, then the run in --out, then the one in --base."""
    config = settings.parse_args([runs[name] for name in names], train.STAGES)
    assert config.ppo.kl_coef == kl_coef


def test_sources_are_not_mixed(runs):
    """A setting that the nearest run does not name is a default, not that of a run further off."""
    folder = Path(runs["out"].removeprefix("--out="))
    content = json.loads((folder / "config.json").read_text())
    del content["config"]["seed"]
    (folder / "config.json").write_text(json.dumps(content))
    config = settings.parse_args([runs["base"], runs["out"]], train.STAGES)
    assert (config.seed, config.ppo.kl_coef) == (0, 3.0)


PER_CALL_VALUES = {"out": "elsewhere", "stages": ["ppo"], "resume": True,
                   "resume_with_changes": True, "plan": True, "ranks": 3, "gpu_memory": 7.0}


@pytest.mark.parametrize("name", ["base", "out", "config"])
def test_what_speaks_of_one_call_is_not_handed_on(tmp_path, name):
    assert PER_CALL_VALUES.keys() == set(settings.PER_CALL)
    folder = leave_run(tmp_path / "run", **PER_CALL_VALUES, ppo__gamma=0.9)
    value = folder / "config.json" if name == "config" else folder
    config = settings.parse_args([f"--{name}={value}"], train.STAGES)
    assert config.ppo.gamma == 0.9
    assert config.stages == tuple(train.STAGES) and not config.resume and not config.plan
    defaults = settings.Config()
    assert (config.ranks, config.gpu_memory) == (defaults.ranks, defaults.gpu_memory)
    assert config.out == (str(folder) if name == "out" else "")


def test_what_a_pretrained_model_needs_does_not_undo_the_runs_own(watched, tmp_path):
    model_folder = watched["out"] / "world" / "sft"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    flags = [f"--model={model_folder}", f"--ppo.prompts={prompts}", "--stages=ppo",
             "--data.max_prompt_tokens=60", "--data.max_response_tokens=12"]
    fresh = settings.parse_args(flags, train.STAGES)
    assert fresh.ppo.kl_coef == settings.PRETRAINED_DEFAULTS["ppo.kl_coef"] != 0.3
    given = settings.parse_args([*flags, "--ppo.kl_coef=0.7"], train.STAGES)
    assert given.ppo.kl_coef == 0.7
    out = leave_run(tmp_path / "out", ppo__kl_coef=3.0)
    later = settings.parse_args([*flags, f"--out={out}"], train.STAGES)
    assert later.ppo.kl_coef == 3.0


# ---------------------------------------------------------------------------------------------
# No flag is dead

# Who reads all flags, or only to refuse or to describe them: that does not make a flag live.
BOOKKEEPING = {"flatten", "longest", "contradictions", "stage_problems", "folder_problems",
               "shape_problems", "data_problems", "check_ranks", "parse_args"}


class Watched:
    """A config, or a section of one, that notes which of its flags are read."""

    def __init__(self, target: Any, prefix: str, seen: set[str]) -> None:
        self.__dict__.update(target=target, prefix=prefix, seen=seen)

    def __getattr__(self, key: str) -> Any:
        value = getattr(self.target, key)
        if key in settings.get_type_hints(type(self.target)):
            if settings.dataclasses.is_dataclass(value):
                return Watched(value, f"{key}.", self.seen)
            if sys._getframe(1).f_code.co_name not in BOOKKEEPING:
                self.seen.add(self.prefix + key)
        return value


def watch(monkeypatch: pytest.MonkeyPatch, seen: set[str]) -> None:
    parse_args = settings.parse_args
    monkeypatch.setattr(train, "parse_args",
                        lambda *args: Watched(parse_args(*args), "", seen))
    # what is built of a section's other fields has been read by the stage that owns them
    monkeypatch.setattr(train, "replace", lambda section, **new: replace(section.target, **new))


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> dict[str, Any]:
    """A run on the world in bfloat16 and one on files; what they read, and how models ran."""
    seen: set[str] = set()
    forwards: list[tuple[str, bool]] = []  # function that is a stage, whether under autocast
    run = model.Trunk.run

    def spy(self, *args, **named):
        names, frame = set(), sys._getframe(1)
        while frame:
            names.add(frame.f_code.co_name)
            frame = frame.f_back
        stage = next(stage.run.__name__ for stage in train.STAGES.values()
                     if stage.run.__name__ in names)
        forwards.append((stage, torch.is_autocast_enabled("cpu")))
        return run(self, *args, **named)
    out = tmp_path_factory.mktemp("runs")
    files = tmp_path_factory.mktemp("files")
    rows = [{"prompt": f"Copy: {a} {b}", "response": a} for a in "abcd" for b in "efghij"]
    (files / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (files / "length.py").write_text("def score(prompt, response, answer):\n"
                                     '    return len(response) + response.count("e")\n')
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, seen)
        patch.setattr(model.Trunk, "run", spy)
        train.main([*SMALLEST, f"--out={out / 'world'}", "--dtype=bfloat16", "--eval.best_of=2",
                    "--ppo.kl_target=0.1", "--ppo.ptx_coef=0.1"])
        patch.setattr(model.Trunk, "run", run)
        train.main([f"--model={out / 'world' / 'sft'}", *SMALLEST[5:], f"--out={out / 'files'}",
                    "--data.template=plain", "--data.max_prompt_tokens=60",
                    f"--sft.data={files / 'prompts.jsonl'}", "--eval.holdout=4",
                    f"--ppo.prompts={files / 'prompts.jsonl'}",
                    f"--reward.function={files / 'length.py'}"])
    return {"seen": seen, "forwards": forwards, "out": out}


# What is read elsewhere than in a run: by the planner (test_plan.py), and before there is a run
# (test_continuing.py).
READ_ELSEWHERE = {"ranks", "gpu_memory", "resume_with_changes"}


def test_every_flag_is_read_by_a_run(watched):
    """Whatever its section: by the code that should act on it, not by checks and records alone."""
    assert settings.flag_types().keys() - watched["seen"] == READ_ELSEWHERE


def test_every_forward_of_a_bfloat16_run_is_in_bfloat16(watched):
    """In one process autocast has to be asked for; a stage that forgot would run in float32."""
    stages = {stage for stage, _ in watched["forwards"]}
    assert stages == {"run_sft", "run_sample", "run_top", "run_reward", "run_ppo", "run_eval"}
    assert {stage for stage, is_autocast in watched["forwards"] if not is_autocast} == set()


def test_a_watched_run_is_a_whole_run(watched):
    assert len(read_jsonl(watched["out"] / "world" / "metrics.jsonl")) == 4 + 2 + 2 + 2
    assert (watched["out"] / "files" / "eval.json").exists()
