"""Text in, tokens out: the tokenizer, the formats people bring, chat templates, lengths and batches.

    file -> rows -> Example (prompt, responses, ranks) -> Dialogue | Ranking | Prompt -> tokens -> batch

Every format is parsed to one Example; each stage takes from it what it learns from. Policy:

 - a file is recognised by its content, never by its name; a row by its fields
 - a *bad* row (broken JSON or encoding, missing field, wrong type, wrong roles, ranks that contradict) stops
   the reading with file, line and reason; with skip_bad it is left out and counted
 - an *uninformative* row (nothing to prefer: equal, tied, not annotated) is always left out and counted
 - what is kept but deserves a look (duplicates, empty responses, cuts) is counted as well; see Report
 - text never becomes a control token: bos and eos are put in as ids, so no user text can close a turn

Prompt and response are encoded apart and their ids joined: the response's ids start exactly where the policy
starts to sample, so SFT, reward model and PPO agree on every border. A policy's own samples are never
encoded again from their text, since encode(decode(ids)) may differ from ids.
"""
from __future__ import annotations

import bisect
import codecs
import gzip
import json
import math
import random
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

import sentencepiece
import torch
from torch import Tensor


@dataclass(frozen=True)
class DataConfig:
    template: str = "plain"             # alpaca | llama2 | vicuna | plain: how a dialogue becomes text
    max_prompt_tokens: int = 96         # a longer PPO prompt is refused, or left out with skip_bad
    max_response_tokens: int = 32       # a response is cut off here; a training sequence is at most the sum of both
    skip_bad: bool = False              # leave malformed rows and overlong prompts out and count them, instead of stopping at the first


# ---------------------------------------------------------------------------------------------
# Tokenizer

class Tokenizer:
    """A sentencepiece model as LLaMA uses it.

    path: the file.   vocab_size: pieces.   bos_id, eos_id: control ids, which `encode` never returns.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a tokenizer.model, or the one in a folder; ValueError if it cannot serve."""
        path = Path(path)
        self.path = path / "tokenizer.model" if path.is_dir() else path
        if not self.path.exists() and (path / "params.json").exists():  # Meta keeps one tokenizer beside the folders of all sizes
            self.path = path.parent / "tokenizer.model"
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such file; give a sentencepiece tokenizer.model or the folder that holds one")
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (OSError, RuntimeError):
            raise ValueError(f"{self.path}: not a sentencepiece model; give LLaMA's tokenizer.model") from None
        self.vocab_size: int = self._pieces.vocab_size()
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{self.path}: has no bos or no eos piece; train it with both")
        self._newline = self.encode("\n")
        if self._pieces.unk_id() in self._newline:
            raise ValueError(f"{self.path}: has no piece for a newline; train it with byte_fallback, or with a newline "
                             "among its user_defined_symbols")

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text that opens a sequence, without bos and eos.

        sentencepiece puts a space in front (the dummy prefix): "Hello" has the ids of " Hello" in mid-text.
        """
        return self._pieces.encode(text)

    def encode_segment(self, text: str) -> list[int]:
        """Return the ids of a text that continues the one before it, hence without the dummy prefix.

        A newline in front takes the prefix upon itself and does not merge with what follows; both come off again.
        """
        ids = self._pieces.encode("\n" + text)
        if ids[:len(self._newline)] != self._newline:
            raise ValueError(f"{self.path}: merges a newline with the text after it; train it with a newline piece that stays alone")
        return ids[len(self._newline):]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; control ids have none, nor have ids beyond the vocabulary (a padded embedding's)."""
        return self._pieces.decode([i for i in ids if 0 <= i < self.vocab_size])

    def huggingface_files(self) -> dict[str, dict]:
        """Return the content of tokenizer.json and tokenizer_config.json, with which `transformers` finds the ids of `encode`.

        From tokenizer.model alone it takes merges in the order of ids, which is wrong for runs of spaces: they have the lowest
        ids and the lowest scores. Text never becomes a control token there either (split_special_tokens). Empty unless this is BPE.
        """
        p, count = self._pieces, self.vocab_size
        special = [i for i in range(count) if p.is_control(i) or p.is_unknown(i)]
        bos, eos, unk = (p.id_to_piece(i) for i in (self.bos_id, self.eos_id, p.unk_id()))
        scores = {p.id_to_piece(i): p.get_score(i) for i in range(count) if not (i in special or p.is_byte(i) or p.is_unused(i))}
        if any(score % 1 for score in scores.values()):  # BPE's are whole numbers, the merges counted down; unigram's log-probabilities
            return {}
        merges = [(score, i, len(piece) - i, piece) for piece, score in scores.items() for i in range(1, len(piece))
                  if piece[:i] in scores and piece[i:] in scores]
        normalizers: list[dict] = [{"type": "NFKC"}] if "\ufb01" not in p.normalize("\ufb01") else []  # the ligature fi
        if p.normalize("a  b") == p.normalize("a b"):  # trained to merge spaces
            normalizers += [{"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
                            for pattern, content in ((r"\A +| +\z", ""), (" +", " "))]
        normalizers += [{"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]
        begin, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        decoders = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
        tokenizer = {
            "version": "1.0", "truncation": None, "padding": None, "pre_tokenizer": None,
            "added_tokens": [{"id": i, "content": p.id_to_piece(i), "special": True, "normalized": False, "single_word": False,
                              "lstrip": False, "rstrip": False} for i in special],
            "normalizer": {"type": "Sequence", "normalizers": normalizers}, "decoder": {"type": "Sequence", "decoders": decoders},
            "post_processor": {"type": "TemplateProcessing", "single": [begin, text], "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 1}}],
                               "special_tokens": {bos: {"id": bos, "ids": [self.bos_id], "tokens": [bos]}}},
            "model": {"type": "BPE", "dropout": None, "unk_token": unk, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": True, "byte_fallback": any(map(p.is_byte, range(count))), "ignore_merges": False,
                      "vocab": {p.id_to_piece(i): i for i in range(count)},
                      "merges": [f"{piece[:i]} {piece[i:]}" for _, i, _, piece in sorted(merges, reverse=True)]}}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "unk_token": unk, "pad_token": unk,
                  "padding_side": "left", "split_special_tokens": True, "clean_up_tokenization_spaces": False}
        return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


# ---------------------------------------------------------------------------------------------
# Records: what every format becomes

@dataclass(frozen=True)
class Message:
    """One turn. A message of role "raw" is a whole prompt that already is in some template and stays as it is."""
    role: str                           # system | user | assistant | raw
    content: str


Messages = tuple[Message, ...]          # system?, user, assistant, user, ...; or raw, assistant?


@dataclass(frozen=True)
class Dialogue:
    """A demonstration; the last message is the assistant's. source: "file:line", or "file:row N" of a JSON array."""
    messages: Messages
    source: str


@dataclass(frozen=True)
class Ranking:
    """Responses to one prompt and their ranks: lower is better, equal is a tie."""
    messages: Messages
    responses: tuple[str, ...]
    ranks: tuple[float, ...]
    source: str


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer. answer: the reference answer where the file has one, to be shown, not learned."""
    messages: Messages
    source: str
    answer: str | None = None


Record = Dialogue | Ranking | Prompt


@dataclass
class Report:
    """What became of the rows; str(report) is the line to print."""
    kept: int = 0
    skipped: Counter[str] = field(default_factory=Counter)      # reason -> rows
    noted: Counter[str] = field(default_factory=Counter)        # kept, but worth a look -> rows
    first: dict[str, str] = field(default_factory=dict)         # reason -> source of its first row
    tokens: int = 0                                             # of all that was kept, once it is encoded
    longest: int = 0

    def keep(self, tokens: int = 0) -> None:
        self.kept, self.tokens, self.longest = self.kept + 1, self.tokens + tokens, max(self.longest, tokens)

    def skip(self, reason: str, source: str) -> None:
        self.skipped[reason] += 1
        self.first.setdefault(reason, source)

    def note(self, reason: str, source: str) -> None:
        self.noted[reason] += 1
        self.first.setdefault(reason, source)

    def describe(self, reasons: Counter[str]) -> str:
        return ", ".join(f"{n} {reason} (first {self.first[reason]})" for reason, n in reasons.most_common())

    def __str__(self) -> str:
        parts = [f"kept {self.kept} of {self.kept + self.skipped.total()}"]
        parts += [f"skipped {self.describe(self.skipped)}"] * bool(self.skipped)
        parts += [f"noted {self.describe(self.noted)}"] * bool(self.noted)
        if self.tokens:
            parts.append(f"tokens: mean {self.tokens / self.kept:.0f}, longest {self.longest}")
        return "; ".join(parts)

    def add(self, other: Report) -> None:
        self.kept += other.kept
        self.skipped += other.skipped
        self.noted += other.noted
        self.first = {**other.first, **self.first}

    def require_rows(self, where: str, advice: str) -> None:
        """Raise ValueError if nothing was kept."""
        if not self.kept:
            reasons = self.describe(self.skipped) or "it is empty"
            raise ValueError(f"{where}: 0 usable rows of {self.skipped.total()} ({reasons}); {advice}")


class BadRow(Exception):
    """A malformed row: the kind of fault, which reports count, and details of this one."""

    def __str__(self) -> str:
        reason, *details = self.args
        return f"{reason} ({', '.join(map(str, details))})" if details else reason


class Uninformative(Exception):
    """A well-formed row with nothing to learn from."""


# ---------------------------------------------------------------------------------------------
# Files to rows

class DuplicateKey(str):
    """Stands for an object that names this key twice (json alone keeps the last), until its row is checked."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any] | DuplicateKey:
    counts = Counter(key for key, _ in pairs)
    return dict(pairs) if len(counts) == len(pairs) else DuplicateKey(counts.most_common(1)[0][0])


def load_json(content: bytes) -> Any:
    return json.loads(content.decode("utf-8"), object_pairs_hook=unique_keys)


def read_bytes(path: str | Path) -> bytes:
    """Return a file's content, unzipped, without byte order mark."""
    try:
        content = Path(path).read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; check the path") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path}:1: UTF-16, not UTF-8; convert it with: iconv -f UTF-16 -t UTF-8")
    return content.removeprefix(codecs.BOM_UTF8)


def read_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield (source, row) of a JSON array, of {"data": [...]} or {"examples": [...]}, or of JSON lines.

    A line stays bytes, so that a broken line is one bad row. A broken array has no rows to tell apart: ValueError.
    """
    content = read_bytes(path)
    try:
        whole = load_json(content)
    except (ValueError, RecursionError) as error:  # JSON lines come here with "Extra data", right after their first row
        whole = None
        if content.lstrip().startswith(b"[") and getattr(error, "msg", "") != "Extra data":
            before = content[:error.start] if isinstance(error, UnicodeDecodeError) else b""
            line = getattr(error, "lineno", before.count(b"\n") + 1)
            raise ValueError(f"{path}:{line}: broken JSON array ({error}); was the file cut off?") from None
    if isinstance(whole, dict):
        whole = whole.get("data", whole.get("examples"))
    if isinstance(whole, list):
        yield from ((f"{path}:row {n}", row) for n, row in enumerate(whole, 1))
    else:
        yield from ((f"{path}:{n}", line) for n, line in enumerate(content.split(b"\n"), 1) if line.strip())


def check_values(value: Any) -> None:
    """Reject what json lets through and what would surface far from here: an error in sentencepiece, a NaN loss."""
    if isinstance(value, DuplicateKey):
        raise BadRow("duplicate key", repr(str(value)))
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRow("lone surrogate escape in a string")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow("NaN or Infinity")
    for item in [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ():
        check_values(item)


def parse_row(raw: Any) -> dict[str, Any]:
    """Return a row as an object whose values are all sound."""
    if isinstance(raw, bytes):
        try:
            raw = load_json(raw)
        except UnicodeDecodeError as error:
            raise BadRow("not UTF-8", f"byte {error.start + 1} of the line")
        except json.JSONDecodeError as error:
            raise BadRow("broken JSON", f"column {error.colno}: {error.msg}")
        except (ValueError, RecursionError) as error:
            raise BadRow("broken JSON", error)
    check_values(raw)
    if not isinstance(raw, dict):
        raise BadRow("not a JSON object", f"got {kind_of(raw)}")
    return raw


# ---------------------------------------------------------------------------------------------
# Rows to examples: one parser per format

class Example(NamedTuple):
    """What every format says: a prompt, responses to it, and how they rank (None: they are not compared)."""
    prompt: Messages
    responses: tuple[str, ...] = ()
    ranks: tuple[float, ...] | None = None
    flaw: str = ""                      # why the responses teach nothing; the prompt is good all the same


Row = dict[str, Any]
DIALOGUES = ("messages", "conversations", "conversation", "items")
# Further tags of real files (bard, tool, developer, observation, ...) are refused: nobody can say what they mean here.
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "chatgpt": "assistant", "raw": "raw"}
KINDS = {str: "a string", list: "a list", dict: "an object", bool: "a boolean", int: "a number", float: "a number",
         type(None): "null"}
INPUT = "\n\n### Input:\n"              # joins Alpaca's instruction and input, in its own template's words
HH_ANSWER = "\n\nAssistant:"
TEMPLATE_MARKS = ("### Response:", "[INST]", HH_ANSWER, "ASSISTANT:")


def kind_of(value: Any) -> str:
    return KINDS[type(value)]


def get(row: Row, name: str, kind: type = str) -> Any:
    """Return a field that must be there and of one type."""
    if name not in row:
        raise BadRow(f"no field '{name}'", f"keys: {', '.join(row)}")
    if not isinstance(row[name], kind):
        raise BadRow(f"field '{name}' must be {KINDS[kind]}, got {kind_of(row[name])}")
    return row[name]


def get_optional(row: Row, name: str) -> str:
    return "" if row.get(name) is None else get(row, name)


def get_list(row: Row, name: str, kind: type) -> list[Any]:
    """Return a field that must be a list of one type."""
    items = get(row, name, list)
    for item in items:
        if not isinstance(item, kind):
            raise BadRow(f"field '{name}' must hold {KINDS[kind]} each, got {kind_of(item)}")
    return items


def get_numbers(row: Row, name: str) -> list[float]:
    numbers = get(row, name, list)
    if not all(type(x) in (int, float) and abs(x) < 1e300 for x in numbers):  # type(): True is an int, but no score
        raise BadRow(f"field '{name}' must hold finite numbers only")
    return [float(x) for x in numbers]


def parse_message(turn: Row) -> Message:
    """{from, value} or {role, content}; the text may come in parts: [{type: "text", text | value}, ...]."""
    role_name, name = ("from", "value") if "from" in turn else ("role", "content")
    role = get(turn, role_name)
    if role not in ROLES:
        raise BadRow("unknown role", f"{role!r}; known: {', '.join(ROLES)}")
    if not isinstance(turn.get(name), list):
        return Message(ROLES[role], get(turn, name))
    parts = get_list(turn, name, dict)
    if any(part.get("type") != "text" for part in parts):
        raise BadRow("a message may have parts of type text only")
    return Message(ROLES[role], "".join(get(part, "value" if "value" in part else "text") for part in parts))


def parse_messages(row: Row, name: str) -> list[Message]:
    return [parse_message(turn) for turn in get_list(row, name, dict)]


def make_example(prompt: Sequence[Message], responses: Sequence[str] = (), ranks: Sequence[float] | None = None,
                 flaw: str = "") -> Example:
    """Check a prompt's roles and texts. Nothing is mended: which turn of a broken dialogue is wrong, nobody knows."""
    prompt = tuple(message for message in prompt if message.role != "system" or message.content.strip())
    if not re.fullmatch("s?u(au)*|r", "".join(message.role[0] for message in prompt)):
        roles = ", ".join(message.role for message in prompt) or "none"
        raise BadRow("roles must be: system if any, then user and assistant in turn", f"got {roles}")
    if not all(message.content.strip() for message in prompt):
        raise BadRow("empty message in the prompt")
    return Example(prompt, tuple(responses), None if ranks is None else tuple(ranks), flaw)


def split_answer(turns: Sequence[Message], flaw: str = "") -> Example:
    """Take a last assistant turn as the response to all before it; a dialogue that ends with the user is a prompt."""
    if turns and turns[-1].role == "assistant":
        return make_example(turns[:-1], [turns[-1].content], flaw=flaw)
    return make_example(turns, flaw=flaw)


def text_prompt(text: str) -> Message:
    """Return a prompt string as what it is: a user's words, or a prompt that somebody put into a template already.

    Trailing spaces of the latter go: with them, the border to the response would lie inside its first word.
    """
    is_raw = any(mark in text for mark in TEMPLATE_MARKS)
    return Message("raw", text.rstrip(" ")) if is_raw else Message("user", text)


def alpaca_prompt(row: Row) -> list[Message]:
    """{instruction, input?, system?, history?: [[user, assistant], ...]}."""
    instruction, extra = get(row, "instruction"), get_optional(row, "input")
    if not instruction.strip():
        raise BadRow("field 'instruction' is empty")
    turns = [Message("system", get_optional(row, "system"))]
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise BadRow("field 'history' must be a list of [user, assistant] strings")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    return [*turns, Message("user", instruction + INPUT + extra if extra else instruction)]


def any_prompt(row: Row) -> list[Message]:
    """Return the prompt that goes with one response or with several, in whichever field it is; [] if there is none."""
    if "prompt" in row:
        return parse_messages(row, "prompt") if isinstance(row["prompt"], list) else [text_prompt(get(row, "prompt"))]
    if "instruction" in row:
        return alpaca_prompt(row)
    if "question" in row:
        return [Message("user", get(row, "question"))]
    system = Message("system", get_optional(row, "system"))
    return next(([system, *parse_messages(row, name)] for name in DIALOGUES if name in row), [])


def read_reply(prompt: list[Message], row: Row, name: str) -> tuple[list[Message], str]:
    """Return prompt and response of a field that holds a string, a message, messages that continue the prompt,
    or the whole dialogue, prompt included (as messages, or as HH-RLHF's text)."""
    value = row.get(name)
    if isinstance(value, (list, dict)):
        turns = parse_messages({name: value if isinstance(value, list) else [value]}, name)
        if not turns or turns[-1].role != "assistant":
            raise BadRow(f"field '{name}' must end with a message of the assistant")
        turns = prompt + turns if turns[0].role == "assistant" else turns
        return turns[:-1], turns[-1].content
    if prompt:
        return prompt, get(row, name)
    # HH-RLHF. Its turns stay text: replies quote "\n\nHuman:", so splitting there would invent turns.
    before, mark, reply = get(row, name).rpartition(HH_ANSWER)
    if not mark:
        raise BadRow(f"no prompt: neither a field 'prompt' nor {HH_ANSWER!r} in '{name}'")
    return [Message("raw", before + mark)], reply.removeprefix(" ")


def parse_alpaca(row: Row) -> Iterator[Example]:
    """{instruction, ..., output?}; Alpaca-farm's output is a list of samples that nobody ranked."""
    is_list = isinstance(row.get("output"), list)
    responses = get_list(row, "output", str) if is_list else [get(row, "output")] if "output" in row else []
    yield make_example(alpaca_prompt(row), responses)


def parse_instances(row: Row) -> Iterator[Example]:
    """Self-instruct: {instruction, instances: [{input, output}, ...]}."""
    for instance in get_list(row, "instances", dict):
        yield from parse_alpaca({**instance, "instruction": get(row, "instruction")})


def parse_dialogue(row: Row) -> Iterator[Example]:
    """ShareGPT, OpenAI: {messages | conversations | conversation | items: [...], system?}; KTO: label?."""
    flaw = "marked as undesirable (label: false)" if row.get("label") is False else ""
    yield split_answer(any_prompt({name: row[name] for name in row if name in (*DIALOGUES, "system")}), flaw)


def parse_prompt_response(row: Row) -> Iterator[Example]:
    """{prompt, response? | completion?}, {question, answer?}; strings or message lists."""
    prompt = any_prompt(row)
    name = next((name for name in ("response", "completion", "answer") if name in row), None)
    if name is None:
        yield split_answer(prompt)
    else:
        turns, response = read_reply(prompt, row, name)
        yield make_example(turns, [response])


def parse_pair(row: Row) -> Iterator[Example]:
    """HH-RLHF, TRL, UltraFeedback-binarized, LLaMA-Factory: {chosen, rejected} or {chosen_messages, ...}, any prompt?."""
    suffix = "_messages" if "chosen_messages" in row or "rejected_messages" in row else ""
    prompt = [] if suffix else any_prompt(row)
    chosen_prompt, chosen = read_reply(prompt, row, "chosen" + suffix)
    rejected_prompt, rejected = read_reply(prompt, row, "rejected" + suffix)
    if chosen_prompt != rejected_prompt:
        raise Uninformative("prompts of chosen and rejected differ")
    yield make_example(chosen_prompt, [chosen, rejected], [1, 2])


def get_preference(row: Row) -> float | None:
    """Return AlpacaEval's judgment: the output that wins, 1 or 2, or between them the judge's belief in output 2.

    1.5 is a tie (0 in older files); None is not annotated.
    """
    preference = row.get("preference")
    if preference is not None and (type(preference) not in (int, float) or preference != 0 and not 1 <= preference <= 2):
        raise BadRow("field 'preference' must be null, 0 or a number from 1 to 2", f"got {preference!r}")
    return preference if preference is None else preference or 1.5


def parse_alpaca_eval(row: Row) -> Iterator[Example]:
    """{instruction, output_1, output_2, preference}: see get_preference."""
    preference = get_preference(row)
    flaw = "not annotated (preference: null)" if preference is None else ""
    preference = preference or 1.5
    ranks = [1, 1] if preference == 1.5 else [1, 2] if preference < 1.5 else [2, 1]
    yield make_example(alpaca_prompt(row), [get(row, "output_1"), get(row, "output_2")], ranks, flaw)


def ranks_of(scores: Sequence[float]) -> list[float]:
    """Return ranks as in a competition: 1 for the highest score, equal ranks for equal scores."""
    return [1 + sum(other > score for other in scores) for score in scores]


def parse_ranked(row: Row) -> Iterator[Example]:
    """{any prompt, responses: [...], scores (higher is better) and/or ranks (lower is better)}."""
    responses = get_list(row, "responses", str)
    orders = [ranks_of(get_numbers(row, "scores"))] if row.get("scores") is not None else []
    orders += [get_numbers(row, "ranks")] if row.get("ranks") is not None else []
    if not responses or not orders:
        raise BadRow("'responses' and their 'ranks' or 'scores' are needed", f"keys: {', '.join(row)}")
    if any(len(order) != len(responses) for order in orders):
        raise BadRow("not as many ranks or scores as responses")
    a, b = orders[0], orders[-1]
    if any((a[i] - a[j]) * (b[i] - b[j]) < 0 for i in range(len(a)) for j in range(i)):
        raise BadRow("ranks and scores contradict each other")
    yield make_example(any_prompt(row), responses, b)


def parse_ultrafeedback(row: Row) -> Iterator[Example]:
    """{instruction, completions: [{response, fine-grained_score, overall_score}, ...]}.

    The fine-grained score, a mean over four aspects, goes first: overall scores of 1 were published as 10.
    """
    completions = get_list(row, "completions", dict)
    name = "fine-grained_score" if all(c.get("fine-grained_score") is not None for c in completions) else "overall_score"
    flaw = "not annotated (a completion without score)" if any(c.get(name) is None for c in completions) else ""
    scores = get_numbers({name: [c.get(name) or 0 for c in completions]}, name)
    yield make_example(alpaca_prompt(row), [get(c, "response") for c in completions], ranks_of(scores), flaw)


# A row belongs to the first group that knows one of its fields. Two formats of one group are ambiguous.
FORMATS: tuple[dict[str, Callable[[Row], Iterator[Example]]], ...] = (
    {"chosen": parse_pair, "rejected": parse_pair, "chosen_messages": parse_pair, "rejected_messages": parse_pair,
     "output_1": parse_alpaca_eval, "output_2": parse_alpaca_eval,
     "responses": parse_ranked, "completions": parse_ultrafeedback},
    {"instances": parse_instances, **dict.fromkeys(DIALOGUES, parse_dialogue)},
    {"instruction": parse_alpaca, "prompt": parse_prompt_response, "question": parse_prompt_response},
)


def parse_example(row: Row) -> Iterator[Example]:
    """Recognise a row's format by its fields and parse it."""
    for group in FORMATS:
        known = [name for name in group if name in row]
        if len({group[name] for name in known}) > 1:
            raise BadRow("ambiguous fields", f"keep one of {', '.join(known)}; keys: {', '.join(row)}")
        if known:
            return group[known[0]](row)
    raise BadRow("unknown fields", f"keys: {', '.join(row) or 'none'}")


# ---------------------------------------------------------------------------------------------
# Examples to records: what each stage takes

def to_dialogue(example: Example, source: str) -> Dialogue:
    if example.flaw:
        raise Uninformative(example.flaw)
    if example.ranks is not None:
        raise BadRow("a comparison, not a demonstration; it serves the reward model")
    if not example.responses:
        raise BadRow("no answer to learn from: no field has it, or the dialogue ends with the user")
    if len(example.responses) > 1:
        raise BadRow("several answers that nobody ranked; keep one")
    if not example.responses[0].strip():
        raise BadRow("empty answer")
    return Dialogue((*example.prompt, Message("assistant", example.responses[0])), source)


def to_ranking(example: Example, source: str) -> Ranking:
    """Keep what a reward model can learn from: at least two different responses that are not all tied."""
    if example.flaw:
        raise Uninformative(example.flaw)
    if example.ranks is None:
        raise BadRow("nothing is compared: no 'chosen' and 'rejected', no 'ranks', no 'scores'")
    texts = [text.strip() for text in example.responses]
    if len(texts) < 2:
        raise Uninformative("one response")
    if len(set(example.ranks)) == 1:
        raise Uninformative("all tied")
    if len(set(texts)) == 1:
        raise Uninformative("responses are equal")
    if len(set(zip(texts, example.ranks))) > len(set(texts)):
        raise BadRow("equal responses with different ranks")
    return Ranking(example.prompt, example.responses, example.ranks, source)


def to_prompt(example: Example, source: str) -> Prompt:
    has_answer = example.ranks is None and len(example.responses) == 1
    return Prompt(example.prompt, source, example.responses[0] if has_answer else None)


def notes_on(record: Record) -> Iterator[str]:
    """Yield what a reader of the report should know about a record that is kept."""
    if record.messages[0].role == "raw":
        yield "already in a template, left as they are"
    elif any(mark in message.content for message in record.messages for mark in TEMPLATE_MARKS):
        yield "with a template's marks in the text"
    if isinstance(record, Ranking) and not all(text.strip() for text in record.responses):
        yield "with an empty response"


def read_file(path: str | Path, make: Callable[[Example, str], Record], skip_bad: bool) -> tuple[list[Any], Report]:
    """Return a file's usable rows as records; ValueError for the first bad row (unless skip_bad) and if none is usable."""
    records, report = [], Report()
    for source, raw in read_rows(path):
        try:
            made = [make(example, source) for example in parse_example(parse_row(raw))]
        except Uninformative as reason:
            report.skip(str(reason), source)
        except BadRow as fault:
            if not skip_bad:
                raise ValueError(f"{source}: {fault}; mend the row, or leave such rows out with --data.skip_bad") from None
            report.skip(fault.args[0], source)
        else:
            records += made
    for record in records:
        report.keep()
        for note in notes_on(record):
            report.note(note, record.source)
    report.require_rows(str(path), "check that the file suits this stage")
    return records, report


def read_files(paths: Sequence[str | Path], make: Callable[[Example, str], Record], skip_bad: bool) -> tuple[list[Any], Report]:
    """Read files in order, and count what occurs more than once in them."""
    records, total = [], Report()
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        rows, report = read_file(path, make, skip_bad)
        records += rows
        total.add(report)
    seen: set[Record] = set()
    for record in records:
        content = replace(record, source="")
        if content in seen:
            total.note("exact duplicates", record.source)
        seen.add(content)
    return records, total


def read_dialogues(paths: Sequence[str | Path], skip_bad: bool = False) -> tuple[list[Dialogue], Report]:
    """Read demonstrations for supervised fine-tuning: any format with one response per prompt."""
    return read_files(paths, to_dialogue, skip_bad)


def read_rankings(paths: Sequence[str | Path], skip_bad: bool = False) -> tuple[list[Ranking], Report]:
    """Read comparisons for the reward model: pairs and ranked lists."""
    return read_files(paths, to_ranking, skip_bad)


def read_prompts(paths: Sequence[str | Path], skip_bad: bool = False) -> tuple[list[Prompt], Report]:
    """Read prompts for PPO: the prompt part of any format."""
    return read_files(paths, to_prompt, skip_bad)


# ---------------------------------------------------------------------------------------------
# Templates

class Template(NamedTuple):
    """turn(system, user, is_first): all text between the end of one answer and the start of the next."""
    turn: Callable[[str, str, bool], str]
    before: str = ""                    # between that text and the answer: encoded with the answer, as its first word's space
    after: str = ""                     # between the answer and eos
    restarts: bool = False              # every turn is a sequence of its own, with bos


def alpaca_turn(system: str, user: str, is_first: bool) -> str:
    """Stanford Alpaca's wording, with a newline after "Response:", a border that no token can cross.

    The original has one turn and no system text; here a system text replaces its preamble and turns repeat the rest.
    """
    context = ", paired with an input that provides further context" if INPUT in user else ""
    preamble = system or (f"Below is an instruction that describes a task{context}. "
                          "Write a response that appropriately completes the request.")
    return f"{preamble if is_first else ''}\n\n### Instruction:\n{user}\n\n### Response:\n"


def llama2_turn(system: str, user: str, is_first: bool) -> str:
    """Llama-2 chat, as in Meta's generation.py."""
    system = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    return f"[INST] {(system + user).strip()} [/INST]"


def vicuna_turn(system: str, user: str, is_first: bool) -> str:
    """Vicuna v1.1, as in FastChat's conversation.py."""
    preamble = system or ("A chat between a curious user and an artificial intelligence assistant. "
                          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
    return f"{preamble + ' ' if is_first else ''}USER: {user} ASSISTANT:"


def plain_turn(system: str, user: str, is_first: bool) -> str:
    """The texts alone, each on lines of its own."""
    return ("" if is_first else "\n") + (system + "\n" if system else "") + user + "\n"


# Meta's code ends every finished turn with a space before eos. So that space ends every llama2 answer here, the
# last and the ranked ones included: one habit for the policy to learn, whether or not another turn follows.
TEMPLATES = {
    "alpaca": Template(alpaca_turn),
    "llama2": Template(llama2_turn, before=" ", after=" ", restarts=True),
    "vicuna": Template(vicuna_turn, before=" "),
    "plain": Template(plain_turn),
}


def template_for(name: str, messages: Sequence[Message]) -> Template:
    """Return the named template; a raw prompt's own leaves it as it is, and a space follows unless a line ends there."""
    if name not in TEMPLATES:
        raise ValueError(f"unknown template '{name}'; choose one of {', '.join(TEMPLATES)}")
    if messages and messages[0].role == "raw":
        return Template(lambda system, user, is_first: user, before="" if messages[0].content.endswith("\n") else " ")
    return TEMPLATES[name]


def encode_response(tokenizer: Tokenizer, text: str, template: str, prompt: Sequence[Message] = ()) -> list[int]:
    """Return the ids of a response as they follow its prompt's, eos included. prompt: matters if it is raw."""
    style = template_for(template, prompt)
    text = text.strip() if style.before else text  # where a space parts prompt and response, there is just that one
    return [*tokenizer.encode_segment(style.before + text + style.after if text else ""), tokenizer.eos_id]


def encode_dialogue(tokenizer: Tokenizer, messages: Sequence[Message], template: str) -> tuple[list[int], list[bool]]:
    """Return ids and which of them are trained on: every assistant turn, its eos included.

    Up to each answer the ids are those of `encode_prompt`, and the answer's are those of `encode_response`.
    """
    style = template_for(template, messages)
    has_system = messages[0].role == "system"
    ids: list[int] = []
    trained: list[bool] = []
    for n, message in enumerate(messages[has_system:]):
        text = style.turn(messages[0].content if has_system and n == 0 else "", message.content, n == 0)
        if message.role == "assistant":
            part = encode_response(tokenizer, message.content, template, messages)
        elif n == 0 or style.restarts:
            part = [tokenizer.bos_id, *tokenizer.encode(text)]
        else:
            part = tokenizer.encode_segment(text)
        ids += part
        trained += [message.role == "assistant"] * len(part)
    return ids, trained


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message], template: str) -> list[int]:
    """Return the ids the policy sees when it starts to answer, bos included."""
    return encode_dialogue(tokenizer, messages, template)[0]


# ---------------------------------------------------------------------------------------------
# Lengths, and records to tokens

class TokenizedDialogue(NamedTuple):
    tokens: list[int]
    response_mask: list[bool]           # True: trained on


class TokenizedRanking(NamedTuple):
    prompt: list[int]
    responses: list[list[int]]          # each with its eos, unless that was cut off
    ranks: list[float]


def fit(tokenizer: Tokenizer, messages: Messages, template: str, max_tokens: int) -> Messages | None:
    """Shorten a prompt or dialogue to max_tokens; None if that cannot be done.

    The oldest turns go first, whole. Then the last user text loses its beginning, or if it has an Alpaca input,
    that one does. The system text, the instruction before an input, and the last answer stay.
    """
    def fits(candidate: Messages) -> bool:
        return len(encode_dialogue(tokenizer, candidate, template)[0]) <= max_tokens

    system = messages[:messages[0].role == "system"]
    turns = messages[len(system):]
    while len(turns) > 2 and not fits(system + turns):
        turns = turns[2:]
    if fits(system + turns):
        return system + turns
    user, *answer = turns
    instruction, joint, text = user.content.rpartition(INPUT)

    def without(n: int) -> Messages:
        return (*system, Message(user.role, instruction + joint + text[n:]), *answer)

    n = bisect.bisect_left(range(len(text)), True, key=lambda n: fits(without(n)))
    return without(n) if n < len(text) else None


def encode_sft(records: Sequence[Dialogue], tokenizer: Tokenizer, template: str,
               max_tokens: int) -> tuple[list[TokenizedDialogue], Report]:
    """Encode demonstrations; too long ones lose old turns and prompt text, never the end of an answer."""
    examples, report = [], Report()
    for record in records:
        tokens, trained = encode_dialogue(tokenizer, record.messages, template)
        if len(tokens) > max_tokens:
            messages = fit(tokenizer, record.messages, template, max_tokens)
            if messages is None:
                report.skip(f"answer leaves no room for a prompt in {max_tokens} tokens", record.source)
                continue
            report.note(f"prompt cut to fit {max_tokens} tokens", record.source)
            tokens, trained = encode_dialogue(tokenizer, messages, template)
        examples.append(TokenizedDialogue(tokens, trained))
        report.keep(len(tokens))
    report.require_rows("supervised fine-tuning", "allow more tokens")
    return examples, report


def cut_ranking(record: Ranking, responses: list[list[int]], tokenizer: Tokenizer, template: str,
                max_tokens: int) -> tuple[list[int], list[list[int]]]:
    """Shorten the prompt that all responses share, by what the longest of them needs.

    If that one leaves no room for a prompt, the prompt gets half of the tokens and all responses end where the rest
    does, without an eos that is not theirs. Raises Uninformative if nothing is left to compare.
    """
    messages = fit(tokenizer, record.messages, template, max_tokens - max(map(len, responses)))
    messages = messages or fit(tokenizer, record.messages, template, max_tokens // 2)
    if messages is None:
        raise Uninformative(f"prompt cannot be cut to fit {max_tokens} tokens")
    prompt = encode_prompt(tokenizer, messages, template)
    cut = [response[:max_tokens - len(prompt)] for response in responses]
    if len(set(map(tuple, cut))) < len(set(map(tuple, responses))):
        raise Uninformative(f"responses are equal within {max_tokens} tokens")
    return prompt, cut


def encode_rankings(records: Sequence[Ranking], tokenizer: Tokenizer, template: str,
                    max_tokens: int) -> tuple[list[TokenizedRanking], Report]:
    """Encode comparisons; what is too long is cut alike for all responses to a prompt."""
    examples, report = [], Report()
    for record in records:
        prompt = encode_prompt(tokenizer, record.messages, template)
        responses = [encode_response(tokenizer, text, template, record.messages) for text in record.responses]
        longest = max(map(len, responses))
        if len(prompt) + longest > max_tokens:
            try:
                prompt, responses = cut_ranking(record, responses, tokenizer, template, max_tokens)
            except Uninformative as reason:
                report.skip(str(reason), record.source)
                continue
            part = "prompt" if max(map(len, responses)) == longest else "responses"
            report.note(f"{part} cut to fit {max_tokens} tokens", record.source)
        examples.append(TokenizedRanking(prompt, responses, list(record.ranks)))
        report.keep(len(prompt) + max(map(len, responses)))
    report.require_rows("reward model", "allow more tokens")
    return examples, report


def encode_prompts(records: Sequence[Prompt], tokenizer: Tokenizer, template: str, max_tokens: int,
                   skip_bad: bool = False) -> tuple[list[list[int]], list[Prompt], Report]:
    """Encode prompts; return them, their records, and the report.

    A prompt that is too long is never cut, since the reward of an answer to half a question would teach the wrong
    thing: it is a ValueError, or with skip_bad it is left out.
    """
    prompts, kept, report = [], [], Report()
    for record in records:
        ids = encode_prompt(tokenizer, record.messages, template)
        if len(ids) > max_tokens:
            if not skip_bad:
                raise ValueError(f"{record.source}: a prompt of {len(ids)} tokens, longer than --data.max_prompt_tokens={max_tokens}; "
                                 "raise that, shorten the prompt, or leave such rows out with --data.skip_bad")
            report.skip(f"longer than {max_tokens} tokens", record.source)
            continue
        prompts.append(ids)
        kept.append(record)
        report.keep(len(ids))
    report.require_rows("prompts", "allow more tokens")
    return prompts, kept, report


# ---------------------------------------------------------------------------------------------
# Batches

def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return tokens (B, T) int64, filled up with 0 on the right, and attention_mask (B, T) bool, True = real.

    The filler's id means nothing, LLaMA has no pad token: only the mask tells.
    """
    lengths = torch.tensor([len(ids) for ids in rows], dtype=torch.int64)
    tokens = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.int64)
    for row, ids in zip(tokens, rows):
        row[:len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


def pad_masks(rows: Sequence[Sequence[bool]]) -> Tensor:
    """Return masks (B, T) bool, False where `pad` fills up."""
    return pad(rows)[0].bool()


@lru_cache(maxsize=8)
def epoch_order(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Return a permutation of range(n), a pure function of its arguments.

    random() is the one method whose numbers Python promises to keep between versions, hence the sorting.
    """
    numbers = random.Random(f"order {seed} {epoch}")
    return tuple(sorted(range(n), key=lambda _: numbers.random()))


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Return the global batch of an optimizer step: the next batch_size places in the row of the epochs' permutations.

    Every example comes once per epoch; a batch may hold the end of one epoch and the start of the next.
    """
    return [epoch_order(n, seed, place // n)[place % n] for place in range(step * batch_size, (step + 1) * batch_size)]
