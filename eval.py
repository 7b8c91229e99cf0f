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
import json
import math
import os
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, NoReturn, Sequence

import benchmarks
import chat
import data
import microcosm
from compare import (Interval, Pair, change_interval, contest, contest_text, draw_tasks, mean, prefer, pyplot, read_judgments, results_text,
                     share_interval, sigmoid, to_judge, write_page)
from model import ScalarModel


@dataclass(frozen=True)
class EvalConfig:
    prompts: tuple[str, ...] = ()       # prompt files; none: prompts held out from ppo.prompts
    in_domain: int = 500                # unseen advertisements (embedded world)
    general: int = 720                  # unseen prompts over the 12 general tasks (embedded world)
    holdout: int = 64                   # prompts held out from ppo.prompts
    show: int = 3                       # prompts shown with all answers


# ---------------------------------------------------------------------------------------------
# The reward model against people

BUCKETS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, math.inf)  # edges of the margin |s_i - s_j| [nats: the log-odds the model gives]


def calibration(margins: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Compare the probabilities a reward model gives with how often it is right.

    margins: for every prompt, the scores of all its pairs, better less worse as people rank them.
    Of a pair with scores s_i > s_j the model claims that i is better with probability sigmoid(s_i - s_j) (Bradley-Terry).
    Returns: accuracy over all pairs (equal scores half), loss = mean -log sigmoid(margin) [nats], error = mean distance
        between predicted and actual over the buckets, weighted by pairs; pairs; prompts; interval; rows, one per bucket.
        Intervals count prompts, not pairs, since pairs of one prompt are not independent.
    """
    def judge(kept: list[tuple[int, float]]) -> dict[str, Any]:
        prompts, right = len({n for n, _ in kept}), mean(prefer(m, 0.0) for _, m in kept)
        return {"pairs": len(kept), "prompts": prompts, "actual": right, "interval": share_interval(right, prompts),
                "predicted": mean(sigmoid(abs(m)) for _, m in kept)}
    pairs = [(n, margin) for n, row in enumerate(margins) for margin in row]
    rows = [{"from": low, "to": high, **judge([(n, m) for n, m in pairs if low <= abs(m) < high])} for low, high in zip(BUCKETS, BUCKETS[1:])]
    overall = judge(pairs)
    return {"accuracy": overall.pop("actual"), **overall, "loss": mean(math.log1p(math.exp(-abs(m))) + max(-m, 0.0) for _, m in pairs),
            "error": sum(row["pairs"] * abs(row["predicted"] - row["actual"]) for row in rows) / max(len(pairs), 1),
            "rows": [row for row in rows if row["pairs"]]}


# ---------------------------------------------------------------------------------------------
# The numbers of a run: values of single prompts, and what they add up to

Values = dict[str, dict[str, list[float]]]  # {"in_domain": {metric: value of every prompt}, "general": {task: ...}}


def world_values(items: Sequence[microcosm.Item], answers: Sequence[str]) -> tuple[Values, list[float]]:
    """Judge answers by the gold rubric; return the values, in [0, 1], and the gold score of every item."""
    grades = [microcosm.grade(item, answer) for item, answer in zip(items, answers, strict=True)]
    ads = [grade for item, grade in zip(items, grades) if item.task == "ad"]
    tasks: dict[str, list[float]] = defaultdict(list)
    for item, grade in zip(items, grades):
        if item.task != "ad":
            tasks[item.task].append(float(grade.strict))
    in_domain = {"gold": [g.gold for g in ads], "strict": [float(g.strict) for g in ads],
                 "multi": [float(g.multi) for g in ads if g.multi is not None], "verdict": [float(g.verdict) for g in ads]}
    return {"in_domain": in_domain, "general": {name: tasks[name] for name in sorted(tasks)}}, [grade.gold for grade in grades]


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
# What a person sees

def percent(value: float) -> str:
    return f"{100 * value:6.1f}"


def table_row(label: str, values: Sequence[float], change: Mapping[str, Any] | None, unit: float = 100.0) -> str:
    """Write one line: a column per model, the change with its 95 % interval, and whether that is noise."""
    digits = 1 if unit == 100 else 2
    text = f"{label:26}" + "".join(f"{unit * value:8.{digits}f}" for value in values)
    if change:
        low, high = (unit * bound for bound in change["interval"])
        text += f"{unit * change['change']:+8.{digits}f}" + f"{low:+9.{digits}f} to {high:+.{digits}f}".ljust(20) + "noise" * (low <= 0 <= high)
    return text.rstrip()


def table(results: dict) -> str:
    """Lay out eval.json for a terminal; the change is that from SFT to PPO."""
    models, changed = results["models"], results["changes"]
    lines = ["", f"{'':26}" + "".join(f"{name.upper():>8}" for name in models) + ("  change   95 % interval" if changed else "")]
    first = next(iter(models.values()))
    if "general" not in first:
        lines.append(table_row(f"reward score (n={first['in_domain']['n']})", [model["in_domain"]["score"] for model in models.values()],
                               changed and changed["in_domain"]["score"], unit=1.0))
    else:
        lines.append(f"in-domain (n={first['in_domain']['n']}), %")
        for key, meaning in (("gold", "rubric score"), ("strict", "exactly right"), ("multi", "so on 2+ faults"), ("verdict", "verdict")):
            values = [model["in_domain"][key] for model in models.values()]
            lines.append(table_row(f"  {key:9}{meaning}", values, changed and changed["in_domain"][key]))
        general = changed.get("general", {"tasks": {}})
        lines.append(f"general tasks (n={first['general']['n']}), % exactly right")
        for task in first["general"]["tasks"]:
            lines.append(table_row(f"  {task}", [model["general"]["tasks"][task] for model in models.values()], general["tasks"].get(task)))
        lines.append(table_row("  mean", [model["general"]["mean"] for model in models.values()], general.get("mean")))
    for name, numbers in results["head_to_head"].items():
        lines.append(f"{name.replace('_', ' ')}, in-domain: {results_text(numbers)}")
    if results["reward_model"]:
        lines.append("reward model orders " + ", ".join(f"{percent(value).strip()} % ({'all' if key == 'accuracy' else key.replace('_', '-')})"
                                                       for key, value in results["reward_model"].items()) + " of held-out pairs as the annotator")
    lines.append("seconds: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in results["seconds"].items()))
    return "\n".join(lines)


def examples_text(examples: Sequence[dict[str, str]]) -> str:
    """Lay out prompts with all answers, one block each; long texts are cut."""
    width = max((len(key) for example in examples for key in example), default=0)

    def lines(key: str, value: str) -> str:
        shown = [line for line in value.splitlines() if line.strip()] or [""]
        shown = shown if len(shown) <= 12 else [*shown[:12], "..."]
        return f"{key:>{width}}  " + f"\n{'':{width + 2}}".join(line if len(line) <= 400 else line[:400] + " ..." for line in shown)
    return "\n\n".join("\n".join(lines(key, value) for key, value in example.items()) for example in examples)


def pick_examples(items: Sequence[Any], answers: dict[str, Sequence[str]], scores: dict[str, Sequence[float]], show: int) -> list[dict[str, str]]:
    """Choose prompts to show, without regard to who wins: the first in-domain ones, then a general one."""
    ads = [i for i, item in enumerate(items) if getattr(item, "task", "ad") == "ad"]
    others = [i for i in range(len(items)) if i not in set(ads)]
    chosen = ads[:max(show - 1, 1) if others else show] + others[:1]
    examples = []
    for i in chosen[:show]:
        example = {"prompt": items[i].prompt}
        example.update({f"{name} ({scores[name][i]:.2f})": texts[i] for name, texts in answers.items()})
        if items[i].answer:
            example["truth"] = items[i].answer
        examples.append(example)
    return examples


READING = ("**base** is the model before any training (on the embedded world: random weights). **change** is PPO less SFT on the same prompts; "
           "**noise** marks a change whose 95 % interval holds 0. One interval in twenty misses the truth.")


def write_report(out: Path, results: dict, examples: Sequence[dict[str, str]]) -> str:
    """Write report.md, with plots if matplotlib is installed; return a line about what was written."""
    plots = write_plots(out, results)
    lines = [f"# Run {out.name}", "", "```", table(results).strip("\n"), "```", "", READING, ""]
    lines += [line for plot in plots for line in (f"![{plot}]({plot})", "")]
    lines += ["## Examples", "", "```", examples_text(examples), "```", ""]
    if not plots:
        lines += ["No plots: matplotlib is not installed (`pip install matplotlib`, then run `--stages=eval` again)."]
    (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"report: {out / 'report.md'}" + ("" if plots else " (no plots: pip install matplotlib to get them)")


CURVES = {
    "sft": [("loss", "nats per token"), ("grad_norm", "")],
    "reward": [("loss", "nats per prompt"), ("accuracy", "share of pairs")],
    "ppo": [("score_mean", "reward (std of SFT)"), ("kl", "nats per response"), ("entropy", "nats per token"),
            ("response_length", "tokens"), ("explained_variance", ""), ("clip_fraction", "share of tokens")],
}


def write_plots(out: Path, results: dict) -> list[str]:
    """Draw the tasks, score against KL, and the curves of metrics.jsonl as PNG files; return their names, [] without matplotlib."""
    plots = pyplot()
    if not plots:
        return []
    rows = read_jsonl(out / "metrics.jsonl") if (out / "metrics.jsonl").exists() else []
    figures = {"tasks": draw_rows(results), "score_against_kl": draw_path(plots, [row for row in rows if row["stage"] == "ppo"]),
               **{stage: draw_curves(plots, stage, [row for row in rows if row["stage"] == stage]) for stage in CURVES}}
    for name, figure in figures.items():
        if figure:
            figure.savefig(out / f"{name}.png", dpi=110)
            plots.close(figure)
    return [f"{name}.png" for name, figure in figures.items() if figure]


def draw_rows(results: dict) -> Any:
    """Draw the in-domain metrics and the general tasks of all models; None on prompts without a rubric."""
    models = {name: {**{f"ads: {key}": model["in_domain"][key] for key in ("gold", "strict", "multi", "verdict")}, **model["general"]["tasks"]}
              for name, model in results["models"].items() if "general" in model}
    changed = {f"ads: {key}": row for key, row in results["changes"].get("in_domain", {}).items()}
    changed.update(results["changes"].get("general", {}).get("tasks", {}))
    return draw_tasks(models, {task: (row["change"], row["interval"]) for task, row in changed.items()})


def draw_path(plots: Any, rows: Sequence[Mapping[str, float]]) -> Any:
    """Draw PPO's iterations as points: how far the policy went from SFT, and what score it got for that."""
    if not rows:
        return None
    figure, axis = plots.subplots(figsize=(5.2, 3.6), constrained_layout=True)
    points = axis.scatter([row["kl"] for row in rows], [row["score_mean"] for row in rows], c=[row["step"] for row in rows], s=18)
    axis.set(title="score against KL", xlabel="KL to SFT [nats per response]", ylabel="reward [std of SFT]")
    figure.colorbar(points, label="iteration")
    return figure


def draw_curves(plots: Any, stage: str, rows: Sequence[Mapping[str, float]]) -> Any:
    """Draw a stage's statistics against its steps."""
    if not rows:
        return None
    columns = min(len(CURVES[stage]), 3)
    lines = len(CURVES[stage]) // columns
    figure, axes = plots.subplots(lines, columns, figsize=(3.4 * columns, 2.6 * lines), constrained_layout=True)
    for axis, (name, unit) in zip(axes.flat, CURVES[stage]):
        axis.plot([row["step"] for row in rows], [row.get(name) for row in rows], linewidth=0.8)
        axis.set(title=name, xlabel="iteration" if stage == "ppo" else "step", ylabel=unit)
    figure.suptitle(stage)
    return figure


# ---------------------------------------------------------------------------------------------
# Files

def read_jsonl(path: Path) -> list[dict]:
    """Read a file that `write_jsonl` wrote, possibly edited by people; ValueError names the line."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not valid JSON ({error})")
        if row is not None:
            rows.append(row)
    return rows


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write one object per line; the file is replaced whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(partial, path)


# ---------------------------------------------------------------------------------------------
# compare

def answer_pairs(args: argparse.Namespace, judge: chat.Speaker | None) -> list[Pair]:
    """Have both models answer, greedily, and prefer what the judge, or else the rubric, gives the higher score.

    Both judge every answer by itself, so there is no order that could matter.
    """
    flags = vars(args)
    speakers = [chat.load(folder, flags) for folder in (args.first, args.second)]
    items: list[microcosm.Item] = []
    if args.prompts:
        records = chat.read_prompts(args.prompts.split(","), flags["data.skip_bad"])
    elif all(speaker.is_world for speaker in speakers):
        settings = speakers[0].settings
        items = [item for part, share in (("in_domain", 1.0), ("general", 0.0))
                 for item in microcosm.items("eval", settings[f"eval.{part}"], settings["seed"], share)]
        records = [data.Prompt((data.Message("user", item.prompt),), f"{item.task} {n}", item.answer) for n, item in enumerate(items, 1)]
    else:
        raise ValueError("compare: these models are not of the embedded world, so give --prompts=FILE and --judge=REWARD_DIR or --judge=FILE.json")
    answers = [[given for given, in chat.answers(speaker, chat.encode(speaker, records))] for speaker in speakers]
    if judge:
        scores = [chat.judged(judge, records, given) for given in answers]
    elif items:
        scores = [[microcosm.grade(item, answer.text).gold for item, answer in zip(items, given)] for given in answers]
    else:
        scores = [[math.nan] * len(records)] * 2
    groups = ["in-domain" if item.task == "ad" else "general" for item in items] or ["prompts"] * len(records)
    return [Pair(chat.shown(record.messages), a.text, b.text, prefer(x, y), (f"{x:.2f}", f"{y:.2f}"), record.answer or "", group)
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
        judge = chat.load(args.judge, vars(args), ScalarModel) if args.judge and not is_file else None
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
    judge = chat.load(args.folder, vars(args), ScalarModel)
    records, report = data.read_rankings(args.data.split(","), vars(args)["data.skip_bad"])
    ranked, cut = data.encode_rankings(records, judge.tokenizer, judge.data.template, judge.model.config.max_seq_len)
    print(f"data: {report}", f"rankings: {cut}", sep="\n", file=sys.stderr)
    groups = [{tuple(response): rank for response, rank in zip(example.responses, example.ranks)} for example in ranked]  # equal ones once
    rows = [example.prompt + list(response) for example, group in zip(ranked, groups) for response in group]
    scores = iter(chat.score_rows(judge.model, rows, judge.settings.get("ppo.microbatch_size", 4)))
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
    chat.chat(args.folder, args.temperature, args.seed, vars(args))


def run_generate(args: argparse.Namespace) -> None:
    """Print answers to prompts as JSON lines."""
    chat.write_generations(args.folder, args.prompts.split(","), args.n, args.temperature, args.seed, vars(args))


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:  # also under torchrun, and with flags of its own
        benchmarks.main(sys.argv[2:])
        sys.exit()
    try:
        parsed = parser().parse_args()
        parsed.run(parsed)
    except (ValueError, OSError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
