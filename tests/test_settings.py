"""Wrong settings: every number has its range, every value its type, and all that is wrong is named at once."""

import json
import math
import re
import shutil

import pytest

import eval as command
import golden
import train
from benchmarks.command import parse_options
from evaluation.flags import FLAGS, is_in
from run import settings

NUMERIC = {flag for flag, hint in settings.flag_types().items() if settings.numbers_of(hint)}
HELP = settings.usage("", train.STAGES)
WRONG = ("0", "-1", "nan", "inf", "-inf", "1e30", "1e999", str(10**30))


def interval_in_help(flag: str) -> str:
    (line,) = [line for line in HELP.splitlines() if line.startswith(f"  --{flag}=")]
    return re.search(r"[\[(]\d+, [\de.]+[\])](?=: )", line)[0]


@pytest.mark.parametrize("flag", sorted(NUMERIC))
def test_a_number_outside_its_range_is_refused_before_any_work(tmp_path, monkeypatch, flag):
    """What --help says of a flag is what is taken: elementwise in a list, and never NaN or infinity."""
    monkeypatch.chdir(tmp_path)
    interval = interval_in_help(flag)
    for text in WRONG:
        value = float(text)
        whole = settings.numbers_of(settings.flag_types()[flag]) is int
        if is_in(value, interval) and not (whole and not text.isdigit()):
            assert text == "0" and interval[0] == "[", f"--{flag}={text} is not documented"
            continue
        given = f"1,{text}" if flag == "reward.temperatures" else text
        with pytest.raises(ValueError) as error:
            train.main([f"--{flag}={given}"])
        assert f"--{flag}=" in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_every_range_is_of_a_flag():
    named = " ".join(settings.RANGES.values()).split()
    assert len(named) == len(set(named))
    assert set(named) <= {part for flag in NUMERIC for part in (flag, flag.split(".")[-1])}
    assert not list(settings.impossible(settings.flatten(settings.Config())))
    assert not list(settings.impossible(settings.PRETRAINED_DEFAULTS))


def test_a_run_at_the_lower_end_of_every_range(tmp_path):
    """What may be 0 is 0, what may be 1 is 1, and the seed is the largest there is: no stage stumbles."""
    low = {"--seed": 9 * 10**18, "--reward.temperatures": "0,1"}
    for flag in NUMERIC:
        if f"--{flag}" not in low and not flag.startswith(("model.", "data.", "reward.dim",
                                                           "reward.n_", "reward.ffn")):
            low[f"--{flag}"] = {"[0": 0, "[1": 1, "(0": 0.5}[settings.range_of(flag).split(",")[0]]
    # an untrained model says nothing right, so error alone ranks; a scale needs two scores
    low |= {"--sft.examples": 8, "--reward.sampled_prompts": 6, "--reward.noise": 1,
            "--ppo.iterations": 4}
    flags = [f"{name}={value}" for name, value in low.items()]
    train.main([*golden.FLAGS, *flags, f"--out={tmp_path / 'a'}"])
    assert (tmp_path / "a" / "eval.json").exists()


# ---------------------------------------------------------------------------------------------
# All at once, and types


def test_all_that_is_wrong_is_named_at_once():
    flags = "--ppo.gamma=2 --sft.lr=nan --ppo.kl_kind=k9 --ppo.foo=1 --seed=x stages=sft"
    with pytest.raises(ValueError) as error:
        train.main(flags.split())
    assert [line.split("=")[0].strip() for line in str(error.value).splitlines()] == [
        "unknown flag --ppo.foo (see --help)", "--seed", "cannot read 'stages", "--ppo.gamma",
        "--sft.lr", "--ppo.kl_kind"]
    flags = "--stages=ppo,sft --model.n_heads=3 --ppo.minibatch_size=48 --ppo.kl_in=loss --resume"
    with pytest.raises(ValueError) as error:
        train.main(flags.split())
    assert len(str(error.value).splitlines()) == 5


@pytest.mark.parametrize("flag,value", [
    ("ppo.lr", "0.1"), ("ppo.lr", True), ("ppo.lr", None), ("ppo.lr", [0.1]), ("ppo.lr", math.nan),
    ("ppo.lr", 10**400), ("ppo.lr", -1), ("ppo.epochs", 1.0), ("ppo.epochs", True),
    ("ppo.epochs", "2"), ("data.skip_bad", 1), ("data.skip_bad", "true"), ("model.path", 3),
    ("ppo.kl_kind", None), ("ppo.kl_kind", "k9"), ("sft.data", "file"), ("sft.data", [1]),
    ("reward.temperatures", [1, "1"]), ("reward.temperatures", [1, True]),
    ("reward.temperatures", [1, math.inf]), ("seed", 1e9), ("seed", {}), ("seed", -1)])
def test_a_config_file_holds_values_of_the_right_types(tmp_path, flag, value):
    file = tmp_path / "config.json"
    flat = settings.flatten(settings.Config())
    file.write_text(json.dumps({"config": {**flat, "ppo.gamma": 1, flag: value}}))
    with pytest.raises(ValueError, match=flag) as error:
        settings.parse_args([f"--config={file}"], train.STAGES)
    assert len(str(error.value).splitlines()) == 1
    file.write_text(json.dumps({"config": {**flat, "ppo.gamma": 1}}))
    assert settings.parse_args([f"--config={file}"], train.STAGES) == settings.Config(
        stages=tuple(train.STAGES))


@pytest.mark.parametrize("config", [
    5, [], {"data.template": 3}, {"data.template": ["a"]}, {"data.max_response_tokens": "8"},
    {"data.max_response_tokens": True}, {"ppo.generation_batch": -1}, {"eval.in_domain": 2.0},
    {"seed": "x"}, {"model.path": 1}, {"ppo.microbatch_size": None}, {"ppo.microbatch_size": 0}, {"ppo.generation_batch": 0}])
def test_a_model_speaks_by_settings_of_the_right_types(finished, tmp_path, capsys, config):
    """eval.py reads the config.json around a model folder, which people may have edited."""
    shutil.copytree(finished[0] / "sft", tmp_path / "sft")
    (tmp_path / "p.jsonl").write_text('{"prompt": "Copy: cat"}\n')
    (tmp_path / "config.json").write_text(json.dumps({"config": config}))
    with pytest.raises(SystemExit) as error:
        command.main(["generate", str(tmp_path / "sft"), f"--prompts={tmp_path / 'p.jsonl'}"])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.value.code == 2 and f"{tmp_path / 'config.json'}: " in said
    (tmp_path / "config.json").write_text(json.dumps({"config": {"seed": 1}}))
    with pytest.raises(SystemExit):
        command.main(["compare", str(tmp_path / "sft"), str(finished[0] / "ppo")])
    assert "lacks eval.in_domain" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# eval.py

NUMBERS = {"--shots", "--limit", "--seed", "--batch_tokens", "--samples"}
READ = [(name, flag) for name, flags in FLAGS.items() for flag in flags if "type" in flags[flag]]


@pytest.mark.parametrize("name,flag", [*READ, *[("run", flag) for flag in sorted(NUMBERS)]])
def test_numbers_of_eval_have_ranges_too(capsys, name, flag):
    with pytest.raises(SystemExit):
        command.main([name, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    interval = re.search(rf"{flag} N ([\[(]\d+, [\de.]+[\])]): ", told)[1]
    for text in WRONG:
        if text == "0" and is_in(0, interval):
            continue
        with pytest.raises(SystemExit) as error:
            command.main([name, "none", "--tasks=x", f"{flag}={text}"] if name == "run" else
                         [name, "none", f"{flag}={text}"])
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.value.code == 2 and f"{text}: expected" in said and interval in said


def test_every_number_of_the_benchmarks_is_tested():
    given = vars(parse_options(["none", "--tasks=x", *[f"{flag}=3" for flag in NUMBERS]]))
    assert {f"--{name}" for name, value in given.items() if type(value) is int} == NUMBERS
