"""Public benchmarks: prompts, token boundaries, metrics and totals against the harness's own; the sandbox; what is refused."""
import gzip
import json
import math
import os
import random
import subprocess
import sys
import time
import zlib
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import torch

import microcosm
from benchmarks.engine import Engine, cut_text
from benchmarks.asking import answer_questions, by_part, evaluate, measure
from benchmarks.questions import Question, Request, encode_question, read_questions, texts_to_score
from benchmarks.reading import read_items
from data import Tokenizer
from model import ModelConfig, Transformer, generate
from weights.initial import init_weights
from weights.export import save_pretrained
from parallel import Machine
from benchmarks.tasks import GENERIC, GROUPS, TASKS, Task, generic
from benchmarks.formulas import math_equal
from benchmarks.items import Item, Likelihood, Outcome
from benchmarks.metrics import pass_at_k
from benchmarks import command as benchmark
from benchmarks import report, results as numbers, sandbox

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
        return Likelihood(round(-sum((31 * t + 17 * p + 7 * j) % 101 + 1 for t, p, j in pairs) / 10, 6), all((t + p) % 3 == 0 for t, p, _ in pairs))

    def write(self, prompts, task, name):
        return [[text] for text in self.texts]


def stand_in_evaluate(name: str, task, questions, tokenizer, texts=()):
    """Evaluate with the stand-in; return the result, per-question values by metric, and the stand-in."""
    engine = StandIn(tokenizer, texts)
    engine.check = lambda programs, name: [False] * len(programs)
    asked = [encode_question(question, task, tokenizer, engine.context_size) for question in questions]
    outcomes = answer_questions(name, task, questions, asked, engine)
    measured = measure(name, task, questions, outcomes, engine)
    values = [{metric: row[i] for metric, row in measured.items() if i in row} for i in range(len(questions))]
    result = {metric: numbers.summarize(metric, by_part(row, questions))[0] for metric, row in measured.items()}
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
            assert texts_to_score(question, task.delimiter) == [(r["context"], r["continuation"]) for r in row["requests"]]
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


# ---------------------------------------------------------------------------------------------
# The same on documents of our own, for a clone without the shared data

class Letters:
    """A tokenizer whose ids are code points, with sentencepiece's space in front."""
    bos_id, eos_id = 1, 2

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in " " + text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i) for i in ids if i > 2).removeprefix(" ")


def own_cases() -> list[dict]:
    return json.loads((ROOT / "tests" / "benchmarks.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", own_cases(), ids=lambda case: case["name"])
def test_own_golden(case, tmp_path):
    for path, rows in case["files"].items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / path).write_text(text, encoding="utf-8")
    task = TASKS[case["task"]]
    questions = read_questions(case["task"], task, tmp_path, None, 0)
    result, values, engine = stand_in_evaluate(case["task"], task, questions, Letters(), case.get("texts", ()))
    if "contexts" in case:
        assert [question.prefix + question.item.query for question in questions] == case["contexts"]
    if "pairs" in case:
        assert [[list(pair) for pair in texts_to_score(question, task.delimiter)] for question in questions] == case["pairs"]
    assert values == [pytest.approx(one) for one in case["values"]]
    assert {metric: [number.value, number.error] for metric, number in result.items()} == \
        {metric: pytest.approx([math.nan if x is None else x for x in two], nan_ok=True) for metric, two in case["totals"].items()}


# ---------------------------------------------------------------------------------------------
# Numbers by hand

def test_characters_not_bytes_and_the_first_of_equals():
    item = Item("q", ("是的", "Not at all correct"), (0,))
    assert TASKS["arc_easy"].metrics["acc_norm"](item, Outcome((-6.0, -20.0))) == 0.0  # per byte it would be right
    assert TASKS["arc_easy"].metrics["acc"](Item("q", ("a", "b"), (0,)), Outcome((-1.0, -1.0))) == 1.0


def test_pass_at_k_by_counting_subsets():
    for n in range(1, 7):
        for right in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([True] * right + [False] * (n - right), k))
                assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_errors_by_hand():
    assert numbers.standard_error([0.0, 1.0, 1.0, 1.0]) == pytest.approx(0.25)
    assert math.isnan(numbers.standard_error([1.0]))
    total, _ = numbers.summarize("acc", {"a": [0.0, 1.0, 1.0, 1.0], "b": [0.0, 0.0]})
    assert total.value == 0.5 and total.n == 6  # weighted by size: (4 * 0.75 + 2 * 0) / 6
    assert total.error == pytest.approx(math.sqrt(3 * 0.25**2 * 4 / 4 / 6))


def test_bootstrap_draws_are_those_of_python():
    values = [-1.0, -2.5, -0.5, -4.0, -3.0]
    drawn = [math.exp(-sum(rng.choices(values, k=5)) / 5) for i in range(2) for rng in [random.Random(i)] for _ in range(1000)]
    mean = sum(drawn) / 2000
    assert numbers.perplexity_error(values, draws=2000) == pytest.approx(math.sqrt(sum((x - mean)**2 for x in drawn) / 1999), rel=1e-9)


@pytest.mark.parametrize("text, truth, equal", [
    (r"so \boxed{\frac12}", "1/2", False), (r"$x = \frac12$", r"$\frac{1}{2}$", True), ("the answer is 3.", "3", True), ("0.5", "$1/2$", True),
    (r"\boxed{x=7}", "7", True), (r"$\sqrt3$", r"$\sqrt{3}$", True), (r"$90^\circ$", "$90$", True), ("", "3", False), (r"\boxed{", "3", False)])
def test_formulas(text, truth, equal):
    assert math_equal(text, truth) is equal


# ---------------------------------------------------------------------------------------------
# The real engine

def small_engine(batch_tokens: int = 512, context: int = 64) -> Engine:
    model = Transformer(ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300, ffn_dim=64, max_seq_len=context))
    init_weights(model, 0)
    return Engine(model, Letters(), Machine(0, 1, torch.device("cpu"), torch.float32), batch_tokens)


def naive_score(model, request, context: int) -> tuple[float, bool]:
    """Score one request in a forward of its own."""
    full = [*request.context, *request.continuation]
    kept = full[-(context + 1):][:-1]
    logprobs = model(torch.tensor([kept]))[0].log_softmax(-1)[-len(request.continuation):]
    target = torch.tensor(request.continuation)
    return logprobs.gather(1, target[:, None]).sum().item(), bool((logprobs.argmax(-1) == target).all())


@pytest.mark.parametrize("batch_tokens", [1, 100, 5000])
def test_trees_score_as_single_forwards_do(batch_tokens):
    engine, rng = small_engine(batch_tokens), random.Random(0)
    def draw(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(300) for _ in range(n))
    questions = []
    for _ in range(30):
        context = draw(rng.choice([1, 5, 30, 70]))
        questions.append([Request(context, draw(rng.choice([1, 1, 2, 9, 40]))) for _ in range(rng.randint(1, 5))])
    questions.append([Request(draw(20) + (7,), (5, 6)), Request(draw(20) + (8,), (5, 6))])
    for question, scores in zip(questions, engine.score(questions, "test")):
        for request, (logprob, greedy) in zip(question, scores):
            expected, expected_greedy = naive_score(engine.model, request, 64)
            assert logprob == pytest.approx(expected, abs=1e-4) and greedy == expected_greedy


def test_generation_stops_at_the_first_stop_string():
    engine = small_engine()
    prompts = [[1, *map(ord, "abc")], [1, *map(ord, "hello there")]]
    free = generate(engine.model, prompts, 30, temperature=0.0, eos_id=2).tokens
    stop = chr(free[0][5]) + chr(free[0][6])
    task = Task(generic, (), {}, until=(stop,), max_new_tokens=30)
    texts = engine.write(prompts, task, "test")
    for text, ids in zip(texts, free):
        assert text == [cut_text(Letters().decode(ids), (stop, "</s>"))]


# ---------------------------------------------------------------------------------------------
# What is refused, and what is counted

@pytest.mark.parametrize("content, message", [
    ('{"query": "a", "choices": ["x", ""], "gold": 0}', ":1: an empty choice"),
    ('{"query": "a", "choices": ["x", "y"]}', ":1: no field 'gold'"),
    ('{"query": "a", "choices": ["x", "y"], "gold": 2}', ":1: no right answer among the choices"),
    ('{"query": "a", "choices": ["x", "y"], "gold": -1}', ":1: no right answer among the choices"),
    ('{"query": "a", "choices": ["x", "y"], "gold": null}', ":1: no right answer among the choices"),
    ('{"query": "a", "choices": ["x", "y"], "gold": "z"}', ":1: a field has the wrong type or value"),
    ('{"query": 1, "choices": ["x", "y"], "gold": 0}', ":1: query, choices and answers must be strings"),
    ('{"context": "a", "answer": ""}', ":1: no right answer"),
    ('{"context": "a", "answer": "b"}\n{"context": "a", "ans', ":2: broken JSON"),
    ('{"text": "a"}', ":1: not a generic task"),
    ("", ": holds no question"),
])
def test_bad_files_are_refused_with_file_and_line(content, message, tmp_path):
    (tmp_path / "mine.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="mine.jsonl" + message):
        read_items(GENERIC, ("mine.jsonl",), tmp_path)


def test_broken_csv_and_missing_demonstrations_are_refused(tmp_path):
    for split in ("test", "dev"):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
    test, dev = tmp_path / "mmlu" / "test" / "algebra_test.csv", tmp_path / "mmlu" / "dev" / "algebra_dev.csv"
    test.write_text('"1+1, in ""Z""?",0,1,2,3,C\n')
    dev.write_text("1+0?,0,1,2,3,B\n" * 4)
    with pytest.raises(ValueError, match="4 demonstrations of algebra, it takes 5"):
        read_questions("mmlu", TASKS["mmlu"], tmp_path, None, 0)
    dev.write_text("1+0?,0,1,2,3,B\n" * 5)
    (question,) = read_questions("mmlu", TASKS["mmlu"], tmp_path, None, 0)
    assert question.item.query == '1+1, in "Z"?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer:' and question.item.gold == (2,)
    test.write_text("1+1?,0,1,2,3,C\n1,2\n")
    with pytest.raises(ValueError, match="algebra_test.csv:2: 2 columns instead of 6"):
        read_questions("mmlu", TASKS["mmlu"], tmp_path, None, 0)


def test_demonstrations_on_request(tmp_path):
    rows = [{"sentence": f"The cup {i} fell on the plate because _ slid.", "option1": "it", "option2": "the plate", "answer": "2"} for i in range(9)]
    (tmp_path / "winogrande").mkdir()
    for split in ("train", "validation"):  # the same rows, to see that no question is its own demonstration
        (tmp_path / "winogrande" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = replace(TASKS["winogrande"], shots=2)
    rng, pool = random.Random(1234), list(range(9))
    for i, question in enumerate(read_questions("winogrande", task, tmp_path, None, 0)):
        shown = [j for j in rng.sample(pool, 3) if j != i][:2]
        assert question.prefix == "".join(f"The cup {j} fell on the plate because the plate slid.\n\n" for j in shown)
    with pytest.raises(ValueError, match="9 demonstrations of winogrande, it takes 10"):
        read_questions("winogrande", replace(task, shots=9), tmp_path, None, 0)
    assert all(not question.prefix for question in read_questions("winogrande", replace(task, shots=0), tmp_path, None, 0))


def test_questions_that_do_not_fit_are_counted():
    engine = small_engine(context=16)
    questions = [Question(Item("q", ("a", "b"), (0,))), Question(Item("q", ("a" * 40, "b"), (0,))), Question(Item("q" * 40, ("a", "b"), (0,)))]
    result = evaluate("mine", GENERIC, questions, engine)
    assert result.metrics["acc"].n == 2 and result.truncated == 1
    assert result.skipped == {"a choice is longer than the model's context of 16 tokens": 1}
    result = evaluate("mine", GENERIC, [Question(Item("q", answers=("a",)))], engine)
    assert result.metrics == {} and result.skipped == {"256 new tokens leave no room in the model's context of 16": 1}
    assert "mine: 1 skipped: 256 new tokens" in report.table({"model": {"mine": result}}, [])


def test_limit_draws_from_the_seed_and_keeps_the_order(tmp_path):
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"context": f"q{i}", "answer": "a"}) + "\n" for i in range(50)))
    task = replace(GENERIC, files=("mine.jsonl",))
    def draw(seed: int) -> list[str]:
        return [question.item.query for question in read_questions("mine", task, tmp_path, 10, seed)]
    assert draw(0) == draw(0) != draw(1)
    assert draw(0) == sorted(draw(0), key=lambda query: int(query[1:])) and len(draw(0)) == 10


def test_groups():
    assert len(GROUPS["general12"]) == 12 and set(GROUPS["general12"]) <= set(TASKS)
    asked, groups = benchmark.plan("arc_easy,general12")
    assert asked["arc_easy"] and not asked["mmlu"] and groups == ["general12"]
    with pytest.raises(ValueError, match="no task 'arc'"):
        benchmark.plan("arc")
    results = {name: numbers.Result(skipped=Counter({"no file": 0})) for name in GROUPS["general12"]}
    results["boolq"] = numbers.Result({"acc": numbers.Number(0.5, 0.1, 30)})
    assert "mean over 1 of 12 tasks" in report.table({"model": results}, groups)


def test_one_model_against_another():
    """Question by question, on the questions both were asked; a mean over tasks that all were asked."""
    def model(rte: dict[int, float], lambada: dict[int, float]) -> dict:
        rows = {"rte": {"acc": rte}, "lambada_openai": {"perplexity": lambada}, "copa": {}}
        return {name: numbers.Result({metric: numbers.summarize(metric, {"": list(row.values())})[0] for metric, row in values.items()}, {},
                                        Counter(), values=values) for name, values in rows.items()}
    results = {"sft": model({0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0}, {0: -1.0, 1: -2.0}), "ppo": model({1: 1.0, 2: 0.0, 3: 0.0}, {0: -0.5, 1: -1.0})}
    changed = numbers.changes(results)
    rte = changed["rte"]["acc"]  # +1, 0, 0, and by Agresti and Min half a win, half a loss, one tie
    middle, half = 1 / 5, 1.959964 * math.sqrt((2 / 5 - 1 / 25) / 5)
    assert rte == pytest.approx((1 / 3, middle - half, middle + half, 3))
    perplexity = changed["lambada_openai"]["perplexity"]  # from exp(1.5) to exp(0.75); log-likelihoods rise by 0.5 and by 1
    half = 1.959964 * 0.25 / math.sqrt(2)
    assert perplexity == pytest.approx((math.exp(0.75) - math.exp(1.5), *(math.exp(1.5) * (math.exp(-0.75 + s * half) - 1) for s in (-1, 1)), 2))
    assert changed["copa"] == {} and numbers.changes({"sft": results["sft"]}) == {}
    assert numbers.group_change(["rte"], results)[:3] == pytest.approx(rte[:3])
    results["base"] = {name: numbers.Result() for name in results["sft"]}
    assert numbers.members("all", {name: {**dict.fromkeys(GROUPS["all"], results["base"]["copa"]), **one} for name, one in results.items()}) == []


# ---------------------------------------------------------------------------------------------
# Programs that a model wrote

try:
    sandbox.passes("")
    confined = True
except sandbox.NotConfined:
    confined = False
needs_sandbox = pytest.mark.skipif(not confined, reason="needs Linux with seccomp")


def programs(problems: list[dict], completions: list[str]) -> list[str]:
    items = [TASKS["humaneval"].read({"canonical_solution": "", **problem}) for problem in problems]
    return [f"{item.opening}{completion}\n{item.checks}" for item, completion in zip(items, completions)]


@needs_sandbox
@needs_shared
def test_official_solutions_pass_and_the_official_smoke_file_scores_one_half():
    problems = [json.loads(line) for line in gzip.open(SHARED / "eval" / "humaneval" / "HumanEval.jsonl.gz", "rt")]
    assert sum(sandbox.check_all(programs(problems, [problem["canonical_solution"] for problem in problems]))) == len(problems) == 110
    folder = SHARED / "eval" / "humaneval"
    samples = read_jsonl(folder / "example_samples.jsonl")
    right = sandbox.check_all(programs(read_jsonl(folder / "example_problem.jsonl") * 6, [sample["completion"] for sample in samples]))
    assert pass_at_k(len(samples), sum(right), 1) == 0.5
    rows = [json.loads(line) for line in (SHARED / "eval" / "mbpp" / "mbpp.jsonl").read_text().splitlines()]
    assert all(sandbox.check_all([f"{row['code']}\n{row['test_setup_code']}\n" + "\n".join(row["test_list"]) for row in rows]))


@needs_sandbox
@pytest.mark.parametrize("program", [
    "assert False", "1 +", "import sys; sys.exit(0)", "import os; os._exit(0)", "input()", "import sys; sys.stdin.buffer.raw.read(1)[0]",
    "import os; os.fork()", "import subprocess; subprocess.run(['true'])", "import multiprocessing; multiprocessing.Pool(2)",
    "import os, sys; os.execv(sys.executable, ['python'])", "import os; os.kill(-1, 9)", "import os; os.kill(os.getppid(), 9)",
    "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()", "import socket; socket.socket()", "open('inside', 'w')", "open(VICTIM, 'w')", "open(VICTIM, 'r+')", "import os; os.remove(VICTIM)",
    "import os; os.truncate(VICTIM, 0)", "import os; os.chmod(VICTIM, 0)", "import os; os.rename(VICTIM, 'x')", "import os; os.mkdir('x')",
    "import shutil; shutil.rmtree(FOLDER)", "import os; os.link(VICTIM, VICTIM + '2')", "import os\nwhile True: os.write(1, b'x' * 10**6)",
    "x = bytearray(10**11)", "import resource; resource.setrlimit(resource.RLIMIT_CPU, (999, 999))",
    "import ctypes\nif ctypes.CDLL(None).fork() < 0: raise OSError"])
def test_a_hostile_program_fails_and_harms_nothing(program, tmp_path):
    (tmp_path / "victim").write_text("whole")
    mode = (tmp_path / "victim").stat().st_mode
    assert not sandbox.passes(f"FOLDER, VICTIM = {str(tmp_path)!r}, {str(tmp_path / 'victim')!r}\n{program}")
    assert os.listdir(tmp_path) == ["victim"] and (tmp_path / "victim").read_text() == "whole" and (tmp_path / "victim").stat().st_mode == mode


@needs_sandbox
def test_sleepers_and_spinners_are_killed_at_the_deadline():
    began = time.perf_counter()
    assert sandbox.check_all(["import time; time.sleep(60)", "while True: pass"]) == [False, False]
    assert time.perf_counter() - began < 2 * sandbox.DEADLINE


@needs_sandbox
def test_harmless_programs_pass():
    assert all(sandbox.check_all([
        "", "print('x' * 10**6)", "import os; assert os.listdir('.') == []", "assert __name__ == '__main__'", "import time; time.sleep(0.1)",
        "import math, re, heapq, hashlib, random, datetime, collections, itertools, decimal, typing",
        "import threading; thread = threading.Thread(target=print); thread.start(); thread.join()"]))


# ---------------------------------------------------------------------------------------------
# The command

@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A model of the embedded world, untrained, and a few files."""
    folder = tmp_path_factory.mktemp("world")
    microcosm.train_tokenizer(folder / "tokenizer.model")
    tokenizer = Tokenizer(folder / "tokenizer.model")
    model = Transformer(ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=tokenizer.vocab_size, ffn_dim=64, max_seq_len=128))
    for seed, name in enumerate(("model", "other")):
        init_weights(model, seed)
        save_pretrained(model, folder / name, tokenizer)
    rows = [{"query": f"Say {i}:", "choices": [f"word {i}", "no", "yes, " * (i % 5)+ "so"], "gold": i % 3} for i in range(23)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "bad.jsonl").write_text('{"query": "a", "choices": ["x", ""], "gold": 0}')
    return folder


def command(world: Path, *args: str, ranks: int = 1) -> subprocess.CompletedProcess:
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=29517"] if ranks > 1 else [sys.executable]
    return subprocess.run([*start, str(ROOT / "eval.py"), "run", str(world / "model"), *args], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_command_on_one_and_on_two_ranks(world, tmp_path):
    tasks = f"--tasks={world / 'mine.jsonl'},microcosm,general12"
    outputs = []
    for ranks in (1, 2):
        done = command(world, tasks, f"--data={tmp_path}", "--limit=20", "--batch_tokens=200", f"--out={tmp_path / str(ranks)}", ranks=ranks)
        assert done.returncode == 0, done.stderr
        outputs.append(json.loads((tmp_path / str(ranks) / "results.json").read_text()))
    assert "microcosm                   0  strict" in done.stdout and "mmlu                        -  -" in done.stdout and "mmlu: not run: " in done.stdout
    one, two = (output["models"]["model"]["tasks"] for output in outputs)
    assert one["microcosm"]["metrics"]["strict"]["n"] == 240 and set(one["microcosm"]["parts"]["strict"]) == set(microcosm.TASKS)
    assert one == two and one[str(world / "mine.jsonl")]["metrics"]["acc"]["n"] == 20


def test_command_on_two_models(world, tmp_path):
    task, out = str(world / "mine.jsonl"), tmp_path / "out"
    done = command(world, str(world / "other"), f"--tasks={task}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    written, answers = json.loads((out / "results.json").read_text()), read_jsonl(out / "answers.jsonl")
    rows = {name: [row for row in answers if row["model"] == name] for name in ("model", "other")}
    assert list(written["models"]) == ["model", "other"] and len(rows["model"]) == len(rows["other"]) == 23
    for metric in ("acc", "acc_norm"):
        before, after = ([row["values"][metric] for row in rows[name]] for name in ("model", "other"))
        assert written["models"]["other"]["tasks"][task]["metrics"][metric]["value"] == pytest.approx(sum(after) / 23)
        assert written["changes"]["tasks"][task][metric]["value"] == pytest.approx(sum(after) / 23 - sum(before) / 23)
    best = [row["logprobs"].index(max(row["logprobs"])) in row["gold"] for row in rows["other"]]
    assert best == [row["values"]["acc"] for row in rows["other"]]
    assert done.stdout.strip() in (out / "report.md").read_text()
    kept = (out / "report.md").read_bytes()
    done = command(world, f"--tasks={task}", f"--out={out}")
    assert done.returncode == 2 and "holds something already; name a new folder" in done.stderr and (out / "report.md").read_bytes() == kept


@pytest.mark.parametrize("args, message", [
    (["--tasks=bad.jsonl"], "bad.jsonl:1: an empty choice (choice 2 of 2); correct this row or take it out"),
    (["--tasks=boolq", "--data=nowhere"], "nowhere/boolq/validation.jsonl: no such file"),
    (["--tasks=boolqq"], "--tasks: no task 'boolqq'"),
    (["MODEL", "--tasks=microcosm"], "a model folder is named twice"),
    (["nowhere", "--tasks=microcosm"], "nowhere"),
    (["--tasks=bbh", "--data=nowhere", "--shots=5"], "bbh has 3 fixed demonstrations: leave out --shots"),
    (["--tasks=microcosm", "--shots=5"], "microcosm has no demonstrations: leave out --shots"),
])
def test_command_refuses_with_one_line_and_status_2(world, args, message):
    done = command(world, *[arg.replace("bad.jsonl", str(world / "bad.jsonl")).replace("MODEL", str(world / "model")) for arg in args])
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_code_runs_only_when_allowed(world, tmp_path):
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval" / "HumanEval.jsonl").write_text(json.dumps({
        "task_id": "test/0", "prompt": "def f():\n", "canonical_solution": "    return 1", "test": "def check(f):\n    assert f() == 1", "entry_point": "f"}))
    done = command(world, "--tasks=humaneval", f"--data={tmp_path}")
    assert done.returncode == 2 and "--allow-code-execution" in done.stderr
