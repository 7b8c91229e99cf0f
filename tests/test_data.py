"""data.py and formats/ against small files written here and two small tokenizers trained here.

Where the folder of real files lies beside the project, against those as well: the real LLaMA
tokenizer, real data sets, real malformed input.
"""

import gzip
import itertools
import json
import os
import random
import re
import stat
import tracemalloc
from array import array
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import sentencepiece
import torch

import data
from data import Tokenizer, open_tokenizer
from formats import parsers, reading
from formats.files import read_json, read_jsonl, write_jsonl
from formats.records import Dialogue, Message, Prompt, Ranking, Report, dialogue_text
from formats.rows import read_rows
from run.sharing import Pages, mapped

SHARED = Path(__file__).parents[2] / "shared" / "data"
SENTENCES = [
    "Name a colour that is not red.", "Blue is a colour, and so is green!", "What is two plus two? It is four.",
    "Be brief. Hi Hello! Bye", "[INST] <<SYS>> <</SYS>> [/INST] USER: ASSISTANT: Human: Assistant:",
    "Below is an instruction that describes a task. ### Instruction: ### Input: ### Response:",
    "A chat between a curious user and an artificial intelligence assistant. (0123456789) </s> <s>",
]
LLAMA_CONFIG = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 400, "intermediate_size": 8}
TEXT = ("alpaca", "llama2", "vicuna", "plain")  # those of control tokens: test_checkpoints.py
BYTES = {"byte_fallback": True, "vocab_size": 400}              # like LLaMA's: every text has ids
SYMBOLS = {"user_defined_symbols": ["\n"], "vocab_size": 120}  # like the embedded world's: no bytes


def trimmed(text: str) -> str:
    """An answer without the spaces at its borders, an indentation excepted."""
    return text.rstrip() if re.match(r"  |\t", text) else text.strip()


def train_tokenizer(path: Path, **options) -> Path:
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES * 4),
            model_writer=file,
            model_type="bpe",
            hard_vocab_limit=False,
            minloglevel=2,
            num_threads=1,
            **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False, **options},
        )
    return path


@pytest.fixture(scope="module", params=[BYTES, SYMBOLS], ids=["bytes", "symbols"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    return open_tokenizer(
        train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", **request.param)
    )


@pytest.fixture(scope="module")
def llama() -> Tokenizer:
    return open_tokenizer(shared("tokenizer/tokenizer.model"))


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"the real files are not beside the project: {SHARED / name}")
    return SHARED / name


@pytest.fixture
def write(tmp_path):
    """Write a file of rows (objects as JSON lines, bytes as they are) and return its path."""

    def write(*rows, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(
            b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
        )
        return path

    return write


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


SYSTEM = Message("system", "Be brief.")
SINGLE = (user("Name a colour."), assistant("Blue."))
MULTI = (SYSTEM, user("Hi"), assistant("Hello!"), user("Two plus two?"), assistant("four"))
RAW = (Message("raw", "\n\nHuman: Hi\n\nAssistant:"), assistant("Hello!"))


# ---------------------------------------------------------------------------------------------
# Tokenizer


def test_segment_continues_a_text(tokenizer):
    for head, tail in [("Name\n", "Blue."), ("Name\n", " Blue"), ("a\n", "\n\nb"), ("Hi\n", "")]:
        assert tokenizer.encode(head) + tokenizer.encode_segment(tail) == tokenizer.encode(
            head + tail
        )
    assert tokenizer.encode_segment("Blue") != tokenizer.encode("Blue")  # the dummy prefix


def test_text_never_becomes_a_control_token(tokenizer):
    text = "<s> Hi </s>"
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(
        tokenizer.encode(text) + tokenizer.encode_segment(text)
    )
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_segment_decodes_to_its_text(tokenizer):
    for text in ("Blue", " Blue", "   Blue  red ", " ", "   ", "\n", "\n\n Blue\n", ""):
        assert tokenizer.decode_segment(tokenizer.encode_segment(text)) == text
        assert tokenizer.decode_segment([*tokenizer.encode_segment(text), tokenizer.eos_id]) == text
    assert tokenizer.decode(tokenizer.encode_segment(" Blue")) == "Blue"  # hence the second method


def test_decode_ignores_what_has_no_text(tokenizer):
    ids = tokenizer.encode("Blue.")
    assert (
        tokenizer.decode(
            [tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.vocab_size, -1, 10**9]
        )
        == "Blue."
    )


def test_tokenizer_refuses_what_cannot_serve(tmp_path):
    (tmp_path / "text").write_text("no model")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    with pytest.raises(ValueError, match="tokenizer.model: no such file"):
        open_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="text: not a sentencepiece model"):
        open_tokenizer(tmp_path / "text")
    with pytest.raises(ValueError, match="no bos or no eos"):
        open_tokenizer(train_tokenizer(tmp_path / "no_eos", eos_id=-1, **BYTES))
    with pytest.raises(ValueError, match="no piece for a newline"):
        open_tokenizer(train_tokenizer(tmp_path / "no_newline", vocab_size=120))
    with pytest.raises(ValueError, match="no piece for a newline"):  # it reads "\n" as nothing
        spaces = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
        open_tokenizer(train_tokenizer(tmp_path / "spaces", **{**BYTES, **spaces}))
    with pytest.raises(ValueError, match="merges a newline") as error:
        open_tokenizer(
            train_tokenizer(
                tmp_path / "merges", vocab_size=120, user_defined_symbols=["\n", "\nBlue"]
            )
        ).encode_segment("Blue")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------
# Formats

CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Q"}]},
         {"role": "assistant", "content": [{"type": "text", "value": "A"}]}]
SHAREGPT = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
HH = "\n\nHuman: Q\n\nAssistant: A?\n\nHuman: Q2\n\nAssistant:"

DEMONSTRATIONS = {
    "alpaca": ({"instruction": "Q", "input": "", "output": "A"}, (user("Q"), assistant("A"))),
    "alpaca, input": ({"instruction": "Q", "input": "X", "output": "A"},
                      (user("Q\n\n### Input:\nX"), assistant("A"))),
    "alpaca, null input": ({"instruction": "Q", "input": None, "output": "A"}, (user("Q"), assistant("A"))),
    "alpaca, history": ({"instruction": "Q", "output": "A", "system": "S", "history": [["q", "a"]]},
                        (Message("system", "S"), user("q"), assistant("a"), user("Q"), assistant("A"))),
    "self-instruct": ({"instruction": "Q", "instances": [{"input": "X", "output": "A"}], "id": "1"},
                      (user("Q\n\n### Input:\nX"), assistant("A"))),
    "sharegpt": ({"id": 1, "conversations": SHAREGPT}, (user("Q"), assistant("A"))),
    "sharegpt, items": ({"items": SHAREGPT, "system": "S"},
                        (Message("system", "S"), user("Q"), assistant("A"))),
    "sharegpt, empty system": ({"conversation": SHAREGPT, "system": ""}, (user("Q"), assistant("A"))),
    "messages": ({"messages": CHAT}, (user("Q"), assistant("A"))),
    "messages, parts": ({"messages": PARTS}, (user("Q"), assistant("A"))),
    "messages beside a prompt": ({"prompt": "Q", "messages": CHAT}, (user("Q"), assistant("A"))),
    "kto, desirable": ({"messages": CHAT, "label": True}, (user("Q"), assistant("A"))),
    "prompt, response": ({"prompt": "Q", "response": "A"}, (user("Q"), assistant("A"))),
    "prompt, completion": ({"prompt": CHAT[:1], "completion": CHAT[1:]}, (user("Q"), assistant("A"))),
    "prompt in a template": ({"prompt": "### Instruction:\nQ\n\n### Response:\n", "response": "A"},
                             (Message("raw", "### Instruction:\nQ\n\n### Response:\n"), assistant("A"))),
    "gsm8k": ({"question": "Q", "answer": "A\n#### 1"}, (user("Q"), assistant("A\n#### 1"))),
}

ASK = (user("Q"),)
AB = ("A", "B")
OTHER = [{"role": "assistant", "content": "B"}]
COMPARISONS = {
    "hh": ({"chosen": HH + " A", "rejected": HH + " B"}, (Message("raw", HH),), AB, (1, 2)),
    "hh quoting a turn": ({"chosen": HH + " A\n\nHuman: x", "rejected": HH + " B"},
                          (Message("raw", HH),), ("A\n\nHuman: x", "B"), (1, 2)),
    "trl": ({"prompt": "Q", "chosen": "A", "rejected": "B"}, ASK, AB, (1, 2)),
    "trl, messages": ({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": OTHER},
                      ASK, AB, (1, 2)),
    "trl, implicit prompt": ({"chosen": CHAT, "rejected": [CHAT[0], *OTHER]}, ASK, AB, (1, 2)),
    "ultrafeedback binarized": ({"prompt": "Q", "chosen": CHAT, "rejected": [CHAT[0], *OTHER],
                                 "messages": CHAT, "score_chosen": 8.0}, ASK, AB, (1, 2)),
    "llama-factory": ({"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "B"}},
                      ASK, AB, (1, 2)),
    "alpaca pair": ({"instruction": "Q", "input": "", "chosen": "A", "rejected": "B"}, ASK, AB, (1, 2)),
    "messages pair": ({"chosen_messages": PARTS, "rejected_messages": [PARTS[0], *OTHER]},
                      ASK, AB, (1, 2)),
    "alpaca-eval 1": ({"instruction": "Q", "output_1": "A", "output_2": "B", "preference": 1}, ASK, AB, (1, 2)),
    "alpaca-eval 2": ({"instruction": "Q", "output_1": "A", "output_2": "B", "preference": 2.0},
                      ASK, AB, (2, 1)),
    "alpaca-eval 1.9": ({"instruction": "Q", "output_1": "A", "output_2": "B", "preference": 1.9},
                        ASK, AB, (2, 1)),
    "alpaca-eval 1.2": ({"instruction": "Q", "output_1": "A", "output_2": "B", "preference": 1.2},
                        ASK, AB, (1, 2)),
    "scores": ({"prompt": "Q", "responses": ["A", "B", "C"], "scores": [0.5, 2, 0.5]}, ASK,
               ("A", "B", "C"), (2, 1, 2)),
    "ranks": ({"messages": CHAT[:1], "responses": ["A", "B"], "ranks": [1, 0]}, ASK, AB, (1, 0)),
    "ranks and scores": ({"question": "Q", "responses": ["A", "B", "C"], "ranks": [2, 1, 1], "scores": [-1, 3, 2]},
                         ASK, ("A", "B", "C"), (2, 1, 1)),
    "an empty response": ({"prompt": "Q", "chosen": "", "rejected": "B"}, ASK, ("", "B"), (1, 2)),
    "ultrafeedback": ({"instruction": "Q", "completions": [
        {"response": "A", "overall_score": 10, "fine-grained_score": 1.25},
        {"response": "B", "overall_score": 7, "fine-grained_score": 4}]},
                      ASK, AB, (2, 1)),
}


@pytest.mark.parametrize("row, messages", DEMONSTRATIONS.values(), ids=DEMONSTRATIONS)
def test_demonstrations(write, row, messages):
    path = write(row)
    assert reading.read_dialogues([path])[0] == [Dialogue(messages, f"{path}:1")]
    assert reading.read_prompts([path])[0] == [
        Prompt(messages[:-1], f"{path}:1", messages[-1].content)
    ]
    with pytest.raises(ValueError, match="nothing is compared"):
        reading.read_rankings([path])


@pytest.mark.parametrize("row, messages, responses, ranks", COMPARISONS.values(), ids=COMPARISONS)
def test_comparisons(write, row, messages, responses, ranks):
    path = write(row)
    assert reading.read_rankings([path])[0] == [Ranking(messages, responses, ranks, f"{path}:1")]
    assert reading.read_prompts([path])[0] == [Prompt(messages, f"{path}:1", None)]
    with pytest.raises(ValueError, match="a comparison, not a demonstration"):
        reading.read_dialogues([path])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q"},
        {"instruction": "Q"},
        {"messages": CHAT[:1]},
        {"question": "Q"},
        {"prompt": CHAT[:1]},
    ],
)
def test_prompts_alone(write, row):
    assert reading.read_prompts(write(row))[0][0].messages == (user("Q"),)
    with pytest.raises(ValueError, match="no answer to learn from"):
        reading.read_dialogues(write(row))


def test_a_sample_is_no_reference_answer(write):
    for row in (
        {"prompt": "Q", "responses": ["A"], "ranks": [1]},
        {"instruction": "Q", "output": ["A", "B"]},
    ):
        assert reading.read_prompts(write(row))[0][0].answer is None


def test_records_survive_being_written_and_read(write):
    prompt = reading.read_prompts(write({"chosen": HH + " A", "rejected": HH + " B"}))[0][0]
    assert (
        reading.read_prompts(write({"messages": asdict(prompt)["messages"]}))[0][0].messages
        == prompt.messages
    )
    for ending in (
        "",
        "  ",
    ):  # trailing spaces would move the border into the response's first word
        assert (
            reading.read_prompts(write({"prompt": prompt.messages[0].content + ending}))[0][
                0
            ].messages
            == prompt.messages
        )


# ---------------------------------------------------------------------------------------------
# Files


def alpaca(n: int) -> dict:
    return {"instruction": f"Q{n}", "input": "", "output": f"A{n}"}


@pytest.mark.parametrize(
    "content, sources",
    [
        (json.dumps([alpaca(1), alpaca(2)], indent=1).encode(), ["row 1", "row 2"]),
        (json.dumps({"data": [alpaca(1), alpaca(2)]}, indent=1).encode(), ["row 1", "row 2"]),
        (
            b"\n"
            + json.dumps(alpaca(1)).encode()
            + b"\r\n \r\n\r\n"
            + json.dumps(alpaca(2)).encode(),
            ["2", "5"],
        ),
        (
            b"\xef\xbb\xbf"
            + json.dumps(alpaca(1)).encode()
            + b"\n"
            + json.dumps(alpaca(2)).encode()
            + b"\n",
            ["1", "2"],
        ),
        (
            gzip.compress(json.dumps(alpaca(1)).encode() + b"\n" + json.dumps(alpaca(2)).encode()),
            ["1", "2"],
        ),
    ],
    ids=["array", "data", "blank lines, CRLF", "BOM", "gzip"],
)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows"])
def test_container_is_known_by_its_content(write, content, sources, name):
    path = write(content, name=name)
    records, report = reading.read_dialogues([path])
    assert [record.source for record in records] == [f"{path}:{source}" for source in sources]
    assert [record.messages[0].content for record in records] == ["Q1", "Q2"]
    assert str(report) == "kept 2 of 2"


def test_unicode_line_separators_do_not_end_a_row(write):
    row = {"prompt": "a\u2028b\x85c\x0bd", "response": "\x00"}
    assert reading.read_dialogues(write(json.dumps(row, ensure_ascii=False).encode()))[0][
        0
    ].messages == (user(row["prompt"]), assistant("\x00"))


BAD_ROWS = {
    "cut off": (b'{"instruction": "Q', "broken JSON .column"),
    "not UTF-8": (b'{"instruction": "\xff"}', "not UTF-8 .byte 18 of the line"),
    "lone surrogate": (b'{"instruction": "\\ud83d", "output": "A"}', "lone surrogate"),
    "lone surrogate deep": (b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "\\ud83d"}]}]}',
                            "lone surrogate"),
    "duplicate key": (b'{"instruction": "Q", "output": "A", "output": "B"}', "duplicate key .'output'"),
    "NaN": (b'{"instruction": "Q", "output": "A", "score": NaN}', "NaN or Infinity"),
    "not an object": (b'["Q", "A"]', "not a JSON object .got a list"),
    "too many digits": (b'{"n": ' + b"9" * 5000 + b"}", "broken JSON"),
    "unknown fields": ({"text": "Q", "target": "A"}, "unknown fields .keys: text, target"),
    "ambiguous": ({"prompt": "Q", "instruction": "Q", "response": "A"},
                  "ambiguous fields .keep one of instruction, prompt"),
    "no output": ({"instruction": "Q", "input": ""}, "no answer to learn from"),
    "number": ({"instruction": "Q", "output": 42}, "field 'output' must be a string, got a number"),
    "null": ({"instruction": None, "output": "A"}, "field 'instruction' must be a string, got null"),
    "list": ({"instruction": "Q", "input": ["a"], "output": "A"}, "field 'input' must be a string, got a list"),
    "object": ({"instruction": "Q", "output": {"text": "A"}}, "field 'output' must be a string, got an object"),
    "several samples": ({"instruction": "Q", "output": ["A", "B"]}, "several answers"),
    "empty instruction": ({"instruction": " ", "input": "X", "output": "A"}, "field 'instruction' is empty"),
    "empty output": ({"instruction": "Q", "output": " \n"}, "empty answer"),
    "bad history": ({"instruction": "Q", "output": "A", "history": [["q"]]}, "field 'history'"),
    "bad instance": ({"instruction": "Q", "instances": ["A"]},
                     "field 'instances' must hold an object each, got a string"),
    "two users": ({"messages": [CHAT[0], *CHAT]}, "roles must be: .*got user, user"),
    "assistant first": ({"messages": [CHAT[1], *CHAT]}, "roles must be"),
    "system later": ({"messages": [CHAT[0], {"role": "system", "content": "S"}, CHAT[1]]}, "roles must be"),
    "no messages": ({"messages": []}, "roles must be: .*got none"),
    "messages is text": ({"messages": "Q"}, "field 'messages' must be a list, got a string"),
    "message is text": ({"messages": ["Q"]}, "field 'messages' must hold an object each"),
    "unknown role": ({"messages": [{"role": "tool", "content": "Q"}, CHAT[1]]}, "unknown role .'tool'"),
    "no role": ({"messages": [{"content": "Q"}, CHAT[1]]}, "no field 'role'"),
    "null content": ({"messages": [CHAT[0], {"role": "assistant", "content": None}]},
                     "field 'content' must be a string, got null"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image", "text": "x"}]}, CHAT[1]]},
              "parts of type text only"),
    "empty turn": ({"messages": [CHAT[0], {"role": "assistant", "content": ""}, *CHAT]},
                   "empty message in the prompt"),
}

BAD_COMPARISONS = {
    "no rejected": ({"prompt": "Q", "chosen": "A"}, "no field 'rejected'"),
    "no prompt": ({"chosen": "A", "rejected": "B"}, "no prompt: "),
    "list of strings": ({"prompt": "Q", "chosen": "A", "rejected": ["B"]},
                        "field 'rejected' must hold an object each"),
    "ends with the user": ({"chosen": CHAT, "rejected": CHAT[:1]},
                           "field 'rejected' must end with a message of the assistant"),
    "no ranks": ({"prompt": "Q", "responses": ["A", "B"]}, "'ranks' or 'scores' are needed"),
    "ranks not given yet": ({"prompt": "Q", "responses": ["A", "B"], "ranks": None},
                            "'ranks' or 'scores' are needed"),
    "no responses": ({"prompt": "Q", "responses": [], "ranks": []}, "'responses' and their"),
    "lengths": ({"prompt": "Q", "responses": ["A", "B", "C"], "scores": [1, 2]}, "not as many"),
    "strings": ({"prompt": "Q", "responses": ["A", "B"], "ranks": ["1", "2"]},
                "field 'ranks' must hold finite numbers"),
    "booleans": ({"prompt": "Q", "responses": ["A", "B"], "scores": [True, False]},
                 "field 'scores' must hold finite numbers"),
    "huge": (b'{"prompt": "Q", "responses": ["A", "B"], "scores": [1, 1' + b"0" * 400 + b"]}",
             "field 'scores' must hold finite numbers"),
    "infinite": (b'{"prompt": "Q", "responses": ["A", "B"], "scores": [1, 1e999]}', "NaN or Infinity"),
    "contradiction": ({"prompt": "Q", "responses": ["A", "B"], "scores": [2, 1], "ranks": [2, 1]},
                      "contradict"),
    "equal, ranked apart": ({"prompt": "Q", "responses": ["A", "A", "B"], "ranks": [1, 2, 3]},
                            "equal responses with different ranks"),
    "prompt missing": ({"responses": ["A", "B"], "ranks": [1, 2]}, "roles must be: .*got none"),
    "preference 3": ({"instruction": "Q", "output_1": "A", "output_2": "B", "preference": 3},
                     "field 'preference'"),
    "preference text": ({"instruction": "Q", "output_1": "A", "output_2": "B", "preference": "1"},
                        "field 'preference'"),
    "two formats": ({"prompt": "Q", "chosen": "A", "rejected": "B", "responses": ["A", "B"]},
                    "ambiguous fields"),
}


def assert_stops_at_the_row(reader, path, match):
    """The strict reader names the second row in one line; the lenient one skips and counts it."""
    with pytest.raises(ValueError, match=match) as error:
        reader([path])
    assert (
        str(error.value).startswith(f"{path}:2: ")
        and "skip_bad" in str(error.value)
        and "\n" not in str(error.value)
    )
    records, report = reader([path], skip_bad=True)
    assert [record.source for record in records] == [f"{path}:1", f"{path}:3"]
    assert report.skipped.total() == 1 and list(report.first.values()) == [f"{path}:2"]


@pytest.mark.parametrize("row, match", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_demonstrations(write, row, match):
    assert_stops_at_the_row(reading.read_dialogues, write(alpaca(1), row, alpaca(3)), match)


@pytest.mark.parametrize("row, match", BAD_COMPARISONS.values(), ids=BAD_COMPARISONS)
def test_bad_comparisons(write, row, match):
    pair = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    assert_stops_at_the_row(reading.read_rankings, write(pair, row, {**pair, "prompt": "R"}), match)


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": "Q", "chosen": "A", "rejected": " A\n"}, "responses are equal"),
        ({"prompt": "Q", "responses": ["A"], "scores": [1]}, "one response"),
        ({"prompt": "Q", "responses": ["A", "B"], "scores": [1, 1]}, "all tied"),
        (
            {"chosen": HH + " A", "rejected": "\n\nHuman: other\n\nAssistant: B"},
            "prompts of chosen and rejected differ",
        ),
        ({"instruction": "Q", "output_1": "A", "output_2": "B", "preference": 1.5}, "all tied"),
        ({"instruction": "Q", "output_1": "A", "output_2": "B", "preference": 0}, "all tied"),
        (
            {"instruction": "Q", "output_1": "A", "output_2": "B", "preference": None},
            "not annotated (preference: null)",
        ),
        (
            {
                "instruction": "Q",
                "completions": [
                    {"response": "A", "overall_score": None},
                    {"response": "B", "overall_score": 1},
                ],
            },
            "not annotated (a completion without score)",
        ),
    ],
)
def test_uninformative_comparisons_are_skipped_and_counted(write, row, reason):
    records, report = reading.read_rankings(
        write(row, row, {"prompt": "Q", "chosen": "A", "rejected": "B"})
    )
    assert len(records) == report.kept == 1 and report.skipped == {reason: 2}


def test_undesirable_demonstrations_are_not_learned_but_their_prompts_serve(write):
    path = write({"messages": CHAT, "label": False}, {"messages": CHAT, "label": True})
    assert len(reading.read_dialogues(path)[0]) == 1 and len(reading.read_prompts(path)[0]) == 2


@pytest.mark.parametrize("mark", [
    {"label": False}, {"label": 0}, {"label": 0.0}, {"label": "False"}, {"label": "0"},
    {"kto_tag": False},
])
@pytest.mark.parametrize("row", [
    {"prompt": "Q", "completion": "A"}, {"instruction": "Q", "output": "A"},
    {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
])
def test_no_spelling_of_undesirable_is_learned(write, row, mark):
    name, = mark
    records, report = reading.read_dialogues(write({**row, **mark}, {**row, name: True}))
    assert len(records) == 1 and report.skipped == {"marked as undesirable (label: false)": 1}


OTHER = [CHAT[0], {"role": "assistant", "content": "B"}]


@pytest.mark.parametrize("row, other", [
    ({"prompt": "Q", "response": "A"}, {"completion": "B"}),
    ({"prompt": "Q", "response": "A"}, {"answer": "B"}),
    ({"prompt": "Q", "completion": CHAT[1:]}, {"response": OTHER[1:]}),
    ({"prompt": "Q", "response": "A"}, {"question": "R"}),
    ({"messages": CHAT}, {"conversations": OTHER}),
    ({"items": CHAT}, {"conversation": OTHER}),
])
def test_two_fields_for_one_thing_must_agree(write, row, other):
    """Of fields that say different things none is picked in silence."""
    with pytest.raises(ValueError, match="1: fields '.*' and '.*' say different things .keep one."):
        reading.read_dialogues(write({**row, **other}))
    name, = other
    records, _ = reading.read_dialogues(write(row))
    for same in (None, next(row[n] for n in row if name in group_of(n))):
        assert [r.messages for r in reading.read_dialogues(write({**row, name: same}))[0]] == [
            r.messages for r in records]


def group_of(name: str) -> tuple[str, ...]:
    groups = (parsers.REPLIES, parsers.DIALOGUES, ("prompt", "question"))
    return next(group for group in groups if name in group)


def test_report_is_one_line_with_first_sources(write):
    pair = {"prompt": "Q", "chosen": "", "rejected": "B"}
    path = write(
        pair,
        b"{",
        pair,
        {"prompt": "Q", "chosen": "A", "rejected": "A"},
        b"nothing",
        {"prompt": "Is [INST] a mark?", "chosen": "A", "rejected": "B"},
        {"prompt": CHAT[:1], "chosen": "ASSISTANT: A", "rejected": "B"},
    )
    _, report = reading.read_rankings([path], skip_bad=True)
    assert str(report) == (
        f"kept 4 of 7; skipped 2 broken JSON (first {path}:2), 1 responses are equal (first {path}:4); "
        f"noted 2 with an empty response (first {path}:1), "
        f"1 already in a template, left as they are (first {path}:6), 1 exact duplicates (first {path}:3)"
    )
    _, report = reading.read_dialogues(
        write({"messages": [{"role": "user", "content": "[INST]"}, CHAT[1]]})
    )
    assert report.noted == {"with a template's marks in the text": 1}


def test_files_that_give_nothing(write, tmp_path):
    for content, match in [
        (b"", r"0 usable rows of 0 \(it is empty\)"),
        (b"\n \n", "0 usable rows of 0"),
        (b"{\nx", r"0 usable rows of 2 \(2 broken JSON"),
        (b"[]", "0 usable rows of 0"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16"),
        (b'[{"a": 1},\n{"a', ":2: broken JSON array .*line 2"),
        (b'[\n\n"\xff"]', ":3: broken JSON array"),
        (gzip.compress(b"{}")[:-9], "damaged gzip"),
    ]:
        path = write(content)
        with pytest.raises(ValueError, match=match) as error:
            reading.read_dialogues([path], skip_bad=True)
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="No such file"):
        reading.read_prompts([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="Is a directory"):
        reading.read_prompts([tmp_path])


def test_several_files_come_in_order_and_each_must_give_rows(write):
    a, b, c = (
        write(alpaca(1), name="a"),
        write(alpaca(2), alpaca(1), b"x", name="b"),
        write(b"x", name="c"),
    )
    records, report = reading.read_dialogues([b, a], skip_bad=True)
    assert [record.source for record in records] == [f"{b}:1", f"{b}:2", f"{a}:1"]
    assert (
        str(report)
        == f"kept 3 of 4; skipped 1 broken JSON (first {b}:3); noted 1 exact duplicates (first {a}:1)"
    )
    with pytest.raises(ValueError, match="c: 0 usable rows of 1 "):
        reading.read_dialogues([a, c], skip_bad=True)


def test_a_broken_row_of_an_array_is_only_that_row(write):
    path = write(
        b'[{"instruction": "Q", "output": "A"}, 3, {"instruction": "Q", "instruction": "R"}, '
        b'{"instruction": "Q", "output": "\\ud800"}]'
    )
    records, report = reading.read_dialogues([path], skip_bad=True)
    assert [record.source for record in records] == [f"{path}:row 1"]
    assert report.first == {
        "not a JSON object": f"{path}:row 2",
        "duplicate key": f"{path}:row 3",
        "lone surrogate escape in a string": f"{path}:row 4",
    }


def test_written_rows_come_back_as_they_were(tmp_path):
    """JSON lets U+2028, U+2029 and U+0085 stand as they are; only a newline ends a row."""
    texts = [
        "a\u2028b",
        "a\u2029b",
        "a\x85b",
        "a\x0b\x0c\x1c\x1d\x1eb",
        "a\r\nb\rc\n",
        " \u00a0",
        "\U0001f642",
        "",
    ]
    rows = [{"prompt": text, "n": n} for n, text in enumerate(texts)]
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, rows)
    assert path.read_bytes().count(b"\n") == len(rows) and b"\r" not in path.read_bytes()
    assert read_jsonl(path) == rows
    assert [record.text for record in reading.read_prompts([path], skip_bad=True)[0]] == texts[
        :5
    ] + texts[6:7]
    path.write_bytes(
        b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\n")
    )  # as an editor may leave it
    assert read_jsonl(path) == rows


@pytest.mark.parametrize(
    "line, problem",
    [
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"[1]", "holds list, expected an object"),
        (b"3", "holds int, expected"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, problem):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"rows.jsonl:3: {problem}") as error:
        read_jsonl(path)
    assert "\n" not in str(error.value)
    (tmp_path / "one.json").write_bytes(line)
    with pytest.raises(ValueError, match=f"one.json: {problem}"):
        read_json(tmp_path / "one.json")


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """A kill or a power cut at any moment leaves the old file or the new one, whole."""
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"old": True}])
    flush, rename, seen = os.fsync, os.replace, []

    def fsync(descriptor):
        flush(descriptor)
        kind = "named" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "flushed"
        seen.append((kind, path.stat().st_size if kind == "named" else os.fstat(descriptor).st_size, read_jsonl(path)))

    def replaced(old, new):
        seen.append(("renamed", os.path.getsize(old), read_jsonl(path)))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replaced)
    write_jsonl(path, [{"n": n} for n in range(3)])
    size = path.stat().st_size
    assert seen[:2] == [("flushed", size, [{"old": True}]), ("renamed", size, [{"old": True}])]
    # then the folder, so that the name is on the disk as well
    assert seen[2:] == [("named", size, [{"n": n} for n in range(3)])]
    assert read_jsonl(path) == [{"n": n} for n in range(3)] and os.listdir(tmp_path) == [
        "rows.jsonl"
    ]

    def rows():
        yield {"n": 0}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(path, rows())
    assert len(read_jsonl(path)) == 3


# ---------------------------------------------------------------------------------------------
# Records


def test_a_prompt_shows_its_whole_dialogue():
    assert Prompt((user("Hi"),), "p:1").text == "Hi"
    assert Prompt(RAW[:1], "p:1").text == RAW[0].content
    assert (
        Prompt(MULTI[:4], "p:1").text
        == "system: Be brief.\n\nuser: Hi\n\nassistant: Hello!\n\nuser: Two plus two?"
    )
    assert dialogue_text(SINGLE) == "user: Name a colour.\n\nassistant: Blue."


def test_a_prompt_is_one_record_from_file_to_tokens(write, tokenizer):
    path = write({"question": "Two plus two?", "answer": "four"}, {"messages": CHAT[:1]})
    read, _ = reading.read_prompts([path])
    assert [(p.answer, p.task, p.ids) for p in read] == [("four", "", ()), (None, "", ())]
    read = [read[0], replace(read[1], task="copy")]
    encoded, report = data.encode_prompts(read, tokenizer, "plain", 50)
    for before, after in zip(read, encoded, strict=True):
        ids = data.encode_prompt(tokenizer, before.messages, "plain")
        assert after == replace(before, ids=tuple(ids)) and after.text == before.text
    assert report.kept == 2 and report.tokens == sum(len(p.ids) for p in encoded)
    assert [p.ids for p in read] == [(), ()] and len(
        {*read, *encoded}
    ) == 4  # frozen, and it can be hashed


# ---------------------------------------------------------------------------------------------
# Templates

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory) -> Tokenizer:
    return open_tokenizer(
        train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", **BYTES)
    )


def spell(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return the text of ids piece by piece, control tokens by name: an oracle for every decoder.

    What follows a BOS loses the dummy prefix, and nothing else does.
    """
    spelt = b""
    for n, token in enumerate(ids):
        piece = tokenizer.processor.id_to_piece(token)
        if tokenizer.processor.is_byte(token):
            spelt += bytes([int(piece.removeprefix("<0x").removesuffix(">"), 16)])
            continue
        piece = piece.replace("\u2581", " ")
        opens = n > 0 and ids[n - 1] == tokenizer.bos_id
        spelt += (piece.removeprefix(" ") if opens else piece).encode()
    return spelt.decode(errors="replace")


def spell_training(tokenizer: Tokenizer, messages: tuple[Message, ...], template: str) -> str:
    """Spell a dialogue out, with stars where training begins and ends."""
    ids, trained = data.encode_dialogue(tokenizer, messages, template)
    runs = [
        [token for token, _ in run]
        for _, run in itertools.groupby(zip(ids, trained), key=lambda pair: pair[1])
    ]
    return "*".join(spell(tokenizer, run) for run in runs) + "*" * trained[-1]


@pytest.mark.parametrize(
    "template, messages, expected",
    [
        ("alpaca", SINGLE, "<s>" + ALPACA + "Name a colour.\n\n### Response:\n*Blue.</s>*"),
        (
            "alpaca",
            (user("Add.\n\n### Input:\n2 2"), assistant("4")),
            "<s>" + ALPACA_INPUT + "Add.\n\n### Input:\n2 2\n\n### Response:\n*4</s>*",
        ),
        (
            "alpaca",
            MULTI,
            "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\n*Hello!</s>*"
            "\n\n### Instruction:\nTwo plus two?\n\n### Response:\n*four</s>*",
        ),
        ("llama2", SINGLE, "<s>[INST] Name a colour. [/INST]* Blue. </s>*"),
        (
            "llama2",
            MULTI,
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]* Hello! </s>*"
            "<s>[INST] Two plus two? [/INST]* four </s>*",
        ),
        ("llama2", (user(" Hi\n"), assistant("\nHello ")), "<s>[INST] Hi [/INST]* Hello </s>*"),
        ("vicuna", SINGLE, "<s>" + VICUNA + "USER: Name a colour. ASSISTANT:* Blue.</s>*"),
        (
            "vicuna",
            MULTI,
            "<s>Be brief. USER: Hi ASSISTANT:* Hello!</s>*"
            "USER: Two plus two? ASSISTANT:* four</s>*",
        ),
        ("plain", SINGLE, "<s>Name a colour.\n*Blue.</s>*"),
        ("plain", MULTI, "<s>Be brief.\nHi\n*Hello!</s>*\nTwo plus two?\n*four</s>*"),
        ("vicuna", RAW, "<s>\n\nHuman: Hi\n\nAssistant:* Hello!</s>*"),
        (
            "llama2",
            (Message("raw", "### Response:\n"), assistant("A")),
            "<s>### Response:\n*A</s>*",
        ),
    ],
)
def test_template_text_and_what_is_trained(bytes_tokenizer, template, messages, expected):
    assert spell_training(bytes_tokenizer, messages, template) == expected


@pytest.mark.parametrize(
    "template, expected",
    [
        (
            "alpaca",
            "<s>Be brief.\n\n### Instruction:\n Hi \n\n\n### Response:\n*A</s>*"
            "\n\n### Instruction:\n Bye \n\n### Response:\n*B</s>*",
        ),
        (
            "llama2",
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Hi [/INST]* A </s>*"
            "<s>[INST] Bye [/INST]* B </s>*",
        ),
        ("vicuna", "<s>Be brief. USER:  Hi \n ASSISTANT:* A</s>*USER:  Bye  ASSISTANT:* B</s>*"),
        ("plain", "<s>Be brief.\n Hi \n\n*A</s>*\n Bye \n*B</s>*"),
    ],
)
def test_spaces_at_the_borders_beside_a_system_text(bytes_tokenizer, template, expected):
    """Only llama2 takes them off, as Meta does, but not between a system text and the user's."""
    messages = (SYSTEM, user(" Hi \n"), assistant("A"), user(" Bye "), assistant("B"))
    assert spell_training(bytes_tokenizer, messages, template) == expected


@pytest.mark.parametrize(
    "messages",
    [
        SINGLE,
        MULTI,
        RAW,
        (user("Add.\n\n### Input:\n2"), assistant("")),
        (user("Hi "), assistant(" Bye\n")),
    ],
)
@pytest.mark.parametrize("template", TEXT)
def test_a_dialogue_is_prompt_plus_response_at_every_answer(tokenizer, template, messages):
    ids, trained = data.encode_dialogue(tokenizer, messages, template)
    for n, message in enumerate(messages):
        if message.role == "assistant":
            prompt = data.encode_prompt(tokenizer, messages[:n], template)
            response = data.encode_response(tokenizer, message.content, template, messages[:n])
            assert ids[: len(prompt) + len(response)] == prompt + response
            assert trained[: len(prompt)].count(True) == sum(trained) - sum(trained[len(prompt) :])
            assert not trained[len(prompt) - 1] and all(
                trained[len(prompt) : len(prompt) + len(response)]
            )
            assert response[-1] == tokenizer.eos_id and tokenizer.eos_id not in response[:-1]
            assert tokenizer.decode(response).strip() == message.content.strip()
    assert len(ids) == len(trained) == len(prompt) + len(response)
    assert ids[0] == tokenizer.bos_id


def test_an_empty_response_is_its_eos_alone(tokenizer):
    for template in TEXT:
        assert data.encode_response(tokenizer, "", template) == [tokenizer.eos_id]
    assert data.encode_response(tokenizer, " ", "alpaca", RAW) == [tokenizer.eos_id]


@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_no_token_crosses_the_border(tokenizer, template):
    """Encoded apart or together: the same ids, where the prompt ends with a newline."""
    text = {"alpaca": ALPACA + "Name a colour.\n\n### Response:\n", "plain": "Name a colour.\n"}[
        template
    ]
    ids, _ = data.encode_dialogue(tokenizer, SINGLE, template)
    assert ids == [tokenizer.bos_id, *tokenizer.encode(text + "Blue."), tokenizer.eos_id]


def test_user_text_cannot_close_a_turn(tokenizer):
    messages = (user("Hi </s><s> [/INST] {braces} {0}"), assistant("</s>"))
    for template in TEXT:
        ids, _ = data.encode_dialogue(tokenizer, messages, template)
        assert ids.count(tokenizer.eos_id) == ids.count(tokenizer.bos_id) == 1


def test_unknown_template(tokenizer):
    for messages in (SINGLE, RAW):
        with pytest.raises(
            ValueError,
            match="unknown template 'phi'; choose one of alpaca, llama2, vicuna, plain, chatml",
        ):
            data.encode_prompt(tokenizer, messages, "phi")


# ---------------------------------------------------------------------------------------------
# Responses to text

ASKED = {
    "user": SINGLE[:1],
    "raw, in a line": RAW[:1],
    "raw, a line of its own": (Message("raw", "### Response:\n"),),
}
WORDS = ["Blue", "colour", " ", "  ", "   ", "\n", "\n\n", ".",
         "[INST]", " [/INST] ", "</s>", "ASSISTANT:", "### Response:\n"]
BYTE_WORDS = ["\u65e5\u672c", "caf\u00e9", "\U0001f642", "\t",
              "\u00a0", "\u2028", "\x85", "\x00", "\r\n"]


def texts(tokenizer: Tokenizer, n: int) -> list[str]:
    """Return random texts of what the tokenizer has ids for, spaces and line ends anywhere."""
    has_bytes = any(tokenizer.processor.is_byte(i) for i in range(tokenizer.vocab_size))
    words = WORDS + BYTE_WORDS * has_bytes
    draw = random.Random(0)
    return [
        "",
        " ",
        "\n",
        " Blue",
        "Blue ",
        *("".join(draw.choices(words, k=draw.randrange(1, 8))) for _ in range(n)),
    ]


def parts(template: str, prompt: tuple[Message, ...]) -> tuple[str, str]:
    """Return what stands between prompt and answer, and between answer and EOS."""
    if prompt[0].role == "raw":
        return "" if prompt[0].content.endswith("\n") else " ", ""
    return data.TEMPLATES[template].before, data.TEMPLATES[template].after


each_border = pytest.mark.parametrize(
    "template, asked", list(itertools.product(TEXT, ASKED))
)


@each_border
def test_decode_response_is_the_inverse_of_encode_response(tokenizer, template, asked):
    prompt = ASKED[asked]
    before, _ = parts(template, prompt)
    for text in texts(tokenizer, 200):
        ids = data.encode_response(tokenizer, text, template, prompt)
        # Where a space parts prompt and answer, an answer has none of its own at its borders.
        assert data.decode_response(tokenizer, ids, template, prompt) == (
            trimmed(text) if before else text
        )


@each_border
def test_an_answer_cut_off_keeps_its_end(tokenizer, template, asked):
    prompt = ASKED[asked]
    before, after = parts(template, prompt)
    for text in texts(tokenizer, 30):
        ids = data.encode_response(tokenizer, text, template, prompt)
        for n in range(len(ids)):
            decoded = data.decode_response(tokenizer, ids[:n], template, prompt)
            expected = spell(tokenizer, ids[:n]).removeprefix(before)
            assert decoded.rstrip("\ufffd") == expected.rstrip("\ufffd"), (
                "bytes of half a character may stand at the end"
            )
        whole = data.decode_response(tokenizer, ids, template, prompt)
        assert decoded == whole + after * bool(whole), "all but the EOS: `after` is not taken off"


def test_decode_response_of_what_only_a_policy_writes(tokenizer):
    def decode(text: str, template: str, *end: int) -> str:
        return data.decode_response(tokenizer, [*tokenizer.encode_segment(text), *end], template)

    eos_id = tokenizer.eos_id
    for template in TEXT:
        assert data.decode_response(tokenizer, [], template) == decode("", template, eos_id) == ""
    assert decode("Blue", "llama2", eos_id) == "Blue"  # neither the space before nor the one after
    assert decode("  Blue  ", "llama2", eos_id) == " Blue "  # one of each is the template's
    assert decode("  Blue  ", "llama2") == " Blue  "
    assert decode(" ", "llama2", eos_id) == decode(" ", "vicuna") == ""
    assert decode("  Blue  ", "plain", eos_id) == "  Blue  "
    assert decode("Blue", "plain", tokenizer.vocab_size, 10**9, eos_id) == "Blue"


def test_plain_decoding_is_no_inverse(tokenizer):
    """`decode` drops a response's leading space and keeps llama2's trailing one."""
    for text, template, plainly_decoded in [
        (" Blue", "plain", "Blue"),
        ("Blue", "llama2", "Blue "),
    ]:
        ids = data.encode_response(tokenizer, text, template)
        assert data.decode_response(tokenizer, ids, template) == text
        assert tokenizer.decode(ids) == plainly_decoded != text


# ---------------------------------------------------------------------------------------------
# Lengths

LONG = " ".join(f"{n}" for n in range(10, 40)) + " red?"


ANSWERS = ("Blue.", "Is it red?")


def each_long_prompt(test):
    """Run a test with every template, on a prompt alone and beside a system text and spaces."""
    prompts = {"alone": (user(LONG),), "system": (SYSTEM, user(f" {LONG} "))}
    test = pytest.mark.parametrize("prompt", prompts.values(), ids=prompts)(test)
    return pytest.mark.parametrize("template", TEXT)(test)


@each_long_prompt
def test_a_prompt_of_exactly_the_limit_stays(tokenizer, template, prompt):
    ids = data.encode_prompt(tokenizer, prompt, template)
    long, short = Prompt(prompt, "p:1"), Prompt((*prompt[:-1], user("Hi")), "p:2")
    kept, report = data.encode_prompts([long, short], tokenizer, template, len(ids))
    assert kept[0] == replace(long, ids=tuple(ids)) and len(kept) == 2
    assert report.longest == len(ids) and not report.skipped

    limit = len(ids) - 1
    with pytest.raises(ValueError, match=f"p:1: a prompt of {len(ids)} tokens, .*={limit}"):
        data.encode_prompts([long, short], tokenizer, template, limit)
    kept, report = data.encode_prompts([long, short], tokenizer, template, limit, skip_bad=True)
    assert [record.source for record in kept] == ["p:2"]
    assert report.first == {f"longer than {limit} tokens": "p:1"}


@each_long_prompt
def test_a_demonstration_of_exactly_the_limit_stays(tokenizer, template, prompt):
    answer = ANSWERS[1]
    record = Dialogue((*prompt, assistant(answer)), "d:1")
    response = data.encode_response(tokenizer, answer, template)
    whole = data.encode_prompt(tokenizer, prompt, template) + response
    (example,), report = data.encode_sft([record], tokenizer, template, len(whole))
    assert example.tokens == whole and not report.noted

    limit = len(whole) - 1
    (example,), report = data.encode_sft([record], tokenizer, template, limit)
    assert report.noted == {f"prompt cut to fit {limit} tokens": 1}
    assert len(example.tokens) <= limit and example.tokens[-len(response):] == response
    assert sum(example.response_mask) == len(response)


@each_long_prompt
def test_a_ranking_of_exactly_the_limit_stays(tokenizer, template, prompt):
    record = Ranking(prompt, ANSWERS, (1, 2), "r:1")
    ids = data.encode_prompt(tokenizer, prompt, template)
    responses = [data.encode_response(tokenizer, answer, template) for answer in ANSWERS]
    whole = len(ids) + max(map(len, responses))
    (example,), report = data.encode_rankings([record], tokenizer, template, whole)
    assert (example.prompt, example.responses) == (ids, responses) and not report.noted

    (example,), report = data.encode_rankings([record], tokenizer, template, whole - 1)
    assert report.noted == {f"prompt cut to fit {whole - 1} tokens": 1}
    assert example.responses == responses and len(example.prompt) < len(ids)


@pytest.mark.parametrize("template", TEXT)
@pytest.mark.parametrize(
    "messages",
    [
        (user(LONG),),
        (user(LONG), assistant("Blue.")),
        (SYSTEM, user(LONG), assistant("Blue.")),
        (user("Name it.\n\n### Input:\n" + LONG),),
        (Message("raw", f"USER: {LONG} ASSISTANT:"), assistant("Blue.")),
        (SYSTEM, user("Hi"), assistant("Hello!"), user(LONG)),
    ],
    ids=["prompt", "dialogue", "system", "input", "raw", "turns"],
)
def test_long_prompts_lose_their_beginning_never_their_end(tokenizer, template, messages):
    def length_of(messages) -> int:
        return len(data.encode_dialogue(tokenizer, messages, template)[0])

    question = next(n for n, message in enumerate(messages) if LONG in message.content)
    system = messages[:1] if SYSTEM in messages else ()  # older turns go before the question does
    answer = messages[question + 1 :]
    instruction, joint, text = messages[question].content.rpartition("\n\n### Input:\n")

    def with_end(n: int) -> tuple[Message, ...]:
        content = instruction + joint + text[len(text) - n :]
        return (*system, replace(messages[question], content=content), *answer)

    limits = range(length_of(messages) - 1, 0, -1)
    fitted = [data.fit(tokenizer, messages, template, limit) for limit in limits]
    n_fitted = sum(kept is not None for kept in fitted)
    assert n_fitted > 20 and set(fitted[n_fitted:]) <= {None}, (
        "below what does not fit, nothing does"
    )
    for limit, kept in zip(limits, fitted[:n_fitted]):
        n = len(kept[len(system)].content) - len(instruction + joint)
        assert n > 0 and kept == with_end(n) and length_of(kept) <= limit
        assert n == len(text) or length_of(with_end(n + 1)) > limit, (
            "no more is lost than has to be"
        )


def test_a_question_of_spaces_is_none(tokenizer):
    messages = (user("Blue?" + " " * 30), assistant("A"))
    fitted = [data.fit(tokenizer, messages, "plain", limit) for limit in range(1, 40)]
    assert None in fitted and all(kept is None or "?" in kept[0].content for kept in fitted)


def length(tokenizer: Tokenizer, *messages: Message) -> int:
    return len(data.encode_dialogue(tokenizer, messages, "plain")[0])


def sft(tokenizer: Tokenizer, messages, max_tokens: int):
    records = [Dialogue(SINGLE, "short:1"), Dialogue(messages, "long:1")]
    examples, report = data.encode_sft(records, tokenizer, "plain", max_tokens)
    assert all(
        len(example.tokens) == len(example.response_mask) <= max_tokens for example in examples
    )
    return list(examples)[1:], report


def test_long_dialogues_lose_old_turns_then_the_start_of_the_prompt(tokenizer):
    room = length(tokenizer, SYSTEM, *MULTI[3:])
    for max_tokens in (room, length(tokenizer, *MULTI) - 1):
        (example,), report = sft(tokenizer, MULTI, max_tokens)
        assert example == data.encode_dialogue(tokenizer, (SYSTEM, *MULTI[3:]), "plain")
        assert report.noted.total() == 1 and report.kept == 2 and report.longest == room
    three = (*MULTI, user("Bye"), assistant("Bye"))
    (example,), _ = sft(tokenizer, three, length(tokenizer, *three) - 1)
    assert example == data.encode_dialogue(
        tokenizer, (SYSTEM, *three[3:]), "plain"
    )  # no more turns than needed
    (example,), _ = sft(tokenizer, MULTI, room - 2)
    text = tokenizer.decode(example.tokens)
    assert text.startswith("Be brief.\n") and text.endswith("?\nfour") and "Two" not in text
    assert len(example.tokens) >= room - 4 and sum(example.response_mask) == len(
        data.encode_response(tokenizer, "four", "plain")
    )


def test_a_dialogue_without_room_for_a_prompt_is_skipped(tokenizer):
    long_answer = (user("Hi"), assistant("Blue. " * 30))
    examples, report = sft(tokenizer, long_answer, length(tokenizer, user("H"), long_answer[1]) - 1)
    assert (
        not examples
        and report.skipped.total() == 1
        and report.first == {report.skipped.most_common()[0][0]: "long:1"}
    )
    with pytest.raises(ValueError, match="0 usable rows of 1 .*long:1.*allow more tokens"):
        data.encode_sft([Dialogue(long_answer, "long:1")], tokenizer, "plain", 8)


def test_an_instruction_outlives_its_input(tokenizer):
    messages = (user("Name it.\n\n### Input:\n" + "red " * 40 + "blue"), assistant("Blue."))
    kept = data.fit(
        tokenizer,
        messages,
        "alpaca",
        len(data.encode_dialogue(tokenizer, messages, "alpaca")[0]) - 20,
    )
    assert kept[0].content.startswith("Name it.\n\n### Input:\n") and kept[0].content.endswith(
        "red blue"
    )
    assert kept[0].content.count("red") < 40


def rank(tokenizer: Tokenizer, prompt: str, responses: tuple[str, ...], max_tokens: int):
    record = Ranking((user(prompt),), responses, tuple(range(len(responses))), "long:1")
    short = Ranking((user("Q"),), ("A", "B"), (1, 2), "short:1")
    examples, report = data.encode_rankings([short, record], tokenizer, "plain", max_tokens)
    assert all(len(e.prompt) + len(r) <= max_tokens for e in examples for r in e.responses)
    return list(examples)[1:], report


def test_rankings_share_one_cut_of_the_prompt(tokenizer):
    prompt, responses = "red " * 20 + "blue", ("A green colour.", "B")
    whole = [data.encode_response(tokenizer, text, "plain") for text in responses]
    (example,), report = rank(tokenizer, prompt, responses, 100)
    assert (example.prompt, example.responses, example.ranks) == (
        data.encode_prompt(tokenizer, (user(prompt),), "plain"),
        whole,
        [0, 1],
    )
    (example,), report = rank(tokenizer, prompt, responses, len(whole[0]) + 12)
    assert example.responses == whole and 10 <= len(example.prompt) <= 12
    assert tokenizer.decode(example.prompt).endswith("red blue\n")
    assert report.noted == {f"prompt cut to fit {len(whole[0]) + 12} tokens": 1}


def test_responses_too_long_are_cut_alike_and_get_no_eos(tokenizer):
    responses = ("red " * 40, "blue " * 40, "B")
    (example,), report = rank(tokenizer, "Name a colour.", responses, 30)
    assert (
        len(example.responses[0]) == len(example.responses[1]) == 30 - len(example.prompt)
        and len(example.prompt) <= 15
    )
    for text, cut in zip(responses, example.responses):
        whole = data.encode_response(tokenizer, text, "plain")
        assert cut == whole[: len(cut)]
    assert [r[-1] == tokenizer.eos_id for r in example.responses] == [False, False, True]
    assert report.noted == {"responses cut to fit 30 tokens": 1}
    (example,), _ = rank(tokenizer, "red " * 40 + "blue", responses, 30)
    assert 13 <= len(example.prompt) <= 15 and len(example.responses[0]) == 30 - len(example.prompt)


def test_rankings_equal_after_the_cut_are_skipped(tokenizer):
    examples, report = rank(tokenizer, "Name a colour.", ("red " * 40 + "A", "red " * 40 + "B"), 30)
    assert not examples and report.skipped == {"responses are equal within 30 tokens": 1}


def test_long_prompts_are_left_out_with_their_records(tokenizer):
    records = [
        Prompt((user(text),), f"p:{n}") for n, text in enumerate(["Hi", "red " * 50, "Bye"], 1)
    ]
    kept, report = data.encode_prompts(records, tokenizer, "plain", 20, skip_bad=True)
    assert [replace(record, ids=()) for record in kept] == [records[0], records[2]]
    assert [list(record.ids) for record in kept] == [
        data.encode_prompt(tokenizer, record.messages, "plain") for record in kept
    ]
    assert str(report).startswith(
        "kept 2 of 3; skipped 1 longer than 20 tokens (first p:2); tokens: mean "
    )
    with pytest.raises(ValueError, match="0 usable rows of 1"):
        data.encode_prompts(records[1:2], tokenizer, "plain", 20, skip_bad=True)
    with pytest.raises(ValueError, match=r"^p:2: a prompt of \d+ tokens, longer than .*=20"):
        data.encode_prompts(records, tokenizer, "plain", 20)


# ---------------------------------------------------------------------------------------------
# Batches


def test_pad():
    tokens, mask = data.pad([[5, 6, 7], [8], []])
    assert tokens.dtype == torch.int64 and mask.dtype == torch.bool
    assert tokens.tolist() == [[5, 6, 7], [8, 0, 0], [0, 0, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False], [False, False, False]]
    assert data.pad_masks([[False, True], [True]]).tolist() == [[False, True], [True, False]]
    assert data.pad_masks([[True]]).dtype == torch.bool
    assert data.pad([[0, 0]])[1].all()  # id 0 is a token like any other
    assert data.pad([])[0].shape == (0, 0)


def test_epoch_order_is_a_fixed_permutation():
    assert list(data.epoch_order(10, 0, 0)) == [
        3,
        1,
        8,
        5,
        9,
        7,
        6,
        0,
        4,
        2,
    ]  # golden: a change re-orders everybody's runs
    orders = {tuple(data.epoch_order(50, seed, epoch)) for seed in (1, 12) for epoch in (2, 3, 23)}
    assert len(orders) == 6 and all(sorted(order) == list(range(50)) for order in orders)


@pytest.mark.parametrize("n, batch_size", [(10, 5), (10, 4), (7, 3), (3, 8), (1, 1)])
def test_every_example_comes_once_per_epoch(n, batch_size):
    steps = [data.batch_indices(n, batch_size, step, seed=3) for step in range(12)]
    assert all(len(step) == batch_size for step in steps)
    stream = [i for step in steps for i in step]
    for epoch in range(len(stream) // n):
        assert stream[epoch * n : (epoch + 1) * n] == list(data.epoch_order(n, 3, epoch))
    data.epoch_order.cache_clear()
    assert data.batch_indices(n, batch_size, 7, seed=3) == steps[7]  # whatever came before


# ---------------------------------------------------------------------------------------------
# Real files


def test_real_golden_encodings(llama):
    golden = json.loads(shared("tokenizer/golden_encodings.json").read_text(encoding="utf-8"))
    assert (llama.vocab_size, llama.bos_id, llama.eos_id) == (
        golden["vocab_size"],
        golden["bos"],
        golden["eos"],
    )
    for case in golden["cases"]:
        assert llama.encode(case["text"]) == case["ids"]
        assert llama.decode(case["ids"]) == case["decoded"]
    assert llama.encode_segment("Hello") == [10994] and llama.encode_segment(" Hello") == [15043]


def test_real_llama2_worked_example(llama):
    """Meta's own ids for two turns with a system text."""
    ids = data.encode_prompt(
        llama, (SYSTEM, user("Hi"), assistant("Hello!"), user("Bye")), "llama2"
    )
    assert ids == [
        int(i)
        for i in (
            "1 518 25580 29962 3532 14816 29903 6778 13 3629 11473 29889 13 29966 829 14816 29903 "
            "6778 13 13 18567 518 29914 25580 29962 "
            "15043 29991 29871 2 1 518 25580 29962 2648 29872 518 29914 25580 29962"
        ).split()
    ]
    assert data.encode_response(llama, "Hello!", "llama2") == [15043, 29991, 29871, 2]


def test_real_alpaca_rows_have_a_clean_border(llama):
    records, _ = reading.read_dialogues(
        [shared("sft/alpaca_en_demo.json"), shared("sft/alpaca_zh_demo.json")]
    )
    for record in records:
        question, answer = (message.content for message in record.messages)
        text = (
            (ALPACA_INPUT if "\n\n### Input:\n" in question else ALPACA)
            + question
            + "\n\n### Response:\n"
        )
        ids, trained = data.encode_dialogue(llama, record.messages, "alpaca")
        assert ids == [1, *llama.encode(text + answer), 2]
        assert ids[: trained.index(True)] == [1, *llama.encode(text)]
    assert (
        len(records) == 1000
        and sum("\n\n### Input:\n" in record.messages[0].content for record in records) == 355
    )


@pytest.mark.parametrize("template", TEXT)
def test_real_answers_survive_their_tokens(llama, template):
    records, _ = reading.read_dialogues(
        [shared("sft/alpaca_en_demo.json"), shared("sft/alpaca_zh_demo.json")]
    )
    for record in records:
        answer = record.messages[-1].content
        ids = data.encode_response(llama, answer, template)
        assert data.decode_response(llama, ids, template) == (
            trimmed(answer) if template in ("llama2", "vicuna") else answer
        )


@pytest.mark.parametrize(
    "name, kept, skipped",
    [
        (
            "preference/hh_harmless_base_test.jsonl.gz",
            1723,
            {"prompts of chosen and rejected differ": 1},
        ),
        ("preference/alpaca_eval_gpt4_alpaca-7b.json", 394, {"all tied": 6}),
        ("preference/alpaca_eval_gpt4_vicuna-13b.json", 399, {"all tied": 1}),
        ("preference/alpaca_eval_gpt4_llama-2-13b-chat-hf.json", 400, {}),
        ("preference/dpo_en_demo.json", 210, {}),
        ("preference/v1_dpo_demo.jsonl", 10, {}),
        ("ranked/gsm8k_ranked.jsonl", 157, {"all tied": 143}),
        ("ranked/alpaca_eval_ranked.jsonl", 298, {"all tied": 2}),
    ],
)
def test_real_comparisons(name, kept, skipped):
    records, report = reading.read_rankings([shared(name)])
    assert len(records) == report.kept == kept and report.skipped == skipped
    if "hh" in name:
        assert (
            report.noted["with an empty response"] == 4
            and report.noted["already in a template, left as they are"] == 1723
        )


@pytest.mark.parametrize(
    "name, kept",
    [
        ("sft/dolly_hhrlhf_train_small.jsonl", 750),
        ("sft/dummy_conversation.json", 350),
        ("sft/v1_sft_demo.jsonl", 350),
        ("sft/kto_en_demo.json", 107),
        ("sft/seed_tasks.jsonl", 140),
        ("sft/user_oriented_instructions.jsonl", 180),
        ("eval/gsm8k/train.jsonl", 400),
        ("preference/truthfulqa_finetune_truth.jsonl", 4194),
    ],
)
def test_real_demonstrations(llama, name, kept):
    records, report = reading.read_dialogues([shared(name)])
    assert len(records) == report.kept == kept
    examples, report = data.encode_sft(records, llama, "vicuna", 512)
    assert report.longest <= 512 and report.kept == len(examples) > 0.7 * kept


MANIFEST_READERS = {"alpaca": reading.read_dialogues, "top_level": reading.read_dialogues,
                    "messages": reading.read_dialogues,
                    "preference": reading.read_rankings, "ranked": reading.read_rankings}
# What the manifest leaves to judgement: an empty choice, strings after a message list, text parts
# and ranks from 0 are kept; booleans, contradictions and answers that differ in whitespace are not.
JUDGED_GOOD = {"preference.jsonl": [4, 9], "messages.jsonl": [2], "ranked.jsonl": [7]}


def test_real_malformed_lines():
    tested = 0
    for entry in json.loads(shared("malformed/manifest.json").read_text()):
        if "good_lines" not in entry:
            continue
        path = SHARED / "malformed" / entry["file"]
        reader = next(
            reader
            for prefix, reader in MANIFEST_READERS.items()
            if entry["file"].startswith(prefix)
        )
        good = sorted(entry["good_lines"] + JUDGED_GOOD.get(entry["file"], []))
        records, report = reader([path], skip_bad=True)
        assert [record.source for record in records] == [f"{path}:{n}" for n in good]
        bad = [int(n) for n in entry["bad"]]
        assert report.skipped.total() == len(bad) + len(entry.get("judgement", {})) + len(
            entry.get("optional", {})
        ) - len(JUDGED_GOOD.get(entry["file"], []))
        if bad:
            with pytest.raises(ValueError) as error:
                reader([path])
            assert int(str(error.value).removeprefix(f"{path}:").split(":")[0]) in bad
        tested += 1
    assert tested == 13


def test_real_malformed_files():
    folder = shared("malformed")
    for name, message in {
        "alpaca_array_truncated.json": "broken JSON array",
        "empty.jsonl": "0 usable rows",
        "only_newlines.jsonl": "0 usable rows",
        "utf16.jsonl": "UTF-16",
        "duplicate_keys.jsonl": "duplicate key",
    }.items():
        with pytest.raises(ValueError, match=message):
            reading.read_dialogues([folder / name], skip_bad=True)
    assert (
        len(
            reading.read_dialogues(
                [folder / "array_named_jsonl.jsonl", folder / "jsonl_named_json.json"]
            )[0]
        )
        == 12
    )
    records, _ = reading.read_dialogues([folder / "sharegpt_roles.json"], skip_bad=True)
    rows = json.loads((folder / "sharegpt_roles.json").read_text())
    assert [rows[int(record.source.split()[-1]) - 1]["id"] for record in records] == [
        "ok",
        "ends_with_human",
        "user_assistant_tags",
        "system_first",
    ]
    records, report = reading.read_rankings([folder / "hh_real_empty_chosen.jsonl"])
    assert len(records) == report.noted["with an empty response"] == 4 and all(
        record.responses[0] == "" for record in records
    )
    with pytest.raises(
        ValueError, match="0 usable rows of 5 .5 prompts of chosen and rejected differ"
    ):
        reading.read_rankings([folder / "hh_real_prompt_mismatch.jsonl"])
    records, report = reading.read_rankings([folder / "hh_real_nonalternating.jsonl"])
    assert (
        len(records) + report.skipped["prompts of chosen and rejected differ"] == 8
        and len(records) == 4
    )


def test_real_long_rows(llama):
    records, _ = reading.read_dialogues([shared("malformed/long.jsonl")])
    examples, report = data.encode_sft(records, llama, "alpaca", 2048)
    assert all(
        len(example.tokens) <= 2048
        and example.tokens[-1] == llama.eos_id
        and any(example.response_mask)
        for example in examples
    )
    assert (
        report.kept == report.noted["prompt cut to fit 2048 tokens"] == 1
        and report.skipped.total() == 3
    )
    assert len(data.encode_sft(records, llama, "alpaca", 16384)[0]) == 4


# ---------------------------------------------------------------------------------------------
# Micro-batches

@pytest.mark.parametrize("lengths, size, tokens, ranks, parts", [
    ([3, 9, 4, 8], 4, 0, 1, [[0, 1, 2, 3]]),                      # no limit: the order they have
    ([3, 9, 4, 8], 1, 0, 2, [[0], [1], [2], [3]]),
    ([3, 9, 4, 8], 4, 12, 1, [[1, 0], [3, 2]]),                   # long ones with short ones
    ([3, 9, 4, 8], 4, 24, 1, [[1, 3, 2, 0]]),                     # just enough
    ([3, 9, 4, 8], 4, 23, 1, [[1, 0], [3, 2]]),                   # one too many
    ([3, 9, 4, 8], 1, 24, 1, [[1], [3], [2], [0]]),               # rows count as well
    ([1, 1, 99, 1], 4, 10, 1, [[2], [0, 1, 3]]),                  # one huge row stands alone
    ([1, 1, 99, 1], 4, 10, 2, [[2], [0, 1, 3]]),                  # ... one rank's, while the other
    ([1, 1, 99, 98], 4, 10, 2, [[2], [3], [0], [1]]),
    ([5, 5, 5, 5, 5, 5], 6, 10, 1, [[0, 3], [1, 4], [2, 5]]),     # all equal
    ([5, 5, 5, 5, 5, 5], 6, 10, 2, [[0, 4], [1, 5], [2], [3]]),   # three are no multiple of two
    ([7], 4, 10, 2, [[0], []]),                                   # fewer rows than ranks
    ([], 4, 10, 2, []),
])
def test_microbatches_by_hand(lengths, size, tokens, ranks, parts):
    assert [part.tolist() for part in data.cut(lengths, size, tokens, ranks)] == parts


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_microbatches_keep_their_limits_and_the_ranks_in_step(ranks):
    """Any lengths: every row once, no limit broken, none empty; ranks of ragged rows wait little."""
    waste = []
    for seed in range(60):
        g = random.Random(seed)
        lengths = [min(1024, int(200 * g.lognormvariate(0, 0.8)) + 1) for _ in range(8 * 16)]
        size, tokens, least = g.choice((2, 5, 128)), g.choice((1, 300, 1024, 4096)), g.choice((0, 9))
        parts = [part.tolist() for part in data.cut(lengths, size, tokens, ranks, least)]
        assert sorted(sum(parts, [])) == list(range(128)) and all(parts)
        assert len(parts) % ranks == 0 and len(parts) >= ranks * least
        held = [sum(lengths[row] for row in part) for part in parts]
        assert all(len(part) == 1 or len(part) <= size and total <= tokens
                   for part, total in zip(parts, held))
        if size == 128 and tokens == 4096:
            slowest = sum(max(held[i:i + ranks]) for i in range(0, len(parts), ranks))
            waste.append(slowest * ranks / sum(held))
    assert waste and sum(waste) / len(waste) < 1.05


# ---------------------------------------------------------------------------------------------
# Memory

def test_dialogues_take_few_bytes_a_token():
    """Lists of Python's numbers took 16 and more: 25 GB for a gigabyte of JSON lines."""
    examples = data.TokenizedDialogues()
    tracemalloc.start()
    try:
        for i in range(2000):
            ids = [(i * 37 + t) % 32000 for t in range(200)]
            examples.append(ids, [t >= 50 for t in range(200)])
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(examples) == 2000 and taken < 3 * 2000 * 200
    assert examples[7] == examples[-1993] == ([(7 * 37 + t) % 32000 for t in range(200)],
                                              [t >= 50 for t in range(200)])
    with pytest.raises(IndexError):
        examples[2000]


@pytest.mark.parametrize("numbers", [array, Pages])
@pytest.mark.parametrize("rows_before", [0, 2])
def test_dialogues_hold_ids_of_any_vocabulary(numbers, rows_before):
    """Those of the rows before stay when a larger id makes the array wider."""
    examples = data.TokenizedDialogues(numbers("H"), numbers("q", [0]))
    given = [([0, 1, 32767], [False, True, True]), ([], []), ([151_935, 32768, 0], [True] * 3),
             ([5], [False])]
    given = given[2 - rows_before:]
    for tokens, mask in given:
        examples.append(tokens, mask)
    if numbers is Pages:
        examples = data.TokenizedDialogues(mapped(examples.words.place()), mapped(examples.ends.place()))
    assert list(examples) == given and examples.words.itemsize == 4
    with pytest.raises(ValueError):
        data.TokenizedDialogues().append([1, 2], [True])


def test_json_lines_are_read_one_by_one(tmp_path):
    """Of a long file no more than a little is in memory, and a row comes before the next is read."""
    path = tmp_path / "long.jsonl"
    row = json.dumps({"prompt": "Q " * 2000, "response": "A " * 500}) + "\n"
    path.write_text(row * 2000 + "{broken\n")
    report = Report()
    stream = reading.stream_dialogues([path], False, report)
    tracemalloc.start()
    try:
        assert sum(1 for _ in itertools.islice(stream, 2000)) == 2000
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 10
    finally:
        tracemalloc.stop()
    with pytest.raises(ValueError, match="long.jsonl:2001: broken JSON"):
        next(stream)


@pytest.mark.parametrize("text, rows", [
    ('\ufeff{"a": 1}\n\n{"a": 2}', 2), ('{"a": 1}', 1), ('{"data": [{"a": 1}]}\n', 1),
    ('{"a": 1}\n{"data": []}', 2), ('{\n"examples": [{"a": 1},\n{"a": 2}]}', 2), ("", 0), ("\n", 0),
    ('{"a": 1} \r\n {"a": 2}\r\n', 2), ('{broken\n{"a": 2}', 2),
])
def test_what_is_lines_and_what_is_one_value(text, rows, tmp_path):
    path = tmp_path / "file"
    path.write_text(text, encoding="utf-8", newline="")
    assert len(list(read_rows(path))) == rows
