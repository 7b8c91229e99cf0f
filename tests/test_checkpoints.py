"""Checkpoints as people bring them, against transformers: logits, ids, chat templates, and what we write for it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoints
from data import (
    TEMPLATES,
    choose_template,
    decode_response,
    encode_dialogue,
    encode_prompt,
    encode_response,
    end_ids,
    open_tokenizer,
)
from formats import Message
from model import generate
from weights import load_pretrained, save_pretrained, stored_dtype

transformers = pytest.importorskip("transformers", reason="transformers judges the checkpoints; it is a development dependency")
TOKENS = torch.randint(3, 300, (3, 100), generator=torch.Generator().manual_seed(0))
SYSTEM = Message("system", "Be brief.")
TURNS = (
    Message("user", "What is that?\n\nSay."),
    Message("assistant", "A tree.\nOr so."),
    Message("user", "été: 12345 你好"),
)
DIALOGUES = {"one turn": TURNS[:1], "two turns": TURNS, "a system text": (SYSTEM, *TURNS)}


def rows(messages: tuple[Message, ...]) -> list[dict]:
    return [vars(message) for message in messages]


SMOLLM2 = os.environ.get("SMOLLM2", "")  # the folder of a real model
needs_smollm2 = pytest.mark.skipif(not SMOLLM2, reason="needs a folder of SmolLM2-135M-Instruct: SMOLLM2=FOLDER")


@pytest.fixture(scope="module", params=[*checkpoints.CHECKPOINTS, pytest.param("the real SmolLM2", marks=needs_smollm2)])
def checkpoint(request, tmp_path_factory) -> Path:
    if request.param == "the real SmolLM2":
        return Path(SMOLLM2)
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoints.CHECKPOINTS[request.param](folder)
    return folder


def theirs(folder: Path) -> object:
    return transformers.AutoTokenizer.from_pretrained(folder)


def exported(folder: Path, to: Path, template: str) -> Path:
    """Load a folder and write it out again."""
    save_pretrained(load_pretrained(folder), to, open_tokenizer(folder), template=template)
    return to


@pytest.mark.line(22)
def test_logits(checkpoint):
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)(TOKENS).logits
        found = load_pretrained(checkpoint)(TOKENS)
    assert (found - expected).abs().max() < 1e-4


def test_ids(checkpoint):
    """Of texts in 12 scripts; the names of control tokens in them stay text."""
    if (checkpoint / "tokenizer.model").exists():
        pytest.skip("sentencepiece itself judges those (test_data.py)")
    ours, other = open_tokenizer(checkpoint), theirs(checkpoint)
    for text in checkpoints.texts(2000):
        ids = ours.encode(text)
        assert ids == other.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert not set(ids) & set(ours.controls.values())
        assert ours.decode(ids) == other.decode(ids, skip_special_tokens=True)
        assert ours.decode_segment(ours.encode_segment(text)) == ours.decode(ids)
    assert list(ours.opening) == other("").input_ids


def own_template(folder: Path) -> str:
    name = open_tokenizer(folder).own.name
    return name or pytest.skip("has no chat template of its own")


@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_its_own_chat_template(checkpoint, dialogue):
    """Token for token, with and without a system text, up to where the answer begins."""
    if (checkpoint / "tokenizer.model").exists() and not checkpoints.META.exists():
        pytest.skip("shared/data/tokenizer is not in this checkout: of another one transformers guesses the merges")
    if (checkpoint / "tokenizer.model").exists():
        pytest.importorskip("google.protobuf", reason="transformers reads sentencepiece models with protobuf")
    template, other = own_template(checkpoint), theirs(checkpoint)
    messages = DIALOGUES[dialogue]
    if template == "mistral" and messages[0].role == "system":
        pytest.skip("Mistral's refuses system texts")
    ours = open_tokenizer(checkpoint)
    expected = other.apply_chat_template(rows(messages), add_generation_prompt=True)["input_ids"]
    assert encode_prompt(ours, messages, template) == expected
    whole, trained = encode_dialogue(ours, (*messages, Message("assistant", "No.")), template)
    rest = other.apply_chat_template(rows((*messages, Message("assistant", "No."))))["input_ids"]
    assert rest[:len(whole)] == whole and ours.decode(rest[len(whole):]).strip() == ""
    assert whole[-1] == end_ids(ours, template)[0] and trained[-1]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_what_we_write_gives_our_very_ids(checkpoint, tmp_path, template, dialogue):
    ours = open_tokenizer(checkpoint)
    try:
        choose_template(template, ours)
    except ValueError as error:
        assert "control token" in str(error)
        return
    folder = exported(checkpoint, tmp_path / "out", template)
    other = theirs(folder)
    again = open_tokenizer(folder)
    for messages in (DIALOGUES[dialogue], (*DIALOGUES[dialogue][:-1], Message("user", "### Input:\n  x"))):
        expected = encode_prompt(ours, messages, template)
        found = other.apply_chat_template(rows(messages), add_generation_prompt=True)["input_ids"]
        assert found == expected
        assert encode_prompt(again, messages, choose_template("auto", again)) == expected
    for text in checkpoints.texts(60):
        assert other.encode(text, add_special_tokens=False, split_special_tokens=True) == ours.encode(text)


def test_what_we_write_loads_there(checkpoint, tmp_path):
    folder = exported(checkpoint, tmp_path / "out", "plain")
    with torch.no_grad():
        found = transformers.AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits
        expected = load_pretrained(checkpoint)(TOKENS)
    assert (found - expected).abs().max() < 1e-4
    assert stored_dtype(folder) == torch.float32


@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_come_back_as_they_were(checkpoint, template):
    """An indentation, line breaks and the names of control tokens included."""
    ours = open_tokenizer(checkpoint)
    try:
        choose_template(template, ours)
    except ValueError:
        return
    for text in ("Blue.", "    return 1", "\treturn 1\n    if x:", "", "<|im_end|> is text", "été 你好"):
        ids = encode_response(ours, text, template)
        assert decode_response(ours, ids, template) == text
        assert ids[-1] == end_ids(ours, template)[0]


def test_every_end_ends_an_answer(tmp_path):
    checkpoints.llama3(tmp_path)
    tokenizer, model = open_tokenizer(tmp_path), load_pretrained(tmp_path)
    ends = end_ids(tokenizer, "llama3")
    assert len(ends) == 2
    drawn = generate(model, [[5, 6]] * 100, 100, eos_id=ends, seed=1).tokens
    assert {row[-1] for row in drawn} >= set(ends), "either of them is drawn"
    assert all(not set(row[:-1]) & set(ends) for row in drawn), "and nothing behind it"
    assert decode_response(tokenizer, [*tokenizer.encode("No."), ends[1]], "llama3") == "No."


def rewrite(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


REFUSED = {
    "an eos that is text": (lambda d: rewrite(d / "generation_config.json", eos_token_id=7), "eos_token_id 7 is no control token"),
    "an eos of no token": (lambda d: rewrite(d / "tokenizer_config.json", eos_token="<end>"), "'<end>' is no control token"),
    "no word of an eos": (lambda d: rewrite(d / "tokenizer_config.json", eos_token=None), "needs an eos_token"),
    "broken": (lambda d: rewrite(d / "tokenizer.json", model={}), "not a tokenizer.json"),
    "Llama 3's own file": (lambda d: ((d / "tokenizer.json").unlink(), (d / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")), "tiktoken"),
    "yarn": (lambda d: rewrite(d / "config.json", rope_parameters={"rope_type": "yarn", "factor": 2.0}), "'yarn'"),
    "dynamic": (lambda d: rewrite(d / "config.json", rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "'dynamic'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path, case):
    checkpoints.llama3(tmp_path)
    change, expected = REFUSED[case]
    change(tmp_path)
    with pytest.raises(ValueError, match=expected):
        open_tokenizer(tmp_path)


def test_a_chat_template_that_is_none_of_ours(tmp_path):
    checkpoints.llama3(tmp_path)
    dated = checkpoints.LLAMA3.replace("{{ content }}", "{{ 'Today is Monday. ' + content }}")
    rewrite(tmp_path / "tokenizer_config.json", chat_template=dated)
    tokenizer = open_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="the nearest is --data.template=llama3"):
        choose_template("auto", tokenizer)
    assert choose_template("llama3", tokenizer) == "llama3"


def test_a_template_needs_its_control_tokens(tmp_path):
    checkpoints.llama2(tmp_path)
    with pytest.raises(ValueError, match=r"has no control token <\|im_start\|>, which the template needs; it has <s>, </s>"):
        choose_template("chatml", open_tokenizer(tmp_path))


def test_without_the_package_it_is_asked_for_by_name(tmp_path, monkeypatch):
    checkpoints.smollm2(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ValueError, match="needs the package tokenizers: pip install tokenizers"):
        open_tokenizer(tmp_path)


def test_without_jinja_control_tokens_tell(tmp_path, monkeypatch):
    checkpoints.smollm2(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "jinja2.sandbox", None)
    assert open_tokenizer(tmp_path).own.name == "chatml"


@needs_smollm2
def test_a_real_model_chats():
    """It knows where France is governed from, and stops at an end of its own."""
    done = subprocess.run(
        [sys.executable, "eval.py", "chat", SMOLLM2, "--temperature=0"], cwd=Path(__file__).parents[1],
        input="What is the capital of France?\n", capture_output=True, text=True)
    assert done.returncode == 0 and "Paris" in done.stdout, done.stdout + done.stderr
    assert len(done.stdout.split()) < 60 and "<|im_end|>" not in done.stdout
