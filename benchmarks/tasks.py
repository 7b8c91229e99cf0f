"""Task records: how a row of a public benchmark becomes a question, and what its answer earns.

A task is one `Task` and one reader from a row to an `Item`. What the model is asked follows from
the item:

    choices                 log-likelihood of every choice after the query   acc, acc_norm, mc1, mc2
    queries                 log-likelihood of the rest after every query     acc (partial scoring)
    choices with one entry  log-likelihood of the last word after the text   perplexity, acc
    neither                 text generated after it, cut at a stop string    exact match
    checks                  as before, and the text is run with these checks  pass@k

Prompts, delimiters, stop strings, filters and metrics are those of EleutherAI's
lm-evaluation-harness 0.4.13, letter by letter, with one exception: MBPP's set-up code, which the
harness forgets, runs before its checks.

A benchmark of your own is one more entry at the end of TASKS; its reader may stand there as a
lambda:

    "mine": Task(lambda row: choose(row["ask"], row["options"], row["right"]), ("my.jsonl",), ACC),
"""
from __future__ import annotations

import re
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from benchmarks.formulas import math_equal
from benchmarks.items import Item, Outcome
from benchmarks.metrics import (
    Metric, acc, acc_norm, exact_match, extract, is_greedy, log_likelihood, mc2
)
from benchmarks.texts import CMMLU_SUBJECTS, TRUTHFUL_SHOTS, XCOPA_WORDS, XNLI_WORDS
from formats import BadRow
from formats.rows import load_json, read_bytes, read_rows

Row = dict[str, Any]                    # as its file has it, and the file's name as row["file"]
Reader = Callable[[Row], Item | None]   # None: the row is not of the test split
Description = Callable[[str, Path], str]    # (part, data folder) -> the text before everything else


@dataclass(frozen=True)
class Task:
    """A benchmark. files: patterns below the data folder; the first that matches counts."""
    read: Reader
    files: tuple[str, ...]
    metrics: Mapping[str, Metric]       # the first is the one for the mean over tasks
    part: Callable[[Row], str] = lambda row: ""     # rows of one part share demonstrations
    describe: Description = lambda part, folder: ""
    shots: int = 0                      # demonstrations; without shot_files `describe` shows them
    shot_files: tuple[str, ...] = ()
    draw_shots: bool = False            # drawn anew for every question; else the first of the file
    spare_shot: bool = False            # one more is drawn, in case it is the question itself
    delimiter: str = " "                # between query and answer
    shot_delimiter: str = "\n\n"
    until: tuple[str, ...] = ()         # stop strings of a generated text
    max_new_tokens: int = 256
    is_dialogue: bool = False           # the query is what a user says, in the model's template


# ---------------------------------------------------------------------------------------------
# Choices

def letters(n: int) -> tuple[str, ...]:
    return tuple(string.ascii_uppercase[:n])


def several(value: Any) -> tuple[Any, ...]:
    """Return a list as a tuple; of a text it would be the letters."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"a list is expected, got {value!r}")
    return tuple(value)


def choose(query: str, choices: Sequence[str], gold: int | str) -> Item:
    if isinstance(gold, float):
        raise TypeError(f"an index is expected, got {gold!r}")
    return Item(query, several(choices), (int(gold),))


def lettered(query: str, options: Sequence[str], gold: int, ask: str) -> Item:
    """Ask for the letter of an option: the options one a line, then `ask`."""
    names = letters(len(several(options)))
    lines = [f"{name}. {option}" for name, option in zip(names, options)]
    return choose("\n".join([query, *lines, ask]), names, gold)


def labelled(row: Row) -> int:
    """Return the index of the right answer among labels such as A, B, C or 1, 2, 3."""
    return row["choices"]["label"].index(row["answerKey"])


def arc(row: Row) -> Item:
    return choose(f"Question: {row['question']}\nAnswer:", row["choices"]["text"], labelled(row))


def openbookqa(row: Row) -> Item:
    return choose(row["question_stem"], row["choices"]["text"], labelled(row))


def commonsense_qa(row: Row) -> Item:
    query = f"Question: {row['question'].strip()}"
    return lettered(query, row["choices"]["text"], labelled(row), "Answer:")


def hellaswag_text(text: str) -> str:
    """Remove the traces of WikiHow's mark-up."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def hellaswag(row: Row) -> Item:
    """Read a raw row, or one that has been cleaned already."""
    if "query" in row:
        return choose(row["query"], row["choices"], row["gold"])
    query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [hellaswag_text(ending) for ending in row["endings"]]
    return choose(hellaswag_text(query), endings, row["label"])


def winogrande(row: Row) -> Item:
    """Put each option into the gap, and score what follows: the same text after both."""
    before, after = row["sentence"].split("_", 1)
    return Item(
        choices=(after.strip(),) * 2,
        gold=(("1", "2").index(row["answer"]),),
        queries=(before + row["option1"], before + row["option2"]),
    )


def piqa(row: Row) -> Item:
    return choose(f"Question: {row['goal']}\nAnswer:", (row["sol1"], row["sol2"]), row["label"])


def boolq(row: Row) -> Item:
    right = row["answer"] if "answer" in row else row["label"]
    return choose(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ("no", "yes"), right)


def social_iqa(row: Row) -> Item:
    choices = row["answerA"], row["answerB"], row["answerC"]
    return choose(f"Q: {row['context']} {row['question']}\nA:", choices, int(row["label"]) - 1)


def sciq(row: Row) -> Item:
    choices = row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]
    return choose(f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:", choices, 3)


def rte(row: Row) -> Item:
    query = f"{row['sentence1']}\nQuestion: {row['sentence2']} True or False?\nAnswer:"
    return choose(query, ("True", "False"), row["label"])


def xcopa(row: Row, language: str | None = None) -> Item:
    because, therefore = XCOPA_WORDS[language or last_part(row)]
    word = (because, therefore)[("cause", "effect").index(row["question"])]
    query = f"{row['premise'].strip()[:-1]} {word}"  # without the full stop
    choices = [choice[0].lower() + choice[1:] for choice in (row["choice1"], row["choice2"])]
    return choose(query, choices, row["label"])


def copa(row: Row) -> Item:
    """Read XCOPA's English, with the second space that the harness puts before a choice."""
    item = xcopa(row, "en")
    (gold,) = item.gold
    return choose(item.query, [" " + choice for choice in item.choices], gold)


def xnli(row: Row) -> Item:
    """Score whole sentences, which differ in the word between premise and hypothesis."""
    right, *verdicts = XNLI_WORDS[last_part(row)]
    sentences = [
        f"{row['premise']}, {right}? {verdict}, {row['hypothesis']}" for verdict in verdicts
    ]
    return choose("", sentences, row["label"])


def truthfulqa(targets: str) -> Reader:
    """Make a reader of mc1_targets or mc2_targets.

    They are {text: 0 or 1}, or {"choices": [...], "labels": [...]}.
    """
    def read(row: Row) -> Item:
        answers = row[targets]
        labels = answers
        if "choices" in answers:
            labels = dict(zip(answers["choices"], answers["labels"]))
        gold = tuple(i for i, label in enumerate(labels.values()) if label == 1)
        return Item(f"Q: {row['question']}\nA:", tuple(labels), gold)
    return read


def mmlu(row: Row) -> Item:
    """Read a row of Hugging Face, or of Hendrycks' CSV files."""
    if "choices" in row:
        return lettered(row["question"].strip(), row["choices"], row["answer"], "Answer:")
    options = [row[name] for name in "ABCD"]
    return lettered(row["Question"].strip(), options, letters(4).index(row["Answer"]), "Answer:")


def mmlu_subject(row: Row) -> str:
    return row["subject"] if "subject" in row else re.sub("_(test|dev|val)$", "", row["file"])


def mmlu_description(part: str, folder: Path) -> str:
    subject = part.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


def cmmlu(row: Row) -> Item:
    options = [row[name] for name in "ABCD"]
    return lettered(row["Question"].strip(), options, letters(4).index(row["Answer"]), "答案：")


def cmmlu_description(part: str, folder: Path) -> str:
    return f"以下是关于{CMMLU_SUBJECTS[part]}的单项选择题，请直接给出正确答案的选项。\n\n"


def agieval(row: Row) -> Item:
    """Read AGIEval's own rows, with its zero-shot template; several letters are all right."""
    passage = row["passage"] or ""
    question = row["question"]
    options = row["options"]
    is_chinese = re.match("gaokao(?!-english)|logiqa-zh|jec-qa", row["file"])
    if not options:
        chinese, english = f"问题：{question}\n答案：", f"Q: {question}\nA: The answer is"
        return Item(passage + (chinese if is_chinese else english), answers=(str(row["answer"]),))

    last = letters(len(options))[-1]
    listed = " ".join(options)
    chinese = f"问题：{question} 选项：{listed}\n答案：从A到{last}, 我们应选择"
    english = f"Q: {question} Answer Choices: {listed}\nA: Among A through {last}, the answer is"
    gold = tuple(letters(len(options)).index(letter) for letter in row["label"])
    return Item(passage + (chinese if is_chinese else english), several(options), gold)


def agieval_acc(item: Item, outcome: Outcome) -> float:
    """Judge a choice, or the formula that a question without choices asks for."""
    return acc(item, outcome) if item.choices else float(math_equal(outcome.text, item.answers[0]))


def lambada(row: Row) -> Item:
    """Ask for the last word: of OpenAI's text, or MosaicML's context and continuation."""
    if "text" in row:
        text, _space, word = row["text"].rpartition(" ")
        return Item(text, (word,), (0,))
    return Item(row["context"], (row["continuation"],), (0,))


# ---------------------------------------------------------------------------------------------
# Generated texts

def gsm8k(row: Row) -> Item:
    return Item(f"Question: {row['question']}\nAnswer:", answers=(row["answer"],))


def triviaqa(row: Row) -> Item:
    """Read rows of Hugging Face or MosaicML.

    The harness puts a "?" after Hugging Face's questions, which have one; MosaicML's contexts are
    brought to that form.
    """
    if "context" in row:
        question = row["context"].removeprefix("Question: ").removesuffix("\nAnswer:")
        question = question.removesuffix("?")
        return Item(f"Question: {question}?\nAnswer:", answers=several(row["aliases"]))
    return Item(f"Question: {row['question']}?\nAnswer:", answers=several(row["answer"]["aliases"]))


def nq_open(row: Row) -> Item:
    return Item(f"Q: {row['question']}?\nA:", answers=several(row["answer"]))


def bbh(row: Row) -> Item:
    return Item(f"Q: {row['input']}\nA: Let's think step by step.\n", answers=(row["target"],))


def bbh_shots(part: str, folder: Path) -> str:
    """Return the task's description and three worked examples, the canary above them taken off."""
    text = read_bytes(folder / "bbh" / "cot-prompts" / f"{part}.txt").decode("utf-8")
    return text.split("-----\n", 1)[-1].strip() + "\n\n"


def humaneval(row: Row) -> Item:
    checks = f"{row['test']}\ncheck({row['entry_point']})"
    prompt = row["prompt"]
    return Item(
        prompt, checks=checks, opening=prompt, asked=(row["entry_point"],),
        shown=row["canonical_solution"])


def mbpp_item(row: Row) -> Item:
    """Show the tests with the question, and run them."""
    checks = "\n".join(f"{test}" for test in several(row["test_list"])[:3])
    if not checks:
        raise ValueError("no test")
    query = (
        "You are an expert Python programmer, and here is your task: "
        f"{row['text']} Your code should pass these tests:\n\n{checks}\n[BEGIN]\n"
    )
    # what the solution defines: one is called sum
    asked = tuple(re.findall(r"^(?:def|class)\s+(\w+)", row["code"], re.MULTILINE))
    return Item(
        query, checks=row["test_setup_code"] + f"\n{checks}", asked=asked,
        shown=f"{row['code']}\n[DONE]")


def mbpp(row: Row) -> Item | None:
    # the others are for training and for demonstrations
    return mbpp_item(row) if 11 <= row["task_id"] <= 510 else None


def mbpp_shots(part: str, folder: Path) -> str:
    """Return tasks 2, 3 and 4 with their solutions."""
    rows = [load_json(line) for _source, line in read_rows(folder / "mbpp" / "mbpp.jsonl")]
    shots = [mbpp_item(row) for row in rows if row["task_id"] in (2, 3, 4)]
    return "".join(f"{shot.demonstrate('')}\n\n" for shot in shots)


# ---------------------------------------------------------------------------------------------
# Parts, descriptions, metrics

def file_part(row: Row) -> str:
    return row["file"]


def last_part(row: Row) -> str:
    """Return the language in names such as dev_zh and test.zh."""
    return re.split(r"[._]", row["file"])[-1]


def fixed(text: str) -> Description:
    return lambda part, folder: text


ACC: Mapping[str, Metric] = {"acc": acc}
BOTH: Mapping[str, Metric] = {"acc": acc, "acc_norm": acc_norm}
NORM_FIRST: Mapping[str, Metric] = {"acc_norm": acc_norm, "acc": acc}  # where it is usually told
LAST_WORD: Mapping[str, Metric] = {"acc": is_greedy, "perplexity": log_likelihood}
BBH_ANSWER: Mapping[str, Metric] = {
    "exact_match,get-answer": exact_match(extract("(?<=the answer is )(.*)(?=.)")),
}
AGIEVAL: Mapping[str, Metric] = {"acc": agieval_acc, "acc_norm": acc_norm}

GSM8K_IGNORED = (",", r"\$", "(?s).*#### ", r"\.$")
GSM8K_NUMBER = r"#### (\-?[0-9\.\,]+)"
ANY_NUMBER = "(-?[$0-9.,]{2,})|(-?[0-9]+)"
GSM8K: Mapping[str, Metric] = {
    "exact_match,strict-match": exact_match(extract(GSM8K_NUMBER), GSM8K_IGNORED, case=False),
    "exact_match,flexible-extract": exact_match(extract(ANY_NUMBER, -1), GSM8K_IGNORED, case=False),
}

ARTICLES = (r"\b(?:The |the |An |A |The |a |an )",)
TRIVIA: Mapping[str, Metric] = {
    "exact_match,remove_whitespace": exact_match(str.strip, case=False, punctuation=False),
}
NQ_OPEN: Mapping[str, Metric] = {
    "exact_match,remove_whitespace":
        exact_match(str.strip, ARTICLES, case=False, punctuation=False),
}

ANSWER_STOPS = ("\n", ".", ",")
GSM8K_STOPS = ("Question:", "</s>", "<|im_end|>")
CODE_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


def trained(
    read: Reader,
    folder: str,
    metrics: Mapping[str, Metric],
    splits: Sequence[str] = ("validation",),
) -> Task:
    """Make the task of a data set with a training split: no demonstrations unless asked for.

    splits: that hold the questions; the first that is there is read.
    """
    files = tuple(f"{folder}/{split}.jsonl" for split in splits)
    shot_files = (f"{folder}/train.jsonl",)
    spare_shot = "test" not in splits
    return Task(
        read, files, metrics, shot_files=shot_files, draw_shots=True, spare_shot=spare_shot
    )


# ---------------------------------------------------------------------------------------------
# The table

TESTED = ("test", "validation")
TRUTHFUL_FILES = ("truthfulqa/mc_task.json", "truthfulqa/*.jsonl")
TRIVIA_FILES = ("triviaqa/validation.jsonl", "triviaqa/*.jsonl")
MMLU_FILES = ("mmlu/test.jsonl", "mmlu/test/*_test.csv")
MMLU_SHOTS = ("mmlu/dev.jsonl", "mmlu/dev/*_dev.csv")

TASKS: dict[str, Task] = {
    "mmlu": Task(
        mmlu, MMLU_FILES, ACC, mmlu_subject, mmlu_description, shots=5, shot_files=MMLU_SHOTS),
    "bbh": Task(
        bbh, ("bbh/*.json",), BBH_ANSWER, file_part, bbh_shots, shots=3, delimiter="",
        until=("</s>", "Q", "\n\n"), max_new_tokens=1024),
    "agieval": Task(
        agieval, ("agieval/*.jsonl",), AGIEVAL, file_part, until=("Q:",), max_new_tokens=32),
    "gsm8k": Task(
        gsm8k, ("gsm8k/test.jsonl",), GSM8K, until=GSM8K_STOPS,
        shots=5, shot_files=("gsm8k/train.jsonl",), draw_shots=True),
    "humaneval": Task(
        humaneval, ("humaneval/HumanEval.jsonl*",), {}, until=CODE_STOPS, max_new_tokens=1024),
    "mbpp": Task(
        mbpp, ("mbpp/mbpp.jsonl",), {}, describe=mbpp_shots, shots=3, delimiter="",
        until=("[DONE]",)),
    "triviaqa": Task(
        triviaqa, TRIVIA_FILES, TRIVIA, until=ANSWER_STOPS,
        shot_files=("triviaqa/train.jsonl",), draw_shots=True, spare_shot=True),
    "nq_open": Task(
        nq_open, ("nq_open/validation.jsonl",), NQ_OPEN, until=ANSWER_STOPS,
        describe=fixed("Answer these questions:\n\n"), shot_delimiter="\n",
        shot_files=("nq_open/train.jsonl",), draw_shots=True, spare_shot=True),
    "lambada_openai": Task(lambada, ("lambada/*.jsonl",), LAST_WORD),
    "arc_easy": trained(arc, "arc_easy", BOTH, TESTED),
    "arc_challenge": trained(arc, "arc_challenge", NORM_FIRST, TESTED),
    "hellaswag": trained(hellaswag, "hellaswag", NORM_FIRST, ("validation*",)),
    "winogrande": trained(winogrande, "winogrande", ACC),
    "piqa": trained(piqa, "piqa", BOTH),
    "boolq": trained(boolq, "boolq", ACC),
    "openbookqa": trained(openbookqa, "openbookqa", BOTH, TESTED),
    "social_iqa": trained(social_iqa, "social_iqa", ACC),
    "commonsense_qa": trained(commonsense_qa, "commonsense_qa", ACC),
    "sciq": trained(sciq, "sciq", BOTH, TESTED),
    "copa": trained(copa, "copa", ACC),
    "rte": trained(rte, "rte", ACC),
    "truthfulqa_mc1": Task(
        truthfulqa("mc1_targets"), TRUTHFUL_FILES, ACC, describe=fixed(TRUTHFUL_SHOTS)),
    "truthfulqa_mc2": Task(
        truthfulqa("mc2_targets"), TRUTHFUL_FILES, {"acc": mc2}, describe=fixed(TRUTHFUL_SHOTS)),
    "xnli": Task(xnli, ("xnli/dev_*.jsonl",), ACC, last_part),
    "xcopa": Task(xcopa, ("xcopa/test.*.jsonl",), ACC, last_part),
    "cmmlu": Task(
        cmmlu, ("cmmlu/test/*.csv",), BOTH, file_part, cmmlu_description,
        shots=5, shot_files=("cmmlu/dev/*.csv",)),
}


# ---------------------------------------------------------------------------------------------
# Files of the user's own, and groups

def generic(row: Row) -> Item:
    """Read a row whose fields say what is asked, and thereby what is measured.

    {query, choices, gold}, gold an index, a list of them, or a choice's text; {context_options,
    continuation, gold}; {context, continuation}; {context, answer, aliases?}.
    """
    if "choices" in row:
        gold = row["gold"]
        if isinstance(gold, str):
            gold = row["choices"].index(gold)
        gold = tuple(gold) if isinstance(gold, list) else (gold,)
        return Item(row["query"], several(row["choices"]), gold)
    if "context_options" in row:
        contexts = several(row["context_options"])
        same = (row["continuation"],) * len(contexts)
        return Item(choices=same, gold=(row["gold"],), queries=contexts)
    if "continuation" in row:
        return Item(row["context"], (row["continuation"],), (0,))
    if "answer" in row:
        return Item(row["context"], answers=(row["answer"], *several(row.get("aliases", ()))))
    fields = "query, choices, gold; or context, continuation; or context, answer, aliases"
    raise BadRow("not a generic task", f"give {fields}")


def only(applies: Callable[[Item], bool], metric: Metric) -> Metric:
    """Make a metric that says nothing of other items."""
    return lambda item, outcome: metric(item, outcome) if applies(item) else None


def has_choices(item: Item) -> bool:
    return len(item.choices) > 1


def has_own_choices(item: Item) -> bool:
    return has_choices(item) and not item.queries  # where queries differ, the choices are the same


def has_continuation(item: Item) -> bool:
    return len(item.choices) == 1


def has_answers(item: Item) -> bool:
    return not item.choices


GENERIC = Task(generic, (), {
    "acc": only(has_choices, acc),
    "acc_norm": only(has_own_choices, acc_norm),
    "acc_greedy": only(has_continuation, is_greedy),
    "perplexity": only(has_continuation, log_likelihood),
    "exact_match": only(has_answers, exact_match(str.strip, case=False, punctuation=False)),
}, until=("\n",))

# The paper reports "12 general language tasks" without a public list; these twelve are our estimate
# of it.
GENERAL12 = (
    "mmlu", "bbh", "agieval", "gsm8k", "humaneval", "mbpp",
    "triviaqa", "lambada_openai", "arc_challenge", "hellaswag", "winogrande", "boolq",
)
GROUPS: dict[str, tuple[str, ...]] = {
    "general12": GENERAL12,
    "microcosm": ("microcosm",),
    "all": (*TASKS, "microcosm"),
}
