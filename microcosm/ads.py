"""The domain: review a short advertisement, name every rule it breaks and quote the word that shows it.

Nine rules. Some are broken by one phrase (a cure, a sure success, a gift, a photo before and after), some
by how two places of the ad relate: the product and the audience, a superlative and its proof, an investment
and its notice, the product and the landing page. The same words also occur innocently ("A story about
asthma."), so a review has to read, not to spot words.
"""
from __future__ import annotations

import random
from typing import NamedTuple

# Rules in the order in which a review lists them, and the words it uses for them.
RULES = {
    "banned": "Banned product", "minors": "Sold to minors", "notice": "No risk notice", "medical": "Medical claim", "promise": "False promise",
    "price": "Misleading price", "image": "Altered photo", "superlative": "No proof", "page": "Wrong page",
}
RULE_OF = {title: rule for rule, title in RULES.items()}
PRODUCTS = {
    "plain": ("tea", "lamp", "bike", "sofa", "soap", "phone", "desk", "coat"),
    "banned": ("vape", "gun", "ivory", "venom"),
    "adult": ("beer", "wine", "casino", "cigar"),
    "finance": ("loan", "bonds", "crypto", "shares"),
}
GATE = {"banned": "banned", "minors": "adult", "notice": "finance"}  # rule -> the only kind of product that can break it
VERBS, LOOKS = ("Try", "Buy", "Get", "Enjoy"), ("new", "smart", "modern", "famous", "classic", "royal")
SMALL_TALK = ("Call us now.", "Made in Spain.", "Open on Sunday.", "Sold in two sizes.")
VIOLATIONS = (0.13, 0.22, 0.32, 0.22, 0.11)  # share of ads that break 0, 1, 2, 3, 4 rules

CAREFUL, HASTY = 0.36, 0.50  # reviewers who give every reason, or the first one only; the rest is sloppy


class Phrase(NamedTuple):
    """A place in an ad that breaks its rule with one wording and keeps it with another; {} is where the word stands."""
    words: tuple[str, ...]
    breaking: tuple[str, ...]
    innocent_words: tuple[str, ...]
    innocent: tuple[str, ...]
    share: float               # of the ads that keep the rule, how many have the innocent wording


ILLNESSES = ("migraine", "asthma", "cancer", "acne", "flu", "gout")
GOALS = ("love", "wealth", "fame", "luck", "success", "beauty")
PARTS = ("skin", "belly", "hair", "face", "teeth", "legs")
SUPERLATIVES = ("best", "finest", "safest", "fastest", "cheapest", "purest")
MINORS, GROWN = ("kids", "teens", "pupils", "children"), ("adults", "parents", "seniors", "teams")
PHRASES = {
    "medical": Phrase(ILLNESSES, ("It cures {}.", "Ends {} for good."), ILLNESSES, ("A story about {}.",), 0.1),
    "promise": Phrase(GOALS, ("Brings sure {}.", "You will find {}."), GOALS, ("We wish you {}.",), 0.1),
    "price": Phrase(("nothing", "zero", "pennies", "peanuts"), ("Costs {}.", "Pay {} today."),
                    ("9", "15"), ("Costs {} dollars.", "Pay {} dollars today."), 0.3),
    "image": Phrase(PARTS, ("See {} before and after.",), PARTS, ("Gentle to your {}.",), 0.1),
    "superlative": Phrase(SUPERLATIVES, ("The {} of all.",), SUPERLATIVES, ("The {} in a study.",), 0.2),
}
AUDIENCE = {kind: Phrase(MINORS, ("For {}.",), GROWN if kind == "adult" else MINORS + GROWN, ("For {}.",), 0.5) for kind in PRODUCTS}


class Ad(NamedTuple):
    """An advertisement and what its words stand for, both in the order of RULES."""
    text: str
    look: str
    product: str
    evidence: dict[str, str]   # broken rule -> the word that shows it
    innocent: dict[str, str]   # kept rule -> the word that one might wrongly quote against it


def draw(rng: random.Random) -> Ad:
    """Draw an advertisement."""
    broken = draw_rules(rng)
    gate = next((rule for rule in broken if rule in GATE), None)
    kind = GATE[gate] if gate else rng.choices(("plain", "adult", "finance"), (6, 2, 2))[0]
    product = page = rng.choice(PRODUCTS[kind])
    if "page" in broken:
        page = rng.choice([other for other in PRODUCTS["plain"] if other != product])
    body, words = draw_body(rng, {"minors": AUDIENCE[kind], **PHRASES}, broken)
    if kind == "finance" and "notice" not in broken:
        body.append("Risk of loss.")
    rng.shuffle(body)
    look, words = rng.choice(LOOKS), words | {"banned": product, "notice": product, "page": page}
    text = " ".join((f"{rng.choice(VERBS)} our {look} {product}.", *body, f"Page: {page} shop."))
    known = [rule for rule in RULES if rule in words]
    return Ad(text, look, product, {rule: words[rule] for rule in known if rule in broken},
              {rule: words[rule] for rule in known if rule not in broken})


def draw_rules(rng: random.Random) -> list[str]:
    """Draw the rules an ad breaks; at most one of those that a kind of product alone can break."""
    number = rng.choices(range(len(VIOLATIONS)), VIOLATIONS)[0]
    broken: list[str] = []
    while len(broken) < number:
        rule = rng.choice(tuple(RULES))
        if rule not in broken and (rule not in GATE or not any(other in GATE for other in broken)):
            broken.append(rule)
    return broken


def draw_body(rng: random.Random, phrases: dict[str, Phrase], broken: list[str]) -> tuple[list[str], dict[str, str]]:
    """Draw the sentences of an ad, and the word that each rule is about."""
    body, words = [], {}
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
    return " ".join(("Approve." if approve else "Reject.", *(f"{RULES[rule]}: {word}." for rule, word in evidence.items())))


def demonstrate(ad: Ad, rng: random.Random) -> str:
    """Write the review of a careful, a hasty or a sloppy person."""
    mood, reasons = rng.random(), list(ad.evidence.items())
    if mood < CAREFUL + HASTY:
        return review(dict(reasons if mood < CAREFUL else reasons[:1]), approve=not reasons)
    given = {rule: word for rule, word in reasons if rng.random() < 0.5}
    if rng.random() < 0.3:  # holds an innocent word against the ad
        rule = rng.choice(tuple(ad.innocent))
        given[rule] = ad.innocent[rule]
    right_way_up = rng.random() < 0.8
    return review({rule: given[rule] for rule in RULES if rule in given}, approve=right_way_up == (not reasons and not given))


def parse(answer: str) -> tuple[bool | None, list[tuple[str, str]]]:
    """Read a review: approved?, and its (rule, evidence) pairs; (None, []) for a text that is no review."""
    verdict, _, rest = answer.strip().partition(".")
    if verdict not in ("Approve", "Reject"):
        return None, []
    sentences = (sentence.strip().partition(": ") for sentence in rest.split(".") if sentence.strip())
    return verdict == "Approve", [(RULE_OF.get(title, title), word) for title, _, word in sentences]  # an unknown rule stays, and is wrong
