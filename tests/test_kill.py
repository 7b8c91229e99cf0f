"""Killed runs end as undisturbed ones. The short form of `python tests/kill.py --kills=200`, by one process and by two."""

import kill


def test_killed_runs_end_as_undisturbed_ones(tmp_path):
    """Twelve kills, some inside every kind of write."""
    said = []
    done, wrong = kill.kill_runs(12, 1, 4, tmp_path, say=lambda *text, **_: said.append(text))
    assert not wrong and sum(done.values()) == 12 and done.keys() >= {"half", "rename", "torn", "removal"}, said
