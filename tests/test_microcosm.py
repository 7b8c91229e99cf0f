"""The embedded world: its truth re-derived from the text by an own reader, splits, people, rubric,
tokenizer."""

import hashlib
import importlib.util
import random
import re
from collections import Counter
from pathlib import Path
from statistics import fmean

import pytest

import microcosm
from data import open_tokenizer
from microcosm import TASKS, Item, demonstrate, items, rubric

ADULT = {"beer", "wine", "casino", "cigar"}
FINANCE = {"loan", "bonds", "crypto", "shares"}
BANNED = {"vape", "gun", "ivory", "venom"}
CHILDREN = {"kids", "teens", "pupils", "children"}
PATTERNS = {
    "Medical claim": r"(?:It cures|Ends) (\w+)",
    "False promise": r"(?:Brings sure|You will find) (\w+)\.",
    "Misleading price": r"(?:Costs|Pay) ([a-z]+)",
    "Altered photo": r"See (\w+) before and after",
    "No proof": r"The (\w+) of all",
}
ORDER = (
    "Banned product",
    "Sold to minors",
    "No risk notice",
    "Medical claim",
    "False promise",
    "Misleading price",
    "Altered photo",
    "No proof",
    "Wrong page",
)
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
PAIRS = [
    ("hot", "cold"),
    ("big", "small"),
    ("old", "young"),
    ("fast", "slow"),
    ("dark", "bright"),
    ("wet", "dry"),
]


def read_ad(prompt: str) -> str:
    """Review an ad from its text alone."""
    product = re.match(r"Review: \w+ our \w+ (\w+)\.", prompt)[1]
    page = re.search(r"Page: (\w+) shop\.$", prompt)[1]
    audience = re.search(r"For (\w+)\.", prompt)
    reasons = {}
    for title, pattern in PATTERNS.items():
        if match := re.search(pattern, prompt):
            reasons[title] = match[1]
    if product in BANNED:
        reasons["Banned product"] = product
    if product in ADULT and audience and audience[1] in CHILDREN:
        reasons["Sold to minors"] = audience[1]
    if product in FINANCE and "Risk of loss." not in prompt:
        reasons["No risk notice"] = product
    if page != product:
        reasons["Wrong page"] = page
    sentences = [f"{title}: {reasons[title]}." for title in ORDER if title in reasons]
    return " ".join(["Reject." if reasons else "Approve.", *sentences])


def truth_of(words: list[str]) -> bool:
    """Work out "yes and no", "yes or no" or "yes but not no"."""
    first, last = words[0] == "yes", words[-1] == "yes"
    return {"and": first and last, "or": first or last, "but not": first and not last}[
        " ".join(words[1:-1])
    ]


def class_of(word: str) -> str:
    return next(name for name, group in microcosm.general.CLASSES.items() if word in group)


def odd_one(words: list[str]) -> str:
    kinds = Counter(map(class_of, words))
    return next(word for word in words if kinds[class_of(word)] == 1)


def opposite(word: str) -> str:
    return next(b if word == a else a for a, b in PAIRS if word in (a, b))


def solve(item: Item) -> str:
    """Answer a general question from its text alone."""
    head, _, tail = item.prompt.partition(": ")
    words = tail.split()
    numbers = [int(n) for n in re.findall(r"\d+", tail)]
    solvers = {
        "copy": lambda: tail,
        "reverse": lambda: " ".join(reversed(words)),
        "sort": lambda: " ".join(map(str, sorted(numbers))),
        "add": lambda: f"{sum(numbers)} {words[1]}",
        "larger": lambda: str(max(numbers)),
        "count": lambda: str(len(words)),
        "next": lambda: f"{2 * numbers[-1] - numbers[-2]} {head.split()[2]}",
        "kind": lambda: class_of(head.split()[-1]),
        "logic": lambda: "yes" if truth_of(words) else "no",
        "weekday": lambda: DAYS[(DAYS.index(words[-1]) + numbers[0]) % 7],
        "odd-one-out": lambda: odd_one(words),
        "antonym": lambda: f"{opposite(words[0])} and {opposite(words[2])} {words[3]}",
    }
    return solvers[item.task]()


def test_truth_follows_from_the_text():
    for item in items("train", 4000, seed=3):
        assert item.answer == (solve(item) if item.task else read_ad(item.prompt)), item.prompt
        judged = rubric.metrics(item.prompt, item.answer, item.answer)
        assert judged["gold"] == judged["strict"] == 1.0


def test_every_task_and_every_rule_occurs():
    drawn = items("eval", 3000, seed=0)
    assert {item.task for item in drawn} == {"", *TASKS} and len(TASKS) == 12
    assert {rule for item in drawn if item.ad for rule in item.ad.evidence} == set(
        microcosm.ads.RULES
    )


def test_splits_are_disjoint_for_all_seeds():
    prompts = {
        split: {item.prompt for seed in (0, 1, 2) for item in items(split, 3000, seed)}
        for split in microcosm.SPLITS
    }
    assert not prompts["eval"] & prompts["train"]
    assert not prompts["eval"] & prompts["preference"]
    assert not prompts["train"] & prompts["preference"]
    kinds = {
        split: {
            (item.ad.look, item.ad.product, *item.ad.evidence)
            for item in items(split, 5000, 0, 1.0)
        }
        for split in microcosm.SPLITS
    }
    assert not kinds["eval"] & kinds["train"] and not kinds["eval"] & kinds["preference"], (
        "what is sold and why it is rejected are new together"
    )


def test_no_prompt_comes_twice_in_a_split():
    """As many as a default run draws; and where there are no more, that is said."""
    drawn = {
        "train": [("train", 40_000, 0.6), ("train", 3840, 1.0)],
        "preference": [("preference", 9_000, 0.7)],
        "eval": [("eval", 500, 1.0), ("eval", 720, 0.0)],
    }
    for calls in drawn.values():
        for split, n, share in calls:
            prompts = [item.prompt for item in items(split, n, 0, share)]
            assert len(prompts) == n == len(set(prompts))
    tasks = Counter(item.task for item in items("eval", 720, 0, 0.0))
    assert set(tasks.values()) == {60} and len(tasks) == 12
    with pytest.raises(ValueError, match="too few different prompts of .*split eval"):
        items("eval", 6_000, 0, 0.0)


def test_everything_is_a_function_of_the_seed():
    assert items("train", 200, 5) == items("train", 200, 5) != items("train", 200, 6)


def test_the_world_is_the_same_in_every_version():
    """Prompts, answers, demonstrations, slips: what published numbers rest on."""
    digest = hashlib.sha256()
    for split in ("train", "preference", "eval"):
        for seed in (0, 7):
            rng = random.Random(seed)
            for item in items(split, 1500, seed):
                shown = (item.prompt, item.answer, demonstrate(item, rng), item.slip, "")
                digest.update("\n".join(shown).encode())
    assert digest.hexdigest() == "91760b227b0d132e04a6cb8fc74a5144092cc0a1f09b974ce1082b83160e05c9"


def test_people_are_imperfect():
    rng = random.Random(0)
    ads = items("train", 4000, 0, in_domain_share=1.0)
    judged = [rubric.metrics(ad.prompt, demonstrate(ad, rng), ad.answer) for ad in ads]
    assert fmean(row["multi"] for row in judged if "multi" in row) < 0.05, "analyses are rare"
    assert 0.95 < fmean(row["verdict"] for row in judged) < 0.99
    seen: Counter[bool] = Counter()
    invented = 0
    both: Counter[tuple[bool, bool]] = Counter()
    for ad in ads:
        true = microcosm.ads.parse(ad.answer).reasons
        given = set(microcosm.ads.parse(demonstrate(ad, rng)).reasons)
        seen.update(reason in given for reason in true)
        invented += bool(given - set(true))
        both.update((a in given, b in given) for a, b in zip(true, true[1:]))
    noticed = seen[True] / seen.total()
    assert abs(noticed - 0.3) < 0.015 and 0.08 < invented / len(ads) < 0.11
    assert abs(both[True, True] / both.total() - noticed**2) < 0.015, "independently of each other"
    general = items("train", 4000, 0, in_domain_share=0.0)
    right = [
        rubric.metrics(item.prompt, demonstrate(item, rng), item.answer)["strict"]
        for item in general
    ]
    assert 0.86 < fmean(right) < 0.90


TWO_REASONS = "Reject. Medical claim: flu. Wrong page: lamp."


def test_rubric_by_hand():
    cases = {
        "Reject. Medical claim: flu. Wrong page: lamp.": (1.0, 1, 1),
        "Reject. Wrong page: lamp. Medical claim: flu.": (1.0, 1, 1),
        "Reject. Medical claim: flu.": (0.4 + 0.6 * 2 / 3, 0, 1),
        "Reject. Medical claim: acne. Wrong page: lamp.": (0.7, 0, 1),
        "Approve.": (0.0, 0, 0),
        "Approve. Medical claim: flu. Wrong page: lamp.": (0.6, 0, 0),
        "Reject.": (0.4, 0, 1),
        "Reject. Medical claim: flu. Wrong page: lamp. Wrong page: lamp.": (0.4 + 0.6 * 0.8, 0, 1),
        "": (0.0, 0, 0),
        "Reject. Medical claim: flu. Wrong page: lamp. Bad taste: lamp.": (0.4 + 0.6 * 0.8, 0, 1),
        ": .:": (0.0, 0, 0),
    }
    for response, (gold, strict, verdict) in cases.items():
        judged = rubric.metrics("", response, TWO_REASONS)
        assert judged == {
            "gold": pytest.approx(gold),
            "strict": strict,
            "verdict": verdict,
            "multi": strict,
        }, response
        assert rubric.score("", response, TWO_REASONS) == judged["gold"]


def test_rubric_of_an_ad_that_breaks_nothing_or_one_rule():
    responses = ("Approve.", "Reject.", "Approve. Wrong page: lamp.", "nonsense")
    golds = [rubric.score("", response, "Approve.") for response in responses]
    assert golds == pytest.approx([1.0, 0.6, 0.4, 0.0])
    for answer in ("Approve.", "Reject. Medical claim: flu."):
        assert rubric.metrics("", answer, answer) == {"gold": 1, "strict": 1, "verdict": 1}, (
            "no multi"
        )


def test_rubric_of_general_answers():
    responses = ("cat dog owl", "cat dog", "dog cat owl", "", "cat dog owl fox", " cat  dog owl ")
    judged = [rubric.metrics("", response, "cat dog owl") for response in responses]
    assert [row["gold"] for row in judged] == pytest.approx([1, 1.6 / 3, 0.8 / 3, 0, 0.6, 1])
    assert [row["strict"] for row in judged] == [1, 0, 0, 0, 0, 1]
    assert all(row.keys() == {"gold", "strict"} for row in judged)


def test_rubric_needs_a_reference_answer():
    with pytest.raises(ValueError, match="reference answer"):
        rubric.score("Review: anything", "Approve.", None)


def test_rubric_is_a_file_like_a_users_own():
    """Loaded by its path, as --reward.function does it."""
    spec = importlib.util.spec_from_file_location("mine", Path(rubric.__file__))
    mine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mine)
    assert mine.score("", "Reject.", TWO_REASONS) == pytest.approx(0.4)
    assert mine.metrics("", "Reject.", TWO_REASONS)["verdict"] == 1


def test_tokenizer(tmp_path):
    for name in ("a", "b"):
        microcosm.train_tokenizer(tmp_path / name, 640)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    tokenizer = open_tokenizer(tmp_path / "a")
    lengths = []
    for item in items("eval", 1000, 7):
        for text in (item.prompt, item.answer):
            assert tokenizer.decode(tokenizer.encode(text)) == text
            assert tokenizer.decode(tokenizer.encode_segment(text)) == text
        lengths.append(
            len(tokenizer.encode(item.prompt)) + len(tokenizer.encode_segment(item.answer))
        )
    words = set(re.findall(r"[A-Za-z]+", " ".join(item.prompt for item in items("train", 3000, 0))))
    assert fmean(len(tokenizer.encode(word)) for word in words) < 1.1, "a word is a piece"
    assert max(lengths) < 100 and fmean(lengths) < 36
