"""Text in, tokens out, and back: tokenizers, chat templates, lengths, batches.

    files -> Dialogue | Ranking | Prompt (formats/) -> tokens (here) -> batch (B, T)

Three rules hold for every stage:

 - Text never becomes a control token. BOS and EOS are put in as ids: no user text closes a turn.
 - Prompt and response are encoded apart and their ids joined: the response's ids start exactly
   where the policy starts to sample, so SFT, reward model and PPO agree on every border.
 - A policy's own samples are never encoded again from their text, since encode(decode(ids)) may
   differ from ids. Text is for people and for reward functions; training goes on with the ids.
"""
from __future__ import annotations

import bisect
import heapq
import itertools
import math
import random
from array import array
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple, Sequence

import torch
from torch import Tensor

from formats import Dialogue, Message, Messages, Prompt, Ranking, Report, Uninformative
from formats.parsers import INPUT
from text.chat_template import recognise
from text.templates import (AUTO, EOS, TEMPLATES, Control, choose_template, control_id, end_ids,
                            split_system, template_for, trimmed)
from text.tokenizer import Tokenizer, open_file
from weights import check_beside, read_config


@dataclass(frozen=True)
class DataConfig:
    template: str = "plain"             # how a dialogue becomes text: see text/templates.py
    max_prompt_tokens: int = 96         # a longer PPO prompt is refused, or left out with skip_bad
    max_response_tokens: int = 44       # responses end here; SFT trains on at most the sum of both
    skip_bad: bool = False              # leave out and count bad rows and overlong prompts


# ------------------------------------------------------------------------------------------
# Tokenizer

def open_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer file, or a model folder's; ValueError if the two do not belong together."""
    path = Path(path)
    if (path / "metrics.jsonl").exists():
        advice = f"name one in it, such as {path / 'ppo'}"
        raise ValueError(f"{path}: the folder of a run, not of a model: {advice}")
    if path.is_dir():
        check_beside(path)  # all that is read of a folder here
    embeddings = math.inf if path.is_file() else read_config(path).vocab_size
    tokenizer = open_file(path)
    tokenizer.own = recognise(tokenizer, tokenizer.path.parent)

    # Fewer pieces than embeddings are fine, those are padded. More would index past the table: on
    # a GPU that is an assertion somewhere in a kernel, long after its cause.
    if max(tokenizer.vocab_size, *(i + 1 for i in tokenizer.eos_ids)) > embeddings:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} pieces, the model only {embeddings} "
            "embeddings: give it the tokenizer it was trained with, or resize it (transformers: "
            "resize_token_embeddings)"
        )
    # A pad token that nobody uses need not have a row; who asks for it is told by name.
    tokenizer.controls = {name: i for name, i in tokenizer.controls.items() if i < embeddings}
    return tokenizer


# ------------------------------------------------------------------------------------------
# Messages to tokens and back

def encode_response(tokenizer: Tokenizer, text: str, template: str,
                    prompt: Sequence[Message] = ()) -> list[int]:
    """Return the ids of a response as they follow its prompt's, its EOS (or other end) included.

    prompt: the messages before it. They matter only if they are a raw prompt.
    """
    style = template_for(template, prompt)

    # Where a space parts prompt and response, there is just that one: a second one would make
    # other tokens of the first word than the policy has learned to begin with.
    if style.before or style.trims:
        text = trimmed(text)

    # An empty response is its end alone, in every template.
    segment = style.before + text + style.after if text else ""
    return [*tokenizer.encode_segment(segment), control_id(tokenizer, style.end or EOS)]


def decode_response(tokenizer: Tokenizer, ids: Sequence[int], template: str,
                    prompt: Sequence[Message] = ()) -> str:
    """Return the text of a response: the inverse of `encode_response`.

    ids: as sampled. With EOS at their end the answer is finished, without it was cut off.
    """
    style = template_for(template, prompt)
    text = tokenizer.decode_segment(ids).removeprefix(style.before)

    # `after` belongs to the end of an answer. One that was cut off has not come to it, so a space
    # where it stops is a space of its own.
    is_finished = len(ids) > 0 and ids[-1] in end_ids(tokenizer, template)
    return text.removesuffix(style.after) if is_finished else text


def encode_dialogue(tokenizer: Tokenizer, messages: Sequence[Message],
                    template: str) -> tuple[list[int], list[bool]]:
    """Return ids and which of them are trained on: every assistant turn, its EOS included."""
    # Up to each answer the ids are those of `encode_prompt`, and the answer's are those of
    # `encode_response`: SFT sees what the policy will see when it samples.
    style = template_for(template, messages)
    system, turns = split_system(messages)
    ids: list[int] = []
    trained: list[bool] = []
    for n, message in enumerate(turns):
        is_first = n == 0
        is_answer = message.role == "assistant"
        if is_answer:
            part = encode_response(tokenizer, message.content, template, messages)
        else:
            told = system[0].content if system else default_system(tokenizer, template, messages)
            parts = style.turn_parts(told if is_first else "", message.content, is_first)
            part = encode_parts(tokenizer, parts, is_first or style.restarts, style.opens)
        ids += part
        trained += [is_answer] * len(part)
    return ids, trained


def default_system(tokenizer: Tokenizer, template: str, messages: Sequence[Message]) -> str:
    """Return what the checkpoint's own template tells a dialogue that has no system text."""
    is_own = template == tokenizer.own.name and messages[0].role != "raw"
    return tokenizer.own.system if is_own else ""


def encode_parts(tokenizer: Tokenizer, parts: Sequence[str], begins: bool,
                 opens: bool) -> list[int]:
    """Return the ids of texts and control tokens. begins: a sequence, with BOS if it opens so."""
    ids = list(tokenizer.opening) if begins and opens else []
    for n, part in enumerate(parts):
        if isinstance(part, Control):
            ids.append(control_id(tokenizer, part))
        else:
            # only the very first text of a sequence is one that opens it
            ids += (tokenizer.encode if begins and n == 0 else tokenizer.encode_segment)(part)
    return ids


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message], template: str) -> list[int]:
    """Return the ids that the policy sees when it starts to answer, BOS included."""
    ids, _ = encode_dialogue(tokenizer, messages, template)
    return ids


# ------------------------------------------------------------------------------------------
# Records to tokens, within a length

class TokenizedDialogue(NamedTuple):
    tokens: list[int]
    response_mask: list[bool]           # True: trained on

    @property
    def length(self) -> int:
        return len(self.tokens)

    n_tokens = length                   # of all rows that it is in a batch


class TokenizedDialogues(Sequence[TokenizedDialogue]):
    """Dialogues in one array of 2 or 4 bytes a token: lists of Python's numbers take 16."""

    def __init__(self, words: Any = None, ends: Any = None) -> None:
        # of all tokens: twice the id, plus 1 if it is trained on
        self.words = array("H") if words is None else words
        # where the dialogues end in it, behind a 0
        self.ends = array("q", [0]) if ends is None else ends

    def append(self, tokens: Sequence[int], response_mask: Sequence[bool]) -> None:
        words = [2 * token + mask for token, mask in zip(tokens, response_mask, strict=True)]
        if self.words.typecode == "H" and max(words, default=0) >= 2 ** 16:
            self.words = type(self.words)("I", self.words)
        self.words.extend(words)
        self.ends.append(len(self.words))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, place: int) -> TokenizedDialogue:
        i = range(len(self))[place]     # counted from the end too; IndexError beyond it
        words = self.words[self.ends[i]:self.ends[i + 1]]
        return TokenizedDialogue([word >> 1 for word in words], [word & 1 == 1 for word in words])


class TokenizedRanking(NamedTuple):
    prompt: list[int]
    responses: list[list[int]]          # each with its EOS, unless that was cut off
    ranks: list[float]                  # lower is better

    @property
    def length(self) -> int:
        """Tokens of the longest response with its prompt."""
        return len(self.prompt) + max(map(len, self.responses))

    @property
    def n_tokens(self) -> int:
        """Tokens of all responses, each with the prompt."""
        return sum(len(self.prompt) + len(response) for response in self.responses)

    @property
    def best(self) -> TokenizedDialogue:
        """The prompt with its top-ranked response, the first of several, to be trained on."""
        response = self.responses[self.ranks.index(min(self.ranks))]
        mask = [False] * len(self.prompt) + [True] * len(response)
        return TokenizedDialogue(self.prompt + response, mask)


def fit(tokenizer: Tokenizer, messages: Messages, template: str,
        max_tokens: int) -> Messages | None:
    """Shorten a prompt or dialogue to max_tokens; None if no word of the question could stay."""
    # What goes is the beginning, never the end: an answer must follow what it answers.
    def fits(candidate: Messages) -> bool:
        ids, _ = encode_dialogue(tokenizer, candidate, template)
        return len(ids) <= max_tokens

    # 1. The oldest turns go, each question with its answer. The system text stays.
    system, turns = split_system(messages)
    while len(turns) > 2 and not fits((*system, *turns)):
        turns = turns[2:]
    if fits((*system, *turns)):
        return (*system, *turns)

    # 2. The last question loses its beginning. If it is Alpaca's instruction with an input, the
    #    input does: without the instruction nobody could tell what the answer is about.
    user, *answer = turns
    instruction, joint, text = user.content.rpartition(INPUT)

    def without(n: int) -> Messages:
        shorter = Message(user.role, instruction + joint + text[n:])
        return (*system, shorter, *answer)

    # By bisection, since one encoding per character of a long document would take hours.
    n = bisect.bisect_left(range(len(text)), True, key=lambda n: fits(without(n)))
    return without(n) if text[n:].strip() else None


def encode_sft(records: Iterable[Dialogue], tokenizer: Tokenizer, template: str, max_tokens: int,
               examples: TokenizedDialogues | None = None) -> tuple[TokenizedDialogues, Report]:
    """Encode demonstrations; too long ones lose old turns and prompt text.

    examples: what they are appended to.
    """
    # They never lose the end of an answer: a model that learns from answers without EOS does not
    # learn to stop, and from there on every response is as long as allowed.
    examples = TokenizedDialogues() if examples is None else examples
    report = Report()
    for record in records:
        tokens, trained = encode_dialogue(tokenizer, record.messages, template)
        if len(tokens) > max_tokens:
            messages = fit(tokenizer, record.messages, template, max_tokens)
            if messages is None:
                reason = f"answer leaves no room for a prompt in {max_tokens} tokens"
                report.skip(reason, record.source)
                continue
            report.note(f"prompt cut to fit {max_tokens} tokens", record.source)
            tokens, trained = encode_dialogue(tokenizer, messages, template)
        examples.append(tokens, trained)
        report.keep(len(tokens))
    report.require_rows("supervised fine-tuning", "allow more tokens")
    return examples, report


def cut_ranking(record: Ranking, responses: list[list[int]], tokenizer: Tokenizer, template: str,
                max_tokens: int) -> tuple[list[int], list[list[int]]]:
    """Shorten a comparison, alike for all responses; Uninformative if that cannot be done."""
    # 1. The prompt, which all responses share, gives what the longest of them needs.
    longest = max(len(response) for response in responses)
    messages = fit(tokenizer, record.messages, template, max_tokens - longest)

    # 2. If that leaves nothing of it, it gets half of the tokens, and the responses end where the
    #    other half does, without an EOS that is not theirs.
    if messages is None:
        messages = fit(tokenizer, record.messages, template, max_tokens // 2)
    if messages is None:
        raise Uninformative(f"prompt cannot be cut to fit {max_tokens} tokens")
    prompt = encode_prompt(tokenizer, messages, template)
    cut = [response[:max_tokens - len(prompt)] for response in responses]

    # 3. Responses that differ only beyond that cannot be told apart any more.
    n_different = len({tuple(response) for response in responses})
    if len({tuple(response) for response in cut}) < n_different:
        raise Uninformative(f"responses are equal within {max_tokens} tokens")
    return prompt, cut


def encode_rankings(records: Sequence[Ranking], tokenizer: Tokenizer, template: str,
                    max_tokens: int) -> tuple[list[TokenizedRanking], Report]:
    """Encode comparisons; what is too long is cut alike for all responses to a prompt."""
    examples = []
    report = Report()
    for record in records:
        # The reward model reads what the policy will have written: prompt, response, EOS, by the
        # same two functions, so a score never depends on how a border was tokenized.
        prompt = encode_prompt(tokenizer, record.messages, template)
        responses = [
            encode_response(tokenizer, text, template, record.messages)
            for text in record.responses
        ]
        whole = responses

        # Most comparisons fit; cutting costs dozens of encodings, so it is tried only for the rest.
        if len(prompt) + max(map(len, responses)) > max_tokens:
            try:
                prompt, responses = cut_ranking(record, whole, tokenizer, template, max_tokens)
            except Uninformative as reason:
                report.skip(str(reason), record.source)
                continue
            part = "prompt" if responses == whole else "responses"
            report.note(f"{part} cut to fit {max_tokens} tokens", record.source)
        examples.append(TokenizedRanking(prompt, responses, list(record.ranks)))
        report.keep(len(prompt) + max(map(len, responses)))
    report.require_rows("reward model", "allow more tokens")
    return examples, report


def encode_prompts(records: Sequence[Prompt], tokenizer: Tokenizer, template: str, max_tokens: int,
                   skip_bad: bool = False) -> tuple[list[Prompt], Report]:
    """Return prompts with their ids filled in; one that is too long is a ValueError.

    skip_bad: leave it out and count it instead.
    """
    # It is never cut: the reward of an answer to half a question would teach the wrong thing.
    prompts = []
    report = Report()
    for record in records:
        ids = encode_prompt(tokenizer, record.messages, template)
        if len(ids) > max_tokens:
            if not skip_bad:
                raise ValueError(
                    f"{record.source}: a prompt of {len(ids)} tokens, longer than "
                    f"--data.max_prompt_tokens={max_tokens}; raise that, shorten the prompt, "
                    "or leave such rows out with --data.skip_bad"
                )
            report.skip(f"longer than {max_tokens} tokens", record.source)
            continue

        # The same record, not a row of ids beside it: whoever has the ids has the text, the
        # reference answer and the task as well, and no order of two lists can go wrong.
        prompts.append(replace(record, ids=tuple(ids)))
        report.keep(len(ids))
    report.require_rows("prompts", "allow more tokens")
    return prompts, report


# ------------------------------------------------------------------------------------------
# Batches

def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return tokens (B, T) int64, and attention_mask (B, T) bool, True = a real token."""
    # Rows are filled up on the right with 0, which means nothing: LLaMA has no pad token, and 0 is
    # an id like any other. Only the mask tells.
    lengths = torch.tensor([len(ids) for ids in rows], dtype=torch.int64)           # (B,)
    longest = max((len(ids) for ids in rows), default=0)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)                     # (B, T)
    for row, ids in zip(tokens, rows):
        row[:len(ids)] = torch.tensor(ids, dtype=torch.int64)

    # (T,) < (B, 1) -> (B, T): position t of row b is real as long as t < lengths[b].
    attention_mask = torch.arange(longest) < lengths[:, None]
    return tokens, attention_mask


def pad_masks(rows: Sequence[Sequence[bool]]) -> Tensor:
    """Return masks (B, T) bool, False where `pad` fills up."""
    masks, _ = pad(rows)
    return masks.bool()


@lru_cache(maxsize=8)
def epoch_order(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Return a permutation of range(n), a pure function of its arguments."""
    # random() is the one method whose numbers Python promises to keep between versions; shuffle's
    # may change. So every place draws a number, and the places are sorted by theirs.
    numbers = random.Random(f"order {seed} {epoch}")
    return tuple(sorted(range(n), key=lambda _: numbers.random()))


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Return the global batch of an optimizer step, as indices into n examples."""
    # The epochs' permutations stand in one endless row, and a step takes its batch_size places of
    # it. So every example comes once per epoch, a batch may hold the end of one epoch and the start
    # of the next, and a resumed run needs to remember nothing but its step.
    places = range(step * batch_size, (step + 1) * batch_size)
    return [epoch_order(n, seed, place // n)[place % n] for place in places]


# A rank's micro-batches of rows of these lengths, of at most so many rows and tokens: see `cut`.
Share = Callable[[Sequence[int], int, int], list[Tensor]]


def cut(lengths: Sequence[int], size: int, tokens: int, ranks: int = 1,
        least: int = 0) -> list[Tensor]:
    """Cut rows into micro-batches of at most `size` rows and `tokens` tokens (0: any number).

    lengths: tokens of every row; a row longer than `tokens` stands alone.
    ranks: whose micro-batches these are, in turn: all have equally many, of nearly equal work.
    least: so many for each rank at least.
    Returns: the rows' places, int64. None is empty, unless the ranks cannot share the rows evenly.
    """
    if not tokens:
        # Every rank-th row: of rows sorted by length each rank gets short ones and long ones.
        rows = torch.arange(len(lengths))
        return [rows[start + rank:start + ranks * size:ranks]
                for start in range(0, len(lengths), ranks * size) for rank in range(ranks)]
    # As few for each as may do, then more, until all limits hold: they do once every row is alone.
    total = sum(min(length, tokens) for length in lengths)
    fewest = max(least, -(-len(lengths) // (ranks * size)), -(-total // (ranks * tokens)))
    for each in itertools.count(fewest):
        parts = deal(lengths, ranks * each, size)
        held = [sum(lengths[row] for row in part) for part in parts]
        if all(n <= tokens or len(part) == 1 for n, part in zip(held, parts)):
            # Largest first: those of a turn are almost equal, so no rank waits for another.
            order = sorted(range(len(parts)), key=held.__getitem__, reverse=True)
            return [torch.tensor(parts[i], dtype=torch.int64) for i in order]


def deal(lengths: Sequence[int], count: int, size: int) -> list[list[int]]:
    """Deal rows to parts, long ones first, each to the one with the fewest tokens and room left."""
    parts: list[list[int]] = [[] for _ in range(count)]
    waiting = [(0, i) for i in range(count)]  # a heap: tokens so far of the parts with room
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        held, i = heapq.heappop(waiting)
        parts[i].append(row)
        if len(parts[i]) < size:
            heapq.heappush(waiting, (held + lengths[row], i))
    return parts
