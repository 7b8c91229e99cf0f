"""Intervals, head to head, judgments, calibration against numbers worked out otherwise.

And the commands of eval.py as they are typed.
"""

import json
import re
import math
import random
import signal
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import golden
import microcosm
from microcosm.rubric import metrics
from evaluation.head_to_head import Pair, read_judgments, to_judge, write_page
from evaluation.statistics import (
    change_interval,
    contest,
    length_controlled,
    prefer,
    share_interval,
)
from data import open_tokenizer
from model import ScalarModel, generate, last_scores
from formats.files import read_jsonl
from weights.files import accept_changed
from weights.loading import load_pretrained
from evaluation import chat, head_to_head, judging, plots, report, speaking, statistics
from formats import reading, records

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
real_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data beside the repository")


def command(*args: str) -> None:
    parsed = evaluation.parser().parse_args(args)
    parsed.run(parsed)


# ---------------------------------------------------------------------------------------------
# Intervals


@pytest.mark.parametrize("wins,n", [(0, 10), (5, 10), (10, 10), (1, 500), (244, 500)])
def test_share_interval_holds_the_shares_a_test_would_not_reject(wins, n):
    """Wilson's bounds: shares p from which wins / n is just 1.96 of p's own deviations away."""

    def bound(inside: float, outside: float) -> float:
        for _ in range(60):
            p = (inside + outside) / 2
            inside, outside = (
                (p, outside)
                if abs(wins / n - p) <= 1.959964 * math.sqrt(p * (1 - p) / n)
                else (inside, p)
            )
        return inside

    low, high = share_interval(wins / n, n)
    assert low == pytest.approx(bound(wins / n, 0.0), abs=1e-6) and high == pytest.approx(
        bound(wins / n, 1.0), abs=1e-6
    )


def test_known_share_intervals():
    assert share_interval(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert share_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert share_interval(0.0, 0) == (0.0, 1.0)


def test_change_interval_by_hand():
    """100 pairs, 20 gained, 8 lost: (20.5 - 8.5) / 102 +- 1.96 sqrt(29 - 12^2 / 102) / 102."""
    assert change_interval([[1.0] * 20 + [-1.0] * 8 + [0.0] * 72]) == pytest.approx(
        (0.11765 - 0.10093, 0.11765 + 0.10093), abs=1e-5
    )
    assert change_interval([[0.0] * 60]) == pytest.approx((-1.959964 / 62, 1.959964 / 62))
    assert change_interval([[1.0, 3.0]], pseudo=0.0) == pytest.approx(
        (2 - 1.959964 / math.sqrt(2), 2 + 1.959964 / math.sqrt(2))
    )
    # two strata share the two pairs: each interval by itself is one with a pair of its own
    one, other = ([[1.0] * 3 + [0.0] * 7], [[-1.0] + [0.0] * 29])
    (a, b), (c, d), (low, high) = (
        change_interval(one, pseudo=1.0),
        change_interval(other, pseudo=1.0),
        change_interval(one + other),
    )
    assert (low + high) / 2 == pytest.approx((a + b + c + d) / 4) and high - low == pytest.approx(
        math.hypot(b - a, d - c) / 2
    )


def test_change_interval_holds_the_truth_as_often_as_it_says():
    rng = random.Random(0)
    covered = 0
    for _ in range(1000):
        low, high = change_interval(
            [[(rng.random() < 0.2) - (rng.random() < 0.1) for _ in range(60)]]
        )
        covered += low <= 0.1 <= high
    assert 0.93 <= covered / 1000 <= 0.98


# ---------------------------------------------------------------------------------------------
# Head to head


def test_contest_by_hand():
    numbers = contest([1.0, 1.0, 0.5, 0.0, 0.7], [(10, 5), (8, 8), (3, 3), (2, 9), (4, 0)])
    assert (numbers["win"], numbers["tie"], numbers["loss"], numbers["n"]) == (0.6, 0.2, 0.2, 5)
    assert numbers["win_rate"] == pytest.approx(3.2 / 5) and numbers["longer_by"] == pytest.approx(
        2 / 5
    )
    assert [prefer(2.0, 1.0), prefer(1.0, 1.0), prefer(0.0, 1.0)] == [1.0, 0.5, 0.0]


def votes(n: int, theta: float, phi: float, seed: int) -> tuple[list[float], list[int]]:
    """Draw judgments of a judge with a taste for length."""
    rng = random.Random(seed)
    gaps = [round(rng.gauss(40, 100)) for _ in range(n)]
    centre = sum(gaps) / n
    deviation = math.sqrt(sum((gap - centre) ** 2 for gap in gaps) / (n - 1))
    return [
        float(rng.random() < 1 / (1 + math.exp(-theta - phi * math.tanh(gap / deviation))))
        for gap in gaps
    ], gaps


@pytest.mark.parametrize("theta,phi", [(0.0, 0.0), (0.4, 1.5), (-1.0, 3.0)])
def test_length_controlled_rate_against_gradient_descent(theta, phi):
    preferences, gaps = votes(300, theta, phi, seed=1)
    preferences[::10] = [0.5] * 30
    centre = sum(gaps) / 300
    deviation = math.sqrt(sum((gap - centre) ** 2 for gap in gaps) / 299)
    a = b = 0.0
    for _ in range(3000):
        slope_a, slope_b = 0.01 * a, 0.01 * b
        for p, gap in zip(preferences, gaps):
            x = math.tanh(gap / deviation)
            error = 1 / (1 + math.exp(-a - b * x)) - p
            slope_a, slope_b = slope_a + error, slope_b + error * x
        a, b = a - 0.01 * slope_a, b - 0.01 * slope_b
    assert length_controlled(preferences, gaps)[0] == pytest.approx(
        1 / (1 + math.exp(-a)), abs=1e-6
    )


def test_length_control_takes_the_judges_taste_for_length_away():
    preferences, gaps = votes(4000, theta=-0.5, phi=2.0, seed=2)
    rate, (low, high) = length_controlled(preferences, gaps)
    assert sum(preferences) / 4000 > 0.5 and low < 1 / (1 + math.exp(0.5)) < high < 0.5
    swapped, _ = length_controlled([1 - p for p in preferences], [-gap for gap in gaps])
    assert swapped == pytest.approx(1 - rate)


@pytest.mark.parametrize("tied", [0, 300])
def test_length_controlled_interval_against_resampling(tied):
    """Ties vary less than wins and losses do; the interval knows."""
    preferences, gaps = votes(400, theta=0.3, phi=1.0, seed=3)
    preferences[:tied] = [0.5] * tied
    rng, rates = random.Random(0), []
    for _ in range(300):
        drawn = [rng.randrange(400) for _ in range(400)]
        rates.append(
            length_controlled([preferences[i] for i in drawn], [gaps[i] for i in drawn])[0]
        )
    rates.sort()
    low, high = length_controlled(preferences, gaps)[1]
    assert high - low == pytest.approx(rates[292] - rates[7], rel=0.2)


def test_length_controlled_rate_of_extreme_data():
    assert length_controlled([0.5] * 20, [0] * 20)[0] == 0.5
    assert length_controlled([1.0], [3])[0] > 0.9
    rate, (low, high) = length_controlled([1.0] * 20, [0] * 20)
    assert rate > 0.99 and 0.6 < low < rate <= high < 1
    assert length_controlled([1.0] * 10 + [0.0] * 10, [5] * 10 + [-5] * 10)[0] == pytest.approx(
        0.5
    ), "whoever is longer wins"


# ---------------------------------------------------------------------------------------------
# Judgments


def judgment(
    first: str,
    second: str,
    preference: object,
    instruction: str = "Say",
    names: tuple[str, str] = ("a", "b"),
) -> dict:
    return {
        "instruction": instruction,
        "output_1": first,
        "generator_1": names[0],
        "output_2": second,
        "generator_2": names[1],
        "preference": preference,
    }


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_judgments_are_read_in_both_orders(tmp_path):
    path = write(
        tmp_path / "j.jsonl",
        [
            judgment("A1", "B1", 1, "one"),
            judgment("B1", "A1", 2, "one", ("b", "a")),  # a wins, whatever the order
            judgment("A2", "B2", 1, "two"),
            judgment("B2", "A2", 1, "two", ("b", "a")),  # the first place wins: a tie
            judgment("B3", "A3", 1.2, "three", ("b", "a")),  # belief 0.2 in a
            judgment("A4", "B4", 0, "four"),
            judgment("A5", "B5", 1.5, "five"),  # ties in old and new files
            judgment("A6", "B6", None, "six"),
            judgment("A7", "C7", 2, "seven", ("a", "c")),
        ],
    )
    pairs, said = read_judgments(path, "a", "b")
    assert {pair.prompt: pair.preference for pair in pairs} == pytest.approx(
        {"one": 1, "two": 0.5, "three": 0.2, "four": 0.5, "five": 0.5}
    )
    assert all((pair.first[0], pair.second[0]) == ("A", "B") for pair in pairs)
    assert "5 pairs, 1 not annotated, 2 in both orders with the same verdict in 50 %" in said
    swapped, _ = read_judgments(path, "b", "a")
    assert [pair.preference for pair in swapped] == pytest.approx(
        [1 - pair.preference for pair in pairs]
    )


@pytest.mark.parametrize(
    "rows,message",
    [
        (
            [judgment("A", "B", 1), judgment("A", "B", 3)],
            "j.jsonl:2: field 'preference' must be null, 0 or a number from 1 to 2 (got 3)",
        ),
        ([{"instruction": "x", "output_1": "y"}], "j.jsonl:1: no field 'generator_1'"),
        ([judgment("A", "B", 1, names=("x", "y"))], "its generators are x, y"),
        ([judgment("A", "B", None)], 'set every "preference"'),
    ],
)
def test_judgments_that_cannot_be_used(tmp_path, rows, message):
    with pytest.raises(ValueError) as error:
        read_judgments(write(tmp_path / "j.jsonl", rows), "a", "b")
    assert message in str(error.value)


def test_what_is_to_be_judged_comes_back(tmp_path):
    pairs = [
        Pair(f"p{i}", f"long answer {i}", "short" if i else "long answer 0", math.nan)
        for i in range(7)
    ]
    rows = list(to_judge("a", "b", pairs))
    assert len(rows) == 14 and [
        row["preference"] for row in rows if row["instruction"] == "p0"
    ] == [1.5, 1.5]
    for row in rows:
        assert (row["generator_1"] == "a") == (
            row["output_1"] == pairs[int(row["instruction"][1:])].first
        ) or row["instruction"] == "p0"
        row["preference"] = row["preference"] or (1 if row["generator_1"] == "a" else 2)
    back, said = read_judgments(write(tmp_path / "j.jsonl", rows), "a", "b")
    assert [pair.preference for pair in back] == [0.5] + [
        1.0
    ] * 6 and "7 in both orders with the same verdict in 100 %" in said
    assert [row["generator_1"] for row in rows[:4]] == ["a", "b", "a", "b"], (
        "neither stands first more often"
    )


@real_data
@pytest.mark.parametrize("name", ["alpaca-7b", "vicuna-13b", "llama-2-13b-chat-hf"])
def test_real_judgments_against_a_plain_count(name):
    path = SHARED / "preference" / f"alpaca_eval_gpt4_{name}.json"
    pairs, _ = read_judgments(path, name, "text_davinci_003")
    numbers = contest(
        [pair.preference for pair in pairs], [(len(pair.first), len(pair.second)) for pair in pairs]
    )
    given = [row["preference"] for row in json.loads(path.read_text())]
    assert numbers["n"] == len(given) == 400
    assert (
        numbers["win"] == given.count(2) / 400
        and numbers["tie"] == given.count(0) / 400
        and numbers["loss"] == given.count(1) / 400
    )
    for key in ("win", "tie", "loss", "win_rate", "length_controlled"):
        low, high = numbers["intervals"][key]
        assert 0 <= low <= numbers[key] <= high <= 1


# ---------------------------------------------------------------------------------------------
# The reward model against people


def test_calibration_by_hand():
    """Four prompts; margins 0.2, -0.2, 1.5, 5 and a tie of scores."""
    numbers = statistics.calibration([[0.2, -0.2], [1.5], [5.0], [0.0]])
    assert (numbers["pairs"], numbers["prompts"], numbers["accuracy"]) == (5, 4, 3.5 / 5)
    small, middle, large = numbers["rows"]
    assert (small["from"], small["to"], small["pairs"], small["prompts"], small["actual"]) == (
        0.0,
        0.5,
        3,
        2,
        0.5,
    )
    assert small["predicted"] == pytest.approx((0.549834 + 0.549834 + 0.5) / 3, abs=1e-6)
    assert (middle["from"], middle["to"], middle["pairs"], middle["actual"]) == (
        1.0,
        2.0,
        1,
        1.0,
    ) and middle["predicted"] == pytest.approx(0.817574, abs=1e-6)
    assert (large["to"], large["pairs"]) == (math.inf, 1) and large["predicted"] == pytest.approx(
        0.993307, abs=1e-6
    )
    assert numbers["error"] == pytest.approx((3 * 0.033223 + 0.182426 + 0.006693) / 5, abs=1e-5)
    assert numbers["loss"] == pytest.approx(
        (0.598139 + 0.798139 + 0.201413 + 0.006715 + 0.693147) / 5, abs=1e-5
    )
    assert small["interval"] == share_interval(0.5, 2), "pairs of one prompt are not independent"


def test_a_judge_that_knows_its_odds_is_calibrated():
    rng = random.Random(0)
    margins = [rng.uniform(0, 5) for _ in range(20_000)]
    numbers = statistics.calibration(
        [[m if rng.random() < 1 / (1 + math.exp(-m)) else -m] for m in margins]
    )
    assert numbers["error"] < 0.01 and all(
        row["interval"][0] - 0.01 <= row["predicted"] <= row["interval"][1] + 0.01
        for row in numbers["rows"]
    )


def test_reward_command_against_a_loop(finished, capsys):
    """Pairs and rankings alike: every response scored alone."""
    folder = finished[0] / "reward"
    command("reward", str(folder), f"--data={finished[0] / 'ranked.jsonl'}")
    model, tokenizer = load_pretrained(folder, kind=ScalarModel), open_tokenizer(folder)
    right = pairs = 0.0
    for row in golden.lines(finished[0] / "ranked.jsonl"):
        ranks = dict(zip(row["responses"], row["ranks"]))
        scores = {}
        for text in ranks:
            ids = torch.tensor(
                [
                    [
                        tokenizer.bos_id,
                        *tokenizer.encode(row["prompt"] + "\n"),
                        *data.encode_response(tokenizer, text, "plain"),
                    ]
                ]
            )
            scores[text] = last_scores(model, ids, torch.ones_like(ids, dtype=torch.bool)).item()
        for a in ranks:
            for b in ranks:
                if ranks[a] < ranks[b]:
                    pairs, right = (
                        pairs + 1,
                        right + (scores[a] > scores[b]) + 0.5 * (scores[a] == scores[b]),
                    )
    out = capsys.readouterr().out
    assert (
        f"orders {100 * right / pairs:.1f} %" in out
        and f"of {pairs:.0f} pairs" in out
        and "margin [nats]" in out
    )


# ---------------------------------------------------------------------------------------------
# A run's numbers and report


def prompt(text: str, task: str = "", answer: str | None = None) -> records.Prompt:
    return records.Prompt((records.Message("user", text),), "here", answer, task)


def test_assess_by_hand():
    """Two prompts of the domain and three of two tasks; base, sft, ppo and a fourth model."""
    prompts = [
        prompt("a"),
        prompt("b"),
        prompt("c", "add"),
        prompt("d", "add"),
        prompt("e", "sort"),
    ]

    def rows(golds, multi, stricts):
        domain = [{"score": gold, "gold": gold, "multi": multi} for gold in golds]
        del domain[0]["multi"]
        return domain + [{"score": -9.0, "gold": 0.5, "strict": strict} for strict in stricts]

    values = {
        "base": rows([0.0, 0.0], 0.0, [0.0, 0.0, 0.0]),
        "sft": rows([0.5, 1.0], 0.0, [1.0, 0.0, 0.0]),
        "ppo": rows([1.0, 1.0], 1.0, [1.0, 1.0, 1.0]),
        "dpo": rows([0.0, 1.0], 0.0, [0.0, 0.0, 0.0]),
    }
    answers = {name: ["x" * (n + 1)] * 5 for n, name in enumerate(values)}
    result = evaluation.assess(prompts, answers, values, "sft")
    assert list(result["models"]) == ["base", "sft", "ppo", "dpo"] and result["reference"] == "sft"
    assert result["models"]["sft"] == {
        "in_domain": {"gold": 0.75, "multi": 0.0, "n": 2},
        "general": {"mean": 0.25, "tasks": {"add": 0.5, "sort": 0.0}, "n": 3},
    }
    assert list(result["changes"]) == ["base", "ppo", "dpo"]
    changed = result["changes"]["ppo"]
    assert changed["in_domain"] == {
        "gold": {"change": 0.25, "interval": change_interval([[0.5, 0.0]])},
        "multi": {"change": 1.0, "interval": change_interval([[1.0]])},
    }
    assert changed["general"]["tasks"]["add"] == {
        "change": 0.5,
        "interval": change_interval([[0.0, 1.0]]),
    }
    assert changed["general"]["mean"] == {
        "change": 0.75,
        "interval": change_interval([[0.0, 1.0], [1.0]]),
    }
    assert result["changes"]["dpo"]["in_domain"]["gold"]["change"] == -0.25
    assert result["head_to_head"] == {
        "dpo_vs_sft": contest([0.0, 0.5], [(4, 2), (4, 2)]),
        "dpo_vs_ppo": contest([0.0, 0.5], [(4, 3), (4, 3)]),
    }, "the last model against every other one but the base"
    assert list(result["ahead"]) == ["base", "sft", "ppo"]
    assert result["ahead"]["sft"] == result["changes"]["dpo"]
    assert result["ahead"]["ppo"]["in_domain"]["gold"]["change"] == -0.5
    assert result["ahead"]["ppo"]["general"]["mean"]["change"] == -1.0
    other = evaluation.assess(prompts, answers, values, "ppo")
    assert other["changes"]["sft"]["in_domain"]["gold"]["change"] == -0.25
    assert other["ahead"] == result["ahead"] and other["head_to_head"] == result["head_to_head"]


def test_a_score_is_shown_where_there_is_nothing_else():
    """Its changes have no bounds, so there are no pseudo-pairs."""
    prompts = [prompt("a"), prompt("b")]
    answers = {"sft": ["x", "y"], "ppo": ["x", "y"]}
    values = {"sft": [{"score": 2.0}, {"score": 2.0}], "ppo": [{"score": 3.0}, {"score": 5.0}]}
    result = evaluation.assess(prompts, answers, values, "sft")
    assert result["models"]["ppo"] == {"in_domain": {"score": 4.0, "n": 2}}
    assert result["changes"]["ppo"] == {
        "in_domain": {
            "score": {"change": 2.0, "interval": change_interval([[1.0, 3.0]], pseudo=0.0)}
        }
    }
    lines = report.table(result).splitlines()
    assert lines[1].split()[:3] == ["SFT", "PPO", "change"]
    assert lines[2].split()[:6] == ["reward", "score", "(n=2)", "2.00", "4.00", "+2.00"]


def test_a_change_without_spread_has_an_interval():
    """The variance of equal differences may be rounded to less than nothing."""
    low, high = change_interval([[0.1] * 3], pseudo=0.0)
    assert low == pytest.approx(0.1) and high == pytest.approx(0.1)


def test_without_the_reference_nothing_is_compared(tmp_path):
    prompts = [prompt("a")]
    values = {"base": [{"score": 1.0}], "ppo": [{"score": 2.0}]}
    answers = {"base": ["x"], "ppo": ["y"]}
    result = evaluation.assess(prompts, answers, values, "sft")
    assert result["models"]["ppo"]["in_domain"] == {"score": 2.0, "n": 1}
    assert (result["reference"], result["changes"], result["head_to_head"]) == ("sft", {}, {})
    assert "change" not in report.table(result) and "vs" not in report.table(result)
    report.write_report(tmp_path, result, [], [])
    assert "change" not in (tmp_path / "report.md").read_text()


def test_metrics_of_a_users_own_function_are_shown_as_they_are():
    """Known shares in percent, others plainly, without bounds; what an answer lacks is no zero."""
    prompts = [prompt("a"), prompt("b")]
    values = {
        "sft": [
            {"score": 0.0, "words_of_the_answer_in_all": 10.0},
            {"score": 0.0, "words_of_the_answer_in_all": 20.0, "strict": 1.0},
        ],
        "best_of_16": [
            {"score": 1.0, "words_of_the_answer_in_all": 40.0, "depth": 3.0},
            {"score": 0.0, "words_of_the_answer_in_all": 80.0, "strict": 0.0},
        ],
    }
    answers = {name: ["x", "y"] for name in values}
    result = evaluation.assess(prompts, answers, values, "sft")
    assert result["models"]["best_of_16"] == {
        "in_domain": {"strict": 0.0, "words_of_the_answer_in_all": 60.0, "depth": 3.0, "n": 2}
    }
    changed = result["changes"]["best_of_16"]["in_domain"]
    assert changed["words_of_the_answer_in_all"] == {
        "change": 45.0,
        "interval": change_interval([[30.0, 60.0]], pseudo=0.0),
    }
    assert (
        changed["strict"] == {"change": -1.0, "interval": change_interval([[-1.0]])}
        and "depth" not in changed
    )
    lines = report.table(result).splitlines()
    assert [line.split() for line in lines[2:4]] == [
        ["in-domain", "(n=2),", "%"],
        ["strict", "exactly", "right", "100.0", "0.0", "-100.0", "-100.0", "to", "+51.0", "noise"],
    ]
    assert lines[5].split()[:4] == ["words_of_the_answer_in_all", "15.00", "60.00", "+45.00"]
    assert lines[6].split() == ["depth", "-", "3.00"]
    assert lines[1].index("SFT") + 3 == lines[5].index("15.00") + 5, (
        "columns stand under their names, however long those are"
    )
    assert (
        lines[1].index("BEST_OF_16") + 10
        == lines[5].index("60.00") + 5
        == lines[3].index(" 0.0") + 4
    )
    assert lines[7].startswith("best_of_16 less sft        strict -100.0 (-100.0 to +51.0), wins 50 %")


def test_answers_of_an_evaluation_come_back(tmp_path):
    dialogue = (records.Message("system", "Be brief."), records.Message("user", "é\nüber 漢"))
    prompts = [records.Prompt(dialogue, "here", None), prompt("Copy: a b", "copy", "a b")]
    answers = {"sft": ["x\ny", " a b"], "ppo": ["", "a b"]}
    values = {
        "sft": [{"score": 0.25}, {"score": 0.0, "strict": 0.0}],
        "ppo": [{"score": -1.5}, {"score": 1.0, "strict": 1.0}],
    }
    drawn = {"ppo": ["é", "a b"]}
    drawn_values = {"ppo": [{"score": 2.0}, {"score": 0.5, "strict": 0.0}]}
    evaluation.write_answers(
        tmp_path / "answers.jsonl", prompts, answers, values, drawn, drawn_values
    )
    rows = read_jsonl(tmp_path / "answers.jsonl")
    assert [row["model"] for row in rows] == ["sft", "ppo"] * 2
    assert rows[0] == {
        "prompt": "system: Be brief.\n\nuser: é\nüber 漢",
        "task": "",
        "answer": None,
        "model": "sft",
        "response": "x\ny",
        "values": {"score": 0.25},
    }
    for n, row in enumerate(rows):
        assert (
            row["prompt"] == prompts[n // 2].text
            and row["task"] == prompts[n // 2].task
            and row["answer"] == prompts[n // 2].answer
        )
        assert (
            row["response"] == answers[row["model"]][n // 2]
            and row["values"] == values[row["model"]][n // 2]
        )
        if row["model"] == "sft":
            assert "sampled" not in row
        else:
            of_ppo = {"response": drawn["ppo"][n // 2], "values": drawn_values["ppo"][n // 2]}
            assert row["sampled"] == of_ppo


TIMES = 2000  # simulated evaluations
UNEVEN = [10, 15, 20, 30, 40, 60] * 2  # prompts of 12 tasks

# a question's difference between two models: its values, and how often each comes
MOVES = {
    "some better": ([1, -1, 0], [0.15, 0.05, 0.8]),
    "as often worse": ([1, -1, 0], [0.2, 0.2, 0.6]),
    "nearly all better": ([1, -1, 0], [0.93, 0.02, 0.05]),
    "gold": ([0.6, 0.3, 0.15, 0, -0.2, -0.4], [0.2, 0.15, 0.1, 0.45, 0.05, 0.05]),
    "gold, rarely": ([0.6, 0.3, 0, -0.4], [0.03, 0.04, 0.9, 0.03]),
}


def evaluations(rng: np.random.Generator, sizes: list[int], move: str) -> list:
    """Draw the differences of TIMES evaluations: each a list of strata."""
    values, shares = MOVES[move]
    strata = [rng.choice(values, (TIMES, n), p=shares).tolist() for n in sizes]
    return list(zip(*strata))


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("sizes", [[20], [60], [300], UNEVEN], ids=lambda sizes: f"{len(sizes)}x{sizes[0]}")
def test_change_intervals_hold_the_truth_as_often_as_they_say(sizes, move):
    rng = np.random.default_rng(1)
    truth = float(np.dot(*MOVES[move]))
    intervals = [change_interval(strata) for strata in evaluations(rng, sizes, move)]
    # pseudo-pairs of +-1 outweigh a handful of small changes: then the truth is held always
    most = 1.0 if move == "gold, rarely" and sum(sizes) <= 60 else 0.995
    assert 0.93 <= np.mean([low <= truth <= high for low, high in intervals]) <= most


def test_a_change_of_tasks_that_differ_is_held_as_often():
    """Most tasks never change, some get worse: what general tasks do."""
    rng = np.random.default_rng(2)
    losses = [0.0] * 6 + [0.05, 0.1, 0.1, 0.3, 0.02, 0.6]
    truth = -sum(losses) / 12
    held = 0
    for _ in range(TIMES):
        lost = [rng.binomial(n, loss) for n, loss in zip(UNEVEN, losses)]
        low, high = change_interval([[-1.0] * k + [0.0] * (n - k) for n, k in zip(UNEVEN, lost)])
        held += low <= truth <= high
    assert 0.93 <= held / TIMES <= 0.995


def test_share_intervals_hold_the_truth_as_often_as_they_say():
    """Any share; and near 0 and 1, where share +- 1.96 deviations would hold 10 to 90 %."""
    rng = np.random.default_rng(3)
    for n in (10, 60, 500):
        shares = rng.random(TIMES)
        found = rng.binomial(n, shares) / n
        intervals = [share_interval(x, n) for x in found]
        held = [low <= p <= high for p, (low, high) in zip(shares, intervals)]
        assert 0.93 <= np.mean(held) <= 0.995
    for n, p in ((10, 0.02), (20, 0.99), (60, 0.05), (100, 0.98), (500, 0.005), (500, 0.994)):
        intervals = [share_interval(x / n, n) for x in rng.binomial(n, p, TIMES).tolist()]
        assert 0.93 <= np.mean([low <= p <= high for low, high in intervals]) <= 0.995, (n, p)


def test_prompts_that_are_repeated_would_be_too_sure():
    """Four times the same 60 prompts tell what 60 tell; that is why repeats are left out."""
    rng = np.random.default_rng(4)
    truth = float(np.dot(*MOVES["some better"]))
    held = {1: 0, 4: 0}
    for [once] in evaluations(rng, [60], "some better"):
        for times in held:
            low, high = change_interval([once * times])
            held[times] += low <= truth <= high
    assert held[1] / TIMES >= 0.93 and held[4] / TIMES < 0.75


@pytest.mark.parametrize("sizes", [(60,), (21, 60, 55), (21,) * 12])
@pytest.mark.parametrize("sign", [-1, 1])
def test_an_interval_holds_what_was_found(sizes, sign):
    """Nearly all pairs went one way: pseudo-pairs pull the centre, not the interval off the mean."""
    strata = [[sign] * n for n in sizes]
    found = sum(sum(row) / len(row) for row in strata) / len(strata)
    low, high = change_interval(strata)
    assert -1 <= low <= found <= high <= 1 and low < high


def test_answers_of_a_run_add_up_to_its_numbers(finished):
    out, _ = finished
    rows = read_jsonl(out / "answers.jsonl")
    models = json.loads((out / "eval.json").read_text())["models"]
    assert list(models) == ["sft", "top", "best-of-5", "ppo"] and len(rows) == 4 * 44
    assert len({row["prompt"] for row in rows}) == 44, "no prompt is asked twice"
    for name, model in models.items():
        mine = [row["values"] for row in rows if row["model"] == name and not row["task"]]
        assert len(mine) == model["in_domain"]["n"] == 20
        for metric in ("gold", "strict", "multi", "verdict"):
            given = [row[metric] for row in mine if metric in row]
            assert sum(given) / len(given) == pytest.approx(model["in_domain"][metric])
    items = microcosm.items("eval", 20, 0, 1.0)
    assert [row["answer"] for row in rows[:80:4]] == [item.answer for item in items]
    of_ppo = zip(items, rows[3:80:4])
    grades = [metrics(item.prompt, row["response"], item.answer) for item, row in of_ppo]
    for name in ("gold", "strict"):
        mean = sum(grade[name] for grade in grades) / 20
        assert models["ppo"]["in_domain"][name] == pytest.approx(mean)


def test_report_of_a_run(finished):
    out, _ = finished
    text = (out / "report.md").read_text()
    results = json.loads((out / "eval.json").read_text())
    first, other, best = re.split("## (?:top|best-of-5) against sft", text)
    lines = first.splitlines()
    (header,) = [line for line in lines if "SFT" in line]
    names = ["SFT", "TOP", "BEST-OF-5", "PPO"]
    assert header.split() == [*names, "change", "95", "%", "interval"]
    assert max(map(len, lines[:26])) <= 100
    for task in microcosm.TASKS:
        (line,) = [line for line in lines if line.startswith(f"  {task} ")]
        low, high = results["changes"]["ppo"]["general"]["tasks"][task]["interval"]
        assert (
            line.endswith("noise") == (low <= 0 <= high)
            and f"{100 * low:+.1f} to {100 * high:+.1f}" in line
        )
    assert text.count("truth  ") == 6 and text.count("ppo (") == 6, "greedy, then drawn answers"
    assert text.count("best-of-5 (") == 3
    assert "**change** is ppo less sft" in first and "## ppo against sft" not in text
    assert other.splitlines()[3].split() == ["SFT", "TOP", "change", "95", "%", "interval"]
    low, high = results["changes"]["top"]["in_domain"]["verdict"]["interval"]
    assert f"{100 * low:+.1f} to {100 * high:+.1f}" in next(
        line for line in other.splitlines() if line.startswith("  verdict")
    )
    pytest.importorskip("matplotlib")
    for name in ("tasks", "score_against_kl", "sft", "reward", "ppo"):
        assert f"![{name}.png]" in text and (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_report_without_matplotlib_asks_for_it(finished, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    results = json.loads((finished[0] / "eval.json").read_text())
    assert "pip install matplotlib" in report.write_report(tmp_path, results, [], [])
    assert (
        "pip install matplotlib" in (tmp_path / "report.md").read_text()
        and len(list(tmp_path.iterdir())) == 1
    )


@pytest.mark.parametrize(
    "interval,is_noise",
    [((-0.1, 0.2), True), ((0.01, 0.2), False), ((-0.2, -0.01), False), ((0.0, 0.1), True)],
)
def test_noise_is_what_might_be_nothing(interval, is_noise):
    change = {"change": 0.05, "interval": interval}
    line = report.table_row(report.Line("x", [0.5, 0.55], change), 26, (8, 8))
    assert line.endswith("noise") == is_noise and "+5.0" in line


def test_table_of_one_model(finished):
    results = json.loads((finished[0] / "eval.json").read_text())
    results["models"] = {"ppo": results["models"]["ppo"]}
    text = report.table({**results, "changes": {}, "ahead": {}, "head_to_head": {}})
    assert "change" not in text and "less" not in text


# ---------------------------------------------------------------------------------------------
# Plots


def test_every_model_has_a_colour_and_keeps_it():
    names = ["base", "sft", "best_of_4", "dpo", "ppo"]
    colours = plots.colours_of(names)
    assert len(set(colours.values())) == 5 and colours["ppo"] == plots.colours_of(["ppo"])["ppo"]


def test_tasks_of_four_models_are_drawn():
    pytest.importorskip("matplotlib")
    models = {
        name: {"add": 0.2 * n, "sort": 0.9} for n, name in enumerate(("base", "sft", "dpo", "ppo"))
    }
    figure = plots.draw_tasks(models, {"add": (0.4, (0.2, 0.6)), "sort": (0.0, (-0.1, 0.1))}, "sft")
    bars, intervals = figure.axes
    assert sorted(round(bar.get_width()) for bar in bars.patches) == [0, 20, 40, 60, 90, 90, 90, 90]
    edges = sorted((bar.get_y(), bar.get_y() + bar.get_height()) for bar in bars.patches)
    assert all(end <= start + 1e-9 for (_, end), (start, _) in zip(edges, edges[1:])), (
        "no bar covers another"
    )
    assert "ppo less sft" in intervals.get_xlabel()
    points = [line for line in intervals.lines if line.get_marker() == "o"]
    assert [point.get_xdata()[0] for point in points] == [40.0, 0.0]
    assert [point.get_markerfacecolor() == "white" for point in points] == [False, True], (
        "noise is hollow"
    )


def test_curves_of_what_was_logged():
    """Without a critic there is no explained variance, and no empty picture of it."""
    pytest.importorskip("matplotlib")
    rows = [
        {
            "stage": "ppo",
            "step": n,
            "score_mean": 0.1 * n,
            "kl": 0.2 * n,
            "entropy": 1.0,
            "response_length": 9.0,
        }
        for n in range(5)
    ]
    figure = plots.draw_curves(plots.pyplot(), "ppo", rows)
    assert [axis.get_title() for axis in figure.axes if axis.axison] == [
        "score_mean",
        "kl",
        "entropy",
        "response_length",
    ]
    assert plots.draw_curves(plots.pyplot(), "ppo", []) is None


def test_the_judge_stands_beside_what_pays():
    """Against the same KL; without a judge there is one panel."""
    pytest.importorskip("matplotlib")
    rows = [{"step": n, "kl": 0.2 * n, "score_mean": 0.1 * n, "judge_mean": 0.9 - 0.1 * n}
            for n in range(4)]
    alone = [{key: row[key] for key in ("step", "kl", "score_mean")} for row in rows]
    for given, names in ((rows, ["score_mean", "judge_mean"]), (alone, ["score_mean"])):
        *panels, bar = plots.draw_path(plots.pyplot(), given).axes
        assert len(panels) == len(names) and bar.get_ylabel() == "iteration"
        for axis, name in zip(panels, names):
            points = axis.collections[0].get_offsets().tolist()
            assert points == [[row["kl"], row[name]] for row in given]
            assert "[nats per response]" in axis.get_xlabel()


# ---------------------------------------------------------------------------------------------
# compare


def test_compare_by_the_rubric_agrees_with_the_run(finished, tmp_path, capsys):
    out, _ = finished
    page = tmp_path / "page.html"
    command("compare", str(out / "ppo"), str(out / "sft"), f"--page={page}")
    expected = json.loads((out / "eval.json").read_text())["head_to_head"]["ppo_vs_sft"]
    (line,) = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("in-domain (n=20)")
    ]
    assert all(
        head_to_head.with_interval(name, expected) in line for name in ("win", "tie", "loss")
    )
    items = microcosm.items("eval", 20, 0, 1.0)
    assert (
        all(item.prompt in page.read_text() for item in items)
        and page.read_text().count("<section>") == 44
    )


def test_compare_asks_a_repeated_prompt_once(finished, tmp_path, capsys):
    """Repeats, however they are spaced, would count as prompts of their own in every interval."""
    texts = ["Copy: cat dog", "Sort: b a", "Copy:  cat dog ", "Copy: cat dog", "Copy: dog cat"]
    prompts = write(tmp_path / "p.jsonl", [{"prompt": text} for text in texts])
    judge = tmp_path / "judge.py"
    judge.write_text("def score(prompt, response, answer):\n    return len(response)\n")
    page = tmp_path / "page.html"
    models = [str(finished[0] / name) for name in ("ppo", "sft")]
    command("compare", *models, f"--prompts={prompts}", f"--judge={judge}", f"--page={page}")
    said = capsys.readouterr()
    assert "prompts: 2 repeated ones left out" in said.err
    assert "prompts (n=3): " in said.out and page.read_text().count("<section>") == 3


def test_compare_by_a_reward_model(finished, tmp_path, capsys):
    out, _ = finished
    prompts = write(
        tmp_path / "p.jsonl",
        [{"prompt": item.prompt} for item in microcosm.items("eval", 6, 5, 0.5)],
    )
    flags = [
        f"--prompts={prompts}",
        f"--judge={out / 'reward'}",
        f"--page={tmp_path / 'page.html'}",
    ]
    command("compare", str(out / "ppo"), str(out / "sft"), *flags)
    first = capsys.readouterr().out
    command("compare", str(out / "sft"), str(out / "ppo"), *flags)
    second = capsys.readouterr().out
    win, loss = (text[text.index("wins") + 5 :].split(" %")[0] for text in (first, second))
    assert f"losses {loss} %" in first and f"losses {win} %" in second, (
        "the order of the two models does not matter"
    )


def test_compare_by_a_reward_function(finished, tmp_path, capsys):
    """It sees the prompt, the answer and the reference answer of the file."""
    out, _ = finished
    items = microcosm.items("eval", 6, 5, 0.5)
    prompts = write(
        tmp_path / "p.jsonl", [{"prompt": item.prompt, "response": item.answer} for item in items]
    )
    function = tmp_path / "function.py"
    function.write_text(
        f"PROMPTS = {[item.prompt for item in items]}\n"
        f"ANSWERS = {[item.answer for item in items]}\n"
        "def score(prompt, response, answer):\n"
        "    assert ANSWERS[PROMPTS.index(prompt)] == answer\n"
        "    return -abs(len(response) - len(answer))\n"
    )
    page = tmp_path / "page.html"
    command(
        "compare",
        str(out / "ppo"),
        str(out / "sft"),
        f"--prompts={prompts}",
        f"--judge={function}",
        f"--page={page}",
    )
    said = capsys.readouterr().out
    wins = 0
    speakers = [speaking.load(out / name, {}) for name in ("ppo", "sft")]
    for item in items:
        first, second = (
            next(speaking.answers(speaker, speaking.encode(speaker, [prompt(item.prompt)])))[0].text
            for speaker in speakers
        )
        wins += abs(len(first) - len(item.answer)) < abs(len(second) - len(item.answer))
    assert f"judged by {function}" in said and f"prompts (n=6): wins {100 * wins / 6:.1f} %" in said
    assert page.read_text().count("class=truth") == 6


def test_compare_by_people(finished, tmp_path, capsys):
    """The command writes what is to be judged; once filled in, the same command reads it."""
    out, _ = finished
    prompts = write(
        tmp_path / "p.jsonl",
        [{"prompt": item.prompt} for item in microcosm.items("eval", 6, 5, 0.5)],
    )
    judge = tmp_path / "people.jsonl"
    args = [
        "compare",
        str(out / "ppo"),
        str(out / "sft"),
        f"--prompts={prompts}",
        f"--judge={judge}",
        f"--page={tmp_path / 'page.html'}",
    ]
    command(*args)
    assert "6 pairs wait in" in capsys.readouterr().out and not (tmp_path / "page.html").exists()
    rows = golden.lines(judge)
    write(
        judge,
        [
            {
                **row,
                "preference": row["preference"]
                or (1 if row["generator_1"] == str(out / "ppo") else 2),
            }
            for row in rows
        ],
    )
    command(*args)
    different = len({row["instruction"] for row in rows if row["output_1"] != row["output_2"]})
    assert (
        f"wins {100 * different / 6:.1f} %" in capsys.readouterr().out
        and (tmp_path / "page.html").exists()
    )


def test_answers_do_not_depend_on_the_batch(finished):
    speaker = speaking.load(finished[0] / "ppo", {})
    prompts = speaking.encode(
        speaker,
        [
            records.Prompt((records.Message("user", item.prompt),), item.task)
            for item in microcosm.items("eval", 7, 5)
        ],
    )
    small = replace(speaker, settings={"ppo.generation_batch": 4})
    assert list(speaking.answers(small, prompts, 1.0, seed=2, n=2)) == list(
        speaking.answers(speaker, prompts, 1.0, seed=2, n=2)
    )


def test_an_answer_cut_off_is_judged_without_an_eos(finished):
    judge = speaking.load(finished[0] / "reward", {}, ScalarModel)
    record = records.Prompt((records.Message("user", "Copy: cat dog"),), "")
    prompt, response = (
        data.encode_prompt(judge.tokenizer, record.messages, "plain"),
        data.encode_response(judge.tokenizer, "cat dog", "plain"),
    )
    scores = judging.judged(
        judge, [record] * 2, [speaking.Answer("cat dog", True), speaking.Answer("cat dog", False)]
    )
    assert (
        scores == pytest.approx(judging.scores(judge, [prompt + response, prompt + response[:-1]]))
        and scores[0] != scores[1]
    )
    with pytest.raises(ValueError, match="the context of the judge"):
        judging.judged(judge, [record], [speaking.Answer("cat " * 200, True)])


def test_an_answer_cut_off_ends_where_it_was_cut(finished):
    """The space that LLaMA 2's template puts before an EOS was not drawn either."""
    judge = speaking.load(finished[0] / "reward", {"data.template": "llama2"}, ScalarModel)
    messages = (records.Message("user", "Copy: cat dog"),)
    whole = judging.response_ids(judge, messages, speaking.Answer("cat dog", True))
    cut = judging.response_ids(judge, messages, speaking.Answer("cat dog", False))
    space = judge.tokenizer.encode_segment(" ")
    assert whole == [*cut, *space, judge.tokenizer.eos_id]
    assert judging.response_ids(judge, messages, speaking.Answer("", False)) == []


def test_page_shows_text_as_text(tmp_path):
    write_page(
        tmp_path / "page.html",
        "a<b",
        "c",
        "1 & 2",
        [Pair("<script>x</script>", "**a** & b", "{c}", 1.0, truth="<t>")],
    )
    text = (tmp_path / "page.html").read_text()
    assert (
        "<script" not in text
        and "&lt;script&gt;x&lt;/script&gt;" in text
        and "**a** &amp; b" in text
        and "{c}" in text
        and "&lt;t&gt;" in text
    )
    assert "http" not in text, "nothing is fetched from elsewhere"


# ---------------------------------------------------------------------------------------------
# chat and generate


def talk(monkeypatch, capsys, folder: Path, lines: list[str], *flags: str) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", StringIO("".join(line + "\n" for line in lines)))
    command("chat", str(folder), *flags)
    return capsys.readouterr()


def expected(
    folder: Path, dialogue: list[str], turn: int, temperature: float = 0.0, seed: int = 0
) -> tuple[str, float]:
    """Return the answer and its score, by generate and one forward of the reward model.

    dialogue: user, assistant, user, ...
    """
    tokenizer, model, judge = (
        open_tokenizer(folder),
        load_pretrained(folder),
        load_pretrained(folder.parent / "reward", kind=ScalarModel),
    )
    messages = tuple(
        records.Message(("user", "assistant")[i % 2], text) for i, text in enumerate(dialogue)
    )
    prompt = data.encode_prompt(tokenizer, messages, "plain")
    ids = generate(
        model, [prompt], 12, temperature, eos_id=tokenizer.eos_id, seed=seed, rows=[turn]
    ).tokens[0]
    config = json.loads((folder.parent / "reward" / "config.json").read_text())
    row = torch.tensor([prompt + ids])
    raw = last_scores(judge, row, torch.ones_like(row, dtype=torch.bool)).item()
    text = data.decode_response(tokenizer, ids, "plain", messages)
    return text, (raw - config["score_mean"]) / config["score_std"]


@pytest.mark.parametrize("temperature,seed", [(0.0, 0), (1.0, 3)])
def test_chat_says_what_generate_says(finished, monkeypatch, capsys, temperature, seed):
    """With the dialogue so far as its prompt; /reset forgets it."""
    folder = finished[0] / "ppo"
    out, err = talk(
        monkeypatch,
        capsys,
        folder,
        ["Copy: cat dog", "Sort: b a", "", "/reset", "Copy: cat dog"],
        f"--temperature={temperature}",
        f"--seed={seed}",
    )
    first, score = expected(folder, ["Copy: cat dog"], 0, temperature, seed)
    second, next_score = expected(
        folder, ["Copy: cat dog", first, "Sort: b a"], 1, temperature, seed
    )
    third, last_score = expected(folder, ["Copy: cat dog"], 2, temperature, seed)
    # a space that a first token brings is part of the answer, and not shown
    first, second, third = (text.removeprefix(" ") for text in (first, second, third))
    replies = "".join(
        f"> {text}\n[score {score:.2f}]\n" for text, score in ((first, score), (second, next_score))
    )
    assert (
        out.split("\n", 1)[1] == replies + f"> > > {third}\n[score {last_score:.2f}]\n> \n"
        and not err
    )


def test_ctrl_c_stops_the_answer_and_not_the_program(finished, monkeypatch, capsys, request):
    folder, stream = finished[0] / "ppo", chat.stream

    def interrupted(*args, **kwargs):
        for i, token in enumerate(stream(*args, **kwargs)):
            if i == 2 and kwargs["row"] == 0:
                signal.raise_signal(signal.SIGINT)
            yield token

    monkeypatch.setattr(chat, "stream", interrupted)
    handler = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # shells start what runs in the background with SIGINT ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    out, _ = talk(
        monkeypatch,
        capsys,
        folder,
        ["Review: Buy our new beer.", "/reset", "Copy: cat dog"],
        "--temperature=0",
    )
    whole, _ = expected(folder, ["Review: Buy our new beer."], 0)
    stopped = out.split("> ")[1].splitlines()[0]
    assert (
        stopped.endswith(" ...")
        and whole.startswith(stopped.removesuffix(" ..."))
        and len(stopped) < len(whole) + 4
    )
    assert expected(folder, ["Copy: cat dog"], 1)[0] in out.split("> ")[3]


def test_chat_survives_what_is_too_long(finished, monkeypatch, capsys):
    """A long message is refused; a long dialogue loses its oldest turns."""
    folder = finished[0] / "ppo"
    out, err = talk(
        monkeypatch,
        capsys,
        folder,
        ["word " * 200, *["Copy: cat dog" for _ in range(12)]],
        "--temperature=0",
    )
    assert "there is room for 116: shorten it" in err and out.count("[score") == 12


def test_whole_turns_are_forgotten_and_the_system_text_stays():
    system, last = records.Message("system", "s"), records.Message("user", "now")
    turns = tuple(records.Message(("user", "assistant")[i % 2], str(i)) for i in range(6))
    for n in range(9):  # room for so many messages
        for start in ((), (system,)):
            kept = chat.remember((*start, *turns, last), lambda part: len(part) <= n)
            assert kept[: len(start)] == start and kept[-1] == last
            rest = kept[len(start) :]
            assert (
                rest == (*turns, last)[-len(rest) :]
                and rest[0].role == "user"
                and len(rest) % 2 == 1
            )
            assert len(kept) <= n or len(rest) == 1, "what does not fit is forgotten"
            assert len(kept) + 2 > n or len(rest) == 7, "and no turn more"


def test_chat_forgets_whole_turns(finished, monkeypatch, capsys):
    """The model is asked with the turns that fit, each with its answer, by a count of tokens."""
    folder = finished[0] / "ppo"
    asked = []

    def listening(model, prompt, *args, **kwargs):
        asked.append(list(prompt))
        return stream(model, prompt, *args, **kwargs)

    stream = chat.stream
    monkeypatch.setattr(chat, "stream", listening)
    said = [f"Copy: cat dog {'owl ' * n}".strip() for n in (1, 9, 2, 14, 3, 3, 11, 9, 12, 0)]
    out, err = talk(monkeypatch, capsys, folder, said, "--temperature=0")
    assert not err
    tokenizer, model = open_tokenizer(folder), load_pretrained(folder)
    turns = []
    for n, (text, ids) in enumerate(zip(said, asked, strict=True)):
        dialogues = [
            (*sum(turns[start:], ()), records.Message("user", text))
            for start in range(len(turns) + 1)
        ]
        fitting = [
            ids
            for ids in (data.encode_prompt(tokenizer, dialogue, "plain") for dialogue in dialogues)
            if len(ids) <= 116
        ]
        assert ids == fitting[0], f"turn {n}"
        given = generate(model, [ids], 12, 0.0, eos_id=tokenizer.eos_id).tokens[0]
        turns.append(
            (records.Message("user", text), records.Message("assistant", data.decode_response(tokenizer, given, "plain")))
        )
    assert len(fitting) < len(dialogues), "something was forgotten"


def test_a_character_of_several_tokens_is_shown_whole():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    text = "né 😀 漢 \ufffd"
    shown = list(chat.pieces(Bytes(), iter(text.encode()), []))
    assert "".join(shown) == text and "\ufffd" not in "".join(shown[:-1]) and "😀" in shown
    assert "".join(chat.pieces(Bytes(), iter(b"a\xff\xffb\xf0\x9f"), [])) == "a\ufffd\ufffdb\ufffd"
    assert "".join(chat.pieces(Bytes(), iter(()), [])) == ""


@real_data
def test_pieces_of_llamas_tokenizer():
    tokenizer = open_tokenizer(SHARED / "tokenizer" / "tokenizer.model")
    for text in ("Hello  world\n\n 😀 it is 漢字 né", " leading", "", "\n"):
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        assert "".join(chat.pieces(tokenizer, iter(ids), [])) == tokenizer.decode(ids)


def test_generate_writes_what_people_can_rank(finished, tmp_path, capsys):
    folder = finished[0] / "ppo"
    dialogue = [
        {"role": "user", "content": "Copy: a b"},
        {"role": "assistant", "content": "a b"},
        {"role": "user", "content": "Sort: b a"},
    ]
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "Copy: cat dog"}, {"prompt": dialogue}])
    command("generate", str(folder), f"--prompts={prompts}", "--n=5", "--seed=3")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["Copy: cat dog", dialogue] and all(
        row["ranks"] is None for row in rows
    )
    tokenizer, model = open_tokenizer(folder), load_pretrained(folder)
    records, _ = reading.read_prompts([prompts])
    for i, (row, record) in enumerate(zip(rows, records)):
        prompt = data.encode_prompt(tokenizer, record.messages, "plain")
        drawn = generate(
            model,
            [prompt] * 5,
            12,
            1.0,
            eos_id=tokenizer.eos_id,
            seed=3,
            rows=range(5 * i, 5 * i + 5),
        ).tokens
        assert row["responses"] == [data.decode_response(tokenizer, ids, "plain") for ids in drawn]
    ranks = [
        [1 + sorted(set(row["responses"])).index(text) for text in row["responses"]] for row in rows
    ]
    ranked, _ = reading.read_rankings(
        [write(tmp_path / "r.jsonl", [{**row, "ranks": order} for row, order in zip(rows, ranks)])]
    )
    assert [record.messages for record in ranked] == [record.messages for record in records]


# ---------------------------------------------------------------------------------------------
# Input that cannot be used: one line, status 2


@pytest.fixture(scope="module")
def files(finished, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "nomodel").mkdir()
    write(folder / "good.jsonl", [{"prompt": "Copy: cat dog"}])
    write(folder / "long.jsonl", [{"prompt": "Copy: cat dog"}, {"prompt": "Copy:" + " cat" * 500}])
    (folder / "bad.jsonl").write_text('{"prompt": "Copy: cat dog"}\n{"prompt": "Copy')
    (folder / "bad_judgments.jsonl").write_text(json.dumps(judgment("A", "B", 1)) + "\n{")
    return folder


BAD_INPUT = [
    (["chat", "{f}/nomodel"], "{f}/nomodel: no model folder: it has no config.json"),
    (
        ["chat", "{run}"],
        "{run}: the folder of a run, not of a model: name one in it, such as {run}/ppo",
    ),
    (["chat", "{run}/reward"], "tensor lm_head.weight is missing"),
    (["reward", "{run}/sft", "--data={run}/ranked.jsonl"], "tensor score.weight is missing"),
    (["reward", "{run}/reward", "--data={f}/good.jsonl"], "{f}/good.jsonl:1: nothing is compared"),
    (["generate", "{run}/ppo", "--prompts={f}/bad.jsonl"], "{f}/bad.jsonl:2: broken JSON"),
    (["generate", "{run}/ppo", "--prompts={f}/long.jsonl"], "{f}/long.jsonl:2: a prompt of "),
    (["generate", "{run}/ppo", "--prompts={f}/none.jsonl"], "{f}/none.jsonl: No such file"),
    (
        ["generate", "{run}/ppo", "--prompts={f}/good.jsonl", "--n=0"],
        "argument --n: 0: expected int in [1, 1e6]",
    ),
    (
        ["compare", "a", "b", "--judge={f}/bad_judgments.jsonl"],
        "{f}/bad_judgments.jsonl:2: broken JSON",
    ),
    (["compare", "{run}/ppo", "{run}/sft", "--prompts={f}/good.jsonl"], "who judges the answers"),
    (["compare", "{run}/ppo", "{run}/sft", "--judge={f}/none.py"], "{f}/none.py: "),
    (
        ["compare", "{run}/ppo", "{run}/ppo", "--judge={f}/none.json"],
        "a judgment could not say whom it prefers",
    ),
    (
        ["compare", "{run}/ppo", "{run}/sft", "--page={f}/none/page.html"],
        "--page={f}/none/page.html: there is no such folder",
    ),
    (
        ["compare", "{run}/ppo", "{run}/sft", "--prompt={f}/good.jsonl"],
        "unrecognized arguments: --prompt=",
    ),
    (["talk"], "invalid choice: 'talk'"),
]


@pytest.mark.parametrize("args,message", BAD_INPUT, ids=[message for _, message in BAD_INPUT])
def test_bad_input_gets_one_line(finished, files, tmp_path, args, message):
    places = {"f": files, "run": finished[0]}
    done = subprocess.run(
        [sys.executable, ROOT / "eval.py", *[text.format(**places) for text in args]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and not done.stdout
    last = done.stderr.splitlines()[-1]
    assert (
        last.startswith("eval.py: error: ")
        and message.format(**places) in last
        and not list(tmp_path.iterdir())
    )


def test_a_folder_in_no_run_needs_a_template(finished, tmp_path):
    (tmp_path / "alone").mkdir()
    for file in (finished[0] / "ppo").iterdir():
        (tmp_path / "alone" / file.name).write_bytes(file.read_bytes())
    flags = {"data.template": None, "data.max_response_tokens": None}
    assert speaking.load(tmp_path / "alone", flags).data.template == "plain"  # its chat template says
    config = json.loads((tmp_path / "alone" / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "alone" / "tokenizer_config.json").write_text(json.dumps(config))
    accept_changed(tmp_path / "alone")
    with pytest.raises(ValueError, match="brings no chat template: give --data.template=alpaca"):
        speaking.load(tmp_path / "alone", flags)
    with pytest.raises(ValueError, match="--data.max_response_tokens=128 leaves no room"):
        speaking.load(
            tmp_path / "alone", {"data.template": "plain", "data.max_response_tokens": 128}
        )
    assert (
        speaking.load(
            tmp_path / "alone", {**flags, "data.template": "plain"}
        ).data.max_response_tokens
        == 64
    )
    speaker = speaking.load(
        tmp_path / "alone", {"data.template": "vicuna", "data.max_response_tokens": 28}
    )
    assert (speaker.data.template, speaker.data.max_prompt_tokens, speaker.is_world) == (
        "vicuna",
        100,
        False,
    )
    assert speaking.load(finished[0] / "ppo", flags).is_world
