"""The installed lm-evaluation-harness and this code on one model and the same files.

Compared are log-likelihoods, texts, metrics and their standard errors.

For development: skipped unless `lm_eval` and `transformers` are there. The questions are made up, and
real ones where ../shared/data has them. With SMOLLM2=FOLDER in the environment, a folder of that
model, both ask it the real questions.
"""
import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks.asking import answer_questions, evaluate
from benchmarks.engine import Engine
from benchmarks.questions import encode_question, read_questions
from benchmarks.tasks import TASKS
from data import open_tokenizer
from model import ModelConfig, Transformer
from parallel import Machine
from weights import load_pretrained, save_pretrained
from weights.initial import init_weights

SHARED = Path(__file__).parents[2] / "shared" / "data"
REAL = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data, real benchmark files")
SMOLLM2 = os.environ.get("SMOLLM2", "")
os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false", DISABLE_MULTIPROC="1")
lm_eval = pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")

class File(NamedTuple):
    """A task's questions: its record in the harness, and the file both programs ask from."""
    yaml: str
    split: str                          # what the harness calls it
    target: str                         # where the copy for the test lies
    source: str                         # the real file
    rows: int


class Shots(NamedTuple):
    """A task's demonstrations."""
    count: int
    split: str
    target: str
    source: str


LAMBADA = "lambada/lambada_openai"
FILES = {
    "arc_easy": File(
        "arc/arc_easy.yaml", "test", "arc_easy/test.jsonl", "arc_easy/validation.jsonl", 25),
    "winogrande": File(
        "winogrande/default.yaml", "validation", "winogrande/validation.jsonl",
        "winogrande/validation.jsonl", 25),
    "lambada_openai": File(f"{LAMBADA}.yaml", "test", f"{LAMBADA}.jsonl", f"{LAMBADA}.jsonl", 25),
    "mmlu": File(
        "mmlu/default/mmlu_abstract_algebra.yaml", "test", "mmlu/test.jsonl", "mmlu/test.jsonl",
        10),
    "truthfulqa_mc2": File(
        "truthfulqa/truthfulqa_mc2.yaml", "validation", "truthfulqa/rows.jsonl",
        "truthfulqa/mc_task.json", 12),
    "gsm8k": File("gsm8k/gsm8k.yaml", "test", "gsm8k/test.jsonl", "gsm8k/test.jsonl", 3),
}
SHOTS = {
    "mmlu": Shots(5, "dev", "mmlu/dev.jsonl", "mmlu/dev.jsonl"),
    "gsm8k": Shots(5, "train", "gsm8k/train.jsonl", "gsm8k/train.jsonl"),
    "arc_easy": Shots(3, "train", "arc_easy/train.jsonl", "arc_challenge/validation.jsonl"),
    "winogrande": Shots(2, "train", "winogrande/train.jsonl", "winogrande/validation.jsonl"),
}
RECORDS = {
    name: replace(TASKS[name], shots=SHOTS[name].count if name in SHOTS else 0) for name in FILES
}


WORDS = "the man house it fell of cup new is old for 12 7 and".split()


def made_up(path: str, count: int | None = None) -> list[dict]:
    """Make rows in the shape of a real file's, of words without sense."""
    rng = random.Random(path)

    def text(most: int = 6) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    def choices() -> dict:
        return {
            "question": text(), "choices": {"text": [text(), text()], "label": ["A", "B"]},
            "answerKey": rng.choice("AB")}

    makers = {
        "arc_easy": choices,
        "arc_challenge": choices,
        "winogrande": lambda: {
            "sentence": f"{text()} _ {text()}", "option1": "the man", "option2": "the house",
            "answer": rng.choice("12")},
        "lambada": lambda: {"text": text(12) + " house"},
        "mmlu": lambda: {
            "question": text(), "subject": "abstract_algebra", "answer": rng.randrange(4),
            "choices": [text() for _ in range(4)]},
        "truthfulqa": lambda: {
            "question": text(), "mc1_targets": {"choices": [text(), "no"], "labels": [1, 0]},
            "mc2_targets": {"choices": [text(), text(), "no"], "labels": [1, 1, 0]}},
        "gsm8k": lambda: {"question": text(120), "answer": f"{text()}\n#### {rng.randrange(99)}"},
    }
    return [makers[path.split("/")[0]]() for _ in range(count or 12)]


def prepared(path: str, count: int | None = None) -> list[dict]:
    """Read a real file in the fields that both programs know."""
    text = (SHARED / "eval" / path).read_text(encoding="utf-8")
    if path.endswith(".json"):
        rows = json.loads(text)
    else:
        rows = [json.loads(line) for line in text.splitlines()]
    # of MMLU one subject, since the harness has a task for each
    rows = [row for row in rows if row.get("subject", "abstract_algebra") == "abstract_algebra"]
    for row in rows[:count]:
        for key in ("mc1_targets", "mc2_targets"):
            if key in row:
                row[key] = {"choices": list(row[key]), "labels": list(row[key].values())}
        if "continuation" in row:
            row["text"] = f"{row.pop('context')} {row.pop('continuation')}"
    return rows[:count]


class Pieces(transformers.PreTrainedTokenizer):
    """The sentencepiece model itself as a Hugging Face tokenizer.

    Their own conversion of it encodes some spaces differently.
    """

    def __init__(self, path: Path) -> None:
        self.ours = open_tokenizer(path)
        self.pieces = self.ours.processor
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>")

    vocab_size = property(lambda self: self.ours.vocab_size)

    def get_vocab(self) -> dict[str, int]:
        return {self.pieces.id_to_piece(i): i for i in range(self.vocab_size)}

    def _tokenize(self, text: str, **ignored) -> list[str]:
        return self.pieces.encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.pieces.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.pieces.id_to_piece(index)

    def build_inputs_with_special_tokens(self, ids: list[int], pair: None = None) -> list[int]:
        return [1, *ids]

    def _decode(self, token_ids, skip_special_tokens: bool = False, **ignored) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        text = self.ours.decode(ids)
        if skip_special_tokens or len(ids) != 1:
            return text
        return {1: "<s>", 2: "</s>"}.get(ids[0], text)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def write_spec(folder: Path, name: str) -> str:
    """Write a task of the harness with files in `folder` in place of its own; return the path."""
    file = FILES[name]
    shots = SHOTS.get(name)
    # All splits that the harness's record names must exist; those not asked for are never read.
    files = {split: str(folder / file.target) for split in ("train", "validation", "dev", "test")}
    if shots:
        files[shots.split] = str(folder / shots.target)
    spec = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / file.yaml),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "num_fewshot": shots.count if shots else 0,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(spec))
    return str(path)


def harness_results(folder: Path, model_folder: str | Path, tokenizer, names) -> dict:
    """Run the harness on the files in `folder`."""
    from lm_eval.models.huggingface import HFLM
    specs = [write_spec(folder, name) for name in names]
    model = transformers.LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    # None: as the tokenizer does by itself
    bos = True if isinstance(tokenizer, Pieces) else None
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, add_bos_token=bos)
    return lm_eval.simple_evaluate(model=lm, tasks=specs, log_samples=True)


def compare(name: str, theirs: dict, engine: Engine, folder: Path) -> None:
    """Ask our engine a task, and compare every answer and every number with the harness's."""
    task = RECORDS[name]
    questions = read_questions(name, task, folder, None, 0)
    asked = [
        encode_question(question, task, engine.tokenizer, engine.context_size)
        for question in questions
    ]
    given = answer_questions(name, task, questions, asked, engine)
    seen = {sample["doc_id"]: sample for sample in theirs["samples"][name]}
    assert len(seen) == len(questions)
    for i, (outcome,) in enumerate(given):
        answers = [answer for (answer,) in seen[i]["resps"]]
        if questions[i].item.choices:
            logprobs = [logprob for logprob, _greedy in answers]
            assert outcome.logprobs == pytest.approx(logprobs, abs=1e-3), (name, i)
            assert outcome.greedy == tuple(greedy for _logprob, greedy in answers)
        else:
            assert [outcome.text] == answers

    numbers = theirs["results"][name]
    for metric, number in evaluate(name, task, questions, engine).metrics.items():
        value_key = metric if "," in metric else f"{metric},none"
        error_key = value_key.replace(",", "_stderr,")
        assert number.value == pytest.approx(numbers[value_key], rel=1e-4), (name, metric)
        assert number.error == pytest.approx(numbers[error_key], rel=1e-3), (name, metric)


@pytest.mark.parametrize("rows", [made_up, pytest.param(prepared, marks=REAL)])
def test_harness_and_this_code_agree(tmp_path, monkeypatch, finished, rows):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    tokenizer = open_tokenizer(finished[0] / "sft")
    model = Transformer(ModelConfig(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=tokenizer.vocab_size,
        ffn_dim=128, max_seq_len=640))
    init_weights(model, 0)
    save_pretrained(model, tmp_path / "model", tokenizer)
    for file in FILES.values():
        write_jsonl(tmp_path / file.target, rows(file.source, file.rows))
    for shots in SHOTS.values():
        write_jsonl(tmp_path / shots.target, rows(shots.source))

    theirs = harness_results(tmp_path, tmp_path / "model", Pieces(tmp_path / "model"), FILES)
    machine = Machine(0, 1, torch.device("cpu"), torch.float32)
    engine = Engine(load_pretrained(tmp_path / "model"), tokenizer, machine, 4096)
    for name in FILES:
        compare(name, theirs, engine, tmp_path)
    questions = read_questions("gsm8k", TASKS["gsm8k"], tmp_path, None, 0)
    assert evaluate("gsm8k", TASKS["gsm8k"], questions, engine).truncated > 0


@REAL
@pytest.mark.skipif(not SMOLLM2, reason="needs a folder of SmolLM2: SMOLLM2=FOLDER")
def test_a_real_model_gets_the_harnesss_numbers(tmp_path, monkeypatch):
    """The untouched SmolLM2, its own tokenizer and its own answer to whether a BOS comes first."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    names = [name for name in FILES if name != "gsm8k"]
    for name in names:
        write_jsonl(tmp_path / FILES[name].target, prepared(FILES[name].source, FILES[name].rows))
        if name in SHOTS:
            write_jsonl(tmp_path / SHOTS[name].target, prepared(SHOTS[name].source))
    theirs = harness_results(
        tmp_path, SMOLLM2, transformers.AutoTokenizer.from_pretrained(SMOLLM2), names)
    machine = Machine(0, 1, torch.device("cpu"), torch.float32)
    engine = Engine(load_pretrained(SMOLLM2), open_tokenizer(SMOLLM2), machine, 4096)
    for name in names:
        compare(name, theirs, engine, tmp_path)
