"""Text of any origin in a terminal, in Markdown and in HTML: it is shown, and does nothing."""
import ast
import json
import re
import unicodedata
from pathlib import Path

import pytest

from evaluation import chat, report, speaking
from evaluation.head_to_head import Pair, write_page
from formats import Message, Prompt
from formats.showing import fenced, harmless

ROOT = Path(__file__).parents[1]
# red, a window's title, the cursor up over the line before; the same with C1; turned around
HOSTILE = "\x1b[31mred \x1b]0;title\x07 \x1b[A\r\x9b31m \x7f\b \u202eabc\u2066"


def obeyed(text: str) -> list[str]:
    """Return the characters that a terminal would not show."""
    return [c for c in text if unicodedata.category(c) == "Cc" and c not in "\n\t"
            or unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF",
                                                "LRI", "RLI", "FSI", "PDI")]


def test_nothing_is_left_that_a_terminal_obeys():
    everything = "".join(map(chr, range(0x11000)))
    assert obeyed(everything) and not obeyed(harmless(everything))
    kept = [c for c in everything if harmless(c) == c]
    assert len(kept) == len(everything) - len(obeyed(everything))
    assert harmless("é 漢 😀\n\tשלום") == "é 漢 😀\n\tשלום"


def test_pieces_are_as_harmless_as_the_whole():
    for cut in range(len(HOSTILE)):
        assert harmless(HOSTILE[:cut]) + harmless(HOSTILE[cut:]) == harmless(HOSTILE)


@pytest.mark.parametrize("text", ["", "```", "a\n````\n# forged", "`" * 99, "~~~", "`` `"])
def test_no_text_ends_its_fence(text):
    first, *lines, last = fenced(text).split("\n")
    assert re.fullmatch("`{3,}", first) and first == last and "\n".join(lines) == text
    assert not any(line.strip().startswith(first) for line in lines)


def test_chat_shows_escape_codes_cut_in_two(monkeypatch, capsys):
    class Speaker:
        data = speaking.DataConfig()
        tokenizer = model = end_ids = None

    monkeypatch.setattr(chat.data, "encode_prompt", lambda *_: [1])
    monkeypatch.setattr(chat, "stream", lambda *_, **__: iter(()))
    monkeypatch.setattr(chat, "pieces", lambda *_: iter(HOSTILE))
    monkeypatch.setattr(chat, "answer_of", lambda *_: speaking.Answer(HOSTILE, True))
    said = chat.reply(Speaker(), None, (Message("user", "x"),), 1.0, 0, 0)
    shown = capsys.readouterr().out
    assert shown == harmless(HOSTILE) + "\n" and not obeyed(shown)
    assert said.content == HOSTILE  # what the model reads next is what it said


def test_generate_writes_the_same_json_harmlessly(monkeypatch, capsys):
    prompt = Prompt((Message("user", HOSTILE),), "file:1")
    monkeypatch.setattr(speaking, "read_prompts", lambda *_: [prompt])
    monkeypatch.setattr(speaking, "load", lambda *_: None)
    monkeypatch.setattr(speaking, "encode", lambda speaker, prompts: prompts)
    monkeypatch.setattr(speaking, "answers", lambda *_: [[speaking.Answer(HOSTILE, True)]])
    speaking.write_generations("folder", ["file"], 1, 1.0, 0, {"data.skip_bad": False})
    shown = capsys.readouterr().out
    assert not obeyed(shown)
    assert json.loads(shown) == {"prompt": HOSTILE, "responses": [HOSTILE], "ranks": None}


def test_an_answer_stays_within_its_block_of_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write_plots", lambda *_: [])
    monkeypatch.setattr(report, "table", lambda results: "TABLE")
    answer = f"right\n```\n# Forged\n\n<script>{HOSTILE}"
    results = {"models": {"ppo": {}}, "reference": "sft", "changes": {}}
    report.write_report(tmp_path, results, [{"ppo": answer}], [{"ppo": answer}])
    text = (tmp_path / "report.md").read_text()
    assert not obeyed(text)
    fence = ""
    outside = []
    for line in text.split("\n"):
        mark = re.match("`{3,}", line)
        if fence:
            fence = "" if line == fence else fence
        elif mark:
            fence = mark.group()
        else:
            outside.append(line)
    assert not fence and not any("Forged" in line or "script" in line for line in outside)


def test_the_page_shows_escape_codes(tmp_path):
    path = tmp_path / "page.html"
    write_page(path, "a", "b", HOSTILE, [Pair(HOSTILE, HOSTILE, "x", 1.0, (HOSTILE, ""), HOSTILE)])
    assert not obeyed(path.read_text())


FILES = [ROOT / "eval.py", ROOT / "train.py", ROOT / "parallel.py", *(
    path for room in ("evaluation", "benchmarks", "run") for path in (ROOT / room).glob("*.py")
)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_whatever_is_printed_is_made_harmless(path):
    """Names of files and keys of rows are text of strangers too; help and numbers are our own."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or path.stem == "planner":
            continue
        if ast.unparse(node.func) in ("print", "tqdm.write", "sys.stdout.write"):
            texts = [ast.unparse(a) for a in node.args if not isinstance(a, ast.Constant)]
            known = ("harmless(", "usage(", "[score ", "len(records) - len(prompts)", "torn")
            assert all(any(name in text for name in known) for text in texts), (
                f"{path.name}:{node.lineno}")
