"""Let a model folder speak: load it as its run used it, and have it answer prompts.

A folder inside a run (runs/001/ppo) brings the run's template and lengths along; any other needs
--data.template. One process; on a GPU if there is one, in bfloat16.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

import torch
from torch import nn

import data
import formats
import microcosm
from data import DataConfig, Tokenizer, open_tokenizer
from formats import Message, Messages, Prompt, harmless
from formats.files import read_json
from formats.parsers import text_prompt
from formats.records import without_repeats
from model import Transformer, generate
from weights import load_pretrained


@dataclass(frozen=True)
class Speaker:
    """A model folder ready for use. A model of kind Transformer answers, a ScalarModel scores.

    data: template and lengths; a prompt may be as long as the context allows.
    settings: the flat settings of the run the folder lies in, {} if it lies in none.
    """

    path: Path
    model: nn.Module
    tokenizer: Tokenizer
    data: DataConfig
    settings: dict[str, Any]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """What ends an answer."""
        return data.end_ids(self.tokenizer, self.data.template)

    @property
    def is_world(self) -> bool:
        """Whether this model was trained on the embedded world."""
        return bool(self.settings) and not self.settings.get("model.path")


def load(
    folder: str | Path, flags: Mapping[str, Any], kind: type[nn.Module] = Transformer
) -> Speaker:
    """Load a model folder.

    flags: "data.template" and the like in place of the run's settings, where not None.
    """
    path = Path(folder)
    tokenizer = open_tokenizer(path)
    # The run around a folder knows how its prompts were written and how long its answers may be.
    around = path.resolve().parent / "config.json"
    settings = settings_of(around) if around.exists() else {}
    given = {flag: value for flag, value in flags.items() if value is not None}
    chosen = {**settings, **given}
    # a ValueError now, not after the weights are read
    template = data.choose_template(chosen.get("data.template", data.AUTO), tokenizer)

    # On a GPU bfloat16 is precise enough for answers that people read.
    is_cuda = torch.cuda.is_available()
    device = "cuda" if is_cuda else "cpu"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    model = load_pretrained(path, device, dtype, kind)

    context = model.config.max_seq_len
    # What the answer does not need is the prompt's.
    length = chosen.get("data.max_response_tokens", min(512, context // 2))
    if not 0 < length < context:
        raise ValueError(
            f"--data.max_response_tokens={length} leaves no room for a prompt "
            f"in the model's context of {context}"
        )
    return Speaker(path, model, tokenizer, DataConfig(template, context - length, length), settings)


# What is used here of the settings of a run, and may be missing where another version wrote them;
# each with the least that it can be.
USED = {
    "model.path": "",
    "data.template": "",
    "data.max_response_tokens": 1,
    "ppo.generation_batch": 1,
    "ppo.microbatch_size": 1,
    "ppo.microbatch_tokens": 0,
    "eval.in_domain": 1,
    "eval.general": 0,
    "seed": 0,
}


def settings_of(file: Path) -> dict[str, Any]:
    """Return the flat settings in the config.json of a run; ValueError names what is no setting."""
    settings = read_json(file).get("config", {})
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: config is {str(settings)[:80]}, expected an object")
    for flag, least in USED.items():
        value = settings.get(flag, least)
        # type, not isinstance: true is no number
        if type(value) is not type(least) or value < least:
            expected = "a text" if least == "" else f"a whole number from {least}"
            raise ValueError(f"{file}: {flag} is {str(value)[:80]}, expected {expected}")
    return settings


# -------------------------------------------------------------------------------------------------
# Prompts and answers


def read_prompts(files: Sequence[str], skip_bad: bool) -> list[Prompt]:
    """Read the prompts of files, and say what became of the rows."""
    records, report = formats.read_prompts(files, skip_bad)
    print(harmless(f"prompts: {report}"), file=sys.stderr)
    return records


def encode(speaker: Speaker, records: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts with the ids that this speaker reads; ValueError names one too long."""
    encoded = []
    for record in records:
        ids = data.encode_prompt(speaker.tokenizer, record.messages, speaker.data.template)
        if len(ids) > speaker.data.max_prompt_tokens:
            # Never cut: an answer to half a question would be compared with one to the whole.
            raise ValueError(
                f"{record.source}: a prompt of {len(ids)} tokens; "
                f"with {speaker.data.max_response_tokens} for the answer "
                f"(--data.max_response_tokens) {speaker.path} has room for "
                f"{speaker.data.max_prompt_tokens}"
            )
        encoded.append(replace(record, ids=tuple(ids)))
    return encoded


def world_prompts(settings: Mapping[str, Any]) -> list[Prompt]:
    """Return the prompts that the evaluation of a run on the embedded world asks."""
    # The same draws as in the run itself, so compare and the run's table agree.
    drawn_by = ("eval.in_domain", "eval.general", "seed")
    missing = [flag for flag in drawn_by if flag not in settings]
    if missing:
        raise ValueError(f"the run's config.json lacks {', '.join(missing)}: give --prompts=FILE")
    items = microcosm.evaluation_items(*[settings[flag] for flag in drawn_by])
    return [
        Prompt((Message("user", item.prompt),), f"prompt {n}", item.answer, item.task)
        for n, item in enumerate(items, 1)
    ]


def prompts_for(speakers: Sequence[Speaker], files: str, skip_bad: bool) -> list[Prompt]:
    """Return the prompts of files, comma-separated, or those of the world all speakers are from."""
    if files:
        records = read_prompts(files.split(","), skip_bad)
        prompts = without_repeats(records)
        if len(prompts) < len(records):
            print(f"prompts: {len(records) - len(prompts)} repeated ones left out", file=sys.stderr)
        return prompts
    if all(speaker.is_world for speaker in speakers):
        return world_prompts(speakers[0].settings)
    raise ValueError(
        "compare: these models are not of the embedded world, so give --prompts=FILE "
        "and --judge=REWARD_DIR, --judge=FUNCTION.py or --judge=FILE.json"
    )


class Answer(NamedTuple):
    text: str
    finished: bool  # with an EOS, not cut off


def answers(
    speaker: Speaker,
    prompts: Sequence[Prompt],
    temperature: float = 0.0,
    seed: int = 0,
    n: int = 1,
) -> Iterator[list[Answer]]:
    """Yield n answers to each encoded prompt, as they come; temperature 0 is greedy.

    The noise of an answer depends on (seed, its place among all answers) alone, not on the batch.
    """
    # n answers to a prompt are n rows, so a batch holds that many prompts fewer.
    size = max(1, speaker.settings.get("ppo.generation_batch", 32) // n)
    for start in range(0, len(prompts), size):
        part = [prompt for prompt in prompts[start : start + size] for _ in range(n)]
        try:
            drawn = generate(
                speaker.model,
                [list(prompt.ids) for prompt in part],
                speaker.data.max_response_tokens,
                temperature,
                eos_id=speaker.end_ids,
                seed=seed,
                # row i * n + k is answer k to prompt i
                rows=range(start * n, start * n + len(part)),
            ).tokens
        except ValueError as error:  # of several models, which
            raise ValueError(f"{speaker.path}: {error}") from None
        given = [answer_of(speaker, prompt.messages, ids) for prompt, ids in zip(part, drawn)]
        for i in range(0, len(given), n):
            yield given[i : i + n]


def answer_of(speaker: Speaker, messages: Messages, ids: list[int]) -> Answer:
    """Return what new ids say, and whether they end."""
    text = data.decode_response(speaker.tokenizer, ids, speaker.data.template, messages)
    return Answer(text, bool(ids) and ids[-1] in speaker.end_ids)


def write_generations(
    folder: str,
    files: Sequence[str],
    n: int,
    temperature: float,
    seed: int,
    flags: Mapping[str, Any],
) -> None:
    """Print a line of JSON with n answers per prompt, in the format that people rank.

    --reward.data reads it once the ranks are filled in.
    """
    records = read_prompts(files, flags["data.skip_bad"])
    speaker = load(folder, flags)
    prompts = encode(speaker, records)
    for prompt, drawn in zip(prompts, answers(speaker, prompts, temperature, seed, n)):
        # A prompt that is one user's text is written as it came; what has roles keeps them.
        is_text = prompt.messages == (text_prompt(prompt.messages[0].content),)
        asked = prompt.text if is_text else [vars(message) for message in prompt.messages]
        row = {"prompt": asked, "responses": [answer.text for answer in drawn], "ranks": None}
        print(harmless(json.dumps(row, ensure_ascii=False)), flush=True)
