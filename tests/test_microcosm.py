"""The embedded world: its truth re-derived from the text by an own reader, splits, people, rubric, annotator, tokenizer."""
import random
import re
from collections import Counter
from statistics import fmean

import pytest

import microcosm
from data import Tokenizer
from microcosm import TASKS, Item, annotate, demonstrate, grade, items

ADULT, FINANCE, BANNED = {"beer", "wine", "casino", "cigar"}, {"loan", "bonds", "crypto", "shares"}, {"vape", "gun", "ivory", "venom"}
CHILDREN = {"kids", "teens", "pupils", "children"}
PATTERNS = {"Medical claim": r"(?:It cures|Ends) (\w+)", "False promise": r"(?:Brings sure|You will find) (\w+)\.",
            "Misleading price": r"(?:Costs|Pay) ([a-z]+)", "Altered photo": r"See (\w+) before and after", "No proof": r"The (\w+) of all"}
ORDER = ("Banned product", "Sold to minors", "No risk notice", "Medical claim", "False promise", "Misleading price", "Altered photo", "No proof", "Wrong page")


def read_ad(prompt: str) -> str:
    """Review an ad from its text alone."""
    product = re.match(r"Review: \w+ our \w+ (\w+)\.", prompt)[1]
    page = re.search(r"Page: (\w+) shop\.$", prompt)[1]
    audience = re.search(r"For (\w+)\.", prompt)
    reasons = {title: match[1] for title, pattern in PATTERNS.items() if (match := re.search(pattern, prompt))}
    if product in BANNED:
        reasons["Banned product"] = product
    if product in ADULT and audience and audience[1] in CHILDREN:
        reasons["Sold to minors"] = audience[1]
    if product in FINANCE and "Risk of loss." not in prompt:
        reasons["No risk notice"] = product
    if page != product:
        reasons["Wrong page"] = page
    return " ".join(["Reject." if reasons else "Approve."] + [f"{title}: {reasons[title]}." for title in ORDER if title in reasons])


def solve(item: Item) -> str:
    """Answer a general question from its text alone."""
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    head, _, tail = item.prompt.partition(": ")
    words = tail.split()
    numbers = [int(n) for n in re.findall(r"\d+", tail)]
    match item.task:
        case "copy": return tail
        case "reverse": return " ".join(reversed(words))
        case "sort": return " ".join(map(str, sorted(numbers)))
        case "add": return f"{sum(numbers)} {words[1]}"
        case "larger": return str(max(numbers))
        case "count": return str(len(words))
        case "next": return f"{2 * numbers[-1] - numbers[-2]} {head.split()[1]}"
        case "kind": return next(name for name, group in microcosm.general.CLASSES.items() if head.split()[-1] in group)
        case "logic": return "yes" if eval(tail.replace("but not", "and not").replace("yes", "1").replace("no", "0").replace("0t", "not")) else "no"
        case "weekday": return days[(days.index(words[-1]) + numbers[0]) % 7]
        case "odd-one-out":
            classes = {word: name for name, group in microcosm.general.CLASSES.items() for word in group}
            kinds = Counter(classes[word] for word in words)
            return next(word for word in words if kinds[classes[word]] == 1)
        case "antonym":
            pairs = [("hot", "cold"), ("big", "small"), ("old", "young"), ("fast", "slow"), ("dark", "bright"), ("wet", "dry")]
            return f"{next(b if words[0] == a else a for a, b in pairs if words[0] in (a, b))} {words[1]}"
    raise AssertionError(item.task)


def test_truth_follows_from_the_text():
    for item in items("train", 4000, seed=3):
        assert item.answer == (read_ad(item.prompt) if item.task == "ad" else solve(item)), item.prompt
        assert grade(item, item.answer).gold == 1.0 and grade(item, item.answer).strict


def test_every_task_and_every_rule_occurs():
    drawn = items("eval", 3000, seed=0)
    assert {item.task for item in drawn} == {"ad", *TASKS} and len(TASKS) == 12
    assert {rule for item in drawn for rule in item.evidence} == set(microcosm.ads.RULES)


def test_splits_are_disjoint_for_all_seeds():
    prompts = {split: {item.prompt for seed in (0, 1, 2) for item in items(split, 3000, seed)} for split in microcosm.SPLITS}
    assert not prompts["eval"] & prompts["train"] and not prompts["eval"] & prompts["preference"] and not prompts["train"] & prompts["preference"]
    kinds = {split: {(item.ad.look, item.ad.product, *item.evidence) for item in items(split, 5000, 0, 1.0)} for split in microcosm.SPLITS}
    assert not kinds["eval"] & kinds["train"] and not kinds["eval"] & kinds["preference"], "what is sold and why it is rejected are new together"


def test_everything_is_a_function_of_the_seed():
    assert items("train", 200, 5) == items("train", 200, 5) != items("train", 200, 6)
    item = items("preference", 1, 0, 1.0)[0]
    answers = ["Approve.", item.answer, "Reject.", "nonsense"]
    assert annotate(item, answers, 1) == annotate(item, answers, 1)
    assert len({tuple(annotate(item, answers, seed, noise=2.0)) for seed in range(20)}) > 1


def test_people_are_imperfect():
    rng = random.Random(0)
    ads = items("train", 4000, 0, in_domain_share=1.0)
    grades = [grade(ad, demonstrate(ad, rng)) for ad in ads]
    several = [g for g, ad in zip(grades, ads) if len(ad.evidence) > 1]
    assert 0.36 < fmean(g.strict for g in several) < 0.44, "about 38 % are careful"
    assert fmean(g.verdict for g in grades) > 0.95
    general = items("train", 4000, 0, in_domain_share=0.0)
    assert 0.86 < fmean(grade(item, demonstrate(item, rng)).strict for item in general) < 0.90


def test_rubric_by_hand():
    cases = {
        "Reject. Medical claim: flu. Wrong page: lamp.": (1.0, True, True), "Reject. Wrong page: lamp. Medical claim: flu.": (1.0, True, True),
        "Reject. Medical claim: flu.": (0.4 + 0.6 * 2 / 3, False, True), "Reject. Medical claim: acne. Wrong page: lamp.": (0.7, False, True),
        "Approve.": (0.0, False, False), "Approve. Medical claim: flu. Wrong page: lamp.": (0.6, False, False), "Reject.": (0.4, False, True),
        "Reject. Medical claim: flu. Wrong page: lamp. Wrong page: lamp.": (0.4 + 0.6 * 0.8, False, True), "": (0.0, False, False),
        "Reject. Medical claim: flu. Wrong page: lamp. Bad taste: lamp.": (0.4 + 0.6 * 0.8, False, True), ": .:": (0.0, False, False),
    }
    ad = Item("ad", "", "", {"medical": "flu", "page": "lamp"}, ad=microcosm.ads.Ad("", "", "", {}, {}))
    for answer, (gold, strict, verdict) in cases.items():
        judged = grade(ad, answer)
        assert (judged.gold, judged.strict, judged.verdict, judged.multi) == (pytest.approx(gold), strict, verdict, strict), answer
    clean = Item("ad", "", "", {}, ad=microcosm.ads.Ad("", "", "", {}, {}))
    assert [grade(clean, a).gold for a in ("Approve.", "Reject.", "Approve. Wrong page: lamp.", "nonsense")] == pytest.approx([1.0, 0.6, 0.4, 0.0])
    assert grade(clean, "Approve.").multi is None
    words = Item("copy", "", "cat dog owl", {})
    assert [grade(words, a).gold for a in ("cat dog owl", "cat dog", "dog cat owl", "", "cat dog owl fox")] == pytest.approx([1, 1.6 / 3, 0.8 / 3, 0, 0.6])


def test_annotator_ranks_by_the_rubric():
    item = Item("ad", "p", "", {"medical": "flu", "page": "lamp"}, ad=microcosm.ads.Ad("", "", "", {}, {}))
    answers = ["Reject. Medical claim: flu.", "Approve.", "Reject. Medical claim: flu. Wrong page: lamp.", "Approve.", "Reject."]
    assert annotate(item, answers, 0, noise=0.0) == [2, 4, 1, 4, 3]
    noisy = [annotate(item, answers, seed, noise=0.1) for seed in range(200)]
    assert all(ranks[1] == ranks[3] for ranks in noisy), "equal answers are ties"
    assert 0.75 < fmean(ranks[0] > ranks[2] for ranks in noisy) <= 1.0, "the better answer usually wins"


def test_tokenizer(tmp_path):
    for name in ("a", "b"):
        microcosm.train_tokenizer(tmp_path / name, 640)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    tokenizer = Tokenizer(tmp_path / "a")
    lengths = []
    for item in items("eval", 1000, 7):
        for text in (item.prompt, item.answer):
            assert tokenizer.decode(tokenizer.encode(text)) == text
            assert tokenizer.decode(tokenizer.encode_segment(text)) == text
        lengths.append(len(tokenizer.encode(item.prompt)) + len(tokenizer.encode_segment(item.answer)))
    words = set(re.findall(r"[A-Za-z]+", " ".join(item.prompt for item in items("train", 3000, 0))))
    assert fmean(len(tokenizer.encode(word)) for word in words) < 1.1, "a word is a piece"
    assert max(lengths) < 100 and fmean(lengths) < 36
