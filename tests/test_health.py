"""Numbers that go wrong: a step that is not finite is not taken, and says why; bad signs are said once."""

import io
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import eval as command
import golden
import parallel
import train
from model import generate
from run import health
from train import Term, update
from weights.export import save_pretrained
from weights.loading import load_pretrained

MACHINE = parallel.Machine(rank=0, world=1, device=torch.device("cpu"), dtype=torch.float32)


class Batch(NamedTuple):
    tokens: Tensor  # (B, T)

    @property
    def count(self) -> Tensor:
        return torch.tensor(len(self.tokens))

    @property
    def attention_mask(self) -> Tensor:
        return self.tokens > 0


class Sums(nn.Module):
    """Answers every token with a weight, and token 7 with infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(10))

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        return self.weight[tokens] / (tokens != 7)


def squares(model: nn.Module, batch: Batch, scale: float = 1.0) -> tuple[Tensor, dict]:
    total = model(*batch, batch.attention_mask).square().sum() * scale
    return total, {"loss": (total.detach(), batch.count)}


SOUND, ODD = Batch(torch.tensor([[1, 2], [3, 0]])), Batch(torch.tensor([[4, 5], [7, 6], [1, 0]]))


def huge(model: nn.Module, batch: Batch) -> tuple[Tensor, dict]:
    return squares(model, batch, 1e25)


def offset(model: nn.Module, batch: Batch) -> tuple[Tensor, dict]:
    """Sound answers held against what is not finite."""
    total, stats = squares(model, batch)
    return (total * math.nan if len(batch.tokens) == 2 else total), stats


@pytest.mark.parametrize("spoilt,steps,loss,batches,message,rows", [
    ("weights", 0, squares, [ODD], "step 1, as its x_norm is not finite: the weights were not so "
     "before it: the model it starts from", []),
    ("weights", 2, squares, [SOUND, ODD], "step 3, as its x_norm is not finite: the weights were "
     "not so before it: the step before it spoilt them; lower the learning rate", []),
    ("", 0, squares, [SOUND, ODD], "not the loss of 1 of 5 samples", [[7, 6]]),
    ("", 1, offset, [ODD._replace(tokens=ODD.tokens.clamp(max=6)), SOUND],
     "not the loss of 2 of 5 samples", [[1, 2], [3]]),
    ("", 0, huge, [SOUND], "going backwards through them overflows; lower the learning rate", [])])
def test_a_step_that_is_not_finite_says_why(spoilt, steps, loss, batches, message, rows):
    model = Sums()
    optimizer = parallel.adamw(model, 0.0)
    for _ in range(steps):
        update(model, optimizer, [Term(squares, [SOUND])], 0.1, 1.0, MACHINE)
    if spoilt:
        model.weight.data[5] = math.inf
    before = model.weight.clone()
    with pytest.raises(health.NotFinite) as error:
        update(model, optimizer, [Term(loss, batches)], 0.1, 1.0, MACHINE, "x_norm")
    assert message in str(error.value) and list(error.value.rows) == rows
    assert torch.equal(model.weight, before)


def test_a_run_that_stops_names_stage_step_rank_and_samples(tmp_path, monkeypatch):
    loss = train.sft.loss
    odd = []

    def spoilt(model, batch):
        """Be NaN from the fifth batch on; once in the step, and when it is looked into."""
        odd.append(batch)
        total, stats = loss(model, batch)
        return total * (math.nan if len(odd) > 4 else 1), stats

    monkeypatch.setattr(train.sft, "loss", spoilt)
    with pytest.raises(ValueError) as error:
        train.main([*golden.FLAGS, "--stages=sft", "--sft.examples=64", "--sft.batch_size=16",
                    "--sft.microbatch_size=8", f"--out={tmp_path / 'a'}"])
    path = tmp_path / "a" / "not_finite.jsonl"
    said = str(error.value)
    assert said.startswith("sft: stopped before optimizer step 3, as its grad_norm is not finite")
    assert said.endswith(f"; they are in {path}, of rank 0") and "\n" not in said
    rows = golden.lines(path)
    assert len(rows) == 16 and {(row["stage"], row["step"], row["rank"]) for row in rows} == {
        ("sft", 3, 0)}
    assert all(len(row["text"]) > 8 for row in rows)
    assert len(golden.lines(tmp_path / "a" / "metrics.jsonl")) == 2
    assert not (tmp_path / "a" / "sft").exists()


# ---------------------------------------------------------------------------------------------
# Warnings

# the extremes of the default run, and of one without a KL penalty
QUIET = [{"loss": 6.9}, {"loss": 0.23}, {"loss": 0.71}, {"kl": 29.7}, {"cut_off": 0.05},
         {"entropy": 0.12}, {"score_mean": 1.6}, {"first_ratio_max": 1.0}]
LOUD = [("loss", [1.0, 2.4, 2.6, 9.0], "twice"), ("kl", [0, 49, 62, 70], "--ppo.kl_coef"),
        ("entropy", [0.3, 0.02, 0.009], "alike"), ("cut_off", [0.4, 0.6], "--data.max_response"),
        ("score_mean", [0.0, -6.0], "calibr|deviations"), ("first_ratio_max", [1.0, 1.6], "float32")]


def watch(said: list[str], **ppo) -> health.Watch:
    config = SimpleNamespace(ppo=SimpleNamespace(
        score_scale="calibrated", reward="model", **ppo), reward=SimpleNamespace(function=""))
    return health.Watch(SimpleNamespace(config=config, say=said.append,
                                        result=lambda name: Path(name)), "ppo")


@pytest.mark.parametrize("name,values,advice", LOUD)
def test_a_bad_sign_is_said_once(name, values, advice):
    said: list[str] = []
    looking = watch(said)
    for step, value in enumerate(values, 1):
        looking.look(step, {name: value})
    [text] = said
    assert text.startswith("ppo, step ") and any(word in text for word in advice.split("|"))
    assert len(text) < 250


def test_a_sound_run_is_not_warned_of():
    said: list[str] = []
    for stats in QUIET:
        watch(said).look(1, stats)
    assert not said


def test_a_run_with_a_wild_learning_rate_is_warned_of(tmp_path, capsys):
    flags = [*golden.FLAGS, "--sft.examples=320", "--sft.epochs=2", "--stages=sft"]
    for name, lr, count in (("sound", "0.003", 0), ("wild", "3", 1)):
        train.main([*flags, f"--out={tmp_path / name}", f"--sft.lr={lr}"])
        assert capsys.readouterr().out.count("the learning rate is too high") == count


# ---------------------------------------------------------------------------------------------
# A model that yields NaN

@pytest.fixture(scope="module")
def damaged(finished, tmp_path_factory) -> Path:
    """A run whose SFT and reward models hold one NaN."""
    out = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / "reward")
    for name, kind in (("sft", train.Transformer), ("reward", train.ScalarModel)):
        model = load_pretrained(finished[0] / name, kind=kind)
        model.model.norm.weight.data[0] = math.nan
        shutil.rmtree(out / name, ignore_errors=True)
        save_pretrained(model, out / name, None)
        for file in finished[0].glob(f"{name}/tokenizer*"):
            shutil.copy(file, out / name)
    return out


def test_generate_refuses_a_model_that_yields_nan(actor):
    assert generate(actor, [[1, 2]], 3).tokens
    actor.model.norm.weight.data[0] = math.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="answers NaN: its weights are damaged"):
            generate(actor, [[1, 2]], 3, temperature)


@pytest.mark.parametrize("args", [
    ["generate", "{bad}/sft", "--prompts={prompts}"], ["compare", "{bad}/sft", "{good}/ppo"],
    ["compare", "{good}/ppo", "{bad}/sft"], ["chat", "{bad}/sft"],
    ["compare", "{good}/ppo", "{good}/sft", "--judge={bad}/reward"],
    ["reward", "{bad}/reward", "--data={pairs}"]], ids=" ".join)
def test_a_model_that_yields_nan_neither_speaks_nor_judges(finished, damaged, tmp_path, capsys,
                                                           monkeypatch, args):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Copy: cat"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Copy", "chosen": "a", "rejected": "b"}\n')
    monkeypatch.setattr("sys.stdin", io.StringIO("Copy: cat\n"))
    monkeypatch.chdir(tmp_path)
    args = [text.format(bad=damaged, good=finished[0], prompts=tmp_path / "p.jsonl",
                        pairs=tmp_path / "pairs.jsonl") for text in args]
    try:
        command.main(args)
        assert args[0] == "chat", "which goes on to the next question"
    except SystemExit as error:
        assert error.code == 2
    said = capsys.readouterr()
    assert "answers NaN" in said.err and "wins" not in said.out
    assert "--dtype (train.py, eval.py run)" in said.err, "other commands have no such flag"
    assert args[0] not in ("generate", "compare") or "/reward" in args[-1] or "run/sft: " in said.err


def test_no_stage_goes_on_with_a_model_that_yields_nan(damaged, tmp_path):
    for stage in ("sample", "ppo", "eval"):
        with pytest.raises(ValueError, match="answers NaN"):
            train.main([f"--base={damaged}", f"--out={tmp_path / stage}", f"--stages={stage}"])
        assert not list((tmp_path / stage).glob("to_rank.jsonl")), stage
        assert not (tmp_path / stage / "eval.json").exists()
