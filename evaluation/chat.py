"""Chat with a model in the terminal, scored by the reward model beside it."""

from __future__ import annotations

import sys
from typing import Any, Callable, Iterable, Iterator, Mapping

import torch

import data
from data import Tokenizer
from evaluation.judging import scores
from evaluation.speaking import Speaker, answer_of, load
from formats import Message, Messages, harmless
from model import (
    Ends,
    ScalarModel,
    Transformer,
    check_lengths,
    finite,
    generation_steps,
    row_uniforms,
)


@torch.no_grad()
def stream(model: Transformer, prompt: list[int], max_new_tokens: int, temperature: float = 1.0,
           eos_id: Ends = None, seed: int = 0, row: int = 0) -> Iterator[int]:
    """Yield one by one the tokens that `generate` returns for this prompt and row."""
    check_lengths([prompt], max_new_tokens, model.config.max_seq_len)
    noise = row_uniforms(seed, [row], max_new_tokens)
    for step in generation_steps(model, [prompt], max_new_tokens, temperature, 0, 1.0, eos_id,
                                 noise):
        finite(step.logprobs)
        yield step.tokens.item()


def pieces(tokenizer: Tokenizer, tokens: Iterable[int], said: list[int]) -> Iterator[str]:
    """Yield the text of tokens as they come, and collect them in `said`.

    Put together, the pieces are the text of all tokens. A character that comes in several tokens
    (byte fallback) decodes to U+FFFD until it is whole, so that waits.
    """
    shown = 0  # characters yielded so far
    text = ""
    for token in tokens:
        said.append(token)
        # The whole text anew each time: what a token says can depend on those before it.
        text = tokenizer.decode(said)
        whole = len(text.rstrip("\ufffd"))
        if whole > shown:
            yield text[shown:whole]
            shown = whole
    # What is still no character at the end never becomes one: it is shown as it is.
    yield text[shown:]


def remember(messages: Messages, fits: Callable[[Messages], bool]) -> Messages:
    """Return what of a dialogue fits: whole turns are forgotten, from the oldest on.

    A turn is a question with its answer; half of one would leave an answer to nothing. A system
    text and the last message always stay, whether or not they fit.
    """
    n_system = 1 if messages[0].role == "system" else 0
    system = messages[:n_system]
    turns = messages[n_system:]
    while len(turns) > 1 and not fits((*system, *turns)):
        turns = turns[2:]
    return (*system, *turns)


def reply(
    speaker: Speaker,
    judge: Speaker | None,
    messages: Messages,
    temperature: float,
    seed: int,
    turn: int,
) -> Message:
    """Print an answer to the last message as it is drawn, and its score; Ctrl-C ends it early.

    What exceeds the context is forgotten; ValueError if the last message alone does.
    """
    room = speaker.data.max_prompt_tokens
    template = speaker.data.template

    def encoded(messages: Messages) -> list[int]:
        return data.encode_prompt(speaker.tokenizer, messages, template)

    # 1. The dialogue so far is the prompt, as far as it fits.
    messages = remember(messages, lambda part: len(encoded(part)) <= room)
    prompt = encoded(messages)
    if len(prompt) > room:
        raise ValueError(f"a prompt of {len(prompt)} tokens, there is room for {room}: shorten it")
    # 2. The answer is shown token by token. What Ctrl-C leaves of it counts as said.
    length = speaker.data.max_response_tokens
    said: list[int] = []
    try:
        drawn = stream(speaker.model, prompt, length, temperature, speaker.end_ids, seed, row=turn)
        for piece in pieces(speaker.tokenizer, drawn, said):
            print(harmless(piece), end="", flush=True)
    except KeyboardInterrupt:
        print(" ...", end="")
    print()
    # 3. The score is of the ids as they were drawn: both models are of one run and one tokenizer.
    if judge and said:
        print(f"[score {scores(judge, [prompt + said])[0]:.2f}]")
    return Message("assistant", answer_of(speaker, messages, said).text)


def chat(folder: str, temperature: float, seed: int, flags: Mapping[str, Any]) -> None:
    """Answer what is typed until the input ends.

    A reward model beside the folder (../reward) scores every answer.
    """
    speaker = load(folder, flags)
    template = speaker.data.template
    # A run keeps its models side by side, so its reward model is found without being named.
    beside = speaker.path.resolve().parent / "reward"
    judge = None
    if (beside / "config.json").exists():
        judge = load(beside, {**flags, "data.template": template}, ScalarModel)
    scored = f", scored by {beside.name}" if judge else ""
    heading = f"{speaker.path}, template {template}, temperature {temperature:g}{scored}."
    print(harmless(heading), end=" ")
    print("/reset forgets the dialogue, Ctrl-C stops an answer, Ctrl-D ends.")

    messages: Messages = ()
    turn = 0  # of all answers: a new one has its own noise also after /reset
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
        # A message that is too long was not answered, so it is not part of the dialogue either.
        except ValueError as error:
            print(harmless(str(error)), file=sys.stderr)
