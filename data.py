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
import random
from dataclasses import dataclass, replace
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
    template: str = "plain"             # how a dialogue becomes text: see TEMPLATES in data.py
    max_prompt_tokens: int = 96         # a longer PPO prompt is refused, or left out with skip_bad
    max_response_tokens: int = 44       # responses end here; SFT trains on at most the sum of both
    skip_bad: bool = False              # leave out and count bad rows and overlong prompts


# ------------------------------------------------------------------------------------------
# Tokenizer

class Tokenizer:
    """A sentencepiece model as LLaMA uses it.

    path: the file.   processor: the sentencepiece model itself.   vocab_size: pieces.
    bos_id, eos_id: control ids, which `encode` never returns.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a tokenizer.model, or the one in a folder; ValueError if it cannot serve."""
        self.path = find_tokenizer(Path(path))
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (OSError, RuntimeError):
            fault = "not a sentencepiece model; give LLaMA's tokenizer.model"
            raise ValueError(f"{self.path}: {fault}") from None
        self.vocab_size: int = self.processor.vocab_size()
        self.bos_id: int = self.processor.bos_id()
        self.eos_id: int = self.processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{self.path}: has no bos or no eos piece; train it with both")

        # Templates are made of lines. A tokenizer that reads "\n" as nothing (sentencepiece's own
        # default normalization) or as unknown would run them together without a message.
        self._newline = self.encode("\n")
        if not self._newline or self.processor.unk_id() in self._newline:
            advice = ("train it with normalization_rule_name=identity and byte_fallback, or with a "
                      "newline among its user_defined_symbols")
            raise ValueError(f"{self.path}: has no piece for a newline; {advice}")

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text that opens a sequence, without BOS and EOS."""
        # sentencepiece puts a space in front, the dummy prefix: "Hello" at the beginning of a text
        # has the ids that " Hello" has further on.
        return self.processor.encode(text)

    def encode_segment(self, text: str) -> list[int]:
        """Return the ids of a text that continues the one before it: without the dummy prefix."""
        # sentencepiece has no switch for this. A newline in front takes the prefix upon itself and
        # does not merge with what follows; then prefix and newline come off again together.
        ids = self.processor.encode("\n" + text)
        if ids[:len(self._newline)] != self._newline:
            advice = "train it with a newline piece that stays alone"
            raise ValueError(f"{self.path}: merges a newline with the text after it; {advice}")
        return ids[len(self._newline):]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids that open a sequence; control ids have none."""
        # Embeddings are often padded to a round number of rows. A policy can sample a row beyond
        # the vocabulary, which has no text either and would be an IndexError here.
        return self.processor.decode([i for i in ids if 0 <= i < self.vocab_size])

    def decode_segment(self, ids: Iterable[int]) -> str:
        """Return the text of ids that continue others: the inverse of `encode_segment`."""
        # `decode` alone would take a leading space for the dummy prefix and drop it. As above, a
        # newline in front is what takes the prefix upon itself.
        return self.decode([*self._newline, *ids]).removeprefix("\n")


def find_tokenizer(path: Path) -> Path:
    """Return the file itself, or a model folder's; ValueError if there is none."""
    file = path / "tokenizer.model" if path.is_dir() else path
    if not file.exists() and (path / "params.json").exists():
        # Meta's download: one tokenizer beside the folders of all model sizes.
        file = path.parent / "tokenizer.model"
    if not file.is_file():
        advice = "give a sentencepiece tokenizer.model or the folder that holds one"
        raise ValueError(f"{file}: no such file; {advice}")
    return file


def open_tokenizer(path: Path) -> Tokenizer:
    """Open a model folder's tokenizer; ValueError if the two do not belong together."""
    if (path / "metrics.jsonl").exists():
        advice = f"name one in it, such as {path / 'ppo'}"
        raise ValueError(f"{path}: the folder of a run, not of a model: {advice}")
    embeddings = read_config(path).vocab_size
    tokenizer = Tokenizer(path)

    # Fewer pieces than embeddings are fine, those are padded. More would index past the table: on
    # a GPU that is an assertion somewhere in a kernel, long after its cause.
    if tokenizer.vocab_size > embeddings:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} pieces, the model only {embeddings} "
            "embeddings: give it the tokenizer it was trained with, or resize it (transformers: "
            "resize_token_embeddings)"
        )
    return tokenizer


# ------------------------------------------------------------------------------------------
# Templates
#
# A dialogue as the model reads it, <s> for BOS and </s> for EOS, trained on where it is underlined:
#
#     plain     <s>question\nanswer</s>\nquestion\nanswer</s>
#                            ----------            ----------
#     llama2    <s>[INST] question [/INST] answer </s><s>[INST] question [/INST] answer </s>
#                                         ------------                          ------------
#
# In the parts of a Template, llama2's turn is "[INST] question [/INST]", its `before` and its
# `after` are a space each, and it restarts. The answer's ids include `before`, `after` and EOS.
# A new template is its turn function and its line in TEMPLATES.

class Template(NamedTuple):
    """How a dialogue becomes text.

    turn(system, user, is_first): all text between the end of one answer and the start of the next.
    """
    turn: Callable[[str, str, bool], str]
    before: str = ""                    # between that text and the answer, encoded with the answer
    after: str = ""                     # between the answer and EOS
    restarts: bool = False              # every turn is a sequence of its own, with BOS


def alpaca_turn(system: str, user: str, is_first: bool) -> str:
    """Stanford Alpaca's wording, with a newline after "Response:"."""
    # The newline is a border that no token crosses. The original has one turn and no system text:
    # here a system text replaces its preamble, and further turns repeat the rest.
    context = ", paired with an input that provides further context" if INPUT in user else ""
    preamble = system or (f"Below is an instruction that describes a task{context}. "
                          "Write a response that appropriately completes the request.")
    return f"{preamble if is_first else ''}\n\n### Instruction:\n{user}\n\n### Response:\n"


def llama2_turn(system: str, user: str, is_first: bool) -> str:
    """Llama-2 chat, as in Meta's generation.py."""
    # Meta strips the two texts together: spaces before the user's words stay after a system text.
    system = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    return f"[INST] {(system + user).strip()} [/INST]"


def vicuna_turn(system: str, user: str, is_first: bool) -> str:
    """Vicuna v1.1, as in FastChat's conversation.py."""
    preamble = system or (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions."
    )
    return f"{preamble + ' ' if is_first else ''}USER: {user} ASSISTANT:"


def plain_turn(system: str, user: str, is_first: bool) -> str:
    """The texts alone, each on lines of its own."""
    # For models from scratch, the embedded world's: they know no wording that would tell them what
    # a turn is, so a newline serves as well and costs one token.
    start = "" if is_first else "\n"
    return start + (system + "\n" if system else "") + user + "\n"


# The keys are the values of --data.template.
#
# Meta's code ends every finished turn with a space before EOS. So that space ends every llama2
# answer here, the last and the ranked ones included: one habit for the policy to learn, whether or
# not another turn follows.
TEMPLATES = {
    "alpaca": Template(alpaca_turn),
    "llama2": Template(llama2_turn, before=" ", after=" ", restarts=True),
    "vicuna": Template(vicuna_turn, before=" "),
    "plain": Template(plain_turn),
}


def template_for(name: str, messages: Sequence[Message]) -> Template:
    """Return the named template, or for a raw prompt one that leaves it as it is."""
    # The name is checked for a raw prompt as well: a misspelt one should not wait for another row.
    if name not in TEMPLATES:
        raise ValueError(f"unknown template '{name}'; choose one of {', '.join(TEMPLATES)}")
    if not messages or messages[0].role != "raw":
        return TEMPLATES[name]

    # "... Assistant:" is followed by a space and the answer, a line "### Response:" by the answer.
    ends_a_line = messages[0].content.endswith("\n")
    return Template(lambda system, user, is_first: user, before="" if ends_a_line else " ")


# ------------------------------------------------------------------------------------------
# Messages to tokens and back

def split_system(messages: Sequence[Message]) -> tuple[Messages, Messages]:
    """Return the system message, if there is one, and all others."""
    n_system = 1 if messages[0].role == "system" else 0
    return tuple(messages[:n_system]), tuple(messages[n_system:])


def encode_response(tokenizer: Tokenizer, text: str, template: str,
                    prompt: Sequence[Message] = ()) -> list[int]:
    """Return the ids of a response as they follow its prompt's, EOS included.

    prompt: the messages before it. They matter only if they are a raw prompt.
    """
    style = template_for(template, prompt)

    # Where a space parts prompt and response, there is just that one: a second one would make
    # other tokens of the first word than the policy has learned to begin with.
    if style.before:
        text = text.strip()

    # An empty response is its EOS alone, in every template.
    segment = style.before + text + style.after if text else ""
    return [*tokenizer.encode_segment(segment), tokenizer.eos_id]


def decode_response(tokenizer: Tokenizer, ids: Sequence[int], template: str,
                    prompt: Sequence[Message] = ()) -> str:
    """Return the text of a response: the inverse of `encode_response`.

    ids: as sampled. With EOS at their end the answer is finished, without it was cut off.
    """
    style = template_for(template, prompt)
    text = tokenizer.decode_segment(ids).removeprefix(style.before)

    # `after` belongs to the end of an answer. One that was cut off has not come to it, so a space
    # where it stops is a space of its own.
    is_finished = len(ids) > 0 and ids[-1] == tokenizer.eos_id
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
            system_text = system[0].content if system and is_first else ""
            text = style.turn(system_text, message.content, is_first)
            if is_first or style.restarts:
                part = [tokenizer.bos_id, *tokenizer.encode(text)]
            else:
                part = tokenizer.encode_segment(text)
        ids += part
        trained += [is_answer] * len(part)
    return ids, trained


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message], template: str) -> list[int]:
    """Return the ids the policy sees when it starts to answer, BOS included."""
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


class TokenizedRanking(NamedTuple):
    prompt: list[int]
    responses: list[list[int]]          # each with its EOS, unless that was cut off
    ranks: list[float]                  # lower is better

    @property
    def length(self) -> int:
        """Tokens of the longest response with its prompt."""
        return len(self.prompt) + max(map(len, self.responses))

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


def encode_sft(records: Sequence[Dialogue], tokenizer: Tokenizer, template: str,
               max_tokens: int) -> tuple[list[TokenizedDialogue], Report]:
    """Encode demonstrations; too long ones lose old turns and prompt text."""
    # They never lose the end of an answer: a model that learns from answers without EOS does not
    # learn to stop, and from there on every response is as long as allowed.
    examples = []
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
        examples.append(TokenizedDialogue(tokens, trained))
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
