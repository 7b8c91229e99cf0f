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
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Callable, Iterable, NamedTuple, Sequence

import sentencepiece
import torch
from torch import Tensor

from formats import Dialogue, Message, Messages, Prompt, Ranking, Report, Uninformative
from formats.parsers import INPUT
from weights import read_config


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


def open_tokenizer(path: Path) -> Tokenizer:
    """Open a model folder's tokenizer; ValueError if it is no model folder, or the model has no embeddings for all of its pieces."""
    if (path / "metrics.jsonl").exists():
        raise ValueError(f"{path}: the folder of a run, not of a model: name one in it, such as {path / 'ppo'}")
    shape, tokenizer = read_config(path), Tokenizer(path)
    if tokenizer.vocab_size > shape.vocab_size:
        raise ValueError(f"{path}: the tokenizer has {tokenizer.vocab_size} pieces, the model only {shape.vocab_size} embeddings: "
                         "give it the tokenizer it was trained with, or resize it (transformers: resize_token_embeddings)")
    return tokenizer


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


def decode_response(tokenizer: Tokenizer, ids: Sequence[int], template: str, prompt: Sequence[Message] = ()) -> str:
    """Return the text of a response's ids: the inverse of encode_response. What follows a finished answer comes off."""
    style = template_for(template, prompt)
    is_finished = bool(ids) and ids[-1] == tokenizer.eos_id
    newline = tokenizer.encode_segment("\n")  # in front, it keeps decoding from taking a leading space away
    text = tokenizer.decode([*newline, *ids]).removeprefix("\n").removeprefix(style.before)
    return text.removesuffix(style.after) if is_finished else text


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
