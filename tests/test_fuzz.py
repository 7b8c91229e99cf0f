"""A few hundred damaged files of every format: tests/fuzz.py is the command for thousands."""
import signal

import pytest
import torch

import fuzz
from weights.files import read_bin, read_pickle

SUBJECTS = [s.name for s in (*fuzz.data_subjects(), *fuzz.task_subjects())]
OTHERS = ["safetensors", "safetensors header", "pickle", "index of pickles",
          "index of safetensors", "model config", "judgments", "heldout.jsonl", "ranked.jsonl",
          "any jsonl", "any json"]


def test_every_format_is_fuzzed(tmp_path):
    assert [subject.name for subject in fuzz.subjects(tmp_path)] == SUBJECTS + OTHERS


@pytest.mark.parametrize("name", SUBJECTS + OTHERS)
def test_damaged_files_are_read_or_refused(name, tmp_path):
    [subject] = [one for one in fuzz.subjects(tmp_path) if one.name == name]
    before = signal.signal(signal.SIGALRM, fuzz.stop)
    try:
        counts = fuzz.fuzz(subject, 200, tmp_path)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert counts["refused"] and set(counts) <= {"read", "refused"}, counts


def test_what_the_fuzz_would_tell(tmp_path):
    """A reader that fails, one that hangs, one that makes things up and one that reads all."""
    def read(path):
        text = path.read_text()
        return {"F": lambda: {}["missing"], "W": lambda: ["made up"]}.get(text[:1], lambda: text)()

    subject = fuzz.Subject("own", b"text", read)
    said = [fuzz.outcome(subject, tmp_path / "file", content, "text", False)
            for content in (b"F", b"W", b"text")]
    assert said[0].startswith("traceback KeyError") and said[1:] == ["wrong text 'made up'", "read"]
    twice = fuzz.outcome(subject, tmp_path / "file", b"text", "text", True)
    assert twice == "wrong key named twice"


@pytest.mark.parametrize("tensor", [
    torch.ones(2, 2).to_sparse(), torch.ones(2, 2).to_sparse_csr(), torch.ones(2, device="meta"),
    torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
], ids=["sparse", "csr", "meta", "quantized"])
def test_a_pickle_of_no_plain_values_is_one_line(tensor, tmp_path):
    torch.save({"a": torch.ones(1), "b": tensor}, tmp_path / "model.bin")
    for read in (read_bin, read_pickle):
        with pytest.raises(ValueError, match="model.bin: tensor b is|model.bin: ") as refusal:
            read(tmp_path / "model.bin")
        assert "\n" not in str(refusal.value)
