"""Public benchmarks with the numbers of lm-evaluation-harness, on one process or under torchrun.

    python eval.py run MODEL_DIR [MODEL_DIR ...] --tasks=arc_easy,general12 --data=FOLDER
    torchrun --nproc_per_node=8 eval.py run MODEL_DIR --tasks=all --data=FOLDER --out=results

    files -> rows -> Item -> Question (with demonstrations) -> ids -> Outcome -> metrics -> table

Every rank holds the model, reads the same questions and takes its share of them. Nothing is left
out of a mean in silence: a row that cannot be read stops the program, a question that cannot be
asked is counted.
"""
from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Sequence

import parallel
from benchmarks import report, sandbox
from benchmarks.asking import evaluate
from benchmarks.engine import Engine
from benchmarks.questions import MICROCOSM, Question, microcosm_questions, read_questions
from benchmarks.reading import Unavailable
from benchmarks.results import Result, Results
from benchmarks.tasks import GENERIC, GROUPS, TASKS, Task
from data import Tokenizer, choose_template, open_tokenizer
from evaluation.flags import number
from formats import harmless
from formats.files import read_json
from weights import load_pretrained

GPU_BATCH_TOKENS = 16384
CPU_BATCH_TOKENS = 2048

EPILOG = (
    f"tasks: {', '.join(TASKS)}; groups: {', '.join(GROUPS)}; "
    "or a file.jsonl of "
    "{query, choices, gold}, {context, continuation} or {context, answer, aliases}"
)


class Plan(NamedTuple):
    """What --tasks asks for."""
    tasks: dict[str, bool]              # task -> whether it was asked for by its own name
    groups: list[str]                   # that have a mean


class Prepared(NamedTuple):
    """A task that can run, and its questions."""
    task: Task
    questions: list[Question]


class Model(NamedTuple):
    """A model to ask; its weights wait in the folder for their turn."""
    folder: Path
    tokenizer: Tokenizer
    template: str


# ---------------------------------------------------------------------------------------------
# What is asked

def plan(names: str) -> Plan:
    """Expand --tasks."""
    given = [name for name in names.split(",") if name]
    known = ", ".join([*TASKS, *GROUPS])
    if not given:
        raise ValueError(f"--tasks names no task; there are {known}")
    tasks: dict[str, bool] = {}
    for name in given:
        if name in TASKS or re.search(r"\.(jsonl|json)(\.gz)?$", name):
            tasks[name] = True
        elif name in GROUPS:
            for member in GROUPS[name]:
                tasks.setdefault(member, name == member)  # the embedded world is a group of itself
        else:
            raise ValueError(
                f"--tasks: no task {name!r}; there are {known}, "
                "and files of your own ending in .jsonl or .json"
            )
    return Plan(tasks, [name for name in given if len(GROUPS.get(name, ())) > 1])


def find_task(name: str, shots: int | None) -> Task:
    """Return a task of the table, the embedded world, or a file's, with so many demonstrations."""
    if name == "microcosm":
        task = MICROCOSM
    else:
        task = TASKS.get(name) or replace(GENERIC, files=(Path(name).name,))
    if shots is None:
        return task
    if not task.shot_files:
        has = f"{task.shots} fixed" if task.shots else "no"
        raise Unavailable(f"{name} has {has} demonstrations: leave out --shots")
    return replace(task, shots=shots)


def prepare(name: str, options: argparse.Namespace) -> Prepared:
    """Return a task and its questions; Unavailable if it cannot run with these options."""
    task = find_task(name, options.shots)
    if name == "microcosm":
        return Prepared(task, microcosm_questions(options.limit, options.seed))
    folder = options.data if name in TASKS else Path(name).parent
    if folder is None:
        raise Unavailable(f"{name} reads files: give --data=FOLDER")
    questions = read_questions(name, task, folder, options.limit, options.seed)
    if any(question.item.checks for question in questions):
        if not options.allow_code_execution:
            raise Unavailable(
                f"{name} runs programs that the model writes: allow it with --allow-code-execution"
            )
        # Whether programs can be confined here shows now, not after the model has written them.
        sandbox.require_confinement()
    return Prepared(task, questions)


def prepare_all(
    tasks: dict[str, bool], options: argparse.Namespace
) -> dict[str, Prepared | Result]:
    """Read all files; a task that a group names and that cannot run becomes a result that says why.

    All are read before the first question is asked: a bad row shows at once, not after hours.
    """
    ready: dict[str, Prepared | Result] = {}
    for name, by_name in tasks.items():
        try:
            ready[name] = prepare(name, options)
        except Unavailable as error:
            if by_name:
                raise
            ready[name] = Result(skipped=Counter({str(error): 0}))
    return ready


# ---------------------------------------------------------------------------------------------
# Who is asked

def name_folders(folders: Sequence[Path]) -> dict[str, Path]:
    """Return model folders by their names, or by their paths where names are the same."""
    if len(set(folders)) < len(folders):
        raise ValueError("a model folder is named twice; nothing can change between them")
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return dict(zip(names, folders))


def template_of(folder: Path, tokenizer: Tokenizer) -> str:
    """Return the template of the run that a model folder lies in, else its own, else "plain".

    A model asked in another template than it was trained with answers worse, and nothing says so.
    """
    around = folder.resolve().parent / "config.json"
    settings = read_json(around).get("config") if around.is_file() else None
    if not isinstance(settings, dict) or not isinstance(settings.get("data.template"), str):
        return tokenizer.own.name or "plain"
    try:
        return choose_template(settings["data.template"], tokenizer)
    except ValueError as error:
        raise ValueError(f"{around}: data.template: {error}") from None


def open_models(folders: Sequence[Path], is_spoken_to: bool) -> dict[str, Model]:
    """Open models' folders, not yet their weights: a wrong one shows before the first is loaded.

    is_spoken_to: there will be dialogues, so templates matter.
    """
    models = {}
    for name, folder in name_folders(folders).items():
        tokenizer = open_tokenizer(folder)
        template = template_of(folder, tokenizer) if is_spoken_to else "plain"
        models[name] = Model(folder, tokenizer, template)
    return models


def evaluate_model(
    name: str,
    model: Model,
    ready: dict[str, Prepared | Result],
    machine: parallel.Machine,
    options: argparse.Namespace,
) -> dict[str, Result]:
    """Ask a model every task that is ready; its memory is free again on return."""
    weights = load_pretrained(model.folder, machine.device, machine.dtype)
    default = GPU_BATCH_TOKENS if machine.device.type == "cuda" else CPU_BATCH_TOKENS
    engine = Engine(
        weights, model.tokenizer, machine, batch_tokens=options.batch_tokens or default,
        samples=options.samples, seed=options.seed, template=model.template,
    )
    results = {}
    for task, one in ready.items():
        if isinstance(one, Prepared):
            one = evaluate(f"{name} {task}", one.task, one.questions, engine)
        results[task] = one
    return results


# ---------------------------------------------------------------------------------------------
# The command

def parse_options(args: Sequence[str]) -> argparse.Namespace:
    """Read the command line; an error exits with status 2."""
    parser = argparse.ArgumentParser(
        "eval.py run",
        description="Public benchmarks with the prompts and metrics of lm-evaluation-harness.",
        epilog=EPILOG)
    parser.add_argument("models", type=Path, nargs="+", metavar="DIR",
                        help="model folders with their tokenizer.model; "
                             "of several, the last is compared with the one before it")
    parser.add_argument("--tasks", required=True,
                        help="names of tasks, groups and files, separated by commas")
    parser.add_argument("--data", type=Path,
                        help="folder with the benchmarks' files")
    parser.add_argument("--shots", **number(
        int, "[0, 1000]", "demonstrations before a question, from the task's train.jsonl "
        "(the harness's number)"))
    parser.add_argument("--limit", **number(
        int, "[1, 1e9]", "at most so many questions of every part of a task, drawn by the seed"))
    parser.add_argument("--seed", default=0, **number(
        int, "[0, 9e18]", "of the questions drawn and of samples (0)"))
    parser.add_argument("--batch_tokens", **number(
        int, "[1, 1e9]", "tokens of a batch, padding included "
        f"({GPU_BATCH_TOKENS} on a GPU, {CPU_BATCH_TOKENS} on a CPU)"))
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="of the model (auto: bfloat16 on a GPU)")
    parser.add_argument("--samples", default=1, **number(
        int, "[1, 1e4]", "programs per code problem, for pass@10 and pass@100 (1, greedy)"))
    parser.add_argument("--allow-code-execution", action="store_true",
                        help="run the programs that the model writes, confined")
    parser.add_argument("--out", type=Path,
                        help="new folder for report.md, results.json and all answers")
    return parser.parse_args(args)


def settings_json(options: argparse.Namespace) -> dict[str, Any]:
    """Return the command line as plain JSON, the models last."""
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(options).items()
    }
    del settings["models"]
    return {**settings, "models": [str(folder) for folder in options.models]}


def run(options: argparse.Namespace) -> None:
    """Evaluate models; ValueError says in one line what cannot be done."""
    asked = plan(options.tasks)
    machine = parallel.start(options.dtype)
    out = options.out
    if out and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out={out} holds something already; name a new folder")
    models = open_models(options.models, is_spoken_to="microcosm" in asked.tasks)
    ready = prepare_all(asked.tasks, options)
    results: Results = {}
    for name, model in models.items():
        results[name] = evaluate_model(name, model, ready, machine, options)
    if machine.is_main:
        print(harmless(report.table(results, asked.groups)))
        if out:
            report.write(out, results, asked.groups, settings_json(options))
    parallel.stop()


def main(args: Sequence[str]) -> None:
    """Be the command `eval.py run`; what cannot be done ends it with one line and status 2."""
    options = parse_options(args)
    try:
        run(options)
    except (ValueError, OSError, sandbox.NotConfined) as error:
        parallel.fail(f"eval.py run: error: {error}")
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", 0)) == 0:
            print("\neval.py run: stopped", file=sys.stderr, flush=True)
        parallel.leave(130)
