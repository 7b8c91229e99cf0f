"""A sentencepiece tokenizer as the files that `transformers` reads.

From a tokenizer.model alone, `transformers` takes the merges in the order of ids. For runs of
spaces that is wrong, as they have the lowest ids and the lowest scores. So the whole tokenizer is
written out here, and it finds the ids of `data.Tokenizer.encode` for any text.
"""
from __future__ import annotations

from typing import Any

SPACE = "\u2581"        # how sentencepiece writes a space inside a piece
LIGATURE = "\ufb01"     # "fi" in one character, which NFKC takes apart


def ordinary_scores(tokenizer: Any) -> dict[str, float]:
    """Return piece -> score of the pieces that merges make: no control, unknown or byte pieces."""
    pieces = tokenizer.processor
    # Byte pieces stand for what no merge can make; they are found by their name, <0x0A>.
    scores = {}
    for i in range(tokenizer.vocab_size):
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

    # The dummy prefix, then spaces as pieces spell them.
    steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}


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


def added_tokens(tokenizer: Any) -> list[dict]:
    """Return the control pieces and the unknown one, as tokens that stand outside of the merges."""
    pieces = tokenizer.processor
    return [
        {
            "id": i,
            "content": pieces.id_to_piece(i),
            "special": True,
            "normalized": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
        }
        for i in range(tokenizer.vocab_size)
        if pieces.is_control(i) or pieces.is_unknown(i)
    ]


def huggingface_files(tokenizer: Any) -> dict[str, dict]:
    """Return the content of tokenizer.json and tokenizer_config.json; {} unless this is BPE.

    tokenizer: has processor (a SentencePieceProcessor), vocab_size, bos_id and eos_id.
    """
    pieces = tokenizer.processor
    ids = range(tokenizer.vocab_size)
    scores = ordinary_scores(tokenizer)

    # BPE's scores are whole numbers, the merges counted down; a unigram model's are
    # log-probabilities, and it has no merges that could be written.
    if any(score % 1 for score in scores.values()):
        return {}

    bos = pieces.id_to_piece(tokenizer.bos_id)
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
        "pre_tokenizer": None,
        "added_tokens": added_tokens(tokenizer),
        "normalizer": normalizer_of(pieces),
        "decoder": decoder(),
        "post_processor": post_processor(bos, tokenizer.bos_id),
        "model": model,
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": pieces.id_to_piece(tokenizer.eos_id),
        "unk_token": unknown,
        "pad_token": unknown,
        "padding_side": "left",
        # Text never becomes a control token there either.
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": whole, "tokenizer_config.json": config}
