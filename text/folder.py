"""What the files around a tokenizer say of it: control tokens, BOS, EOS, the chat template."""
from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, NamedTuple

from formats.files import read_json

# Control tokens of the chat templates here and of their kin: never text, however a file marks them.
KNOWN = frozenset("""
    <s> </s> <unk> <pad> [PAD] <|im_start|> <|im_end|> <|endoftext|> <|begin_of_text|>
    <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|user|>
    <|assistant|> <|system|> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] <start_of_turn>
    <end_of_turn> <eos> <bos>
""".split())


class Controls(NamedTuple):
    """What a folder says; None: nothing, so the tokenizer's own file decides."""
    ids: dict[str, int]                 # control tokens, name -> id
    bos_id: int | None
    eos_id: int | None
    other_eos_ids: tuple[int, ...]      # of the generation's config: they end an answer as well
    opens_with_bos: bool | None


def optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def token_text(entry: Any) -> str | None:
    """Return a token's name: "<s>" or {"content": "<s>", ...}."""
    return entry.get("content") if isinstance(entry, dict) else entry


def added_tokens(folder: Path, decoder: Mapping[str, Any]) -> dict[str, int]:
    """Return the control tokens that the files beside a tokenizer add, name -> id.

    decoder: the added_tokens_decoder of tokenizer_config.json.
    """
    found = dict(optional_json(folder / "added_tokens.json"))
    listed = [(entry, int(number)) for number, entry in decoder.items()]
    content = optional_json(folder / "tokenizer.json")
    listed += [(entry, entry["id"]) for entry in content.get("added_tokens", [])]
    for entry, number in listed:
        if entry.get("special") or entry["content"] in KNOWN:
            found[entry["content"]] = number
    return found


def read_controls(file: Path, own: Mapping[str, int]) -> Controls:
    """Read what stands beside a tokenizer file.

    own: the control tokens that the file itself has. Raises ValueError where the files disagree.
    """
    folder = file.parent
    settings = {**optional_json(folder / "special_tokens_map.json"),
                **optional_json(folder / "tokenizer_config.json")}
    ids = {**own, **added_tokens(folder, settings.get("added_tokens_decoder") or {})}
    named = {}
    for name in ("bos_token", "eos_token"):
        text = token_text(settings.get(name)) or None  # some files have "" for none
        if text is not None and text not in ids:
            raise ValueError(f"{folder / 'tokenizer_config.json'}: its {name} {text!r} is no "
                             f"control token of {file.name}; name one of {', '.join(ids)}")
        named[name] = None if text is None else ids[text]
    return Controls(ids, named["bos_token"], named["eos_token"], eos_of(folder, ids),
                    settings.get("add_bos_token"))


def eos_of(folder: Path, ids: Mapping[str, int]) -> tuple[int, ...]:
    """Return what ends an answer by generation_config.json, else by config.json."""
    for name in ("generation_config.json", "config.json"):
        value = optional_json(folder / name).get("eos_token_id")
        if value is None:
            continue
        found = tuple(value) if isinstance(value, list) else (value,)
        # it would be drawn as text, or not at all, and answers would never end
        strange = [i for i in found if i not in ids.values()]
        if strange:
            raise ValueError(f"{folder / name}: eos_token_id {strange[0]} is no control token of "
                             "the tokenizer; its control tokens are "
                             f"{', '.join(f'{token} ({i})' for token, i in ids.items())}")
        return found
    return ()


def chat_template_of(folder: Path) -> str | None:
    """Return a checkpoint's own chat template, in Jinja; None if it has none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = optional_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several by name
        named = {entry["name"]: entry["template"] for entry in found}
        found = named.get("default")
    return found or None
