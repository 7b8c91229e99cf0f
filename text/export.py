"""A tokenizer as the files that `transformers` reads.

A tokenizer.json goes out as it came. From a tokenizer.model alone, `transformers` takes the merges
in the order of ids. For runs of spaces that is wrong, as they have the lowest ids and the lowest
scores. So the whole tokenizer is written out here, and it finds the ids of `Tokenizer.encode` for
any text.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

from text.chat_template import jinja_of
from text.folder import optional_json
from text.tokenizer import SentencePiece, Tokenizer

SPACE = "\u2581"        # how sentencepiece writes a space inside a piece
LIGATURE = "\ufb01"     # "fi" in one character, which NFKC takes apart


def ordinary_scores(tokenizer: SentencePiece) -> dict[str, float]:
    """Return piece -> score of the pieces that merges make: no control, unknown or byte pieces."""
    pieces = tokenizer.processor
    # Byte pieces stand for what no merge can make; they are found by their name, <0x0A>.
    scores = {}
    for i in range(tokenizer.n_pieces):
        is_special = pieces.is_control(i) or pieces.is_unknown(i)
        if not (is_special or pieces.is_byte(i) or pieces.is_unused(i)):
            scores[pieces.id_to_piece(i)] = pieces.get_score(i)
    return scores


def merges_of(scores: dict[str, float]) -> list[str]:
    """Return BPE's merges as "left right", the one that is tried first in front."""
    # sentencepiece keeps no list of merges: it joins any two neighbours whose whole is a piece, the
    # best score first. So every way to cut a piece in two pieces is a merge.
    found = []
    for piece, score in scores.items():
        for n in range(1, len(piece)):
            left = piece[:n]
            right = piece[n:]
            if left in scores and right in scores:
                found.append((score, len(left), len(right), f"{left} {right}"))

    # The better score goes first. Of two ways to make one piece, that with the longer left part.
    found.sort(reverse=True)
    return [merge for _, _, _, merge in found]


def normalizer_of(pieces: Any) -> dict:
    """Return what is done to a text before it is cut into pieces; found out by trying."""
    steps: list[dict] = []
    if LIGATURE not in pieces.normalize(LIGATURE):
        steps.append({"type": "NFKC"})
    if pieces.normalize("a  b") == pieces.normalize("a b"):
        # Trained to take off spaces at the borders and to make one of several.
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " +"}, "content": " "})

        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}


def pre_tokenizer(pieces: Any) -> dict | None:
    """Return what puts the dummy prefix in front of a text, and of no text after a control token.

    A tokenizer that takes spaces off has no such thing: there the normalizer puts the prefix in
    front of every text, after a control token as well.
    """
    if pieces.normalize("a  b") == pieces.normalize("a b"):
        return None
    # The first step puts its replacement in front of what does not begin with it. No text begins
    # with a space here, they have become pieces' spaces before, so even " a" gets one; the second
    # step spells it as pieces do.
    first = {"type": "Metaspace", "replacement": " ", "prepend_scheme": "first", "split": False}
    second = {**first, "replacement": SPACE, "prepend_scheme": "never"}
    return {"type": "Sequence", "pretokenizers": [first, second]}


def decoder() -> dict:
    """Return how pieces become text: the normalizer backwards, bytes put together on the way."""
    steps = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    return {"type": "Sequence", "decoders": steps}


def post_processor(bos: str, bos_id: int) -> dict:
    """Return what is put around a text's ids: BOS in front, and nothing behind."""
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    second_text = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, second_text],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def added_tokens(tokenizer: SentencePiece) -> list[dict]:
    """Return the control tokens and the unknown one, as tokens that stand outside of the merges."""
    pieces = tokenizer.processor
    unknown = {pieces.id_to_piece(pieces.unk_id()): pieces.unk_id()}
    return [
        {
            "id": i,
            "content": name,
            "special": True,
            "normalized": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
        }
        for name, i in sorted({**unknown, **tokenizer.controls}.items(), key=lambda pair: pair[1])
    ]


def tokenizer_files(tokenizer: Tokenizer, template: str) -> dict[str, Any]:
    """Return the files of a tokenizer, name -> content: an object, or the Path of one to copy.

    template: the chat template to write into them; "": none.
    """
    is_own = template == tokenizer.own.name
    told = tokenizer.own.system if is_own else ""
    jinja = jinja_of(tokenizer, template, told) if template else ""
    chat = {"chat_template": jinja} if jinja else {}
    if isinstance(tokenizer, SentencePiece):
        files = sentencepiece_files(tokenizer)
        if files:
            files["tokenizer_config.json"].update(chat)
        return {"tokenizer.model": tokenizer.path, **files}
    names = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json")
    files = {name: tokenizer.path.parent / name for name in names}
    files = {name: path for name, path in files.items() if path.is_file()}
    config = optional_json(tokenizer.path.parent / "tokenizer_config.json")
    config.pop("chat_template", None)
    return {**files, "tokenizer_config.json": {**config, **chat}}


def sentencepiece_files(tokenizer: SentencePiece) -> dict[str, dict]:
    """Return the content of tokenizer.json and tokenizer_config.json; {} unless this is BPE."""
    pieces = tokenizer.processor
    ids = range(tokenizer.n_pieces)
    scores = ordinary_scores(tokenizer)

    # BPE's scores are whole numbers, the merges counted down; a unigram model's are
    # log-probabilities, and it has no merges that could be written.
    if any(score % 1 for score in scores.values()):
        return {}

    bos = tokenizer.piece(tokenizer.bos_id)
    unknown = pieces.id_to_piece(pieces.unk_id())
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": any(pieces.is_byte(i) for i in ids),
        "ignore_merges": False,
        "vocab": {pieces.id_to_piece(i): i for i in ids},
        "merges": merges_of(scores),
    }
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "pre_tokenizer": pre_tokenizer(pieces),
        "added_tokens": added_tokens(tokenizer),
        "normalizer": normalizer_of(pieces),
        "decoder": decoder(),
        "post_processor": post_processor(bos, tokenizer.bos_id) if tokenizer.opening else None,
        "model": model,
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": tokenizer.piece(tokenizer.eos_id),
        "unk_token": unknown,
        "pad_token": unknown,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": whole, "tokenizer_config.json": config}
