"""Changes that people make stay small: every fork applies, runs and is within its limit."""
import shutil
from dataclasses import replace

import pytest

import ppo
import train
from benchmarks.tasks import TASKS
from data import TEMPLATES
from experiments import forks
from formats import BadRow
from formats.parsers import parse_example
from formats.reading import to_dialogue
from microcosm.general import GENERATORS

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="patches need git")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forks")
    forks.prepare(folder)
    return folder


@pytest.mark.parametrize("name", forks.FORKS)
def test_a_fork_is_small_and_works(name, place):
    fork = forks.FORKS[name]
    limits = {"dpo": (60, 2), "kl_estimator": (5, 1), "advantage": (10, 1), "template": (10, 1),
              "data_format": (15, 1), "general_task": (12, 1), "benchmark": (8, 1)}
    assert (fork.lines, fork.files) == limits[name]
    one = forks.run_fork(name, place)
    assert 0 < one.lines <= fork.lines and 0 < len(one.files) <= fork.files and one.shown


def test_every_patch_has_its_entry():
    assert {path.stem for path in forks.PATCHES.glob("*.patch")} == forks.FORKS.keys()


def test_the_project_has_none_of_it():
    """Else a run would show it without the patch."""
    assert "dpo" not in train.STAGES and "mean" not in ppo.KL_ESTIMATORS
    assert "batch_mean" not in ppo.ADVANTAGES and "ask" not in TEMPLATES
    assert "last" not in GENERATORS and "logiqa" not in TASKS
    [example] = parse_example(forks.DATA["squad.jsonl"][0])
    with pytest.raises(BadRow, match="no answer to learn from"):
        to_dialogue(example, "")


@pytest.mark.parametrize("change, error", [
    ({"lines": 1}, "2 lines in 1 files; limit 1 in 1"),
    ({"files": 0}, "2 lines in 1 files; limit 5 in 0"),
    ({"command": "no_such_file.py"}, "no_such_file.py failed: .*No such file"),
    ({"command": "-c pass"}, "the run does not show the change"),
])
def test_what_fails_is_told(change, error, tmp_path, monkeypatch):
    monkeypatch.setitem(forks.FORKS, "kl_estimator", replace(forks.FORKS["kl_estimator"], **change))
    with pytest.raises(ValueError, match=error):
        forks.run_fork("kl_estimator", tmp_path)


def test_a_patch_that_does_not_apply_is_told(tmp_path, monkeypatch):
    patch = (forks.PATCHES / "kl_estimator.patch").read_text()
    (tmp_path / "kl_estimator.patch").write_text(patch.replace("log_ratio.abs()", "log_ratio"))
    monkeypatch.setattr(forks, "PATCHES", tmp_path)
    with pytest.raises(ValueError, match="git apply .* failed: .*patch does not apply"):
        forks.run_fork("kl_estimator", tmp_path)


def test_the_command_fails_with_a_fork(monkeypatch, capsys):
    def fails(name, place):
        raise ValueError("too long")
    monkeypatch.setattr(forks, "prepare", lambda place: None)
    monkeypatch.setattr(forks, "run_fork", fails)
    with pytest.raises(ValueError, match="failed: dpo, template"):
        forks.main(["dpo", "template"])
    assert "FAILED: too long" in capsys.readouterr().out
    with pytest.raises(ValueError, match="there is no fork 'dqo'"):
        forks.main(["dqo"])
