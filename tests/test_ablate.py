"""Ablations: what is shared, what runs again, the statistics, and one run of all of it."""

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments import ablate, jobs, summary
from experiments.factors import DEFAULT, FACTORS, Variant
from experiments.forks import SMALLEST
from experiments.jobs import Job, job_of
from experiments.summary import Outcome, over_seeds
from formats.files import write_jsonl
from run import settings
from train import STAGES


def steps(variant: Variant) -> list[Job]:
    return job_of(variant, 0).chain


def test_variants_share_what_they_do_not_change():
    default = steps(DEFAULT)
    assert [job.step for job in default] == ["sft", "rank", "reward", "ppo"]
    weak = steps(Variant("--ppo.kl_coef=0.03"))
    assert weak[:3] == default[:3] and weak[3] != default[3]
    noisy = steps(Variant("--reward.noise=0.3"))
    assert noisy[0] == default[0] and not set(noisy[1:]) & set(default)
    large = steps(Variant("--reward.dim=96"))
    assert large[:2] == default[:2] and not set(large[2:]) & set(default)
    general = steps(Variant("--sft.in_domain_share=0"))
    assert not set(general) & set(default)
    for variant in (Variant(model="top"), FACTORS["methods"].variants["DPO"]):
        assert steps(variant)[:2] == default[:2]
    # a switch of a step that is not taken changes nothing
    assert job_of(Variant("--ppo.kl_coef=0", "top"), 0) == job_of(Variant("", "top"), 0)
    # what trains the reward model trains DPO
    assert job_of(Variant("--reward.lr=0.1", "dpo", ("dpo",)), 0).switches == ("--reward.lr=0.1",)
    patched = steps(Variant(patches=("scores10", "sgd")))
    assert [job.patches for job in patched] == [(), (), ("scores10",), ("scores10", "sgd")]
    assert [job.processes for job in steps(Variant(processes=2))] == [1, 1, 1, 2]
    names = {job.name for seed in (0, 1) for v in (DEFAULT, Variant("--seed=3")) for job in
             job_of(v, seed).chain}
    assert len(names) == 16, "no two different jobs share a folder"


def test_the_ready_made_factors_can_be_run():
    assert len(FACTORS["methods"].variants) == 8 and FACTORS["methods"].seeds == 5
    for factor in FACTORS.values():
        for variant in factor.variants.values():
            settings.parse_args(variant.switches.split(), STAGES)
            assert variant.model in jobs.PATHS and set(variant.patches) <= jobs.PATCHES.keys()
    stages = {*STAGES, "dpo"}
    assert {stage for step in jobs.STEPS.values() for stage in step} <= stages
    assert set(jobs.CONCERNS) <= {*settings.flag_types(), "ppo", "top", "reward"}


def fake(folder: Path, seconds: dict, model: str = "ppo", rows: list | None = None) -> None:
    folder.mkdir(parents=True)
    (folder / "seconds.json").write_text(json.dumps(seconds))
    if rows is not None:
        write_jsonl(folder / "answers.jsonl", rows)


def test_what_is_done_is_not_done_again_and_what_fails_is_named(tmp_path, monkeypatch):
    """A fake in place of train.py: the second seed's sampling fails."""
    script = tmp_path / "code" / "train.py"
    script.parent.mkdir()
    script.write_text(
        "import json, pathlib, sys\n"
        "flags = dict(arg[2:].split('=', 1) for arg in sys.argv[1:])\n"
        "out = pathlib.Path(flags['out']); out.mkdir()\n"
        "if flags['seed'] == '1' and 'sample' in flags['stages']: sys.exit(2)\n"
        "(out / 'seconds.json').write_text(json.dumps(dict.fromkeys(flags['stages'].split(','), 1)))\n"
    )
    monkeypatch.setattr(jobs, "code_for", lambda patches, runs: script.parent)
    runs = tmp_path / "runs"
    ends = [job_of(variant, seed) for variant in (DEFAULT, Variant("--ppo.kl_coef=0"))
            for seed in (0, 1)]
    failed = jobs.run_all(ends, runs, 2)
    (name,) = [job.name for job in ends[1].chain if job.step == "rank"]
    assert failed == [f"{runs / name}.log"]
    made = {path.name for path in runs.iterdir() if path.is_dir()}
    sft = ends[1].chain[0].name
    expected = {job.name for end in (ends[0], ends[2]) for job in end.chain} | {sft, name}
    assert made == expected and len(made) == 7, "shared steps once, nothing after the failure"
    started = []
    monkeypatch.setattr(jobs, "start", lambda job, runs, code: started.append(job) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        jobs.run_all(ends, runs, 2)
    assert [job.name for job in started] == [name], "only what failed"


def test_a_second_round_starts_from_the_first(tmp_path):
    last = job_of(Variant(model="top2"), 4)
    first, again = last.chain[2], last.chain[3]
    folder = tmp_path / first.name
    (folder / "top").mkdir(parents=True)
    (folder / "top" / "weights").write_text("of top")
    (folder / "tokenizer.model").write_text("pieces")
    (folder / "config.json").write_text(json.dumps({"config": {"base": "elsewhere", "seed": 4}}))
    jobs.begin_again(again, tmp_path)
    assert (tmp_path / again.name / "sft" / "weights").read_text() == "of top"
    content = json.loads((tmp_path / again.name / "config.json").read_text())
    assert content["config"] == {"base": "", "seed": 4} and jobs.is_done(again, tmp_path)
    command = jobs.command(last.chain[4], tmp_path, Path("code"))
    assert f"--base={tmp_path / again.name}" in command and "--stages=sample,annotate" in command
    assert "--eval.models=top" in jobs.command(last, tmp_path, Path("code"))


def outcome(strict: list[float], tasks: list[str]) -> Outcome:
    prompts = [str(i) for i in range(len(strict))]
    return Outcome(prompts, tasks, strict, strict, strict, 10, 5.0, [], None)


def test_statistics_by_hand():
    mean, low, high = over_seeds([1.0, 2.0, 3.0])
    assert mean == 2 and high - mean == pytest.approx(4.303 / math.sqrt(3))
    assert mean - low == pytest.approx(high - mean)
    assert math.isnan(over_seeds([1.0]).low)
    one = outcome([1, 0, 1, 1, 0, 1], ["", "", "a", "a", "a", "b"])
    assert summary.in_domain(one, one.strict) == 0.5
    assert summary.general(one) == pytest.approx((2 / 3 + 1) / 2)
    better = outcome([1, 1, 0, 0, 0, 0], ["", "", "a", "a", "a", "b"])
    low, high = summary.over_prompts([better, better], [one, one], "strict")
    assert low < 0.5 < high, "in-domain alone"
    with pytest.raises(AssertionError, match="paired"):
        summary.over_prompts([better], [one._replace(prompts=["x"] * 6)], "strict")
    rows = [{"judge_mean": x, "kl": 1.0} for x in (0.1, 0.9, 0.9, 0.2, 0.2)]
    path = one._replace(path=rows)
    assert summary.peaks_of([path], 2) == [0.9] and summary.at_the_end(path, "judge_mean", 2) == 0.2
    other = one._replace(path=rows[::-1])  # at best two iterations later, where the first is not
    assert summary.peaks_of([path, other], 2) == pytest.approx([0.55, 0.55])


@pytest.mark.parametrize(
    "args,said",
    [
        ([], "name a factor"),
        (["klm"], "neither one of methods, kl"),
        (["mine: --ppo.kl_coeff=1"], "unknown flag --ppo.kl_coeff"),
        (["mine: --ppo.kl_kind=k9"], "--ppo.kl_kind=k9: use k1"),
        (["kl", "--ppo.kl_in=no"], "--ppo.kl_in=no: use reward or loss"),
    ],
)
def test_a_bad_command_is_refused_before_any_run(args, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        ablate.main([*args, f"--runs={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}"])
    assert not list(tmp_path.iterdir())


def test_variants_of_ones_own_end_to_end(tmp_path, capsys):
    """At the smallest size: a table with both variants, paired on the same prompts."""
    args = ["free: --ppo.kl_coef=0", "--seeds=100", f"--runs={tmp_path / 'runs'}",
            f"--out={tmp_path / 'out'}", *SMALLEST]
    ablate.main(args)
    text = (tmp_path / "out" / "own.md").read_text()
    assert "| default |" in text and "| free |" in text and "`--ppo.kl_coef=0`" in text
    assert len([p for p in (tmp_path / "runs").iterdir() if p.is_dir()]) == 5, "3 shared, 2 of PPO"
    first = text
    ablate.main(args)
    again = (tmp_path / "out" / "own.md").read_text()
    assert again == first, "nothing ran again"
    assert "other code" not in capsys.readouterr().out
    mark = next((tmp_path / "runs").glob("*-sft-*.code"))
    mark.write_text("of yesterday")
    ablate.main(args)
    assert "1 runs in" in capsys.readouterr().out, "what is kept from other code is told"
