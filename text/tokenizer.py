"""Tokenizers: sentencepiece's tokenizer.model, and tokenizer.json by the `tokenizers` package.

Text never becomes a control token: neither kind parses the names of control tokens in a text. They
are put in as ids, by those who write a template.
"""
from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Iterable, NamedTuple

import sentencepiece

from formats.files import read_json
from text.folder import Controls, read_controls


class Own(NamedTuple):
    """A checkpoint's own chat template.

    name: which of ours it is; "" if it has none, or one that is none of them.
    system: what it says to a dialogue without system text.   fault: why there is no name.
    exists: whether the checkpoint brings one.
    """
    name: str = ""
    system: str = ""
    fault: str = "brings no chat template"
    exists: bool = False


class Tokenizer(ABC):
    """What both kinds have in common.

    path: the file.   vocab_size: ids that texts are made of.
    own: the checkpoint's chat template, once text.chat_template has looked at it.
    eos_id: ends an answer that is trained on, unless the template has an end of its own.
    eos_ids: each of them ends an answer that is drawn.
    opening: ids in front of every sequence: BOS, or nothing where the model was trained without.
    prefix_id: stands in front of a text that has nothing before it (BOS, else EOS).
    controls: control tokens, name -> id. `encode` never returns one.
    has_space_prefix: whether a text that opens a sequence gets a space in front of it.
    """
    path: Path
    vocab_size: int
    controls: dict[str, int]
    eos_id: int
    eos_ids: tuple[int, ...]
    opening: tuple[int, ...]
    prefix_id: int
    bos_id: int | None
    own: Own = Own()
    has_space_prefix: bool = False

    def take(self, found: Controls, bos_id: int | None, eos_id: int, opening: list[int]) -> None:
        """Set what a folder says of control tokens over what the file itself says."""
        self.controls = found.ids
        self.bos_id = found.bos_id if found.bos_id is not None else bos_id
        self.eos_id = found.eos_id if found.eos_id is not None else eos_id
        self.eos_ids = tuple(dict.fromkeys((self.eos_id, *found.other_eos_ids)))
        if found.opens_with_bos is not None:
            opening = [self.bos_id] if found.opens_with_bos and self.bos_id is not None else []
        self.opening = tuple(opening)
        self.prefix_id = self.eos_id if self.bos_id is None else self.bos_id

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of a text that opens a sequence, without BOS and EOS."""

    @abstractmethod
    def encode_segment(self, text: str) -> list[int]:
        """Return the ids of a text that continues what stands before it."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids that open a sequence; control ids have none."""

    @abstractmethod
    def decode_segment(self, ids: Iterable[int]) -> str:
        """Return the text of ids that continue others: the inverse of `encode_segment`."""

    @abstractmethod
    def piece(self, i: int) -> str:
        """Return how the vocabulary writes an id."""


class SentencePiece(Tokenizer):
    """A sentencepiece model as LLaMA uses it. processor: the model itself."""

    def __init__(self, path: Path) -> None:
        """Open a file; ValueError if it cannot serve."""
        self.path = path
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError):
            fault = "not a sentencepiece model; give LLaMA's tokenizer.model"
            raise ValueError(f"{path}: {fault}") from None
        pieces = self.processor
        if min(pieces.bos_id(), pieces.eos_id()) < 0:
            raise ValueError(f"{path}: has no bos or no eos piece; train it with both")
        self.vocab_size = self.n_pieces = pieces.vocab_size()
        self.has_space_prefix = pieces.normalize("a") != "a"
        own = {pieces.id_to_piece(i): i for i in range(self.n_pieces) if pieces.is_control(i)}
        self.take(read_controls(path, own), pieces.bos_id(), pieces.eos_id(), [pieces.bos_id()])

        # Templates are made of lines. A tokenizer that reads "\n" as nothing (sentencepiece's own
        # default normalization) or as unknown would run them together without a message.
        self._newline = self.encode("\n")
        if not self._newline or pieces.unk_id() in self._newline:
            advice = ("train it with normalization_rule_name=identity and byte_fallback, or with a "
                      "newline among its user_defined_symbols")
            raise ValueError(f"{path}: has no piece for a newline; {advice}")

    def encode(self, text: str) -> list[int]:
        # sentencepiece puts a space in front, the dummy prefix: "Hello" at the beginning of a text
        # has the ids that " Hello" has further on.
        return self.processor.encode(text)

    def encode_segment(self, text: str) -> list[int]:
        # sentencepiece has no switch for this. A newline in front takes the prefix upon itself and
        # does not merge with what follows; then prefix and newline come off again together.
        ids = self.processor.encode("\n" + text)
        if ids[:len(self._newline)] != self._newline:
            advice = "train it with a newline piece that stays alone"
            raise ValueError(f"{self.path}: merges a newline with the text after it; {advice}")
        return ids[len(self._newline):]

    def decode(self, ids: Iterable[int]) -> str:
        # Added tokens and the rows that round an embedding up are no pieces: they have no text,
        # and would be an IndexError here.
        return self.processor.decode([i for i in ids if 0 <= i < self.n_pieces])

    def decode_segment(self, ids: Iterable[int]) -> str:
        # `decode` alone would take a leading space for the dummy prefix and drop it. As above, a
        # newline in front is what takes the prefix upon itself.
        return self.decode([*self._newline, *ids]).removeprefix("\n")

    def piece(self, i: int) -> str:
        names = {number: name for name, number in self.controls.items()}
        return self.processor.id_to_piece(i) if i < self.n_pieces else names.get(i, f"<{i}>")


class TokenizerJson(Tokenizer):
    """A tokenizer.json, as most models bring it today."""

    def __init__(self, path: Path) -> None:
        """Open a file; ValueError if it cannot serve."""
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"{path}: needs the package tokenizers: "
                             "pip install tokenizers") from None
        self.path = path
        content = read_json(path)
        found = read_controls(path, {})
        # What ends an answer or stands in a template is no text, even if the file calls it so.
        for token in content.get("added_tokens", []):
            token["special"] = token["special"] or token["content"] in found.ids
        try:
            self.whole = tokenizers.Tokenizer.from_str(json.dumps(content))
            self.rest = tokenizers.Tokenizer.from_str(json.dumps(without_prefix(content)))
        except Exception as error:  # the package has no class of its own for it
            raise ValueError(f"{path}: not a tokenizer.json: {error}") from None
        for one in (self.whole, self.rest):
            one.encode_special_tokens = True
            one.no_truncation()
            one.no_padding()
        self.vocab_size = self.whole.get_vocab_size(with_added_tokens=False)
        for token in content.get("added_tokens", []):
            if not token["special"]:
                self.vocab_size = max(self.vocab_size, token["id"] + 1)
        self.has_space_prefix = self.encode("a") != self.encode_segment("a")

        # the file says in its post-processor what stands in front of a text
        bare = self.whole.encode("a", add_special_tokens=False).ids
        framed = self.whole.encode("a", add_special_tokens=True).ids
        opening = framed[:framed.index(bare[0])] if bare else []
        if found.eos_id is None:
            raise ValueError(f"{path}: no file beside it says what ends an answer: "
                             "tokenizer_config.json needs an eos_token")
        self.take(found, opening[0] if opening else None, found.eos_id, opening)

    def encode(self, text: str) -> list[int]:
        return self.whole.encode(text, add_special_tokens=False).ids

    def encode_segment(self, text: str) -> list[int]:
        return self.rest.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.whole.decode(list(ids), skip_special_tokens=True)

    def decode_segment(self, ids: Iterable[int]) -> str:
        return self.rest.decode(list(ids), skip_special_tokens=True)

    def piece(self, i: int) -> str:
        return self.whole.id_to_token(i) or f"<{i}>"


def without_prefix(content: Any) -> Any:
    """Return a tokenizer.json that puts no space in front of a text, nor takes one off again."""
    # sentencepiece's dummy prefix has three spellings: a step of the normalizer, a setting of the
    # pre-tokenizer, and in the decoder the step that takes the space off
    if isinstance(content, list):
        return [without_prefix(part) for part in content if not is_prefix_step(part)]
    if not isinstance(content, dict):
        return content
    kept = {name: content[name] if name in ("vocab", "merges", "added_tokens") else
            None if is_prefix_step(part) else without_prefix(part)
            for name, part in content.items()}
    if "prepend_scheme" in kept:
        kept["prepend_scheme"] = "never"
    if "add_prefix_space" in kept:
        kept["add_prefix_space"] = False
    return kept


def is_prefix_step(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    takes_off = part.get("type") == "Strip" and part.get("content") == " " and part.get("start")
    return part.get("type") == "Prepend" or bool(takes_off)


def find_tokenizer(path: Path) -> Path:
    """Return the file itself, or a model folder's; ValueError if there is none."""
    if not path.is_dir():
        files = [path]
    else:
        # Meta's download: one tokenizer beside the folders of all model sizes.
        places = [path, path.parent] if (path / "params.json").exists() else [path]
        files = [place / "tokenizer.model" for place in places]
        files += [place / "tokenizer.json" for place in places]
    for file in files:
        if file.is_file() and (len(files) == 1 or not is_tiktoken(file)):
            return file
    if any(map(is_tiktoken, files)):
        raise ValueError(f"{files[0]}: a tiktoken file, as Meta's download of Llama 3 has it; put "
                         "the tokenizer.json and tokenizer_config.json of the same model on "
                         "Hugging Face beside it")
    raise ValueError(f"{files[0]}: no such file; give the folder of a model that has a "
                     "tokenizer.model (sentencepiece) or a tokenizer.json")


def is_tiktoken(file: Path) -> bool:
    """Whether a tokenizer.model is lines of base64 and ranks: Llama 3's, and no sentencepiece."""
    if not file.is_file() or file.suffix == ".json":
        return False
    with open(file, "rb") as handle:
        word, _, rank = handle.readline(200).strip().partition(b" ")
    return bool(word) and rank.isdigit()


def open_file(path: Path) -> Tokenizer:
    """Open a tokenizer file, or the one in a folder; ValueError if it cannot serve."""
    file = find_tokenizer(path)
    return TokenizerJson(file) if file.suffix == ".json" else SentencePiece(file)
