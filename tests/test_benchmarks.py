"""Public benchmarks: prompts, token boundaries, metrics and totals against the harness's own; the sandbox; what is refused."""
import json
import math
import zlib
from functools import cache
from pathlib import Path

import pytest

import benchmarks
from benchmarks import Engine, Question, evaluate, read_questions
from data import Tokenizer, read_rows
from tasks import GENERIC, GROUPS, TASKS, Item, Outcome

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not (SHARED / "eval" / "harness_golden").is_dir(), reason="needs ../shared/data, real benchmark files")


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class StandIn:
    """A deterministic model of integer arithmetic: it scores token ids, and writes what it is told to."""
    samples, context_size = 1, 10**9

    def __init__(self, tokenizer, texts: list[str] = ()) -> None:
        self.tokenizer, self.texts, self.requests = tokenizer, texts, []

    def score(self, questions, name):
        self.requests = questions
        return [[self.loglikelihood(request) for request in requests] for requests in questions]

    def loglikelihood(self, request) -> tuple[float, bool]:
        full = request.context + request.continuation
        pairs = [(full[j], full[j - 1], j) for j in range(len(request.context), len(full))]
        return round(-sum((31 * t + 17 * p + 7 * j) % 101 + 1 for t, p, j in pairs) / 10, 6), all((t + p) % 3 == 0 for t, p, _ in pairs)

    def write(self, prompts, task, name):
        return [[text] for text in self.texts]


def stand_in_evaluate(name: str, task, questions, tokenizer, texts=()):
    """Evaluate with the stand-in; return the result, per-question values by metric, and the stand-in."""
    engine = StandIn(tokenizer, texts)
    engine.check = lambda programs, name: [False] * len(programs)
    asked = [benchmarks.encode_question(question, task, tokenizer, engine.context_size) for question in questions]
    outcomes = benchmarks.answer_questions(name, task, questions, asked, engine)
    rows = [benchmarks.measure(name, task, [question], [given], engine) for question, given in zip(questions, outcomes)]
    values = [{metric: x for metric, parts in row.items() for values in parts.values() for x in values} for row in rows]
    result = {metric: benchmarks.summarize(metric, parts)[0] for metric, parts in
              benchmarks.measure(name, task, questions, outcomes, engine).items()}
    return result, values, engine


# ---------------------------------------------------------------------------------------------
# The harness's golden files

PARTS = ("mmlu", "bbh_cot_fewshot", "agieval", "xnli", "xcopa", "cmmlu")


def golden_names() -> list[str]:
    return sorted(path.stem for path in (SHARED / "eval" / "harness_golden").glob("*.jsonl"))


def split_name(golden: str) -> tuple[str, str]:
    """Map a golden file's name to a task and one of its parts."""
    name = golden.removesuffix("_5shot").removesuffix("_3shot_prompts")
    for prefix in PARTS:
        if name.startswith(prefix + "_"):
            part = name.removeprefix(prefix + "_")
            return prefix.removesuffix("_cot_fewshot"), part.replace("_", "-") if prefix == "agieval" else part
    return name, ""


@cache
def all_questions(task: str) -> list[Question]:
    return read_questions(task, TASKS[task], SHARED / "eval", None, 0)


def told(golden: str, questions: list[Question], rows: list[dict]) -> list[str]:
    """Rebuild the texts that the golden files' stand-in wrote, for every question where the rule is known."""
    if golden == "gsm8k_5shot":
        solutions = [row["175b_verification"]["solution"] for row in read_jsonl(SHARED / "ranked" / "gsm8k_example_model_solutions.jsonl")]
        heads = [text.rsplit("\nA: ", 1) for text in solutions]
        tails = ["\n#### {}", " So the answer is {}.", "\n#### ${}.00", "\nA: {}"]
        return [head[0] + tails[i % 4].format(head[1]) if len(head) == 2 else head[0] for i, head in enumerate(heads)]
    if golden in ("triviaqa", "nq_open"):
        forms = [lambda a: " " + a[0], lambda a: " " + a[-1].upper(), lambda a: " the " + a[0], lambda a: a[0] + "!", lambda a: " unknown thing"]
        return [forms[i % 5](question.item.answers) for i, question in enumerate(questions)]
    if golden.startswith("mbpp"):
        return ["pass"] * len(questions)
    return [row["raw_generation"] for row in rows if "raw_generation" in row]


@needs_shared
@pytest.mark.parametrize("golden", golden_names())
def test_golden(golden):
    rows = read_jsonl(SHARED / "eval" / "harness_golden" / f"{golden}.jsonl")
    total = json.loads((SHARED / "eval" / "harness_golden" / "summary.json").read_text())[golden]
    name, part = split_name(golden)
    task, questions = TASKS[name], [question for question in all_questions(name) if question.part == part]
    texts = told(golden, questions, rows)
    whole = len(questions) if questions[0].item.choices else len(texts)
    assert [row["doc_id"] for row in rows] == list(range(len(rows)))
    result, values, engine = stand_in_evaluate(name, task, questions[:whole], Tokenizer(SHARED / "tokenizer"), texts)
    for i, row in enumerate(rows):
        question = questions[i]
        if "requests" in row:
            assert benchmarks.texts_to_score(question, task.delimiter) == [(r["context"], r["continuation"]) for r in row["requests"]]
            for request, expected in zip(engine.requests[i], row["requests"], strict=True):
                assert list(request.continuation) == expected["continuation_tokens"]
                assert len(request.context) == expected["n_context_tokens"]
                if "context_tokens" in expected:
                    assert list(request.context) == expected["context_tokens"]
                else:
                    assert zlib.crc32(" ".join(map(str, request.context)).encode()) == expected["context_tokens_crc32"]
                assert engine.loglikelihood(request) == (expected["loglikelihood"], expected["is_greedy"])
        else:
            assert question.prefix + question.item.query == row["context"]
            assert texts[i] == row["raw_generation"]
            assert list(task.until) == row["gen_kwargs"]["until"] and task.max_new_tokens == row["gen_kwargs"].get("max_gen_toks", 256)
        expected = {metric.replace("pass_at_1", "pass@1"): value for metric, value in row["metrics"].items()}
        assert values[i] == pytest.approx(expected, rel=1e-9)
    expected = {metric.replace("pass_at_1", "pass@1"): value for metric, value in total.items() if metric not in ("n_docs", "num_fewshot")}
    assert total["n_docs"] == len(questions)
    if whole == len(questions):  # the texts for BBH are code-davinci-002's, of which the golden files hold the first four
        assert {metric: number.value for metric, number in result.items()} == pytest.approx(expected, abs=1e-6)
