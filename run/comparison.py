"""The evaluation of a run: every model's answers to prompts that no stage has seen."""
from __future__ import annotations

import json
import time
from functools import partial
from typing import Callable, Sequence

import parallel
from eval import assess, write_answers
from evaluation.report import examples_text, pick_examples, table, write_report
from formats import Prompt
from formats.files import read_json
from reward import RewardFunction
from run.folder import Run, load_model, timings
from run.models import answer, base_model, best_of, open_reward, ranker, score_all, to_text
from run.sources import Source

# Prompts and the ids of their answers -> what each answer is worth, by metric.
Judge = Callable[[Sequence[Prompt], Sequence[list[int]]], list[dict[str, float]]]


def compare(run: Run, source: Source, policies: Sequence[str]) -> None:
    """Compare the run's models, and the base, on prompts no stage has seen; write the report.

    policies: names of results that are models that answer, in the order of the table.
    """
    config, began = run.config, time.perf_counter()
    prompts = source.heldout()
    # told before the first answer: scores that nobody gave would look like a tie of all models
    if not ranker(run) and not run.result("reward"):
        raise ValueError("nobody judges the answers: run --stages=reward first, or give "
                         "--reward.function=FILE.py")
    answers = answers_of_all(run, prompts, policies)
    judge = open_judge(run)
    values = {name: judge(prompts, responses) for name, responses in answers.items()}
    texts = {name: [to_text(run, prompt, ids) for prompt, ids in zip(prompts, responses)]
             for name, responses in answers.items()}
    reference = config.eval.reference
    if reference not in texts:
        run.say(f"eval     : no model {reference} to compare with, so with the base")
        reference = "base"
    results = assess(prompts, texts, values, reference)
    reward_path = run.result("reward")
    results["reward_model"] = (read_json(reward_path / "config.json").get("holdout_accuracy", {})
                               if reward_path else {})
    results["seconds"] = {**timings(run), "eval": round(time.perf_counter() - began, 2)}
    if run.machine.is_main:
        write_answers(run.out / "answers.jsonl", prompts, texts, values)
        (run.out / "eval.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        telling = {name: texts[name] for name in texts if name != "base" or not config.is_world}
        examples = pick_examples(prompts, telling, values, config.eval.show)
        said = write_report(run.out, results, examples)
        print(table(results), "", examples_text(examples), "", said, sep="\n")


def answers_of_all(run: Run, prompts: Sequence[Prompt], policies: Sequence[str]
                   ) -> dict[str, list[list[int]]]:
    """Return every model's greedy answers, the base's first, and the best of n where asked for."""
    made = [name for name in policies if run.result(name)]
    if not made and run.config.is_world:
        raise ValueError(f"{run.out} has no model to evaluate: run --stages=sft first")
    answers: dict[str, list[list[int]]] = {}
    for name in ("base", *made):
        path = run.result(name)
        model = load_model(run, path, frozen=True) if path else base_model(run)
        answers[name] = answer(run, model, prompts, temperature=0.0)
        if run.config.eval.best_of and name == ("sft" if "sft" in made else "base"):
            answers[f"best-of-{run.config.eval.best_of}"] = best_of(run, prompts)
    return answers


def open_judge(run: Run) -> Judge:
    """Return who says what answers are worth: "score", and what else a function measures."""
    function = ranker(run)
    if function:
        return partial(function_values, run, function)
    scorer = open_reward(run, "model")
    return lambda prompts, responses: [
        {"score": x} for x in score_all(run, scorer.model, scorer.score, prompts, responses)]


def function_values(run: Run, function: RewardFunction, prompts: Sequence[Prompt],
                    responses: Sequence[list[int]]) -> list[dict[str, float]]:
    """Have a function judge all answers, each rank a part of them."""
    mine = run.machine.part(list(range(len(prompts))))
    asked = [prompts[i] for i in mine]
    texts = [to_text(run, prompts[i], responses[i]) for i in mine]
    rows = zip(function(asked, texts), function.metrics(asked, texts))
    values = [{"score": score, **metrics} for score, metrics in rows]
    return [row for part in parallel.gather_objects(values) for row in part]
