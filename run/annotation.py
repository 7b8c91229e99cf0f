"""Responses and their ranks: the stages between SFT and the reward model."""
from __future__ import annotations

import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Sequence

import data
import parallel
import reward
from formats import Prompt
from formats.files import append_line, cut_torn_line, read_jsonl, read_log, write_jsonl
from formats.parsers import ranks_of
from formats.records import BadRow
from model import derive
from reward import RewardFunction
from run import stopping
from run.folder import Run, load_model
from run.models import policy_path, ranker, to_text
from run.rankings import check_drawn, check_ranks, check_rows, order_of
from run.sources import Source, prompt_of, prompt_row
from run.written import is_whole, sealed


def run_sample(run: Run, source: Source) -> None:
    """Draw several responses per prompt from the SFT model, for an annotator to rank."""
    config, machine = run.config, run.machine
    prompts = source.prompts_to_sample()
    model = load_model(run, policy_path(run))
    mine = machine.part(list(range(len(prompts))))
    bar = run.bar("sample", len(mine))
    done = parallel.from_main(partial(drawn_before, run))
    drawn: list[list[list[int]]] = []  # (prompts, responses, tokens)
    with parallel.gathered(model), machine.autocast():
        for start in range(0, len(mine), config.reward.generation_batch):
            rows = mine[start:start + config.reward.generation_batch]
            # the same batches whether interrupted or not: so are the last digits
            if not all(row in done for row in rows):
                ids = [list(prompts[row].ids) for row in rows]
                groups = reward.sample(model, ids, rows, config.reward,
                                       config.data.max_response_tokens, run.end_ids,
                                       derive(config.seed, "sample"))
                done.update(zip(rows, groups))
                append_line(drawn_folder(run) / f"rank{machine.rank:05d}.jsonl",
                            sealed({"rows": list(rows), "responses": groups}))
            drawn += [done[row] for row in rows]
            bar.update(len(rows))
            if stopping.received:
                break
    bar.close()
    stopping.stop_if_asked(f"within stage sample, after {len(drawn)} of this rank's {len(mine)} "
                           "prompts")
    groups = [group for part in parallel.gather_objects(drawn) for group in part]
    path = run.out / "to_rank.jsonl"
    if machine.is_main:
        write_jsonl(path, (row_to_rank(run, i, prompt, group)
                           for i, (prompt, group) in enumerate(zip(prompts, groups, strict=True))))
        shutil.rmtree(drawn_folder(run))
    parallel.gather_objects(None)  # nobody reads it before it is there
    if not ranker(run):
        run.say(f"{len(groups)} prompts with {len(config.reward.temperatures)} responses each wait "
                f"in {path}.\nReplace each \"ranks\": null by a list such as [2, 1, 3, 3, 5] (1 is "
                "best, equal numbers are ties), then run\n"
                f"  train.py --out={run.out} --stages=annotate,reward,ppo,eval")


def drawn_folder(run: Run) -> Path:
    """Return where drawn responses wait for the others."""
    return run.out / "checkpoints" / "sample"


def drawn_before(run: Run) -> dict[int, list[list[int]]]:
    """Return the responses that an interrupted run drew, by the number of their prompt."""
    drawn_folder(run).mkdir(parents=True, exist_ok=True)
    done: dict[int, list[list[int]]] = {}
    for file in sorted(drawn_folder(run).glob("rank*.jsonl")):
        cut_torn_line(file)
        for batch in read_log(file):
            if is_whole(batch):
                done.update(zip(batch["rows"], batch["responses"]))
    return done


def row_to_rank(run: Run, i: int, prompt: Prompt, group: Sequence[list[int]]) -> dict[str, Any]:
    """Return what annotators see of a prompt and its responses, and the ids behind the texts."""
    texts = [to_text(run, prompt, ids) for ids in group]
    return {"id": i, **prompt_row(prompt), "responses": texts, "ranks": None,
            "prompt_ids": prompt.ids, "response_ids": group}


def run_annotate(run: Run, source: Source) -> None:
    """Turn the drawn responses into rankings: people's, or a function's with an error."""
    informative = parallel.from_main(partial(write_rankings, run, source))
    run.say(f"annotate : {informative} prompts have a pair of differently ranked responses")


def write_rankings(run: Run, source: Source) -> int:
    """Write ranked.jsonl; return how many prompts have a pair."""
    path = run.needed("to_rank.jsonl", "sample")
    rows = read_jsonl(path)
    # those of a base may be other prompts than this run would draw
    asked = source.prompts_to_sample() if path.parent == run.out else []
    check_rows(rows, path, len(asked) or len(rows))
    function = ranker(run)
    for number, row in enumerate(rows, 1):
        place = f"{path}:{number}"
        prompt = follow_texts(run, row, place)
        if asked and list(asked[row["id"]].ids) != row["prompt_ids"]:
            raise ValueError(f"{place}: prompt {row['id']} of this run is another one "
                             f"({asked[row['id']].text!r:.80}): take out what is not of this run")
        if function and not row.get("ranks"):
            row["ranks"] = rank(run, function, prompt, row["responses"])
        check_ranks(row, place)
    write_jsonl(run.out / "ranked.jsonl", rows)
    return sum(len(set(row["ranks"])) > 1 for row in rows)


def follow_texts(run: Run, row: dict[str, Any], place: str) -> Prompt:
    """Put a row's ids into the order of its texts, which people see and rank; return its prompt."""
    check_drawn(row, place)
    try:
        prompt = prompt_of(row, place)
        ids = data.encode_prompt(run.tokenizer, prompt.messages, run.config.data.template)
    except (KeyError, IndexError, BadRow):
        ids = []
    if ids != row["prompt_ids"]:
        raise ValueError(f"{place}: \"prompt\" is not the text that was asked: put it back as it "
                         "was written")
    drawn = [to_text(run, prompt, response) for response in row["response_ids"]]
    order = order_of(row["responses"], drawn, place)
    row["response_ids"] = [row["response_ids"][i] for i in order]
    return prompt


def rank(run: Run, function: RewardFunction, prompt: Prompt, texts: Sequence[str]) -> list[float]:
    """Rank responses by a function, as a person would who errs by N(0, noise).

    The error belongs to the response: equal ones get equal ranks, in whatever order they stand.
    """
    def error(text: str) -> float:
        return random.Random(derive(run.config.seed, "annotator", prompt.text, text)).gauss(0, 1)
    scores = function([prompt] * len(texts), texts)
    felt = [score + run.config.reward.noise * error(text) for score, text in zip(scores, texts)]
    return ranks_of(felt)
