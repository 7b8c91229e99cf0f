"""The domain: review a short advertisement, name every rule it breaks and the word that shows it.

Nine rules. Five are lexical (one word gives them away), four relate two places of the ad: the product
and the audience, a superlative and its proof, an investment and its notice, the product and the page.
"""
from __future__ import annotations

import random
from typing import NamedTuple

# Rules in the order in which a review lists them, with the words a review uses for them.
RULES = {
    "banned": "Banned product", "minors": "Sold to minors", "notice": "No risk notice", "medical": "Medical claim",
    "promise": "False promise", "price": "Misleading price", "image": "Altered photo", "superlative": "No proof", "page": "Wrong page",
}
PRODUCTS = {
    "plain": ("tea", "lamp", "bike", "sofa", "soap", "phone", "desk", "coat"),
    "banned": ("vape", "gun", "ivory", "venom"),
    "adult": ("beer", "wine", "casino", "cigar"),
    "finance": ("loan", "bonds", "crypto", "shares"),
}
KIND = {product: kind for kind, products in PRODUCTS.items() for product in products}
MINORS, GROWN = ("kids", "teens", "pupils", "babies"), ("adults", "parents", "seniors", "teams")
ILLNESSES = ("migraine", "asthma", "cancer", "acne", "flu", "gout")
GOALS = ("love", "wealth", "fame", "luck", "success", "beauty")
GIFTS = ("nothing", "zero", "pennies", "air")
PARTS = ("skin", "belly", "hair", "face", "teeth", "legs")
SUPERLATIVES = ("best", "finest", "safest", "fastest", "cheapest", "purest")
VERBS, LOOKS = ("Try", "Buy", "Get", "Enjoy"), ("new", "smart", "fresh", "light", "classic", "royal")
VIOLATIONS = (0.14, 0.28, 0.32, 0.18, 0.08)  # share of ads with 0, 1, 2, 3, 4 broken rules
GATED = {"banned": "banned", "minors": "adult", "notice": "finance"}  # rules that only a kind of product can break


class Ad(NamedTuple):
    """An advertisement: its text, and the evidence of every broken rule, in the order of RULES."""
    text: str
    product: str
    evidence: dict[str, str]


def draw(rng: random.Random) -> Ad:
    """Draw an advertisement."""
    number = rng.choices(range(len(VIOLATIONS)), VIOLATIONS)[0]
    broken: set[str] = set()
    while len(broken) < number:
        rule = rng.choice(tuple(RULES))
        if rule not in GATED or not broken & GATED.keys():
            broken.add(rule)
    gate = next(iter(broken & GATED.keys()), None)
    kind = GATED[gate] if gate else rng.choices(("plain", "adult", "finance"), (0.6, 0.2, 0.2))[0]
    product = rng.choice(PRODUCTS[kind])
    found: dict[str, str] = {}
    body = [sentence for sentence in (audience(rng, kind, broken, found), notice(rng, kind, product, broken, found), medical(rng, broken, found),
            promise(rng, broken, found), price(rng, broken, found), image(rng, broken, found), superlative(rng, broken, found)) if sentence]
    rng.shuffle(body)
    if "banned" in broken:
        found["banned"] = product
    page = product
    if "page" in broken:
        page = found["page"] = rng.choice([other for other in KIND if other != product and KIND[other] == "plain"])
    text = " ".join((f"{rng.choice(VERBS)} our {rng.choice(LOOKS)} {product}.", *body, f"Page: {page} shop."))
    return Ad(text, product, {rule: found[rule] for rule in RULES if rule in found})


def audience(rng: random.Random, kind: str, broken: set[str], found: dict[str, str]) -> str | None:
    if "minors" in broken:
        found["minors"] = rng.choice(MINORS)
        return f"For {found['minors']}."
    if rng.random() < 0.5:
        return f"For {rng.choice(GROWN if kind == 'adult' else MINORS + GROWN)}."
    return None


def notice(rng: random.Random, kind: str, product: str, broken: set[str], found: dict[str, str]) -> str | None:
    if "notice" in broken:
        found["notice"] = product
        return None
    return "Risk of loss." if kind == "finance" else None


def medical(rng: random.Random, broken: set[str], found: dict[str, str]) -> str | None:
    if "medical" in broken:
        found["medical"] = rng.choice(ILLNESSES)
        return f"It cures {found['medical']}."
    return None


def promise(rng: random.Random, broken: set[str], found: dict[str, str]) -> str | None:
    if "promise" in broken:
        found["promise"] = rng.choice(GOALS)
        return f"Sure {found['promise']}."
    return None


def price(rng: random.Random, broken: set[str], found: dict[str, str]) -> str | None:
    if "price" in broken:
        found["price"] = rng.choice(GIFTS)
        return f"Costs {found['price']}."
    return f"Costs {rng.randrange(2, 20)} dollars." if rng.random() < 0.4 else None


def image(rng: random.Random, broken: set[str], found: dict[str, str]) -> str | None:
    if "image" in broken:
        found["image"] = rng.choice(PARTS)
        return f"See {found['image']} before and after."
    return None


def superlative(rng: random.Random, broken: set[str], found: dict[str, str]) -> str | None:
    word = rng.choice(SUPERLATIVES)
    if "superlative" in broken:
        found["superlative"] = word
        return f"The {word} of all."
    return f"The {word} in a study." if rng.random() < 0.25 else None


def review(evidence: dict[str, str], approve: bool | None = None) -> str:
    """Write a review: the verdict, then one sentence per broken rule."""
    approve = not evidence if approve is None else approve
    return " ".join(("Approve." if approve else "Reject.", *(f"{RULES[rule]}: {word}." for rule, word in evidence.items())))


def demonstrate(ad: Ad, rng: random.Random) -> str:
    """Write the review of a careful (38 %), hasty (47 %: first reason only) or sloppy (15 %) person."""
    mood, reasons = rng.random(), list(ad.evidence.items())
    if mood < 0.38:
        return review(ad.evidence)
    if mood < 0.85:
        return review(dict(reasons[:1]))
    kept = {rule: word for rule, word in reasons if rng.random() < 0.5}
    if rng.random() < 0.3:  # an invented reason, from a word that is in the ad
        rule = rng.choice(tuple(RULES))
        kept[rule] = rng.choice(ad.text.replace(".", "").replace(":", "").split())
    approve = (not ad.evidence) != (rng.random() < 0.2)
    return review({rule: kept[rule] for rule in RULES if rule in kept}, approve)


def parse(answer: str) -> tuple[bool | None, list[tuple[str, str]]]:
    """Read a review: approve?, and its (rule, evidence) pairs; (None, []) for a text that is no review."""
    verdict, _, rest = answer.strip().partition(".")
    if verdict not in ("Approve", "Reject"):
        return None, []
    titles, pairs = {title: rule for rule, title in RULES.items()}, []
    for sentence in filter(None, (part.strip() for part in rest.split("."))):
        title, _, word = sentence.partition(": ")
        pairs.append((titles.get(title, title), word))  # what is no rule stays, and counts as wrong
    return verdict == "Approve", pairs
