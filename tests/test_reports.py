"""Situations from bug reports of other tools, each on a small file of our own: what is read, what is counted, what is refused."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from formats import Message, read_dialogues, read_prompts, read_rankings
from formats.files import print_any_text

ROOT = Path(__file__).parents[1]
SYSTEM = Message("system", "Answer in French only.")
ASKED = Message("user", "Colour?")


def jsonl(folder: Path, *rows: dict) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize("asked", [{"prompt": "Colour?"}, {"question": "Colour?"}, {"instruction": "Colour?"},
                                   {"prompt": [{"role": "user", "content": "Colour?"}]},
                                   {"messages": [{"role": "user", "content": "Colour?"}]}])
def test_a_system_text_in_its_own_field_is_part_of_the_prompt(tmp_path, name, asked):
    [record], report = read_prompts([jsonl(tmp_path, {name: SYSTEM.content, **asked})])
    assert record.messages == (SYSTEM, ASKED) and not report.noted
    pair = {name: SYSTEM.content, **asked, "chosen": "Rouge.", "rejected": "Red."}
    [ranking], _ = read_rankings([jsonl(tmp_path, pair)])
    assert ranking.messages == (SYSTEM, ASKED)


@pytest.mark.parametrize("name", ["context", "passage"])
@pytest.mark.parametrize("asked", [{"prompt": "When?"}, {"question": "When?"}, {"instruction": "When?"}])
def test_the_passage_a_question_is_about_is_part_of_it(tmp_path, name, asked):
    [record], report = read_prompts([jsonl(tmp_path, {name: "Built in 1900.", **asked})])
    [message] = record.messages
    assert "Built in 1900." in message.content and "When?" in message.content and not report.noted


def test_what_nothing_reads_is_counted_by_name(tmp_path):
    rows = [{"prompt": "Colour?", "response": "Red.", "hint": "a word", "n": 3, "empty": " "}] * 2
    _, report = read_dialogues([jsonl(tmp_path, *rows)])
    assert report.noted["with a text that nothing here reads, 'hint'"] == 2
    assert len(report.noted) == 2, "and the exact duplicate"


@pytest.mark.parametrize("end", ["</s>", "<|im_end|>", "<|eot_id|>", "<|endoftext|>", " </s>\n", "<|im_end|>\n<|endoftext|>", "<end_of_turn>"])
def test_a_control_token_as_text_at_the_end_of_an_answer_is_taken_off(tmp_path, end):
    [record], report = read_dialogues([jsonl(tmp_path, {"instruction": "Name it.", "output": f"Item 0.{end}"})])
    assert record.messages[-1].content == "Item 0."
    assert report.noted["with a control token as text at the end of an answer, taken off"] == 1
    [record], report = read_dialogues([jsonl(tmp_path, {"instruction": "Name it.", "output": "</s> ends a text in HTML"})])
    assert record.messages[-1].content == "</s> ends a text in HTML" and not report.noted


MARKUP = {
    "chatml": "<|im_start|>system\nAnswer in French only.<|im_end|>\n<|im_start|>user\nColour?<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nAnswer in French only.<|eot_id|><|start_header_id|>user"
              "<|end_header_id|>\n\nColour?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "zephyr": "<|system|>\nAnswer in French only.</s>\n<|user|>\nColour?</s>\n<|assistant|>\n",
}


@pytest.mark.parametrize("kind", MARKUP)
def test_a_prompt_in_control_tokens_as_text_becomes_a_dialogue(tmp_path, kind):
    [record], _ = read_dialogues([jsonl(tmp_path, {"prompt": MARKUP[kind], "response": "Rouge."})])
    assert record.messages == (SYSTEM, ASKED, Message("assistant", "Rouge."))


def test_gemmas_too_and_turns_before(tmp_path):
    text = ("<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYo.<end_of_turn>\n<start_of_turn>user\nColour?<end_of_turn>\n"
            "<start_of_turn>model\n")
    [record], _ = read_prompts([jsonl(tmp_path, {"prompt": text})])
    assert record.messages == (Message("user", "Hi"), Message("assistant", "Yo."), ASKED)


@pytest.mark.parametrize("text", ["[INST] Colour? [/INST]", "A chat. USER: Colour? ASSISTANT:", "### Instruction:\nColour?\n\n### Response:\n",
                                  "<|im_start|>user\nColour?<|im_end|> and then"])
def test_a_prompt_in_words_of_a_template_stays_as_it_is(tmp_path, text):
    [record], report = read_prompts([jsonl(tmp_path, {"prompt": text})])
    assert [message.role for message in record.messages] == ["raw"] and record.messages[0].content == text
    assert report.noted["already in a template, left as they are"] == 1


@pytest.mark.parametrize("asked", [{"prompt": "Colour?", "completion": "Red."},
                                   {"messages": [{"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "Red."}]}])
def test_an_undesirable_answer_is_not_imitated(tmp_path, asked):
    good = {**asked, "label": True}
    records, report = read_dialogues([jsonl(tmp_path, {**asked, "label": False}, good)])
    assert len(records) == 1 and report.skipped["marked as undesirable (label: false)"] == 1


def test_doubles_that_disagree_are_counted(tmp_path):
    pairs = [{"prompt": "Colour?", "chosen": "Red.", "rejected": "Blue."}, {"prompt": "Colour?", "chosen": "Blue.", "rejected": "Red."}]
    _, report = read_rankings([jsonl(tmp_path, *pairs)])
    assert report.noted["contradict another row"] == 1
    _, report = read_prompts([jsonl(tmp_path, {"question": "2 + 2?", "answer": "4"}, {"question": "2 + 2?", "answer": "5"})])
    assert report.noted["contradict another row"] == 1


ROW = {"instruction": "Name a fruit.", "output": "Apple, red."}
PACKED = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}


@pytest.mark.parametrize("kind", PACKED)
def test_packed_files_are_read(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(PACKED[kind](json.dumps(ROW).encode()))
    [record], _ = read_dialogues([path])
    assert record.messages[-1].content == "Apple, red."
    path.write_bytes(PACKED[kind](json.dumps(ROW).encode())[:-5])
    with pytest.raises(ValueError, match=f"{path}: damaged .* fetch it again"):
        read_dialogues([path])


def test_zip_holds_one_file(tmp_path):
    path = tmp_path / "rows.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rows.jsonl", json.dumps(ROW))
    assert len(read_dialogues([path])[0]) == 1
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("more.jsonl", json.dumps(ROW))
    with pytest.raises(ValueError, match="a zip file that holds 2 files; unpack it"):
        read_dialogues([path])


def test_csv(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('instruction,input,output\n"Name a\nfruit.",,"Apple, ""red""."\nName two.,short,"A, B"\n')
    first, second = read_dialogues([path])[0]
    assert [message.content for message in first.messages] == ["Name a\nfruit.", 'Apple, "red".']
    assert "short" in second.messages[0].content and second.source == f"{path}:4"
    path.write_text("instruction\toutput\nName a fruit.\tApple.\nName two.\n")
    with pytest.raises(ValueError, match=f"{path}:3: not as many cells as the header has columns"):
        read_dialogues([path])
    assert len(read_dialogues([path], skip_bad=True)[0]) == 1


def test_parquet_says_how_to_convert(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1" + bytes(20))
    with pytest.raises(ValueError, match="a Parquet file; convert it to JSON lines"):
        read_dialogues([tmp_path / "rows.parquet"])


@pytest.mark.parametrize("encoding,text", [("GB18030", "你好，很高兴见到你"), ("CP1251", "Привет"), ("CP1252", "Äpfel")])
def test_another_encoding_is_named_with_the_command_that_converts(tmp_path, encoding, text):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps({"instruction": text, "output": text}, ensure_ascii=False).encode(encoding))
    with pytest.raises(ValueError, match=f"{path}:1: not UTF-8 .*iconv -f {encoding} -t UTF-8"):
        read_dialogues([path])


def test_each_fault_of_a_dialogue_is_counted_by_its_reason(tmp_path):
    def dialogue(*turns: str) -> dict:
        roles = {"u": "human", "a": "gpt", "b": "bing"}
        return {"conversations": [{"from": roles[turn[0]], "value": turn[1:]} for turn in turns]}

    rows = [dialogue("uHi", "aHello."), dialogue("aPart two.", "uThanks", "aWelcome."), dialogue(), dialogue("uOne", "uTwo", "aThree"),
            dialogue("uOne", "a"), dialogue("uOne", "aUno", "uand two?"), dialogue("uOne", "bUno")]
    records, report = read_dialogues([jsonl(tmp_path, *rows)], skip_bad=True)
    assert [record.messages[-1].content for record in records] == ["Hello.", "Uno"]
    assert dict(report.skipped) == {"begins with the assistant": 1, "no messages": 1, "two turns in a row by the user": 1, "empty answer": 1,
                                    "unknown role": 1}
    assert report.noted["ends with the user: its last question left out"] == 1


def test_a_terminal_that_is_not_utf8_gets_escapes():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from formats.files import print_any_text; print_any_text(); print('Ω 你')"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONIOENCODING": "cp1252"}, capture_output=True)
    assert done.returncode == 0 and done.stdout.strip() == rb"\u03a9 \u4f60"
    assert print_any_text() is None


def test_real_reports():
    folder = ROOT.parent / "shared" / "data" / "reports"
    if not folder.exists():
        pytest.skip("shared/data/reports is not in this checkout")
    for name in ("sft.zip", "sft_ok.jsonl.xz", "data.csv", "code_indent.jsonl", "literal_eos.jsonl", "chatml_text.jsonl", "prompt_system.jsonl",
                 "sharegpt_dirty.json", "squad_like.jsonl"):
        assert read_dialogues([folder / name], skip_bad=True)[1].kept
    for name, expected in (("gbk.jsonl", "GB18030"), ("sft.parquet", "Parquet")):
        with pytest.raises(ValueError, match=expected):
            read_dialogues([folder / name])
    assert all(record.messages[0].role == "system" for record in read_rankings([folder / "orca_pairs.jsonl"])[0])
    assert all("built in" in record.messages[0].content for record in read_prompts([folder / "dolly_prompts.jsonl"])[0])
