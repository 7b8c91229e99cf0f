"""What a run folder survives: torn lines, half-written files, damaged checkpoints, a full disk."""

import ast
import errno
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import golden
import kill
import train
import weights
from data import open_tokenizer
from formats import files
from formats.files import append_line, cut_torn_line, whole_file, write_json, write_jsonl, write_text
from model import ScalarModel, Transformer
from run import checkpoints
from weights import load_pretrained, save_pretrained
from weights.__main__ import main as accept

ROOT = Path(__file__).parents[1]


# ---------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("where", ["within", "before the rename"])
def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch, where):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        with whole_file(path) as file:
            file.write(b'{"a": 2')
            if where == "within":
                raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"a": 1}
    monkeypatch.undo()
    write_json(path, {"a": 3})
    assert json.loads(path.read_text()) == {"a": 3} and os.listdir(tmp_path) == ["a.json"]


def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    """And the name is there before anything that follows."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args)))
    write_text(tmp_path / "a", "text")
    write_jsonl(tmp_path / "b", [{}])
    assert calls == ["fsync", "replace", "fsync"] * 2


@pytest.mark.parametrize("file", [*(ROOT / "run").glob("*.py"), *(ROOT / "evaluation").glob("*.py"), ROOT / "train.py",
                                  ROOT / "weights" / "export.py", ROOT / "parallel.py", ROOT / "eval.py"],
                         ids=lambda path: path.name)
def test_files_are_written_by_formats(file):
    """Nobody else opens a file to write: so all are written whole."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            assert not (name in ("write_text", "write_bytes") and isinstance(node.func, ast.Attribute)), node.lineno
            assert name not in ("copyfile", "copy", "savez"), node.lineno
            modes = [arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)]
            assert not (name == "open" and modes and set(str(modes[0])) & set("wax+")), node.lineno


TORN = {"nothing": b"", "half a row": b'{"stage": "sft", "st', "no end of line": b'{"stage": "sft"}',
        "zeros": b"\0\0\0\0\n", "half a letter": '{"a": "é'.encode()[:-1], "an empty line": b"\n"}


@pytest.mark.parametrize("case", TORN)
def test_a_torn_last_line_is_cut_off(tmp_path, case):
    path = tmp_path / "metrics.jsonl"
    for before in (b"", b'{"a": "\xe2\x80\xa8"}\n' * 3):  # U+2028 is no end of a line
        path.write_bytes(before + TORN[case])
        assert cut_torn_line(path) == (case != "nothing")
        assert path.read_bytes() == before
    assert not cut_torn_line(tmp_path / "none")


@pytest.fixture
def unfinished(finished, tmp_path) -> Path:
    """The tiny run, without what PPO and the evaluation left."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / "ppo")
    (out / "eval.json").unlink()
    for name in ("metrics.jsonl", "samples.jsonl"):
        write_jsonl(out / name, [row for row in golden.lines(out / name) if row["stage"] != "ppo"])
    return out


def test_torn_files_do_not_stop_a_resumed_run(finished, unfinished, capsys):
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(unfinished / name, "a") as file:
            file.write('{"stage": "ppo", "step": 1, "sc')
    (unfinished / "seconds.json").write_text("")
    (unfinished / "eval.json.partial").write_text('{"mod')
    assert golden.tiny_run(unfinished, "--resume") == finished[1]
    said = capsys.readouterr().out
    assert said.count("its last line was torn, and is cut off") == 2


def test_a_line_broken_elsewhere_is_named(unfinished):
    path = unfinished / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"step": 3,', b'"step": 3', 1))
    with pytest.raises(ValueError, match=r"metrics.jsonl:3: not valid JSON"):
        golden.tiny_run(unfinished, "--resume")


# ---------------------------------------------------------------------------------------------
# Checkpoints and model folders


@pytest.fixture(scope="module")
def stopped(finished, tmp_path_factory) -> Path:
    """The tiny run, killed in PPO with two checkpoints."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / "ppo")
    (out / "eval.json").unlink()
    for name in ("metrics.jsonl", "samples.jsonl"):
        write_jsonl(out / name, [row for row in golden.lines(out / name) if row["stage"] != "ppo"])
    keep = checkpoints.keep

    def killed(run, name, number, *rest):
        keep(run, name, number, *rest)
        if number == 2:
            checkpoints.settle(run)
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "keep", killed)
        with pytest.raises(KeyboardInterrupt):
            golden.tiny_run(out, "--checkpoint_every=1", "--resume")
    assert sorted(os.listdir(out / "checkpoints" / "ppo")) == ["000001", "000002"]
    return out


def flip(path: Path, place: float, bit: int = 0) -> None:
    """Flip a bit of the byte at this share of a file."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1 << bit
    path.write_bytes(content)


SHARD = "rank00000.safetensors"
DAMAGE = {
    "a flipped bit in the weights": lambda d: flip(d / SHARD, 0.7),
    "a flipped bit in the last byte": lambda d: flip(d / SHARD, 1.0, 7),
    "a flipped bit in the header": lambda d: flip(d / SHARD, 0.001),
    "a flipped bit in state.json": lambda d: flip(d / "state.json", 0.5),
    "another number in state.json": lambda d: (d / "state.json").write_text((d / "state.json").read_text().replace('"step": 2', '"step": 1')),
    "cut off": lambda d: os.truncate(d / SHARD, 1000),
    "one byte short": lambda d: os.truncate(d / SHARD, (d / SHARD).stat().st_size - 1),
    "empty": lambda d: os.truncate(d / SHARD, 0),
    "missing": lambda d: (d / SHARD).unlink(),
    "that of the step before": lambda d: shutil.copy(d.with_name("000001") / SHARD, d / SHARD),
    "no state.json": lambda d: (d / "state.json").unlink(),
    "an empty state.json": lambda d: os.truncate(d / "state.json", 0),
    "half a state.json": lambda d: os.truncate(d / "state.json", 100),
    "a state.json of another kind": lambda d: (d / "state.json").write_text("[1]"),
    "a state.json that is a folder": lambda d: ((d / "state.json").unlink(), (d / "state.json").mkdir()),
    "an empty folder": lambda d: (shutil.rmtree(d), d.mkdir()),
    "a file in its place": lambda d: (shutil.rmtree(d), d.write_text("")),
}
HARMLESS = {
    "a stray file beside": lambda d: (d.parent / ".DS_Store").write_text("x"),
    "a stray folder beside": lambda d: (d.parent / "old").mkdir(),
    "a stray file within": lambda d: (d / "notes.txt").write_text("x"),
    "half of the next": lambda d: shutil.copytree(d, d.with_name("000003.partial")),
}


class Machine:
    rank, world, is_main = 0, 1, True


def choose(out: Path) -> tuple[Path | None, list[str]]:
    """Return which checkpoint of PPO a resumed run takes, and what it says."""
    said: list[str] = []

    class Run:
        machine = Machine

        def say(self, text):
            said.append(text)

    run = Run()
    run.out = out
    return checkpoints.newest_whole(run, "ppo"), said


@pytest.mark.parametrize("case", [*DAMAGE, *HARMLESS])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(stopped, tmp_path, case):
    shutil.copytree(stopped / "checkpoints", tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints" / "ppo" / "000002"
    {**DAMAGE, **HARMLESS}[case](newest)
    path, said = choose(tmp_path)
    if case in HARMLESS:
        assert path == newest and said == ["ppo      : continues after step 2"]
        return
    assert path == newest.with_name("000001") and len(said) == 2
    assert said[0].startswith("ppo      : the checkpoint of step 2 is damaged and is left aside: ")
    assert str(newest) in said[0] and "\n" not in said[0]
    DAMAGE["cut off"](path)
    path, said = choose(tmp_path)
    assert path is None and "NO CHECKPOINT IS WHOLE" in said[-1]


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_run_goes_on_from_what_is_whole(finished, stopped, tmp_path, capsys, damaged):
    """From the checkpoint before, or, if none is whole, from the beginning of the stage: to the same end."""
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    for step in (2, 1)[:damaged]:
        flip(out / "checkpoints" / "ppo" / f"{step:06d}" / SHARD, 0.5)
    assert golden.tiny_run(out, "--checkpoint_every=1", "--resume") == finished[1]
    assert ("NO CHECKPOINT IS WHOLE" in capsys.readouterr().out) == (damaged == 2)
    assert (out / "ppo" / "model.safetensors").read_bytes() == (finished[0] / "ppo" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("place", [0.0005, 0.01, 0.5, 1.0])
def test_a_model_folder_with_a_flipped_bit_is_refused(finished, tmp_path, place):
    shutil.copytree(finished[0] / "sft", tmp_path / "sft")
    load_pretrained(tmp_path / "sft")
    file = tmp_path / "sft" / "model.safetensors"
    flip(file, place, 3)
    with pytest.raises(ValueError, match="model.safetensors: ") as error:
        load_pretrained(tmp_path / "sft")
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.copy(file, tmp_path / "run" / "sft")
    with pytest.raises(ValueError, match="sft/model.safetensors: "):
        train.main([f"--out={tmp_path / 'run'}", "--stages=eval"])


def flip_unseen(file: Path) -> None:
    """Flip a bit so that JSON stays JSON, and sentencepiece's numbers numbers: nobody stumbles over it."""
    content = file.read_bytes()
    for place in [len(content) // 2] if file.suffix == ".model" else reversed(range(len(content))):
        flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1:]
        try:
            if file.suffix == ".model" or json.loads(flipped) != json.loads(content):
                return file.write_bytes(flipped)
        except ValueError:
            pass


BESIDE = {"sft": 5, "top": 5, "reward": 4, "ppo": 5}  # files beside the weights: no generation's of the reward model


@pytest.mark.parametrize("stage", BESIDE)
def test_a_flipped_bit_beside_the_weights_is_refused(finished, tmp_path, stage):
    """In each of the small files, whether for the weights or for the tokenizer; a run stops with that line."""
    folder = tmp_path / "run" / stage
    shutil.copytree(finished[0], tmp_path / "run")
    kind = ScalarModel if stage == "reward" else Transformer
    beside = [file for file in folder.iterdir() if file.name != "model.safetensors"]
    assert len(beside) == BESIDE[stage]
    for file in beside:
        whole = file.read_bytes()
        flip_unseen(file)
        (tmp_path / "run" / "eval.json").unlink(missing_ok=True)
        for refuse in (lambda: load_pretrained(folder, kind=kind), lambda: open_tokenizer(folder),
                       lambda: train.main([f"--out={tmp_path / 'run'}", "--stages=eval"])):
            # the evaluation asks the reward model only where that pays for the best of n
            with pytest.raises(ValueError, match=f"{file}: damaged or edited: ") as error:
                refuse()
            assert str(error.value).endswith(f"accept it with: python -m weights {folder}")
            assert "\n" not in str(error.value)
        file.write_bytes(whole)
        load_pretrained(folder, kind=kind)


def test_a_flipped_bit_in_the_index_is_refused(config, tmp_path):
    save_pretrained(Transformer(config), tmp_path / "model", shard_bytes=20_000)
    load_pretrained(tmp_path / "model")
    flip_unseen(tmp_path / "model" / "model.safetensors.index.json")
    with pytest.raises(ValueError, match="model.safetensors.index.json: "):
        load_pretrained(tmp_path / "model")


def test_what_was_edited_is_accepted_by_command(finished, tmp_path, capsys):
    """And only what stands beside the weights: they stay checked, and so do the other files."""
    folder = tmp_path / "sft"
    shutil.copytree(finished[0] / "sft", folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": "{{ messages[0]['content'] }}"}))
    with pytest.raises(ValueError, match="tokenizer_config.json: damaged or edited: "):
        open_tokenizer(folder)
    accept([str(folder)])
    assert capsys.readouterr().out == f"{folder}: accepted: tokenizer_config.json\n"
    assert open_tokenizer(folder).own.exists
    load_pretrained(folder)
    accept([str(folder)])
    assert "accepted: nothing" in capsys.readouterr().out
    flip_unseen(folder / "config.json")
    flip(folder / "model.safetensors", 0.5)
    with pytest.raises(ValueError, match="sft/config.json: "):
        load_pretrained(folder)
    accept([str(folder)])
    with pytest.raises(ValueError, match="model.safetensors: damaged: "):
        load_pretrained(folder)
    with pytest.raises(ValueError, match="give one folder"):
        accept([str(tmp_path)])


def test_a_file_that_is_gone_is_its_readers_affair(finished, tmp_path):
    shutil.copytree(finished[0] / "sft", tmp_path / "sft")
    (tmp_path / "sft" / "generation_config.json").unlink()
    load_pretrained(tmp_path / "sft")
    assert open_tokenizer(tmp_path / "sft").own.exists


def test_a_model_folder_from_elsewhere_has_no_checksum(finished, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    shutil.copytree(finished[0] / "sft", tmp_path / "sft")
    file = tmp_path / "sft" / "model.safetensors"
    safetensors.save_file(safetensors.load_file(file), file, metadata={"format": "pt"})
    flip_unseen(tmp_path / "sft" / "generation_config.json")
    theirs, ours = load_pretrained(tmp_path / "sft"), load_pretrained(finished[0] / "sft")
    for one, other in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(one, other)


# ---------------------------------------------------------------------------------------------
# A disk that is full, a folder that nobody may write to


class Full:
    """A disk that takes so many bytes and no more."""

    def __init__(self, room: int) -> None:
        self.room = room

    def fsync(self, file: int) -> None:
        self.room -= os.fstat(file).st_size
        if self.room < 0:
            raise OSError(28, "No space left on device")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of a few steps a stage."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train.main([*kill.FLAGS, f"--out={out}"])
    return out


@pytest.mark.parametrize("room", [0, 60_000])
def test_a_full_disk_gets_one_line(whole, tmp_path, monkeypatch, room):
    """Wherever it fills: with path, what is free, and how to go on; then the run ends as one on a large disk."""
    out = tmp_path / "run"
    monkeypatch.setattr(os, "fsync", Full(room).fsync)
    with pytest.raises(ValueError) as error:
        train.main([*kill.FLAGS, f"--out={out}"])
    monkeypatch.undo()
    said = str(error.value)
    assert said.startswith(str(out)) and "No space left on device" in said and " MB are free; make room, then continue with: " in said
    is_begun = (out / "config.json").exists()
    assert said.endswith(f"python train.py --out={out} --resume" if is_begun else "the same command") and "\n" not in said
    train.main([*kill.FLAGS, f"--out={out}", *["--resume"] * is_begun])
    assert kill.bytes_of(out) == kill.bytes_of(whole)


class Bad:
    """A disk that is full, or that nobody may write to, while it is told so."""

    def __init__(self, monkeypatch, error: int) -> None:
        self.error, self.begins, self.mkdir = error, None, os.mkdir
        for module in (files, weights.files):
            monkeypatch.setattr(module, "open", self.open, raising=False)
        monkeypatch.setattr(os, "mkdir", self.make)

    def refuses(self, path: Path) -> bool:
        return self.begins is not None and str(path).startswith(str(self.begins))

    def open(self, path: Path, mode: str = "r", **options):
        if not set(mode) & set("wa") or not self.refuses(path):
            return open(path, mode, **options)
        if self.error == errno.EROFS:
            raise OSError(self.error, os.strerror(self.error), str(path))
        return open("/dev/full", mode, **options)

    def make(self, path: Path, *rest) -> None:
        if self.error == errno.EROFS and self.refuses(path):
            raise OSError(self.error, os.strerror(self.error), str(path))
        self.mkdir(path, *rest)


@pytest.mark.parametrize("where", ["at once", "at the result"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_a_bad_disk_in_every_stage(whole, tmp_path, monkeypatch, error, where):
    """One line with path and command, in each stage of one run; continued, it ends as one on a sound disk."""
    out, disk, in_stage, now = tmp_path / "run", Bad(monkeypatch, error), train.in_stage, []

    @contextmanager
    def watched(run, name):
        with in_stage(run, name):
            disk.begins = (out / train.STAGES[name].result if where == "at the result" else out) if name == now[-1] else None
            yield

    monkeypatch.setattr(train, "in_stage", watched)
    for stage in train.STAGES:
        now.append(stage)
        with pytest.raises(ValueError) as told:
            train.main([*kill.FLAGS, f"--out={out}", *["--resume"] * (stage != "sft")])
        disk.begins, said = None, str(told.value)
        assert said.startswith(f"{out}/") and f": {os.strerror(error)}" in said and "\n" not in said, said
        assert said.endswith(f", then continue with: python train.py --out={out} --resume") and not (out / train.STAGES[stage].result).exists()
    now.append("")
    train.main([f"--out={out}", "--resume"])
    assert kill.bytes_of(out) == kill.bytes_of(whole)


def test_a_log_on_a_full_disk(tmp_path):
    """/dev/full takes nothing: the error names file and amount."""
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError) as error:
        append_line(tmp_path / "metrics.jsonl", {"a": 1})
    assert "MB were to be written" in str(error.value) and "metrics.jsonl" in str(error.value)


def test_a_folder_that_nobody_may_write_to(finished, tmp_path, monkeypatch):
    """As root one may write anywhere, so the system's answer is made up."""
    def refused(path, *_):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(OSError, match=f"Read-only file system: '{tmp_path}/run/lock'"):
        golden.tiny_run(tmp_path / "run")
