"""The domain: review a short advertisement, name every rule it breaks and quote the word that shows it.

Nine rules. Some are broken by one phrase (a cure, a sure success, a gift, a photo before and after), some
by how two places of the ad relate: the product and the audience, a superlative and its proof, an investment
and its notice, the product and the landing page. The same words also occur innocently ("A story about
asthma."), so a review has to read, not to spot words.
"""
from __future__ import annotations

import random
from typing import Callable, NamedTuple

# Rules in the order in which a review lists them, and the words it uses for them.
RULES = {
    "banned": "Banned product", "minors": "Sold to minors", "notice": "No risk notice", "medical": "Medical claim", "promise": "False promise",
    "price": "Misleading price", "image": "Altered photo", "superlative": "No proof", "page": "Wrong page",
}
PRODUCTS = {
    "plain": ("tea", "lamp", "bike", "sofa", "soap", "phone", "desk", "coat"),
    "banned": ("vape", "gun", "ivory", "venom"),
    "adult": ("beer", "wine", "casino", "cigar"),
    "finance": ("loan", "bonds", "crypto", "shares"),
}
KIND = {product: kind for kind, products in PRODUCTS.items() for product in products}
GATE = {"banned": "banned", "minors": "adult", "notice": "finance"}  # rule -> the only kind of product that can break it
MINORS, GROWN = ("kids", "teens", "pupils", "babies"), ("adults", "parents", "seniors", "teams")
ILLNESSES = ("migraine", "asthma", "cancer", "acne", "flu", "gout")
GOALS = ("love", "wealth", "fame", "luck", "success", "beauty")
GIFTS = ("nothing", "zero", "pennies", "air")
PARTS = ("skin", "belly", "hair", "face", "teeth", "legs")
SUPERLATIVES = ("best", "finest", "safest", "fastest", "cheapest", "purest")
VERBS, LOOKS = ("Try", "Buy", "Get", "Enjoy"), ("new", "smart", "fresh", "light", "classic", "royal")
SMALL_TALK = ("Call us now.", "Made in Spain.", "Open on Sunday.", "Sold in two sizes.")
VIOLATIONS = (0.14, 0.27, 0.31, 0.19, 0.09)  # share of ads that break 0, 1, 2, 3, 4 rules

CAREFUL, HASTY = 0.38, 0.47  # reviewers who give every reason, or the first one only; the rest is sloppy


class Ad(NamedTuple):
    """An advertisement, and the evidence of every rule it breaks, in the order of RULES."""
    text: str
    look: str
    product: str
    evidence: dict[str, str]


def draw(rng: random.Random) -> Ad:
    """Draw an advertisement."""
    broken = draw_rules(rng)
    gate = next((rule for rule in broken if rule in GATE), None)
    kind = GATE[gate] if gate else rng.choices(("plain", "adult", "finance"), (6, 2, 2))[0]
    product = rng.choice(PRODUCTS[kind])
    evidence = {"banned": product, "notice": product}
    body = [AUDIENCE[kind](rng, "minors" in broken, evidence), "" if kind != "finance" or "notice" in broken else "Risk of loss."]
    body += [phrase(rng, rule in broken, evidence) for rule, phrase in PHRASES.items()]
    body += [rng.choice(SMALL_TALK)] * (rng.random() < 0.3)
    rng.shuffle(body)
    page = product
    if "page" in broken:
        page = evidence["page"] = rng.choice([other for other in PRODUCTS["plain"] if other != product])
    look = rng.choice(LOOKS)
    text = " ".join((f"{rng.choice(VERBS)} our {look} {product}.", *filter(None, body), f"Page: {page} shop."))
    return Ad(text, look, product, {rule: evidence[rule] for rule in RULES if rule in broken})


def draw_rules(rng: random.Random) -> set[str]:
    """Draw the rules an ad breaks; at most one of those that a kind of product alone can break."""
    number = rng.choices(range(len(VIOLATIONS)), VIOLATIONS)[0]
    broken: set[str] = set()
    while len(broken) < number:
        rule = rng.choice(tuple(RULES))
        if rule not in GATE or not broken & GATE.keys():
            broken.add(rule)
    return broken


def audience_of(allowed: tuple[str, ...]) -> Callable[[random.Random, bool, dict[str, str]], str]:
    def phrase(rng: random.Random, broken: bool, evidence: dict[str, str]) -> str:
        if not broken and rng.random() < 0.5:
            return ""
        evidence["minors"] = rng.choice(MINORS if broken else allowed)
        return f"For {evidence['minors']}."
    return phrase


def phrase_of(rule: str, words: tuple[str, ...], breaking: tuple[str, ...], innocent: tuple[str, ...],
              share: float) -> Callable[[random.Random, bool, dict[str, str]], str]:
    """Return a phrase maker: a breaking form around one of `words`, or in `share` of the other ads an innocent one."""
    def phrase(rng: random.Random, broken: bool, evidence: dict[str, str]) -> str:
        if not broken and rng.random() >= share:
            return ""
        evidence[rule] = rng.choice(words)
        return rng.choice(breaking if broken else innocent).format(evidence[rule])
    return phrase


AUDIENCE = {kind: audience_of(GROWN if kind == "adult" else MINORS + GROWN) for kind in PRODUCTS}
PHRASES = {
    "medical": phrase_of("medical", ILLNESSES, ("It cures {}.", "Ends {} for good."), ("A story about {}.",), 0.1),
    "promise": phrase_of("promise", GOALS, ("Brings sure {}.", "You will find {}."), ("We wish you {}.",), 0.1),
    "price": phrase_of("price", GIFTS, ("Costs {}.", "Pay {} today."), ("Costs 9 dollars.", "Pay 15 dollars today."), 0.3),
    "image": phrase_of("image", PARTS, ("See {} before and after.",), ("Gentle to your {}.",), 0.1),
    "superlative": phrase_of("superlative", SUPERLATIVES, ("The {} of all.",), ("The {} in a study.",), 0.2),
}


def review(evidence: dict[str, str], approve: bool) -> str:
    """Write a review: the verdict, then one sentence per reason."""
    return " ".join(("Approve." if approve else "Reject.", *(f"{RULES[rule]}: {word}." for rule, word in evidence.items())))


def demonstrate(ad: Ad, rng: random.Random) -> str:
    """Write the review of a careful, a hasty or a sloppy person."""
    mood, reasons = rng.random(), list(ad.evidence.items())
    if mood < CAREFUL + HASTY:
        return review(dict(reasons if mood < CAREFUL else reasons[:1]), approve=not reasons)
    kept = {rule: word for rule, word in reasons if rng.random() < 0.5}
    if rng.random() < 0.3:  # an invented reason, from some word of the ad
        kept[rng.choice(tuple(RULES))] = rng.choice(ad.text.replace(".", "").replace(":", "").split())
    flipped = rng.random() < 0.2
    return review({rule: kept[rule] for rule in RULES if rule in kept}, approve=(not reasons) != flipped)


def parse(answer: str) -> tuple[bool | None, list[tuple[str, str]]]:
    """Read a review: approved?, and its (rule, evidence) pairs; (None, []) for a text that is no review."""
    verdict, _, rest = answer.strip().partition(".")
    if verdict not in ("Approve", "Reject"):
        return None, []
    rules = {title: rule for rule, title in RULES.items()}
    sentences = (sentence.strip().partition(": ") for sentence in rest.split(".") if sentence.strip())
    return verdict == "Approve", [(rules.get(title, title), word) for title, _, word in sentences]  # an unknown rule stays, and is wrong
