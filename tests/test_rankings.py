"""People edit to_rank.jsonl: ranks follow the texts that people saw, and what cannot be right is refused by line."""

import json
import math
import shutil
from pathlib import Path

import pytest

import golden
import train


@pytest.fixture
def sampled(finished, tmp_path) -> Path:
    """A run that has sampled, and waits for its annotators."""
    out = tmp_path / "run"
    out.mkdir()
    for name in ("config.json", "tokenizer.model", "to_rank.jsonl", "heldout.jsonl"):
        shutil.copy(finished[0] / name, out)
    shutil.copytree(finished[0] / "sft", out / "sft")
    return out


def annotate(out: Path, rows: list[dict] | None = None) -> list[dict]:
    if rows is not None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (out / "to_rank.jsonl").write_text(text)
    train.main([f"--out={out}", "--stages=annotate"])
    return golden.lines(out / "ranked.jsonl")


def ranked(out: Path) -> list[dict]:
    """The rows, every text with a rank of its own: how it sorts."""
    rows = golden.lines(out / "to_rank.jsonl")
    for row in rows:
        row["ranks"] = [sorted(set(row["responses"])).index(text) for text in row["responses"]]
    return rows


def by_ids(rows: list[dict]) -> list[dict]:
    return [{tuple(ids): rank for ids, rank in zip(row["response_ids"], row["ranks"])}
            for row in sorted(rows, key=lambda row: row["id"])]


def test_ranks_follow_the_texts_wherever_they_stand(sampled):
    """Responses sorted, prompts reversed: the same ranks for the same ids."""
    rows = ranked(sampled)
    straight = annotate(sampled, rows)
    edited = []
    for row in reversed(rows):
        both = sorted(zip(row["responses"], row["ranks"]))
        edited.append({**row, "responses": [text for text, _ in both],
                       "ranks": [rank for _, rank in both]})
    assert any(a["responses"] != b["responses"] for a, b in zip(rows, reversed(edited)))
    (sampled / "ranked.jsonl").unlink()
    again = annotate(sampled, edited)
    assert by_ids(again) == by_ids(straight)
    assert [row["id"] for row in again] == list(range(len(rows)))[::-1]


def with_value(rows: list[dict], line: int, name: str, value) -> None:
    rows[line - 1][name] = value


SPOILT = {
    "a NaN": lambda rows: with_value(rows, 3, "ranks", [1, 2, 3, 4, math.nan]),
    "an infinity": lambda rows: with_value(rows, 3, "ranks", [1, 2, 3, 4, math.inf]),
    "huge": lambda rows: with_value(rows, 3, "ranks", [1, 2, 3, 4, 10**400]),
    "a boolean": lambda rows: with_value(rows, 3, "ranks", [1, 2, 3, 4, True]),
    "a word": lambda rows: with_value(rows, 3, "ranks", [1, 2, 3, 4, "5"]),
    "one too few": lambda rows: with_value(rows, 3, "ranks", [1, 2, 3, 4]),
    "no list": lambda rows: with_value(rows, 3, "ranks", 1),
    "an edited text": lambda rows: rows[2]["responses"].__setitem__(1, "Better so."),
    "a text too few": lambda rows: rows[2]["responses"].pop(),
    "no texts": lambda rows: rows[2].pop("responses"),
    "a number for a text": lambda rows: rows[2]["responses"].__setitem__(1, 7),
    "another prompt": lambda rows: with_value(rows, 3, "prompt", "Copy: what?"),
    "no prompt": lambda rows: rows[2].pop("prompt"),
    "a prompt of nothing": lambda rows: with_value(rows, 3, "prompt", []),
    "a prompt of numbers": lambda rows: with_value(rows, 3, "prompt", {"a": 1}),
    "lost ids": lambda rows: rows[2].pop("response_ids"),
    "ids of words": lambda rows: rows[2]["response_ids"].__setitem__(1, ["a"]),
    "lost prompt ids": lambda rows: rows[2].pop("prompt_ids"),
    "an id twice": lambda rows: with_value(rows, 3, "id", 0),
    "no id": lambda rows: rows[2].pop("id"),
    "an id beyond": lambda rows: with_value(rows, 3, "id", 40),
    "a true id": lambda rows: with_value(rows, 3, "id", True),
    "the prompt of another row": lambda rows: rows.__setitem__(2, {**rows[4], "id": 2}),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_what_cannot_be_right_is_refused_by_line(sampled, spoil):
    rows = ranked(sampled)
    spoil(rows)
    with pytest.raises(ValueError) as error:
        annotate(sampled, rows)
    assert str(error.value).startswith(f"{sampled / 'to_rank.jsonl'}:3: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert not (sampled / "ranked.jsonl").exists()


def test_half_a_file_is_refused(sampled):
    rows = ranked(sampled)
    with pytest.raises(ValueError, match="holds 30 of 40 prompts, and lacks number 10 first"):
        annotate(sampled, rows[:10] + rows[20:])
    with pytest.raises(ValueError, match="holds 0 of 40 prompts"):
        annotate(sampled, [])
    whole = annotate(sampled, rows)
    half = "".join(json.dumps(row) + "\n" for row in whole[:20])
    (sampled / "ranked.jsonl").write_text(half)
    (sampled / "checksums.json").unlink()  # by which any change would be refused
    with pytest.raises(ValueError, match=r"ranked.jsonl: holds 20 of 40 prompts"):
        train.main([f"--out={sampled}", "--stages=reward"])
    whole[7]["ranks"][0] = math.nan
    (sampled / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in whole))
    with pytest.raises(ValueError, match=r"ranked.jsonl:8: \"ranks\" must be"):
        train.main([f"--out={sampled}", "--stages=top"])


def test_rows_of_another_seed_are_refused(finished, sampled, tmp_path):
    other = tmp_path / "other"
    train.main([f"--base={finished[0]}", f"--out={other}", "--stages=sample", "--seed=7"])
    shutil.copy(other / "to_rank.jsonl", sampled)
    with pytest.raises(ValueError, match=r"to_rank.jsonl:1: prompt 0 of this run is another one"):
        annotate(sampled)
