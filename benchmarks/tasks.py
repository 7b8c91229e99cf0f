"""Task records: how a row of a public benchmark becomes a question, and which numbers its answer earns.

A task is one `Task` and one reader from a row to an `Item`. What the model is asked follows from the item:

    choices                   log-likelihood of every choice after the query          acc, acc_norm, mc1, mc2
    queries                   log-likelihood of the rest after every query            acc (partial scoring)
    choices with one entry    log-likelihood of the last word after the text          perplexity, acc
    neither                   text generated after the query, cut at a stop string    exact match
    checks                    as before, and the text is run with these checks        pass@k

Prompts, delimiters, stop strings, filters and metrics are those of EleutherAI's lm-evaluation-harness 0.4.13, letter by
letter, with one exception: MBPP's set-up code, which the harness forgets, runs before its checks.
"""
from __future__ import annotations

import re
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from benchmarks.metrics import (Item, Metric, Outcome, acc, acc_norm, exact_match, extract, is_greedy, log_likelihood, math_equal,
                                mc2)
from formats import BadRow
from formats.rows import load_json, read_bytes, read_rows

Row = dict[str, Any]


# ---------------------------------------------------------------------------------------------
# Rows to items

def letters(n: int) -> tuple[str, ...]:
    return tuple(string.ascii_uppercase[:n])


def choose(query: str, choices: Sequence[str], gold: int) -> Item:
    return Item(query, tuple(choices), (int(gold),))


def lettered(query: str, options: Sequence[str], gold: int, ask: str) -> Item:
    """Ask for the letter of an option: the options one a line, then `ask`."""
    names = letters(len(options))
    return choose("\n".join([query, *(f"{name}. {option}" for name, option in zip(names, options)), ask]), names, gold)


def arc(row: Row) -> Item:
    return choose(f"Question: {row['question']}\nAnswer:", row["choices"]["text"], row["choices"]["label"].index(row["answerKey"]))


def openbookqa(row: Row) -> Item:
    return choose(row["question_stem"], row["choices"]["text"], row["choices"]["label"].index(row["answerKey"]))


def commonsense_qa(row: Row) -> Item:
    return lettered(f"Question: {row['question'].strip()}", row["choices"]["text"], row["choices"]["label"].index(row["answerKey"]), "Answer:")


def hellaswag_text(text: str) -> str:
    """Remove the traces of WikiHow's mark-up."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def hellaswag(row: Row) -> Item:
    """Read a raw row, or one that has been cleaned already."""
    if "query" in row:
        return choose(row["query"], row["choices"], row["gold"])
    query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return choose(hellaswag_text(query), [hellaswag_text(ending) for ending in row["endings"]], row["label"])


def winogrande(row: Row) -> Item:
    before, after = row["sentence"].split("_", 1)
    return Item(choices=(after.strip(),) * 2, gold=("12".index(row["answer"]),), queries=(before + row["option1"], before + row["option2"]))


def piqa(row: Row) -> Item:
    return choose(f"Question: {row['goal']}\nAnswer:", (row["sol1"], row["sol2"]), row["label"])


def boolq(row: Row) -> Item:
    return choose(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ("no", "yes"), row["answer"] if "answer" in row else row["label"])


def social_iqa(row: Row) -> Item:
    return choose(f"Q: {row['context']} {row['question']}\nA:", (row["answerA"], row["answerB"], row["answerC"]), int(row["label"]) - 1)


def sciq(row: Row) -> Item:
    choices = row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]
    return choose(f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:", choices, 3)


def rte(row: Row) -> Item:
    return choose(f"{row['sentence1']}\nQuestion: {row['sentence2']} True or False?\nAnswer:", ("True", "False"), row["label"])


XCOPA_WORDS = {  # language -> what joins a premise to its cause and to its effect
    "en": ("because", "therefore"), "et": ("sest", "seetõttu"), "ht": ("poukisa", "donk sa"), "it": ("perché", "quindi"),
    "id": ("karena", "maka"), "qu": ("imataq", "chaymi"), "sw": ("kwa sababu", "kwa hiyo"), "zh": ("因为", "所以"),
    "ta": ("காரணமாக", "எனவே"), "th": ("เพราะ", "ดังนั้น"), "tr": ("çünkü", "bu yüzden"), "vi": ("bởi vì", "vì vậy")}


def xcopa(row: Row, language: str | None = None) -> Item:
    words = XCOPA_WORDS[language or last_part(row)]
    query = f"{row['premise'].strip()[:-1]} {words[('cause', 'effect').index(row['question'])]}"
    return choose(query, [choice[0].lower() + choice[1:] for choice in (row["choice1"], row["choice2"])], row["label"])


def copa(row: Row) -> Item:
    item = xcopa(row, "en")
    return choose(item.query, [" " + choice for choice in item.choices], *item.gold)


XNLI_WORDS = {  # language -> "right?" and what stands for entailment, neutral, contradiction
    "ar": ("صحيح", "نعم", "لذا", "رقم"), "bg": ("правилно", "да", "така", "не"), "de": ("richtig", "Ja", "Auch", "Nein"),
    "el": ("σωστός", "Ναί", "Έτσι", "όχι"), "en": ("right", "Yes", "Also", "No"), "es": ("correcto", "Sí", "Asi que", "No"),
    "fr": ("correct", "Oui", "Aussi", "Non"), "hi": ("सही", "हाँ", "इसलिए", "नहीं"), "ru": ("правильно", "Да", "Так", "Нет"),
    "sw": ("sahihi", "Ndiyo", "Hivyo", "Hapana"), "th": ("ถูกต้อง", "ใช่", "ดังนั้น", "ไม่"), "tr": ("doğru", "Evet", "Böylece", "Hayır"),
    "ur": ("صحیح", "جی ہاں", "اس لئے", "نہیں"), "vi": ("đúng", "Vâng", "Vì vậy", "Không"), "zh": ("正确", "是的", "所以", "不是的")}


def xnli(row: Row) -> Item:
    right, *verdicts = XNLI_WORDS[last_part(row)]
    return choose("", [f"{row['premise']}, {right}? {verdict}, {row['hypothesis']}" for verdict in verdicts], row["label"])


TRUTHFUL_SHOTS = """\
Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain.

"""


def truthfulqa(targets: str) -> Callable[[Row], Item]:
    """Make a reader of mc1_targets or mc2_targets: {text: 0 or 1}, or {"choices": [...], "labels": [...]}."""
    def read(row: Row) -> Item:
        answers = row[targets]
        labels = dict(zip(answers["choices"], answers["labels"])) if "choices" in answers else answers
        return Item(f"Q: {row['question']}\nA:", tuple(labels), tuple(i for i, label in enumerate(labels.values()) if label == 1))
    return read


def mmlu(row: Row) -> Item:
    if "choices" in row:
        return lettered(row["question"].strip(), row["choices"], row["answer"], "Answer:")
    return lettered(row["Question"].strip(), [row[name] for name in "ABCD"], "ABCD".index(row["Answer"]), "Answer:")


def mmlu_subject(row: Row) -> str:
    return row["subject"] if "subject" in row else re.sub("_(test|dev|val)$", "", row["file"])


def cmmlu(row: Row) -> Item:
    return lettered(row["Question"].strip(), [row[name] for name in "ABCD"], "ABCD".index(row["Answer"]), "答案：")


CMMLU_SUBJECTS = dict(pair.split(" ") for pair in """\
agronomy 农学|anatomy 解剖学|ancient_chinese 古汉语|arts 艺术学|astronomy 天文学|business_ethics 商业伦理|chinese_civil_service_exam 中国公务员考试
chinese_driving_rule 中国驾驶规则|chinese_food_culture 中国饮食文化|chinese_foreign_policy 中国外交政策|chinese_history 中国历史
chinese_literature 中国文学|chinese_teacher_qualification 中国教师资格|clinical_knowledge 临床知识|college_actuarial_science 大学精算学
college_education 大学教育学|college_engineering_hydrology 大学工程水文学|college_law 大学法律|college_mathematics 大学数学
college_medical_statistics 大学医学统计|college_medicine 大学医学|computer_science 计算机科学|computer_security 计算机安全
conceptual_physics 概念物理学|construction_project_management 建设工程管理|economics 经济学|education 教育学|electrical_engineering 电气工程
elementary_chinese 小学语文|elementary_commonsense 小学常识|elementary_information_and_technology 小学信息技术|elementary_mathematics 初等数学
ethnology 民族学|food_science 食品科学|genetics 遗传学|global_facts 全球事实|high_school_biology 高中生物|high_school_chemistry 高中化学
high_school_geography 高中地理|high_school_mathematics 高中数学|high_school_physics 高中物理学|high_school_politics 高中政治
human_sexuality 人类性行为|international_law 国际法学|journalism 新闻学|jurisprudence 法理学|legal_and_moral_basis 法律与道德基础|logical 逻辑学
machine_learning 机器学习|management 管理学|marketing 市场营销|marxist_theory 马克思主义理论|modern_chinese 现代汉语|nutrition 营养学|philosophy 哲学
professional_accounting 专业会计|professional_law 专业法学|professional_medicine 专业医学|professional_psychology 专业心理学|public_relations 公共关系
security_study 安全研究|sociology 社会学|sports_science 体育学|traditional_chinese_medicine 中医中药|virology 病毒学|world_history 世界历史
world_religions 世界宗教""".replace("\n", "|").split("|"))


def agieval(row: Row) -> Item:
    """Read AGIEval's own rows with its zero-shot template; several letters in a label are all right answers."""
    passage, question, options = row["passage"] or "", row["question"], row["options"]
    chinese = re.match("gaokao(?!-english)|logiqa-zh|jec-qa", row["file"])
    if not options:
        query = f"{passage}问题：{question}\n答案：" if chinese else f"{passage}Q: {question}\nA: The answer is"
        return Item(query, answers=(str(row["answer"]),))
    last = letters(len(options))[-1]
    ask = f"\n答案：从A到{last}, 我们应选择" if chinese else f"\nA: Among A through {last}, the answer is"
    query = f"{passage}{'问题' if chinese else 'Q'}{'：' if chinese else ': '}{question} {'选项：' if chinese else 'Answer Choices: '}{' '.join(options)}{ask}"
    return Item(query, tuple(options), tuple(string.ascii_uppercase.index(letter) for letter in row["label"]))


def agieval_acc(item: Item, outcome: Outcome) -> float:
    return acc(item, outcome) if item.choices else float(math_equal(outcome.text, item.answers[0]))


def lambada(row: Row) -> Item:
    text, _, word = row["text"].rpartition(" ") if "text" in row else (row["context"], "", row["continuation"])
    return Item(text, (word,), (0,))


def gsm8k(row: Row) -> Item:
    return Item(f"Question: {row['question']}\nAnswer:", answers=(row["answer"],))


def triviaqa(row: Row) -> Item:
    """Read Hugging Face's rows, whose question ends in "?" and gets a second one, or MosaicML's contexts, whose own is taken off."""
    if "context" in row:
        question = row["context"].removeprefix("Question: ").removesuffix("\nAnswer:").removesuffix("?")
        return Item(f"Question: {question}?\nAnswer:", answers=tuple(row["aliases"]))
    return Item(f"Question: {row['question']}?\nAnswer:", answers=tuple(row["answer"]["aliases"]))


def nq_open(row: Row) -> Item:
    return Item(f"Q: {row['question']}?\nA:", answers=tuple(row["answer"]))


def bbh(row: Row) -> Item:
    return Item(f"Q: {row['input']}\nA: Let's think step by step.\n", answers=(row["target"],))


def bbh_shots(part: str, folder: Path) -> str:
    """Return the task's description and three worked examples, which stand below a warning not to train on them."""
    return read_bytes(folder / "bbh" / "cot-prompts" / f"{part}.txt").decode("utf-8").split("-----\n", 1)[-1].strip() + "\n\n"


def humaneval(row: Row) -> Item:
    return Item(row["prompt"], checks=f"{row['test']}\ncheck({row['entry_point']})", opening=row["prompt"], shown=row["canonical_solution"])


def mbpp_item(row: Row) -> Item:
    checks = "\n".join(row["test_list"][:3])
    query = ("You are an expert Python programmer, and here is your task: "
             f"{row['text']} Your code should pass these tests:\n\n{checks}\n[BEGIN]\n")
    return Item(query, checks=f"{row['test_setup_code']}\n{checks}", shown=f"{row['code']}\n[DONE]")


def mbpp(row: Row) -> Item | None:
    return mbpp_item(row) if 11 <= row["task_id"] <= 510 else None  # the others are for training and demonstration


def mbpp_shots(part: str, folder: Path) -> str:
    """Return tasks 2, 3 and 4 with their solutions."""
    rows = [load_json(line) for _, line in read_rows(folder / "mbpp" / "mbpp.jsonl")]
    shots = [mbpp_item(row) for row in rows if row["task_id"] in (2, 3, 4)]
    return "".join(f"{shot.demonstrate('')}\n\n" for shot in shots)


def generic(row: Row) -> Item:
    """Read {query, choices, gold}, {context_options, continuation, gold}, {context, continuation} or {context, answer, aliases?}."""
    if "choices" in row:
        gold = row["gold"]
        gold = row["choices"].index(gold) if isinstance(gold, str) else gold
        return Item(row["query"], tuple(row["choices"]), tuple(gold) if isinstance(gold, list) else (gold,))
    if "context_options" in row:
        return Item(choices=(row["continuation"],) * len(row["context_options"]), gold=(row["gold"],), queries=tuple(row["context_options"]))
    if "continuation" in row:
        return Item(row["context"], (row["continuation"],), (0,))
    if "answer" in row:
        return Item(row["context"], answers=(row["answer"], *row.get("aliases", ())))
    raise BadRow("not a generic task", "give query, choices, gold; or context, continuation; or context, answer, aliases")


# ---------------------------------------------------------------------------------------------
# The table

@dataclass(frozen=True)
class Task:
    """A benchmark. Files are patterns below the data folder, the first that matches; a row knows its file's name as row["file"]."""
    read: Callable[[Row], Item | None]                          # None: the row is not of the test split
    files: tuple[str, ...]
    metrics: Mapping[str, Metric]                               # the first is the one for the mean over tasks
    part: Callable[[Row], str] = lambda row: ""                 # rows of one part share demonstrations and a line of the results
    describe: Callable[[str, Path], str] = lambda part, folder: ""  # of a part: the text before everything else
    shots: int = 0                                              # demonstrations, by default; without shot_files `describe` shows them
    shot_files: tuple[str, ...] = ()
    draw_shots: bool = False                                    # drawn anew for every question, or the first of the file
    spare_shot: bool = False                                    # one more is drawn, as the harness does where no test split exists
    delimiter: str = " "                                        # between query and answer
    shot_delimiter: str = "\n\n"
    until: tuple[str, ...] = ()
    max_new_tokens: int = 256


def file_part(row: Row) -> str:
    return row["file"]


def last_part(row: Row) -> str:
    """Return the language in names such as dev_zh and test.zh."""
    return re.split(r"[._]", row["file"])[-1]


def fixed(text: str) -> Callable[[str, Path], str]:
    return lambda part, folder: text


ACC: Mapping[str, Metric] = {"acc": acc}
BOTH: Mapping[str, Metric] = {"acc": acc, "acc_norm": acc_norm}
LAST_WORD: Mapping[str, Metric] = {"acc": is_greedy, "perplexity": log_likelihood}
GSM8K_IGNORED = (",", r"\$", "(?s).*#### ", r"\.$")
ARTICLES = (r"\b(?:The |the |An |A |The |a |an )",)
ANSWER_STOPS = ("\n", ".", ",")

def trained(read: Callable[[Row], Item], folder: str, metrics: Mapping[str, Metric], splits: Sequence[str] = ("validation",)) -> Task:
    """Make the task of a data set with a training split, which is asked without demonstrations unless the user wants some."""
    return Task(read, tuple(f"{folder}/{split}.jsonl" for split in splits), metrics, shot_files=(f"{folder}/train.jsonl",), draw_shots=True,
                spare_shot="test" not in splits)


TASKS: dict[str, Task] = {
    "mmlu": Task(mmlu, ("mmlu/test.jsonl", "mmlu/test/*_test.csv"), ACC, mmlu_subject, shots=5, shot_files=("mmlu/dev.jsonl", "mmlu/dev/*_dev.csv"),
                 describe=lambda part, _: f"The following are multiple choice questions (with answers) about {part.replace('_', ' ')}.\n\n"),
    "bbh": Task(bbh, ("bbh/*.json",), {"exact_match,get-answer": exact_match(extract("(?<=the answer is )(.*)(?=.)"))}, file_part, bbh_shots, shots=3,
                delimiter="", until=("</s>", "Q", "\n\n"), max_new_tokens=1024),
    "agieval": Task(agieval, ("agieval/*.jsonl",), {"acc": agieval_acc, "acc_norm": acc_norm}, file_part, until=("Q:",), max_new_tokens=32),
    "gsm8k": Task(gsm8k, ("gsm8k/test.jsonl",), {
        "exact_match,strict-match": exact_match(extract(r"#### (\-?[0-9\.\,]+)"), GSM8K_IGNORED, case=False),
        "exact_match,flexible-extract": exact_match(extract("(-?[$0-9.,]{2,})|(-?[0-9]+)", -1), GSM8K_IGNORED, case=False)},
        shots=5, shot_files=("gsm8k/train.jsonl",), draw_shots=True, until=("Question:", "</s>", "<|im_end|>")),
    "humaneval": Task(humaneval, ("humaneval/HumanEval.jsonl*",), {}, until=("\nclass", "\ndef", "\n#", "\nif", "\nprint"), max_new_tokens=1024),
    "mbpp": Task(mbpp, ("mbpp/mbpp.jsonl",), {}, describe=mbpp_shots, shots=3, delimiter="", until=("[DONE]",)),
    "triviaqa": Task(triviaqa, ("triviaqa/validation.jsonl", "triviaqa/*.jsonl"), {"exact_match,remove_whitespace": exact_match(str.strip, case=False, punctuation=False)},
                     shot_files=("triviaqa/train.jsonl",), draw_shots=True, spare_shot=True, until=ANSWER_STOPS),
    "nq_open": Task(nq_open, ("nq_open/validation.jsonl",),
                    {"exact_match,remove_whitespace": exact_match(str.strip, ARTICLES, case=False, punctuation=False)},
                    describe=fixed("Answer these questions:\n\n"), shot_files=("nq_open/train.jsonl",), draw_shots=True, spare_shot=True,
                    shot_delimiter="\n", until=ANSWER_STOPS),
    "lambada_openai": Task(lambada, ("lambada/*.jsonl",), LAST_WORD),
    "arc_easy": trained(arc, "arc_easy", BOTH, ("test", "validation")),
    "arc_challenge": trained(arc, "arc_challenge", {"acc_norm": acc_norm, "acc": acc}, ("test", "validation")),
    "hellaswag": trained(hellaswag, "hellaswag", {"acc_norm": acc_norm, "acc": acc}, ("validation*",)),
    "winogrande": trained(winogrande, "winogrande", ACC),
    "piqa": trained(piqa, "piqa", BOTH),
    "boolq": trained(boolq, "boolq", ACC),
    "openbookqa": trained(openbookqa, "openbookqa", BOTH, ("test", "validation")),
    "social_iqa": trained(social_iqa, "social_iqa", ACC),
    "commonsense_qa": trained(commonsense_qa, "commonsense_qa", ACC),
    "sciq": trained(sciq, "sciq", BOTH, ("test", "validation")),
    "copa": trained(copa, "copa", ACC),
    "rte": trained(rte, "rte", ACC),
    "truthfulqa_mc1": Task(truthfulqa("mc1_targets"), ("truthfulqa/mc_task.json", "truthfulqa/*.jsonl"), ACC, describe=fixed(TRUTHFUL_SHOTS)),
    "truthfulqa_mc2": Task(truthfulqa("mc2_targets"), ("truthfulqa/mc_task.json", "truthfulqa/*.jsonl"), {"acc": mc2}, describe=fixed(TRUTHFUL_SHOTS)),
    "xnli": Task(xnli, ("xnli/dev_*.jsonl",), ACC, last_part),
    "xcopa": Task(xcopa, ("xcopa/test.*.jsonl",), ACC, last_part),
    "cmmlu": Task(cmmlu, ("cmmlu/test/*.csv",), BOTH, file_part, shots=5, shot_files=("cmmlu/dev/*.csv",),
                  describe=lambda part, _: f"以下是关于{CMMLU_SUBJECTS[part]}的单项选择题，请直接给出正确答案的选项。\n\n"),
}
def only(applies: Callable[[Item], bool], metric: Metric) -> Metric:
    return lambda item, outcome: metric(item, outcome) if applies(item) else None


GENERIC = Task(generic, (), {  # a file of the user's, whose rows say by their fields what is measured
    "acc": only(lambda item: len(item.choices) > 1, acc), "acc_norm": only(lambda item: len(item.choices) > 1 and not item.queries, acc_norm),
    "acc_greedy": only(lambda item: len(item.choices) == 1, is_greedy), "perplexity": only(lambda item: len(item.choices) == 1, log_likelihood),
    "exact_match": only(lambda item: not item.choices, exact_match(str.strip, case=False, punctuation=False))}, until=("\n",))

# The paper reports "12 general language tasks" without a public list; these twelve are our estimate of it.
GENERAL12 = ("mmlu", "bbh", "agieval", "gsm8k", "humaneval", "mbpp", "triviaqa", "lambada_openai", "arc_challenge", "hellaswag", "winogrande", "boolq")
GROUPS: dict[str, tuple[str, ...]] = {"general12": GENERAL12, "microcosm": ("microcosm",), "all": (*TASKS, "microcosm")}
