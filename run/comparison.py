"""The evaluation of a run: every model's answers to prompts that no stage has seen."""
from __future__ import annotations

import shutil
import time
from functools import partial
from typing import Callable, Mapping, NamedTuple, Sequence

import parallel
from eval import assess, write_answers
from evaluation.report import examples_text, pick_examples, table, write_report
from formats import Prompt, harmless
from formats.files import read_json, write_json
from reward import RewardFunction
from run import stopping
from run.folder import Run, load_model, timings
from run.models import (answer, base_model, best_of, pays_by_function, ranker, reward_model,
                        score_all, to_text)
from run.sources import Source
from run.written import is_whole, sealed

# Prompts and the ids of their answers -> what each answer is worth, by metric.
Judge = Callable[[Sequence[Prompt], Sequence[list[int]]], list[dict[str, float]]]


def compare(run: Run, source: Source, policies: Sequence[str]) -> None:
    """Compare the run's models on prompts no stage has seen; write the report.

    policies: names of results that are models that answer, in the order of the table. A model of
    one's own is compared with the base it comes from, too; the world's has random weights.
    """
    config, began = run.config, time.perf_counter()
    prompts = source.heldout()
    # told before the first answer: scores that nobody gave would look like a tie of all models
    if not ranker(run) and not run.result("reward"):
        raise ValueError("nobody judges the answers: run --stages=reward first, or give "
                         "--reward.function=FILE.py")
    names = models_to_ask(run, policies)
    reference = config.eval.reference
    if reference not in names:
        reference = names[0]
        run.say(f"eval     : no model {config.eval.reference} to compare with, so with {reference}")
    # greedy answers are what a user gets; drawn ones show what a model does half of the time
    answers = answers_of(run, prompts, names)
    judge = open_judge(run)
    values = {name: judge(prompts, responses) for name, responses in answers.greedy.items()}
    drawn_values = {name: judge(prompts, responses) for name, responses in answers.drawn.items()}
    texts = texts_of(run, prompts, answers.greedy)
    drawn_texts = texts_of(run, prompts, answers.drawn)
    results = assess(prompts, texts, values, reference)
    if drawn_texts:
        results["sampled"] = assess(prompts, drawn_texts, drawn_values, reference)
    reward_path = run.result("reward")
    results["reward_model"] = (read_json(reward_path / "config.json").get("holdout_accuracy", {})
                               if reward_path else {})
    if run.machine.is_main:
        results["seconds"] = {**timings(run.out), "eval": round(time.perf_counter() - began, 2)}
        write_answers(run.out / "answers.jsonl", prompts, texts, values, drawn_texts, drawn_values)
        write_json(run.out / "eval.json", results)
        shutil.rmtree(run.out / "checkpoints" / "eval")
        examples = pick_examples(prompts, texts, values, config.eval.show)
        sampled = pick_examples(prompts, drawn_texts, drawn_values, config.eval.show)
        said = write_report(run.out, results, examples, sampled)
        print(harmless("\n".join([table(results), "", examples_text(examples), "", said])))


def models_to_ask(run: Run, policies: Sequence[str]) -> list[str]:
    """Return the names of the models that are compared: the last one is what the run is about."""
    config = run.config
    names = [] if config.is_world else ["base"]
    names += [name for name in policies if run.result(name)]
    if config.eval.best_of and (run.result("reward") or pays_by_function(run)):
        # before the last, which is the recipe's own
        names.insert(max(len(names) - 1, 1), f"best-of-{config.eval.best_of}")
    asked = [name for name in names if name in config.eval.models or not config.eval.models]
    if not asked:
        raise ValueError(f"{run.out} has no model to evaluate"
                         + (f" of {', '.join(config.eval.models)}: it has {', '.join(names)}"
                            if names else ": run --stages=sft first"))
    return asked


class Answers(NamedTuple):
    """Ids of answers by model, an answer to every prompt."""
    greedy: dict[str, list[list[int]]]  # best-of-n: its best sample
    drawn: dict[str, list[list[int]]]   # at T = 1


def answers_of(run: Run, prompts: Sequence[Prompt], names: Sequence[str]) -> Answers:
    """Have every model answer."""
    answers = Answers({}, {})
    parallel.from_main(partial(clear_answers, run))
    for name in names:
        stopping.stop_if_asked(f"within stage eval, before the answers of {name}")
        given = kept_answers(run, name, partial(ask, run, prompts, name))
        answers.greedy[name] = given["greedy"]
        if "drawn" in given:
            answers.drawn[name] = given["drawn"]
    return answers


def ask(run: Run, prompts: Sequence[Prompt], name: str) -> dict[str, list[list[int]]]:
    """Have one model answer."""
    if name.startswith("best-of-"):
        return {"greedy": best_of(run, prompts)}
    path = run.result(name)
    model = load_model(run, path, frozen=True) if path else base_model(run)
    return {"greedy": answer(run, model, prompts, temperature=0.0),
            "drawn": answer(run, model, prompts, temperature=1.0, purpose="sampled")}


def clear_answers(run: Run) -> None:
    """Forget answers of an evaluation that is not being resumed."""
    folder = run.out / "checkpoints" / "eval"
    if not run.config.resume:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)


def kept_answers(run: Run, name: str, make: Callable[[], dict]) -> dict[str, list[list[int]]]:
    """Return a model's answers: those that an interrupted evaluation had, or new ones."""
    path = run.out / "checkpoints" / "eval" / f"{name}.json"
    given = parallel.from_main(lambda: read_json(path) if path.exists() else {})
    if not is_whole(given):
        given = make()
        parallel.from_main(lambda: write_json(path, sealed(given)))
    return given


def texts_of(run: Run, prompts: Sequence[Prompt], answers: Mapping[str, Sequence[list[int]]]
             ) -> dict[str, list[str]]:
    return {name: [to_text(run, prompt, ids) for prompt, ids in zip(prompts, responses)]
            for name, responses in answers.items()}


def open_judge(run: Run) -> Judge:
    """Return who says what answers are worth: "score", and what else a function measures."""
    function = ranker(run)
    if function:
        return partial(function_values, run, function)
    scorer = reward_model(run)
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
