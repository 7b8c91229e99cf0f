"""Public benchmarks with the numbers of lm-evaluation-harness, on one process or under torchrun.

    python eval.py run MODEL_DIR [MODEL_DIR ...] --tasks=arc_easy,general12 --data=FOLDER
    torchrun --nproc_per_node=8 eval.py run MODEL_DIR --tasks=all --data=FOLDER --limit=200 --out=results.json

    files -> rows -> Item -> Question (demonstrations before it) -> token ids -> Outcome -> metrics -> table

Every rank holds the model, reads the same questions and takes its share of them. The choices of one question are branches
of one tree: what they share is computed once, and an attention mask keeps each branch from seeing the others. Nothing is
left out of a mean in silence: a row that cannot be read stops the program, a question that cannot be asked is counted.
"""
from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Sequence

import parallel
from benchmarks import sandbox
from benchmarks.engine import Engine
from benchmarks.numbers import Change, Number, Result, Results, changes, evaluate, group_change, group_mean, members
from benchmarks.questions import MICROCOSM, Question, Unavailable, microcosm_questions, read_questions
from benchmarks.tasks import GENERIC, GROUPS, TASKS, Task
from data import open_tokenizer
from evaluation.plots import draw_tasks
from weights import load_pretrained


def number(x: float, sign: str = "") -> str:
    return f"{x:{sign}10.4f}" if abs(x) < 1e4 else f"{x:{sign}10.3g}" if math.isfinite(x) else f"{'-':>10}"


def numbers_text(columns: Sequence[Number | None], changed: Change | None) -> str:
    """Write the value and error of one model, or the values of several and what changed."""
    if len(columns) == 1:
        return number(columns[0].value) + number(columns[0].error)
    text = "".join(f"{number(x.value if x else math.nan):>12}" for x in columns)
    if changed:
        text += number(changed.value, "+") + f"{number(changed.low, '+')} to {number(changed.high, '+').strip():10}"
        text += "noise" * (changed.low <= 0 <= changed.high)
    return text.rstrip()


def table(results: Results, groups: Sequence[str]) -> str:
    """Lay out results for a terminal: one line per task and metric, one per group, then what was left out."""
    tables, changed = list(results.values()), changes(results)
    head = f"{'value':>10}{'stderr':>10}" if len(tables) == 1 else "".join(f"{name[-11:]:>12}" for name in results) + f"{'change':>10}   95 % interval"
    lines, notes = [f"{'task':24}{'shots':>5}  {'metric':30}{'n':>7}{'skipped':>9}{head}"], []
    for name, result in tables[-1].items():
        for metric in dict.fromkeys(metric for one in tables for metric in one[name].metrics):
            columns = [one[name].metrics.get(metric) for one in tables]
            n = columns[-1].n if columns[-1] else 0
            lines.append(f"{name:24}{result.shots:>5}  {metric:30}{n:>7}{result.skipped.total():>9}{numbers_text(columns, changed.get(name, {}).get(metric))}")
        if not any(one[name].metrics for one in tables):
            lines.append(f"{name:24}{'-':>5}  {'-':30}{0:>7}{result.skipped.total():>9}")
    for group in groups:
        names = members(group, results)
        if names:
            label, columns = f"mean over {len(names)} of {len(GROUPS[group])} tasks", [group_mean(names, one) for one in tables]
            lines.append(f"{group:31}{label:46}{numbers_text(columns, group_change(names, results))}")
    for model, one in results.items():
        for name, result in one.items():
            who = f"{model}, {name}" if len(tables) > 1 else name
            notes += [f"{who}: {count} skipped: {reason}" if count else f"{name}: not run: {reason}" for reason, count in result.skipped.items()]
            if result.truncated:
                notes.append(f"{who}: {result.truncated} prompts longer than the model's context lost their beginning")
    return "\n".join([*lines, *dict.fromkeys(notes)])


def to_json(results: Results, groups: Sequence[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Return results as plain JSON; what is undefined is null."""
    def plain(x: NamedTuple | None) -> dict[str, Any] | None:
        return x and {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in x._asdict().items()}

    def model(results: dict[str, Result]) -> dict[str, Any]:
        return {"groups": {group: plain(group_mean(names, results)) for group, names in grouped.items()}, "tasks": {
            name: {"metrics": {metric: plain(x) for metric, x in result.metrics.items()}, "shots": result.shots,
                   "skipped": dict(result.skipped), "truncated": result.truncated,
                   "parts": {metric: {part: plain(x) for part, x in parts.items()} for metric, parts in result.parts.items() if len(parts) > 1}}
            for name, result in results.items()}}
    grouped = {group: members(group, results) for group in groups}
    written = {"settings": settings, "models": {name: model(one) for name, one in results.items()}}
    if len(results) > 1:
        written["changes"] = {"groups": {group: plain(group_change(names, results)) for group, names in grouped.items()},
                              "tasks": {name: {metric: plain(x) for metric, x in row.items()} for name, row in changes(results).items()}}
    return written


READING = """Values and standard errors as lm-evaluation-harness gives them. **change** is the last model less the one before it, question by
question, with the 95 % interval of Agresti and Min (2005); **noise** marks an interval that holds 0. One interval in twenty misses the truth.
Every question and answer is in answers.jsonl."""


def write(folder: Path, results: Results, groups: Sequence[str], settings: dict[str, Any]) -> None:
    """Write results.json, answers.jsonl and report.md, with a plot if matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(to_json(results, groups, settings), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with open(folder / "answers.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"model": model, "task": name, **answer}, ensure_ascii=False) + "\n"
                        for model, one in results.items() for name, result in one.items() for answer in result.answers)
    lines = ["# Benchmarks", "", "```", table(results, groups), "```", "", READING, ""]
    shares = {model: {name: next(iter(result.metrics.values())).value for name, result in one.items() if result.metrics}
              for model, one in results.items()}
    changed = {name: next(iter(row.values())) for name, row in changes(results).items() if row}
    figure = draw_tasks(shares, {name: (x.value, (x.low, x.high)) for name, x in changed.items() if x})
    if figure:
        figure.savefig(folder / "tasks.png", dpi=110)
        lines += ["![tasks](tasks.png)", ""]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")


def plan(names: str) -> tuple[dict[str, bool], list[str]]:
    """Expand --tasks; return task -> whether it was asked for by its own name, and the groups among the names."""
    asked: dict[str, bool] = {}
    for name in filter(None, names.split(",")):
        if name in TASKS or re.search(r"\.(jsonl|json)(\.gz)?$", name):
            asked[name] = True
        elif name in GROUPS:
            for member in GROUPS[name]:
                asked.setdefault(member, name == member)
        else:
            raise ValueError(f"--tasks: no task {name!r}; there are {', '.join([*TASKS, *GROUPS])}, and files of your own ending in .jsonl or .json")
    if not asked:
        raise ValueError(f"--tasks names no task; there are {', '.join([*TASKS, *GROUPS])}")
    return asked, [name for name in names.split(",") if len(GROUPS.get(name, ())) > 1]


def prepare(name: str, options: argparse.Namespace) -> tuple[Task, list[Question]]:
    """Return a task and its questions; Unavailable if it cannot run with these options."""
    own = replace(GENERIC, files=(Path(name).name,))
    task, folder = {"microcosm": MICROCOSM, **TASKS}.get(name, own), options.data if name in TASKS else Path(name).parent
    if options.shots is not None:
        if not task.shot_files:
            raise Unavailable(f"{name} has {f'{task.shots} fixed' if task.shots else 'no'} demonstrations: leave out --shots")
        task = replace(task, shots=options.shots)
    if task is MICROCOSM:
        return task, microcosm_questions(options.limit, options.seed)
    if folder is None:
        raise Unavailable(f"{name} reads files: give --data=FOLDER")
    questions = read_questions(name, task, folder, options.limit, options.seed)
    if any(question.item.checks for question in questions):
        if not options.allow_code_execution:
            raise Unavailable(f"{name} runs programs that the model writes: allow it with --allow-code-execution")
        sandbox.passes("")  # whether programs can be confined shows before the model has written them
    return task, questions


def parse_options(args: Sequence[str]) -> argparse.Namespace:
    """Read the command line; an error exits with status 2."""
    def count(text: str) -> int:
        if int(text) < 0:
            raise ValueError
        return int(text)

    def positive(text: str) -> int:
        if int(text) < 1:
            raise ValueError
        return int(text)
    parser = argparse.ArgumentParser("eval.py run", description="Public benchmarks with the prompts and metrics of lm-evaluation-harness.",
                                     epilog=f"tasks: {', '.join(TASKS)}; groups: {', '.join(GROUPS)}; or a file.jsonl of "
                                            "{query, choices, gold}, {context, continuation} or {context, answer, aliases}")
    parser.add_argument("models", type=Path, nargs="+", metavar="DIR",
                        help="model folders with their tokenizer.model; of several, the last is compared with the one before it")
    parser.add_argument("--tasks", required=True, help="names of tasks, groups and files, separated by commas")
    parser.add_argument("--data", type=Path, help="folder with the benchmarks' files")
    parser.add_argument("--shots", type=count, help="demonstrations before a question, from the task's train.jsonl (the harness's number)")
    parser.add_argument("--limit", type=positive, help="at most so many questions of every part of a task, drawn from the seed")
    parser.add_argument("--seed", type=int, default=0, help="of the questions drawn and of samples (0)")
    parser.add_argument("--batch_tokens", type=positive, help="tokens of a batch, padding included (16384 on a GPU, 2048 on a CPU)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the model (auto: bfloat16 on a GPU)")
    parser.add_argument("--samples", type=positive, default=1, help="programs per code problem, for pass@10 and pass@100 (1, greedy)")
    parser.add_argument("--allow-code-execution", action="store_true", help="run the programs that the model writes, confined")
    parser.add_argument("--out", type=Path, help="new folder for report.md, results.json and all answers")
    return parser.parse_args(args)


def run(options: argparse.Namespace) -> None:
    """Evaluate models; ValueError says in one line what cannot be done."""
    asked, groups = plan(options.tasks)
    machine = parallel.start(options.dtype)
    if options.out and options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ValueError(f"--out={options.out} holds something already; name a new folder")
    if len(set(options.models)) < len(options.models):
        raise ValueError("a model folder is named twice; nothing can change between them")
    names = [folder.name for folder in options.models]
    models = dict(zip(names if len(set(names)) == len(names) else map(str, options.models), options.models))
    tokenizers = {name: open_tokenizer(folder) for name, folder in models.items()}
    ready: dict[str, tuple[Task, list[Question]] | Result] = {}
    for name, by_name in asked.items():  # all files are read before the first question is asked: a bad row shows at once
        try:
            ready[name] = prepare(name, options)
        except Unavailable as error:
            if by_name:
                raise
            ready[name] = Result({}, {}, Counter({str(error): 0}))
    results: Results = {}
    for model, folder in models.items():
        engine = Engine(load_pretrained(folder, machine.device, machine.dtype), tokenizers[model], machine,
                        options.batch_tokens or (16384 if machine.device.type == "cuda" else 2048), options.samples, options.seed)
        results[model] = {name: one if isinstance(one, Result) else evaluate(f"{model} {name}", *one, engine) for name, one in ready.items()}
        del engine  # before the next model is loaded
    if machine.is_main:
        print(table(results, groups))
        if options.out:
            write(options.out, results, groups, {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()
                                                 if key != "models"} | {"models": list(map(str, options.models))})
    parallel.stop()


def main(args: Sequence[str]) -> None:
    """Be the command `eval.py run`; what cannot be done ends the program with one line and status 2."""
    options = parse_options(args)
    try:
        run(options)
    except (ValueError, OSError, sandbox.NotConfined) as error:
        parallel.fail(f"eval.py run: error: {error}")
