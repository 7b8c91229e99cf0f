"""Evaluation: what got better, what was kept, and how sure that is.

    python eval.py compare A B                     head to head: one model folder against another
    python eval.py compare A B --prompts=FILE --judge=REWARD_DIR|FUNCTION.py|JUDGMENTS.json
    python eval.py reward REWARD_DIR --data=FILE   a reward model against people's preferences
    python eval.py run A B --tasks=general12 --data=FOLDER      public benchmarks, see benchmarks/
    python eval.py chat DIR                        talk to a model
    python eval.py generate DIR --prompts=FILE --n=5            answers as JSON lines

and what train.py's last stage measures. On the embedded world the gold rubric judges, else a reward
model, a function, or people; a win by the reward model that PPO was trained to please shows that
PPO works, not that answers got better.

A model is a name with an answer to every prompt, and every answer has values: "score", which
decides who wins, and whatever else its judge measures. Prompts without a task are the domain
itself; the others belong to a general task, which must not get worse.
"""
from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Mapping, Sequence

import data
import formats
import microcosm
from benchmarks import command as benchmark
from evaluation import chat, judging, speaking
from evaluation.flags import FLAGS, Parser
from evaluation.head_to_head import contest_text, read_judgments, to_judge, write_page
from evaluation.report import calibration_text
from evaluation.statistics import SHARES, calibration, change_interval, contest, mean, prefer
from formats import Prompt, harmless
from formats.files import print_any_text, write_jsonl
from model import ScalarModel

# The embedded world's judge: a reward-function file like a user's own.
RUBRIC = Path(microcosm.__file__).with_name("rubric.py")


# Settings are flags of train.py (--eval.reference=ppo), and the comments are their help.
@dataclass(frozen=True)
class EvalConfig:
    prompts: tuple[str, ...] = ()       # prompt files; none: prompts held out from ppo.prompts
    in_domain: int = 500                # unseen advertisements (embedded world)
    general: int = 720                  # likewise, over the 12 general tasks; 0: none
    holdout: int = 64                   # prompts held out from ppo.prompts; 0: none
    show: int = 3                       # prompts shown with all answers; 0: none
    reference: str = "sft"              # the model that all others are compared with
    best_of: int = 5                    # adds the SFT model's best of so many samples; 0: off
    models: tuple[str, ...] = ()        # only these are asked; none: all there are


# -------------------------------------------------------------------------------------------------
# The numbers of a run: from the values of single answers to what they add up to

# Everything is kept per prompt until the very end:
#
#     prompts          p_1            p_2            p_3  ...   task "" or the name of a general one
#     answers[model]   a_1            a_2            a_3        texts
#     values[model]    {"score": ..}  {"score": ..}  {..}       of the answer, by whoever judges
#
# A change between two models is the mean of the differences in a column, not the difference of two
# means with an interval each; that is why all models answer the same prompts.

Values = Sequence[Mapping[str, float]]  # of one model, one row per prompt


def assess(
    prompts: Sequence[Prompt],
    answers: Mapping[str, Sequence[str]],
    values: Mapping[str, Values],
    reference: str,
) -> dict[str, Any]:
    """Sum up any number of models, and compare them with the one that is the reference.

    answers, values: by model, in the order of the table's columns; one entry per prompt. Every row
        of values holds "score" and whatever metrics there are.
    Returns the part of eval.json that follows from these:
        models: name -> {"in_domain": {metric: mean, "n"}, "general": {"mean", "tasks", "n"}}
        reference: its name
        changes: name -> the same rows as {"change", "interval"}, on the same prompts; for every
            model but the reference, for none if that is not there
        ahead: name -> the last model's changes against it, for every other model
        head_to_head: "ppo_vs_sft" -> who wins in-domain by the score, likewise without the base
    """
    # 1. Every model by itself.
    models = {name: summarise(prompts, rows) for name, rows in values.items()}
    # 2. Against the reference, prompt by prompt. Where that is missing, because the run never
    #    trained it, there is nothing to compare with: the table has columns and no changes.
    others = [name for name in models if name != reference] if reference in models else []
    changes = {name: changes_between(prompts, values[name], values[reference]) for name in others}
    *rest, last = models
    ahead = {name: changes_between(prompts, values[last], values[name]) for name in rest}

    # 3. Head to head: who wins how often. A mean can rise because a few answers got much better;
    #    wins tell whether many did. General tasks are right or wrong: there the change says it all.
    domain = [i for i, prompt in enumerate(prompts) if prompt.task == ""]
    contests = {}
    for name in rest:
        if name == "base" and name != reference:
            continue  # a win over a model that only babbles says nothing
        ours = values[last]
        theirs = values[name]
        preferences = [prefer(ours[i]["score"], theirs[i]["score"]) for i in domain]
        # A win may be a matter of length, so the contest knows how long both answers are.
        lengths = [(len(answers[last][i]), len(answers[name][i])) for i in domain]
        contests[f"{last}_vs_{name}"] = contest(preferences, lengths)
    return {
        "models": models,
        "reference": reference,
        "changes": changes,
        "ahead": ahead,
        "head_to_head": contests,
    }


def domain_rows(prompts: Sequence[Prompt], values: Values) -> list[Mapping[str, float]]:
    """Return the values of the prompts of the domain, in their order, as they are to be shown."""
    rows = [row for prompt, row in zip(prompts, values, strict=True) if prompt.task == ""]
    # The score decides who wins; it is shown only where the judge measures nothing else. With the
    # rubric it equals "gold", and a line more would say the same twice.
    if all(set(row) == {"score"} for row in rows):
        return rows
    return [{name: value for name, value in row.items() if name != "score"} for row in rows]


def task_values(prompts: Sequence[Prompt], values: Values) -> dict[str, list[float]]:
    """Return by task, in alphabetical order, what counts there: exactly right or not."""
    tasks: dict[str, list[float]] = {}
    for prompt, row in zip(prompts, values, strict=True):
        # A judge that does not measure "strict" has no opinion on general tasks.
        if prompt.task and "strict" in row:
            tasks.setdefault(prompt.task, []).append(row["strict"])
    return {task: tasks[task] for task in sorted(tasks)}


def metrics_of(rows: Iterable[Mapping[str, float]]) -> list[str]:
    """Return the names of all metrics: known ones in the table's order, then as they come."""
    # A dictionary where a set would do, because it keeps the order: the same table every time.
    found = dict.fromkeys(name for row in rows for name in row)
    known = [name for name in SHARES if name in found]
    return known + [name for name in found if name not in SHARES]


def summarise(prompts: Sequence[Prompt], values: Values) -> dict[str, Any]:
    """Return a model's entry in eval.json: means, and of how many prompts."""
    rows = domain_rows(prompts, values)
    in_domain: dict[str, float] = {}
    for name in metrics_of(rows):
        # Not every prompt has every metric: "multi" is of ads with two faults or more.
        in_domain[name] = mean(row[name] for row in rows if name in row)
    summary: dict[str, Any] = {"in_domain": {**in_domain, "n": len(rows)}}

    general = task_values(prompts, values)
    if general:
        tasks = {task: mean(rights) for task, rights in general.items()}
        n = sum(len(rights) for rights in general.values())
        # The mean of tasks, not of prompts: no task counts more for having more prompts.
        summary["general"] = {"mean": mean(tasks.values()), "tasks": tasks, "n": n}
    return summary


def changes_between(prompts: Sequence[Prompt], after: Values, before: Values) -> dict[str, Any]:
    """Return what changed from one model to another, in the shape of `summarise`."""
    # 1. The domain: pairs of answers to the same prompt. How hard a prompt is moves both of them
    #    and leaves their difference alone, so a change is surer than the two means it lies between.
    pairs = list(zip(domain_rows(prompts, after), domain_rows(prompts, before), strict=True))
    in_domain = {}
    for name in metrics_of(row for pair in pairs for row in pair):
        differences = [new[name] - old[name] for new, old in pairs if name in new and name in old]
        if differences:
            # Pseudo-pairs presume differences in [-1, 1]. A share has them, a score has not.
            in_domain[name] = change([differences], pseudo=2.0 if name in SHARES else 0.0)
    result: dict[str, Any] = {"in_domain": in_domain}

    # 2. The general tasks: each is a stratum of its own, so that their mean does not depend on how
    #    many prompts of which task were drawn.
    old_tasks = task_values(prompts, before)
    strata = {}  # task -> the differences of its prompts
    for task, new_values in task_values(prompts, after).items():
        # in the order of the prompts on both sides, so these are pairs as well
        both = zip(new_values, old_tasks[task], strict=True)
        strata[task] = [new - old for new, old in both]
    if strata:
        tasks = {task: change([differences]) for task, differences in strata.items()}
        result["general"] = {"mean": change(list(strata.values())), "tasks": tasks}
    return result


def change(strata: Sequence[Sequence[float]], pseudo: float = 2.0) -> dict[str, Any]:
    """Return the mean over strata of their mean differences, and its 95 % interval."""
    return {"change": mean(map(mean, strata)), "interval": change_interval(strata, pseudo)}


def write_answers(
    path: Path,
    prompts: Sequence[Prompt],
    answers: Mapping[str, Sequence[str]],
    values: Mapping[str, Values],
    sampled: Mapping[str, Sequence[str]],
    sampled_values: Mapping[str, Values],
) -> None:
    """Write answers.jsonl, one object per prompt and model, so that no mean stands alone.

    Whoever doubts a number finds every answer with its values; sampled: those drawn at T = 1.
    """
    rows = []
    for i, prompt in enumerate(prompts):
        # All answers to a prompt stand together: that is how they are read.
        asked = {"prompt": prompt.text, "task": prompt.task, "answer": prompt.answer}
        for name in answers:
            given = {"model": name, "response": answers[name][i], "values": dict(values[name][i])}
            if name in sampled:
                drawn = {"response": sampled[name][i], "values": dict(sampled_values[name][i])}
                given["sampled"] = drawn
            rows.append({**asked, **given})
    write_jsonl(path, rows)


# -------------------------------------------------------------------------------------------------
# compare


def run_compare(args: argparse.Namespace) -> None:
    """Print who wins and write the page; or write the file that people are to judge."""
    flags = vars(args)
    is_people = args.judge.endswith((".json", ".jsonl"))
    # What cannot end well is refused before a model is loaded.
    if not Path(args.page).absolute().parent.is_dir():
        raise ValueError(f"--page={args.page}: there is no such folder")
    if args.prompts and not args.judge:
        raise ValueError(
            "compare: who judges the answers to --prompts? Give --judge=REWARD_DIR, "
            "--judge=FUNCTION.py, or --judge=FILE.json for people to fill in"
        )
    if is_people and args.first == args.second:
        raise ValueError(f"compare: {args.first} twice: a judgment could not say whom it prefers")

    # People judge in two calls: the first writes the file that they fill in, the second reads it.
    if is_people and Path(args.judge).exists():
        pairs, said = read_judgments(Path(args.judge), args.first, args.second)
    else:
        judge = None if is_people else judging.load_judge(args.judge or RUBRIC, flags)
        first = speaking.load(args.first, flags)
        second = speaking.load(args.second, flags)
        prompts = speaking.prompts_for((first, second), args.prompts, flags["data.skip_bad"])
        pairs = judging.answer_pairs(prompts, first, second, judge)
        said = f"judged by {args.judge or 'the rubric'}"
        if is_people:
            write_jsonl(Path(args.judge), to_judge(args.first, args.second, pairs))
            print(harmless(WAITING.format(n=len(pairs), path=args.judge)))
            return

    # The domain and the general tasks are contests of their own.
    lines = [f"{args.first} against {args.second}, {said}"]
    for group in dict.fromkeys(pair.group for pair in pairs):
        rows = [pair for pair in pairs if pair.group == group]
        # In characters: tokens of two models with tokenizers of their own are not the same unit.
        lengths = [(len(pair.first), len(pair.second)) for pair in rows]
        lines.append(contest_text(group, contest([pair.preference for pair in rows], lengths)))
    # The page holds every pair, losses first: numbers say how much, texts say what.
    summary = "\n".join(lines)
    write_page(Path(args.page), args.first, args.second, summary, pairs)
    print(harmless(f"{summary}\nside by side: {args.page}"))


WAITING = """{n} pairs wait in {path}, each in both orders. Replace every "preference": null
by 1 or 2, the better output, or by 1.5, a tie, then run the same command again."""


# -------------------------------------------------------------------------------------------------
# reward


def run_reward(args: argparse.Namespace) -> None:
    """Print how a reward model orders people's preferences, and what its margins are worth."""
    flags = vars(args)
    judge = speaking.load(args.folder, flags, ScalarModel)
    records, report = formats.read_rankings(args.data.split(","), flags["data.skip_bad"])
    # As in training: what is too long is cut alike for all responses to a prompt.
    context = judge.model.config.max_seq_len
    ranked, cut = data.encode_rankings(records, judge.tokenizer, judge.data.template, context)
    print(harmless(f"data: {report}\nrankings: {cut}"), file=sys.stderr)
    # Raw scores, not standardised ones: their differences are the log-odds that training fitted.
    margins, is_best = judging.judge_rankings(judge, ranked)
    print(harmless(calibration_text(calibration(margins), is_best)))


# -------------------------------------------------------------------------------------------------
# Command line


def run_chat(args: argparse.Namespace) -> None:
    """Talk to a model; a reward model beside it scores its answers."""
    chat.chat(args.folder, args.temperature, args.seed, vars(args))


def run_generate(args: argparse.Namespace) -> None:
    """Print answers to prompts as JSON lines."""
    files = args.prompts.split(",")
    speaking.write_generations(args.folder, files, args.n, args.temperature, args.seed, vars(args))


# name on the command line -> function; its docstring is the help
COMMANDS = {
    "compare": run_compare,
    "reward": run_reward,
    "chat": run_chat,
    "generate": run_generate,
}


def parser() -> Parser:
    """Return the commands and their flags; `run` of what was parsed is the command's function."""
    style = argparse.RawDescriptionHelpFormatter
    top = Parser("eval.py", description=__doc__, formatter_class=style, allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True)
    for name, run in COMMANDS.items():
        doc = run.__doc__
        # Without abbreviations: a flag that a later version adds would make them ambiguous.
        command = commands.add_parser(name, help=doc, description=doc, allow_abbrev=False)
        for flag, options in FLAGS[name].items():
            command.add_argument(flag, **options)
        command.set_defaults(run=run)
    return top


def main(args: Sequence[str]) -> None:
    """Run the command; what cannot be done ends the program with one line and status 2."""
    try:
        # Public benchmarks run under torchrun as well, and have flags and errors of their own.
        if args[:1] == ["run"]:
            return benchmark.main(args[1:])
        parsed = parser().parse_args(args)
        parsed.run(parsed)
    # What a user can cause is one line. Anything else is a fault of this code, and keeps its trace.
    except (ValueError, OSError) as error:
        print(harmless(f"eval.py: error: {error}"), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\neval.py: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    print_any_text()
    main(sys.argv[1:])
