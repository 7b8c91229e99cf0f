"""The domain: review an advertisement, name every rule it breaks and quote the word that shows it.

Nine rules. Some are broken by one phrase (a cure, a sure success, a gift, a photo before and
after), some by how two places of the ad relate: the product and the audience, a superlative and its
proof, an investment and its notice, the product and the landing page. The same words also occur
innocently ("A story about asthma."), so a review has to read, not to spot words.
"""
from __future__ import annotations

import random
from typing import NamedTuple

# Rules in the order in which a review lists them, and the words it uses for them.
RULES = {
    "banned": "Banned product",
    "minors": "Sold to minors",
    "notice": "No risk notice",
    "medical": "Medical claim",
    "promise": "False promise",
    "price": "Misleading price",
    "image": "Altered photo",
    "superlative": "No proof",
    "page": "Wrong page",
}
RULE_OF = {title: rule for rule, title in RULES.items()}
PRODUCTS = {
    "plain": ("tea", "lamp", "bike", "sofa", "soap", "phone", "desk", "coat"),
    "banned": ("vape", "gun", "ivory", "venom"),
    "adult": ("beer", "wine", "casino", "cigar"),
    "finance": ("loan", "bonds", "crypto", "shares"),
}
# Rule -> the only kind of product that can break it.
GATE = {"banned": "banned", "minors": "adult", "notice": "finance"}
VERBS = ("Try", "Buy", "Get", "Enjoy")
LOOKS = ("new", "smart", "modern", "famous", "classic", "royal")
SMALL_TALK = ("Call us now.", "Made in Spain.", "Open on Sunday.", "Sold in two sizes.")
# Share of the ads that break 0, 1, 2 ... 6 rules.
VIOLATIONS = (0.12, 0.16, 0.20, 0.20, 0.16, 0.10, 0.06)

# Reviewers are hasty: each reason is noticed with the same chance, whatever else is noticed. So of
# the reviews of an ad that breaks n rules, 0.3 ** n are full analyses: rare among five samples.
NOTICED = 0.3
INVENTED = 0.1   # share of reviews that hold an innocent word against the ad
FLIPPED = 0.04   # share of reviews with the wrong verdict


class Phrase(NamedTuple):
    """A place in an ad that breaks its rule with one wording and keeps it with another.

    {} is where the word stands.
    """
    words: tuple[str, ...]
    breaking: tuple[str, ...]
    innocent_words: tuple[str, ...]
    innocent: tuple[str, ...]
    share: float               # of the ads that keep the rule, how many have the innocent wording


ILLNESSES = ("migraine", "asthma", "cancer", "acne", "flu", "gout")
GOALS = ("love", "wealth", "fame", "luck", "success", "beauty")
PARTS = ("skin", "belly", "hair", "face", "teeth", "legs")
SUPERLATIVES = ("best", "finest", "safest", "fastest", "cheapest", "purest")
MINORS = ("kids", "teens", "pupils", "children")
GROWN = ("adults", "parents", "seniors", "teams")
PHRASES = {
    "medical": Phrase(
        ILLNESSES, ("It cures {}.", "Ends {} for good."), ILLNESSES, ("A story about {}.",), 0.1),
    "promise": Phrase(
        GOALS, ("Brings sure {}.", "You will find {}."), GOALS, ("We wish you {}.",), 0.1),
    "price": Phrase(
        ("nothing", "zero", "pennies", "peanuts"), ("Costs {}.", "Pay {} today."),
        ("9", "15"), ("Costs {} dollars.", "Pay {} dollars today."), 0.3),
    "image": Phrase(
        PARTS, ("See {} before and after.",), PARTS, ("Gentle to your {}.",), 0.1),
    "superlative": Phrase(
        SUPERLATIVES, ("The {} of all.",), SUPERLATIVES, ("The {} in a study.",), 0.2),
}
# Whom an ad addresses: minors are innocent where the product is not for adults alone.
FOR_ADULTS = Phrase(MINORS, ("For {}.",), GROWN, ("For {}.",), 0.5)
FOR_ALL = FOR_ADULTS._replace(innocent_words=MINORS + GROWN)
AUDIENCE = {kind: FOR_ADULTS if kind == "adult" else FOR_ALL for kind in PRODUCTS}


class Ad(NamedTuple):
    """An advertisement and what its words stand for, both in the order of RULES."""
    text: str
    look: str
    product: str
    evidence: dict[str, str]   # broken rule -> the word that shows it
    innocent: dict[str, str]   # kept rule -> the word that one might wrongly quote against it


def draw(rng: random.Random) -> Ad:
    """Draw an advertisement."""
    # 1. What it breaks, which decides on what it sells and where its link leads.
    broken = draw_rules(rng)
    gate = next((rule for rule in broken if rule in GATE), None)
    kind = GATE[gate] if gate else rng.choices(("plain", "adult", "finance"), (6, 2, 2))[0]
    product = rng.choice(PRODUCTS[kind])
    page = product
    if "page" in broken:
        page = rng.choice([other for other in PRODUCTS["plain"] if other != product])

    # 2. The sentences, in any order between the first and the last.
    body, words = draw_body(rng, {"minors": AUDIENCE[kind], **PHRASES}, broken)
    if kind == "finance" and "notice" not in broken:
        body.append("Risk of loss.")
    rng.shuffle(body)
    look = rng.choice(LOOKS)
    text = " ".join((f"{rng.choice(VERBS)} our {look} {product}.", *body, f"Page: {page} shop."))

    # 3. What each word stands for.
    words |= {"banned": product, "notice": product, "page": page}
    known = [rule for rule in RULES if rule in words]
    evidence = {rule: words[rule] for rule in known if rule in broken}
    innocent = {rule: words[rule] for rule in known if rule not in broken}
    return Ad(text, look, product, evidence, innocent)


def draw_rules(rng: random.Random) -> list[str]:
    """Draw the rules an ad breaks."""
    number = rng.choices(range(len(VIOLATIONS)), VIOLATIONS)[0]
    broken: list[str] = []
    while len(broken) < number:
        rule = rng.choice(tuple(RULES))
        # An ad sells one product: no two rules that need different kinds of it.
        clashes = rule in GATE and any(other in GATE for other in broken)
        if rule not in broken and not clashes:
            broken.append(rule)
    return broken


def draw_body(
    rng: random.Random, phrases: dict[str, Phrase], broken: list[str]
) -> tuple[list[str], dict[str, str]]:
    """Draw the sentences of an ad, and the word that each rule is about."""
    body: list[str] = []
    words: dict[str, str] = {}
    for rule, phrase in phrases.items():
        if rule in broken:
            words[rule] = rng.choice(phrase.words)
            body.append(rng.choice(phrase.breaking).format(words[rule]))
        elif rng.random() < phrase.share:
            words[rule] = rng.choice(phrase.innocent_words)
            body.append(rng.choice(phrase.innocent).format(words[rule]))
    if rng.random() < 0.3:
        body.append(rng.choice(SMALL_TALK))
    return body, words


def review(evidence: dict[str, str], approve: bool) -> str:
    """Write a review: the verdict, then one sentence per reason."""
    reasons = [f"{RULES[rule]}: {word}." for rule, word in evidence.items()]
    return " ".join(["Approve." if approve else "Reject.", *reasons])


def demonstrate(ad: Ad, rng: random.Random) -> str:
    """Write the review of a hasty person: the verdict is nearly always right, reasons are few."""
    given = {rule: word for rule, word in ad.evidence.items() if rng.random() < NOTICED}
    if ad.innocent and rng.random() < INVENTED:
        rule = rng.choice(tuple(ad.innocent))
        given[rule] = ad.innocent[rule]
    # Whether an ad is fine is felt at once, before any reason is found.
    right_verdict = rng.random() >= FLIPPED
    approve = (not ad.evidence) == right_verdict and not given
    ordered = {rule: given[rule] for rule in RULES if rule in given}
    return review(ordered, approve=approve)


class Review(NamedTuple):
    """What a review says."""
    approved: bool | None              # None: the text is no review
    reasons: list[tuple[str, str]]     # (rule, word), in the order given, repetitions included


def parse(answer: str) -> Review:
    """Read a review."""
    verdict, _, rest = answer.strip().partition(".")
    if verdict not in ("Approve", "Reject"):
        return Review(None, [])
    reasons = []
    for sentence in rest.split("."):
        if not sentence.strip():
            continue
        title, _, word = sentence.strip().partition(": ")
        # A rule that does not exist stays in the list as it is written, and is wrong.
        reasons.append((RULE_OF.get(title, title), word))
    return Review(verdict == "Approve", reasons)
