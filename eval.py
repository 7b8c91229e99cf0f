"""Evaluation: what got better, what was kept, and how sure that is.

    python eval.py compare A B                          head to head: a model folder of the embedded world against another
    python eval.py compare A B --prompts=FILE --judge=REWARD_DIR|JUDGMENTS.json
    python eval.py reward REWARD_DIR --data=FILE        a reward model against people's preferences
    python eval.py run A B --tasks=general12 --data=FOLDER  public benchmarks of one or several models, see benchmarks.py
    python eval.py chat DIR                             talk to a model
    python eval.py generate DIR --prompts=FILE --n=5    answers as JSON lines

and the tables and report of train.py's last stage. On the embedded world the gold rubric judges, which training never
sees. On real prompts a reward model judges, or people do; a win by the reward model that PPO was trained to please shows
that PPO works, not that answers got better.
"""
from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping, NoReturn, Sequence

import data
import formats
import microcosm
from benchmarks import command as benchmark
from evaluation import speaking
from evaluation.head_to_head import Pair, contest_text, read_judgments, to_judge, write_page
from evaluation.statistics import Interval, calibration, change_interval, contest, mean, prefer, share_interval
from formats.files import write_jsonl
from model import ScalarModel


@dataclass(frozen=True)
class EvalConfig:
    prompts: tuple[str, ...] = ()       # prompt files; none: prompts held out from ppo.prompts
    in_domain: int = 500                # unseen advertisements (embedded world)
    general: int = 720                  # unseen prompts over the 12 general tasks (embedded world)
    holdout: int = 64                   # prompts held out from ppo.prompts
    show: int = 3                       # prompts shown with all answers


# ---------------------------------------------------------------------------------------------
# The numbers of a run: values of single prompts, and what they add up to

Values = dict[str, dict[str, list[float]]]  # {"in_domain": {metric: value of every prompt}, "general": {task: ...}}


def world_values(items: Sequence[microcosm.Item], answers: Sequence[str]) -> tuple[Values, list[float]]:
    """Judge answers by the gold rubric; return the values, in [0, 1], and the gold score of every item."""
    grades = [microcosm.rubric.metrics(item.prompt, answer, item.answer) for item, answer in zip(items, answers, strict=True)]
    ads = [grade for item, grade in zip(items, grades) if not item.task]
    tasks: dict[str, list[float]] = defaultdict(list)
    for item, grade in zip(items, grades):
        if item.task:
            tasks[item.task].append(grade["strict"])
    in_domain = {name: [grade[name] for grade in ads if name in grade] for name in ("gold", "strict", "multi", "verdict")}
    return {"in_domain": in_domain, "general": {name: tasks[name] for name in sorted(tasks)}}, [grade["gold"] for grade in grades]


def summarise(values: Values) -> dict[str, Any]:
    """Return a model's entry in eval.json: means and how many prompts there are."""
    summary: dict[str, Any] = {"in_domain": {**{name: mean(row) for name, row in values["in_domain"].items()},
                                             "n": max(map(len, values["in_domain"].values()))}}
    if "general" in values:
        tasks = {name: mean(row) for name, row in values["general"].items()}
        summary["general"] = {"mean": mean(tasks.values()), "tasks": tasks, "n": sum(map(len, values["general"].values()))}
    return summary


def changes(after: Values, before: Values) -> dict[str, Any]:
    """Return what eval.json says of two models on the same prompts: for every row of `summarise` the change and its 95 % interval."""
    def change(strata: Sequence[tuple[Sequence[float], Sequence[float]]], pseudo: float = 2.0) -> dict[str, Any]:
        differences = [[a - b for a, b in zip(*pair, strict=True)] for pair in strata]
        return {"change": mean(map(mean, differences)), "interval": change_interval(differences, pseudo)}
    result: dict[str, Any] = {"in_domain": {name: change([(row, before["in_domain"][name])], 0.0 if name == "score" else 2.0)
                                            for name, row in after["in_domain"].items()}}
    if after.get("general"):
        pairs = {name: (row, before["general"][name]) for name, row in after["general"].items()}
        result["general"] = {"mean": change(list(pairs.values())), "tasks": {name: change([pair]) for name, pair in pairs.items()}}
    return result


# ---------------------------------------------------------------------------------------------
# compare

def answer_pairs(args: argparse.Namespace, judge: speaking.Speaker | None) -> list[Pair]:
    """Have both models answer, greedily, and prefer what the judge, or else the rubric, gives the higher score.

    Both judge every answer by itself, so there is no order that could matter.
    """
    flags = vars(args)
    speakers = [speaking.load(folder, flags) for folder in (args.first, args.second)]
    items: list[microcosm.Item] = []
    if args.prompts:
        records = speaking.read_prompts(args.prompts.split(","), flags["data.skip_bad"])
    elif all(speaker.is_world for speaker in speakers):
        settings = speakers[0].settings
        items = [item for part, share in (("in_domain", 1.0), ("general", 0.0))
                 for item in microcosm.items("eval", settings[f"eval.{part}"], settings["seed"], share)]
        records = [formats.Prompt((formats.Message("user", item.prompt),), f"{item.task or 'ad'} {n}", item.answer) for n, item in enumerate(items, 1)]
    else:
        raise ValueError("compare: these models are not of the embedded world, so give --prompts=FILE and --judge=REWARD_DIR or --judge=FILE.json")
    answers = [[given for given, in speaking.answers(speaker, speaking.encode(speaker, records))] for speaker in speakers]
    if judge:
        scores = [speaking.judged(judge, records, given) for given in answers]
    elif items:
        scores = [[microcosm.rubric.score(item.prompt, answer.text, item.answer) for item, answer in zip(items, given)] for given in answers]
    else:
        scores = [[math.nan] * len(records)] * 2
    groups = ["general" if item.task else "in-domain" for item in items] or ["prompts"] * len(records)
    return [Pair(speaking.shown(record.messages), a.text, b.text, prefer(x, y), (f"{x:.2f}", f"{y:.2f}"), record.answer or "", group)
            for record, a, b, x, y, group in zip(records, *answers, *scores, groups)]


def run_compare(args: argparse.Namespace) -> None:
    """Print who wins and write the page; or write the file that people are to judge."""
    judge, is_file = None, args.judge.endswith((".json", ".jsonl"))
    if not Path(args.page).absolute().parent.is_dir():
        raise ValueError(f"--page={args.page}: there is no such folder")
    if is_file and args.first == args.second:
        raise ValueError(f"compare: {args.first} against itself: nobody could tell whom a judgment in {args.judge} prefers")
    if is_file and Path(args.judge).exists():
        pairs, said = read_judgments(Path(args.judge), args.first, args.second)
    else:
        judge = speaking.load(args.judge, vars(args), ScalarModel) if args.judge and not is_file else None
        if args.prompts and not args.judge:
            raise ValueError("compare: who judges the answers to --prompts? Give --judge=REWARD_DIR, or --judge=FILE.json for people to fill in")
        pairs = answer_pairs(args, judge)
        said = f"judged by {args.judge or 'the rubric'}"
        if is_file:
            write_jsonl(Path(args.judge), to_judge(args.first, args.second, pairs))
            print(f"{len(pairs)} pairs wait in {args.judge}, each in both orders. Replace every \"preference\": null by 1 or 2, the better output,\n"
                  "or by 1.5, a tie, then run the same command again.")
            return
    groups = {name: [pair for pair in pairs if pair.group == name] for name in dict.fromkeys(pair.group for pair in pairs)}
    contests = {name: contest([pair.preference for pair in rows], [(len(pair.first), len(pair.second)) for pair in rows])
                for name, rows in groups.items()}
    summary = "\n".join([f"{args.first} against {args.second}, {said}", *(contest_text(name, numbers) for name, numbers in contests.items())])
    write_page(Path(args.page), args.first, args.second, summary, pairs)
    print(summary, f"side by side: {args.page}", sep="\n")


# ---------------------------------------------------------------------------------------------
# reward

def run_reward(args: argparse.Namespace) -> None:
    """Print how a reward model orders people's preferences, and what its margins are worth."""
    judge = speaking.load(args.folder, vars(args), ScalarModel)
    records, report = formats.read_rankings(args.data.split(","), vars(args)["data.skip_bad"])
    ranked, cut = data.encode_rankings(records, judge.tokenizer, judge.data.template, judge.model.config.max_seq_len)
    print(f"data: {report}", f"rankings: {cut}", sep="\n", file=sys.stderr)
    groups = [{tuple(response): rank for response, rank in zip(example.responses, example.ranks)} for example in ranked]  # equal ones once
    rows = [example.prompt + list(response) for example, group in zip(ranked, groups) for response in group]
    scores = iter(speaking.score_rows(judge.model, rows, judge.settings.get("ppo.microbatch_size", 4)))
    margins, best = [], []
    for group in groups:
        given = [(next(scores), rank) for rank in group.values()]
        margins.append([a - b for a, rank in given for b, other in given if rank < other])
        if len(given) > 2:
            best.append(max(given)[1] == min(group.values()))
    print(reward_text(calibration(margins), best))


def reward_text(numbers: Mapping[str, Any], best: Sequence[bool]) -> str:
    """Lay out the numbers of `calibration`."""
    def actual(share: float, interval: Interval) -> str:
        return f"{100 * share:.1f} % ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
    lines = [f"orders {actual(numbers['accuracy'], numbers['interval'])} of {numbers['pairs']} pairs from {numbers['prompts']} prompts as people do; "
             f"loss {numbers['loss']:.3f} nats, a coin's is 0.693"]
    if best:
        lines.append(f"its favourite is ranked first in {actual(mean(best), share_interval(mean(best), len(best)))} of {len(best)} rankings "
                     "of 3 or more")
    lines += [f"what it claims and how often it is right are {100 * numbers['error']:.1f} points apart on average", "",
              f"{'margin [nats]':16}{'pairs':>7}{'claims':>9}   is right"]
    lines += [f"{row['from']:<4g}to {row['to']:<9g}{row['pairs']:7}{100 * row['predicted']:7.1f} %   {actual(row['actual'], row['interval'])}"
              for row in numbers["rows"]]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# Command line

class Parser(argparse.ArgumentParser):
    """Argparse, with one line for an error."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see --help)")


def at_least(low: float, kind: type) -> Callable[[str], Any]:
    """Return a reader of numbers that are not below `low`."""
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: expected {kind.__name__} of at least {low}")
        return value
    return read


def parser() -> Parser:
    """Return the commands and their flags; `run` of what was parsed is the command's function."""
    top = Parser(prog="eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], flags: Mapping[str, dict[str, Any]]) -> None:
        sub = commands.add_parser(name, help=run.__doc__.splitlines()[0], description=run.__doc__, allow_abbrev=False)
        for flag, options in flags.items():
            sub.add_argument(flag, **options)
        sub.set_defaults(run=run)
    folder, prompts = {"metavar": "DIR", "help": "model folder"}, {"metavar": "FILE", "help": "prompt files, comma-separated"}
    template = {"--data.template": {"choices": tuple(data.TEMPLATES), "help": "how a dialogue becomes text; default: as in the model's run"}}
    length = {"--data.max_response_tokens": {"type": at_least(1, int), "metavar": "N", "help": "where answers end; default: as in the run, else 512"}}
    skip_bad = {"--data.skip_bad": {"action": "store_true", "help": "leave malformed rows out and count them"}}
    sampling = {"--temperature": {"type": at_least(0, float), "default": 1.0, "metavar": "T", "help": "0 is greedy; default 1"},
                "--seed": {"type": at_least(0, int), "default": 0, "metavar": "N", "help": "of the sampling noise; default 0"}}
    command("compare", run_compare, {
        "first": folder, "second": folder, "--prompts": prompts,
        "--judge": {"default": "", "metavar": "DIR|FILE",
                    "help": "reward model folder; or a .json or .jsonl file of judgments, read if it is there, written if not"},
        "--page": {"default": "compare.html", "metavar": "FILE", "help": "answers side by side; default compare.html"},
        **template, **length, **skip_bad})
    command("reward", run_reward, {
        "folder": folder, "--data": {"required": True, "metavar": "FILE", "help": "pairs or ranked lists, comma-separated files"},
        **template, **skip_bad})
    command("chat", run_chat, {"folder": folder, **sampling, **template, **length})
    command("generate", run_generate, {
        "folder": folder, "--prompts": {**prompts, "required": True},
        "--n": {"type": at_least(1, int), "default": 1, "metavar": "N", "help": "answers to each prompt; default 1"},
        **sampling, **template, **length, **skip_bad})
    return top


def run_chat(args: argparse.Namespace) -> None:
    """Talk to a model; a reward model beside it scores its answers."""
    speaking.chat(args.folder, args.temperature, args.seed, vars(args))


def run_generate(args: argparse.Namespace) -> None:
    """Print answers to prompts as JSON lines."""
    speaking.write_generations(args.folder, args.prompts.split(","), args.n, args.temperature, args.seed, vars(args))


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:  # also under torchrun, and with flags of its own
        benchmark.main(sys.argv[2:])
        sys.exit()
    try:
        parsed = parser().parse_args()
        parsed.run(parsed)
    except (ValueError, OSError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
