"""The installed lm-evaluation-harness and this code, on one model and the same files: log-likelihoods, texts, metrics, errors.

For development: skipped unless `lm_eval`, `transformers` and ../shared/data are there.
"""
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.engine import Engine
from benchmarks.questions import encode_question, read_questions
from benchmarks.numbers import evaluate
from data import Tokenizer
from model import ModelConfig, Transformer
from weights.initial import init_weights
from weights.loading import load_pretrained
from weights.export import save_pretrained
from parallel import Machine
from benchmarks.tasks import TASKS
from benchmarks import numbers

SHARED = Path(__file__).parents[2] / "shared" / "data"
if not SHARED.is_dir():
    pytest.skip("needs ../shared/data, real benchmark files", allow_module_level=True)
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", DISABLE_MULTIPROC="1")
lm_eval = pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")

# task -> its file in the harness, its split there, and its files here: (target, source, rows)
FILES = {
    "arc_easy": ("arc/arc_easy.yaml", "test", "arc_easy/test.jsonl", "arc_easy/validation.jsonl", 25),
    "winogrande": ("winogrande/default.yaml", "validation", "winogrande/validation.jsonl", "winogrande/validation.jsonl", 25),
    "lambada_openai": ("lambada/lambada_openai.yaml", "test", "lambada/lambada_openai.jsonl", "lambada/lambada_openai.jsonl", 25),
    "mmlu": ("mmlu/default/mmlu_abstract_algebra.yaml", "test", "mmlu/test.jsonl", "mmlu/test.jsonl", 10),
    "truthfulqa_mc2": ("truthfulqa/truthfulqa_mc2.yaml", "validation", "truthfulqa/rows.jsonl", "truthfulqa/mc_task.json", 12),
    "gsm8k": ("gsm8k/gsm8k.yaml", "test", "gsm8k/test.jsonl", "gsm8k/test.jsonl", 3),
}
# task -> demonstrations: how many, the harness's split, (target, source) here
SHOTS = {
    "mmlu": (5, "dev", "mmlu/dev.jsonl", "mmlu/dev.jsonl"),
    "gsm8k": (5, "train", "gsm8k/train.jsonl", "gsm8k/train.jsonl"),
    "arc_easy": (3, "train", "arc_easy/train.jsonl", "arc_challenge/validation.jsonl"),
    "winogrande": (2, "train", "winogrande/train.jsonl", "winogrande/validation.jsonl"),
}
RECORDS = {name: replace(TASKS[name], shots=SHOTS.get(name, (0,))[0]) for name in FILES}


def prepared(path: str, count: int | None = None) -> list[dict]:
    """Read a real file in the fields that both programs know."""
    text = (SHARED / "eval" / path).read_text(encoding="utf-8")
    rows = json.loads(text) if path.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    rows = [row for row in rows if row.get("subject", "abstract_algebra") == "abstract_algebra"][:count]
    for row in rows:
        for key in ("mc1_targets", "mc2_targets"):
            if key in row:
                row[key] = {"choices": list(row[key]), "labels": list(row[key].values())}
        if "continuation" in row:
            row["text"] = f"{row.pop('context')} {row.pop('continuation')}"
    return rows


class Pieces(transformers.PreTrainedTokenizer):
    """The sentencepiece model itself as a Hugging Face tokenizer: their conversion of it encodes some spaces differently."""

    def __init__(self, path: Path) -> None:
        self.ours = Tokenizer(path)
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
        return self.ours.decode(ids) if skip_special_tokens or len(ids) != 1 else {1: "<s>", 2: "</s>"}.get(ids[0], self.ours.decode(ids))


def harness_results(folder: Path, model_folder: Path) -> dict:
    """Run the harness on the files in `folder`."""
    from lm_eval.models.huggingface import HFLM
    home, specs = Path(lm_eval.__file__).parent / "tasks", []
    for name, (yaml, split, path, _, _) in FILES.items():
        count, extra, shots, _ = SHOTS.get(name, (0, None, None, None))
        unused = {other: str(folder / path) for other in ("train", "validation", "dev", "test")}  # splits that are named must exist
        files = {**unused, split: str(folder / path), **({extra: str(folder / shots)} if extra else {})}
        spec = {"include": str(home / yaml), "task": name, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files},
                "num_fewshot": count}
        (folder / f"{name}.yaml").write_text(json.dumps(spec))
        specs.append(str(folder / f"{name}.yaml"))
    model = transformers.LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    lm = HFLM(pretrained=model, tokenizer=Pieces(model_folder), batch_size=4, add_bos_token=True)
    return lm_eval.simple_evaluate(model=lm, tasks=specs, log_samples=True)


def test_harness_and_this_code_agree(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    model = Transformer(ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=32000, ffn_dim=128, max_seq_len=1024))
    init_weights(model, 0)
    save_pretrained(model, tmp_path / "model", Tokenizer(SHARED / "tokenizer"))
    wanted = [(target, source, rows) for _, _, target, source, rows in FILES.values()] + [(target, source, None) for _, _, target, source in SHOTS.values()]
    for target, source, count in wanted:
        (tmp_path / target).parent.mkdir(exist_ok=True)
        (tmp_path / target).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in prepared(source, count)), encoding="utf-8")
    theirs = harness_results(tmp_path, tmp_path / "model")
    engine = Engine(load_pretrained(tmp_path / "model"), Tokenizer(tmp_path / "model"), Machine(0, 1, torch.device("cpu"), torch.float32), 4096)
    for name in FILES:
        task, questions = RECORDS[name], read_questions(name, RECORDS[name], tmp_path, None, 0)
        asked = [encode_question(question, task, engine.tokenizer, engine.context_size) for question in questions]
        given = numbers.answer_questions(name, task, questions, asked, engine)
        samples = sorted(theirs["samples"][name], key=lambda sample: sample["doc_id"])
        seen = {sample["doc_id"]: sample for sample in samples}
        assert len(seen) == len(questions)
        for i, (outcome,) in enumerate(given):
            answers = [answer for (answer,) in seen[i]["resps"]]
            if questions[i].item.choices:
                assert outcome.logprobs == pytest.approx([logprob for logprob, _ in answers], abs=1e-3), (name, i)
                assert outcome.greedy == tuple(greedy for _, greedy in answers)
            else:
                assert [outcome.text] == answers
        result = evaluate(name, task, questions, engine)
        for metric, number in result.metrics.items():
            key, error = (metric, metric.replace(",", "_stderr,")) if "," in metric else (f"{metric},none", f"{metric}_stderr,none")
            assert number.value == pytest.approx(theirs["results"][name][key], rel=1e-4), (name, metric)
            assert number.error == pytest.approx(theirs["results"][name][error], rel=1e-3), (name, metric)
    assert evaluate("gsm8k", TASKS["gsm8k"], read_questions("gsm8k", TASKS["gsm8k"], tmp_path, None, 0), engine).truncated > 0
