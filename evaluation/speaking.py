"""Talking to a model folder: load it as its run used it, answer prompts from files, chat in the terminal.

A folder inside a run (runs/001/ppo) brings the run's template and lengths along; any other needs --data.template.
One process; on a GPU if there is one, in bfloat16.
"""
from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, NamedTuple, Sequence

import torch
from torch import nn

import data
import formats
from data import DataConfig, Tokenizer, open_tokenizer
from formats import Message, Messages
from formats.files import read_json
from formats.parsers import text_prompt
from model import ScalarModel, Transformer, generate, last_scores, stream
from weights import load_pretrained


@dataclass(frozen=True)
class Speaker:
    """A model folder ready for use. kind Transformer answers, kind ScalarModel scores.

    data: template and lengths; a prompt may be as long as the context allows.
    settings: the flat settings of the run the folder lies in, {} if it lies in none.
    """
    path: Path
    model: nn.Module
    tokenizer: Tokenizer
    data: DataConfig
    settings: dict[str, Any]

    @property
    def is_world(self) -> bool:
        """Whether this model was trained on the embedded world."""
        return bool(self.settings) and not self.settings.get("model.path")


class Answer(NamedTuple):
    text: str
    finished: bool  # with an EOS, not cut off


def load(folder: str | Path, flags: Mapping[str, Any], kind: type[nn.Module] = Transformer) -> Speaker:
    """Load a model folder. flags: "data.template" and the like in place of the run's settings, where not None."""
    path = Path(folder)
    tokenizer = open_tokenizer(path)
    around = path.resolve().parent / "config.json"
    settings = read_json(around).get("config", {}) if around.exists() else {}
    chosen = {**settings, **{flag: value for flag, value in flags.items() if value is not None}}
    if "data.template" not in chosen:
        raise ValueError(f"{path}: lies in no run that would say how prompts are written: give --data.template={'|'.join(data.TEMPLATES)}")
    data.template_for(chosen["data.template"], ())
    is_cuda = torch.cuda.is_available()
    model = load_pretrained(path, "cuda" if is_cuda else "cpu", torch.bfloat16 if is_cuda else torch.float32, kind)
    context = model.config.max_seq_len
    length = chosen.get("data.max_response_tokens", min(512, context // 2))
    if not 0 < length < context:
        raise ValueError(f"--data.max_response_tokens={length} leaves no room for a prompt in the model's context of {context}")
    return Speaker(path, model, tokenizer, DataConfig(chosen["data.template"], context - length, length), settings)


def read_prompts(files: Sequence[str], skip_bad: bool) -> list[formats.Prompt]:
    """Read the prompts of files, and say what became of the rows."""
    records, report = formats.read_prompts(files, skip_bad)
    print(f"prompts: {report}", file=sys.stderr)
    return records


def encode(speaker: Speaker, records: Sequence[formats.Prompt]) -> list[list[int]]:
    """Return the prompts' ids; ValueError names one that is too long to be answered."""
    encoded = [data.encode_prompt(speaker.tokenizer, record.messages, speaker.data.template) for record in records]
    for record, ids in zip(records, encoded):
        if len(ids) > speaker.data.max_prompt_tokens:
            raise ValueError(f"{record.source}: a prompt of {len(ids)} tokens; with {speaker.data.max_response_tokens} for the answer "
                             f"(--data.max_response_tokens) {speaker.path} has room for {speaker.data.max_prompt_tokens}")
    return encoded


def answers(speaker: Speaker, prompts: Sequence[list[int]], temperature: float = 0.0, seed: int = 0, n: int = 1) -> Iterator[list[Answer]]:
    """Yield n answers to each prompt, as they come. The noise of an answer depends on (seed, its place) alone; temperature 0 is greedy."""
    size = max(1, speaker.settings.get("ppo.generation_batch", 32) // n)
    for start in range(0, len(prompts), size):
        part = [prompt for prompt in prompts[start:start + size] for _ in range(n)]
        drawn = generate(speaker.model, part, speaker.data.max_response_tokens, temperature, eos_id=speaker.tokenizer.eos_id, seed=seed,
                         rows=range(start * n, start * n + len(part))).tokens
        texts = [Answer(speaker.tokenizer.decode(ids), ids[-1] == speaker.tokenizer.eos_id) for ids in drawn]
        yield from (texts[i:i + n] for i in range(0, len(texts), n))


@torch.no_grad()
def score_rows(model: nn.Module, rows: Sequence[list[int]], batch_size: int) -> list[float]:
    """Return a reward model's raw score of every row of ids, prompt and response."""
    device, scores = model.score.weight.device, []
    for start in range(0, len(rows), batch_size):
        tokens, attention_mask = data.pad(rows[start:start + batch_size])
        scores += last_scores(model, tokens.to(device), attention_mask.to(device)).tolist()
    return scores


def calibrated(judge: Speaker, rows: Sequence[list[int]]) -> list[float]:
    """Return scores in the scale of the judge's run: mean 0 and deviation 1 on samples of its SFT model."""
    config = read_json(judge.path / "config.json")
    return [(score - config.get("score_mean", 0.0)) / config.get("score_std", 1.0)
            for score in score_rows(judge.model, rows, judge.settings.get("ppo.microbatch_size", 4))]


def judged(judge: Speaker, records: Sequence[formats.Prompt], given: Sequence[Answer]) -> list[float]:
    """Return the judge's calibrated score of an answer to each prompt; an answer cut off gets no EOS."""
    rows = []
    for record, answer in zip(records, given, strict=True):
        response = data.encode_response(judge.tokenizer, answer.text, judge.data.template, record.messages)
        rows.append(data.encode_prompt(judge.tokenizer, record.messages, judge.data.template) + (response if answer.finished else response[:-1]))
        if len(rows[-1]) > judge.model.config.max_seq_len:
            raise ValueError(f"{record.source}: prompt and answer have {len(rows[-1])} tokens, "
                             f"the context of the judge {judge.path} is {judge.model.config.max_seq_len}")
    return calibrated(judge, rows)


def shown(messages: Messages) -> str:
    """Return a prompt as people read it: one text, or a dialogue with its roles."""
    return messages[0].content if len(messages) == 1 else "\n\n".join(f"{message.role}: {message.content}" for message in messages)


def write_generations(folder: str, files: Sequence[str], n: int, temperature: float, seed: int, flags: Mapping[str, Any]) -> None:
    """Print a line of JSON with n answers per prompt, in the format people rank (--reward.data reads it once the ranks are filled in)."""
    records = read_prompts(files, flags["data.skip_bad"])
    speaker = load(folder, flags)
    for record, drawn in zip(records, answers(speaker, encode(speaker, records), temperature, seed, n)):
        is_text = record.messages == (text_prompt(record.messages[0].content),)
        prompt = record.messages[0].content if is_text else [vars(message) for message in record.messages]
        row = {"prompt": prompt, "responses": [answer.text for answer in drawn], "ranks": None}
        print(json.dumps(row, ensure_ascii=False), flush=True)


def pieces(tokenizer: Tokenizer, tokens: Iterable[int], said: list[int]) -> Iterator[str]:
    """Yield the text of tokens as they come, and collect them in `said`; put together it is the text of them all.

    A character that comes in several tokens (byte fallback) decodes to U+FFFD until it is whole, so that waits.
    """
    shown, text = 0, ""
    for token in tokens:
        said.append(token)
        text = tokenizer.decode(said)
        whole = len(text.rstrip("\ufffd"))
        if whole > shown:
            yield text[shown:whole]
            shown = whole
    yield text[shown:]


def reply(speaker: Speaker, judge: Speaker | None, messages: Messages, temperature: float, seed: int, turn: int) -> Message:
    """Print an answer to the last message as it is drawn, and its score; Ctrl-C ends it early.

    What exceeds the context is forgotten from the oldest turn on; ValueError if the last message alone does.
    """
    def encoded(messages: Messages) -> list[int]:
        return data.encode_prompt(speaker.tokenizer, messages, speaker.data.template)
    while len(messages) > 1 and len(encoded(messages)) > speaker.data.max_prompt_tokens:
        messages = messages[2:]
    prompt, said = encoded(messages), []
    if len(prompt) > speaker.data.max_prompt_tokens:
        raise ValueError(f"a prompt of {len(prompt)} tokens, there is room for {speaker.data.max_prompt_tokens}: shorten it")
    try:
        drawn = stream(speaker.model, prompt, speaker.data.max_response_tokens, temperature, speaker.tokenizer.eos_id, seed, row=turn)
        for piece in pieces(speaker.tokenizer, drawn, said):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" ...", end="")
    print()
    if judge and said:
        print(f"[score {calibrated(judge, [prompt + said])[0]:.2f}]")
    return Message("assistant", speaker.tokenizer.decode(said))


def chat(folder: str, temperature: float, seed: int, flags: Mapping[str, Any]) -> None:
    """Answer what is typed until the input ends. A reward model beside the folder (../reward) scores every answer."""
    speaker = load(folder, flags)
    beside = speaker.path.resolve().parent / "reward"
    judge = load(beside, {**flags, "data.template": speaker.data.template}, ScalarModel) if (beside / "config.json").exists() else None
    print(f"{speaker.path}, template {speaker.data.template}, temperature {temperature:g}"
          + (f", scored by {beside.name}" if judge else "") + ". /reset forgets the dialogue, Ctrl-C stops an answer, Ctrl-D ends.")
    messages: Messages = ()
    turn = 0
    while True:
        try:
            text = input("> ").strip()
            if text == "/reset":
                messages = ()
            elif text:
                asked = (*messages, Message("user", text))
                messages = (*asked, reply(speaker, judge, asked, temperature, seed, turn))
                turn += 1
        except KeyboardInterrupt:
            print("\nCtrl-D ends")
        except EOFError:
            print()
            return
        except ValueError as error:
            print(error, file=sys.stderr)
