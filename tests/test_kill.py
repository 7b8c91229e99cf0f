"""Killed and stopped runs end as undisturbed ones. The short form of tests/kill.py, by one process and by two."""

from functools import partial

import pytest

import kill


def test_killed_runs_end_as_undisturbed_ones(tmp_path):
    """Twelve kills, some inside every kind of write."""
    said = []
    done, wrong = kill.kill_runs(12, 1, 4, tmp_path, say=lambda *text, **_: said.append(text))
    assert not wrong and sum(done.values()) == 12 and done.keys() >= {"half", "rename", "torn", "removal"}, said


@pytest.mark.parametrize("ranks", [1, 2])
def test_stopped_runs_end_as_undisturbed_ones(tmp_path, ranks):
    """SIGTERM and SIGINT in every stage, to the main rank: status 0, one line, the same files in the end."""
    start = partial(kill.forked, ranks=ranks)
    assert not kill.stop_runs(start, 0, tmp_path) + kill.stop_runs(start, 1, tmp_path)
