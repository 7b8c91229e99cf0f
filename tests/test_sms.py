"""The experiment on text messages: what is prepared, and what the rubric pays."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from reward import RewardFunction
from run import settings

ROOT = Path(__file__).parents[1]
SMS = ROOT / "experiments" / "sms"
MESSAGE = "URGENT! You have won a prize of £350. Call 09066612661 now, or text WIN to 87131. Free gift!"
TRUE = (
    "Spam. Prize: won. Free offer: Free gift. Price: £350. Phone number: 09066612661. "
    "Short code: 87131. Pressure: URGENT. Reply bait: Call 09066612661."
)


@pytest.fixture
def rubric() -> RewardFunction:
    return RewardFunction(SMS / "rubric.py")


def score(rubric: RewardFunction, answer: str, true: str) -> float:
    return rubric.module.score("", answer, true)


def test_signs_are_the_words_of_the_message(rubric):
    signs = sys.modules["signs"]
    assert signs.write_answer(True, signs.signs_of(MESSAGE)) == TRUE
    assert signs.write_answer(False, signs.signs_of(MESSAGE)) == "Not spam."
    assert signs.read_answer(TRUE).signs == {
        (kind, words.lower()) for kind, words in signs.signs_of(MESSAGE).items()
    }
    link = signs.signs_of("see www.a-b.co.uk/x?y=1. bye")
    assert link == {"Link": "www.a-b.co.uk/x?y=1"}
    assert signs.read_answer(signs.write_answer(True, link)).signs == {
        ("Link", "www.a-b.co.uk/x?y=1")
    }


@pytest.mark.parametrize(
    "answer, expected",
    [
        (TRUE, 1.0),
        ("Spam.", 0.4),
        ("Spam. Prize: won. Price: £350.", 0.4 + 0.6 * 2 * 2 / (2 + 7)),
        ("Spam. Prize: won. Price: £999.", 0.4 + 0.6 * 2 * 1 / (2 + 7)),  # not in the message
        ("spam. prize: won.", 0.4),  # no kind of sign
        ("Not spam.", 0.0),
        ("I think it is spam.", 0.0),
        ("", 0.0),
    ],
)
def test_the_rubric_by_hand(rubric, answer, expected):
    assert score(rubric, answer, TRUE) == pytest.approx(expected)


def test_a_wrong_verdict_is_worth_nothing_whatever_signs_it_names(rubric):
    assert score(rubric, "Spam.", "Not spam.") == 0.0
    assert score(rubric, "Not spam.", "Spam.") == 0.0
    assert score(rubric, "Not spam.", "Not spam.") == score(rubric, "Spam.", "Spam.") == 1.0


def prepare(tmp_path: Path, text: str, *flags: str) -> subprocess.CompletedProcess:
    (tmp_path / "messages").write_text(text, encoding="utf-8")
    command = [sys.executable, SMS / "prepare.py", tmp_path / "messages", tmp_path / "out", *flags]
    return subprocess.run(command, capture_output=True, text=True)


def test_no_message_is_in_training_and_evaluation(tmp_path):
    lines = [f"spam\tWin prize number {i} now" for i in range(200)]
    lines += [f"ham\tsee you at {i}" for i in range(250)]
    lines += ["spam\tWin  prize number 7 now", "ham\tsee you at 3 "]  # doubles but for spaces
    general = tmp_path / "general.json"
    general.write_text(json.dumps([{"instruction": f"Say {i}", "output": str(i)} for i in range(400)]))
    done = prepare(tmp_path, "\n".join(lines), f"--general={general}")
    assert done.returncode == 0, done.stderr
    rows = {
        name: [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").open()]
        for name in ("demonstrations", "prompts", "unseen")
    }
    asked = {row["prompt"] for row in rows["prompts"]}
    unseen = {row["prompt"] for row in rows["unseen"]}
    assert len(asked) == 260 and len(unseen) == 140 and not asked & unseen
    shown = [row for row in rows["demonstrations"] if "prompt" in row]
    assert {row["prompt"] for row in shown} == asked
    assert len(rows["demonstrations"]) == 520, "as many general ones"
    spam = [row["response"] for row in rows["prompts"] if row["response"].startswith("Spam.")]
    assert len(spam) == pytest.approx(130, abs=25) and all("Prize: Win" not in x for x in spam)
    # people are hasty
    hasty = [row["response"] for row in shown if row["response"].startswith("Spam.")]
    assert sum(map(len, hasty)) < 0.6 * sum(map(len, spam))


def test_a_file_of_another_kind_is_named_with_its_line(tmp_path):
    done = prepare(tmp_path, "ham\thello\nlabel,text\n")
    assert done.returncode and "Traceback" not in done.stderr
    assert "messages:2: expected ham or spam, a tab and a message" in done.stderr


def test_every_setting_is_a_switch():
    content = json.loads((SMS / "config.json").read_text())["config"]
    assert content.keys() <= settings.flag_types().keys()
    assert (ROOT / content["reward.function"]).is_file()
