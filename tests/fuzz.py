"""Damaged and strange files through every public reader, by the thousand.

    python tests/fuzz.py --variants=10000               so many variants of every format
    python tests/fuzz.py --variants=1000 sft pickle     of these alone

A variant is a small valid file with a fault: bytes flipped, cut, doubled or put in; or, in a JSON
value, a key deleted or named twice, a value of another type, a huge number, NaN, deep nesting. A
reader may return what it read, or refuse with a ValueError or an OSError. Counted are

    traceback   any other exception
    hang        more than 5 seconds
    wrong       something returned that the file does not say

The last one cannot be told of flipped bytes: a text with another letter is a text. It can be told
of faults in a JSON value, which make no new texts: every text in a record must stand in one that
the undamaged file gives, every number must be finite, and a key named twice is never accepted.
"""
from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.reading import read_items  # noqa: E402
from benchmarks.tasks import GENERIC, TASKS, Task  # noqa: E402
from evaluation.head_to_head import read_judgments  # noqa: E402
from formats import read_dialogues, read_prompts, read_rankings  # noqa: E402
from formats.files import read_json, read_jsonl  # noqa: E402
from run.rankings import check_rows  # noqa: E402
from run.sources import prompt_of, ranked_of  # noqa: E402
from weights import read_config  # noqa: E402
from weights.files import (  # noqa: E402
    read_bin, read_indexed, read_safetensors, write_safetensors,
)

SECONDS = 5


class Subject(NamedTuple):
    """A format: an undamaged file, and what reads it.

    content: bytes, or JSON: a list is written as lines, a dictionary as one object.
    strict: a key named twice must be refused. It is in files that people bring; what this code
        writes itself never holds any.
    """
    name: str
    content: Any
    read: Callable[[Path], Any]
    strict: bool = True


# ---------------------------------------------------------------------------------------------
# Undamaged files

def data_subjects() -> Iterator[Subject]:
    """Every format of formats/parsers.py."""
    def user(text: str) -> dict[str, str]:
        return {"role": "user", "content": text}

    def bot(text: str) -> dict[str, str]:
        return {"role": "assistant", "content": text}

    sft = [
        {"instruction": "Add two and three.", "input": "as digits", "output": "Five."},
        {"messages": [{"role": "system", "content": "Short."}, user("Why?"), bot("Thus.")]},
        {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]},
        {"prompt": "Where is it?", "completion": "Here.", "label": True},
        {"question": "When was that?", "answer": "Now."},
        {"instruction": "Sort these.", "instances": [{"input": "b a", "output": "a b"}]},
    ]
    rankings = [
        {"prompt": "Say hello.", "chosen": "Hello.", "rejected": "No."},
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes.",
         "rejected": "\n\nHuman: Hi?\n\nAssistant: Go."},
        {"prompt": "Rank these.", "responses": ["one", "two", "three"], "ranks": [1, 2, 3]},
        {"question": "Score these?", "responses": ["uno", "due"], "scores": [0.5, -2]},
        {"instruction": "Feed back.", "completions": [
            {"response": "alpha", "fine-grained_score": 4.5},
            {"response": "beta", "fine-grained_score": 1.0}]},
        {"instruction": "Judge.", "output_1": "left", "output_2": "right", "preference": 2},
        {"prompt": [user("More?")], "chosen": [bot("Ja.")], "rejected": [bot("Nein.")]},
    ]
    for skip in (False, True):
        name = "skip_bad" if skip else "strict"
        for stage, rows, read in (
            ("sft", sft, read_dialogues), ("rankings", rankings, read_rankings),
            ("prompts", sft + rankings, read_prompts),
        ):
            # where bad rows are left out, one with a key twice is: the others are returned
            yield Subject(f"{stage} {name}", rows, lambda p, r=read, s=skip: r([p], s)[0], not skip)
    yield Subject("array", {"data": sft[:3]}, lambda p: read_dialogues([p])[0])
    table = b'prompt,response\nWhere?,"Here, there."\nWho?,Me.\n'
    yield Subject("csv", table, lambda p: read_dialogues([p])[0])
    packed = gzip.compress(b"\n".join(json.dumps(row).encode() for row in sft))
    yield Subject("gzip", packed, lambda p: read_dialogues([p])[0])


def task_subjects() -> Iterator[Subject]:
    """Rows of public benchmarks, of every kind."""
    rows: dict[str, dict[str, Any]] = {
        "mmlu": {"question": "Which one?", "choices": ["w", "x", "y", "z"], "answer": 1,
                 "subject": "logic"},
        "arc_easy": {"question": "What?", "answerKey": "B",
                     "choices": {"text": ["no", "yes"], "label": ["A", "B"]}},
        "boolq": {"passage": "It is.", "question": "is it", "answer": True},
        "hellaswag": {"activity_label": "Run", "ctx_a": "He", "ctx_b": "runs", "label": "1",
                      "endings": ["off", "away"]},
        "winogrande": {"sentence": "The _ fits.", "option1": "key", "option2": "door",
                       "answer": "1"},
        "truthfulqa_mc2": {"question": "Is it?",
                           "mc2_targets": {"choices": ["It is.", "No."], "labels": [1, 0]}},
        "agieval": {"passage": None, "question": "Which?", "options": ["(A)1", "(B)2"],
                    "label": "A", "answer": None},
        "gsm8k": {"question": "How many?", "answer": "Two. #### 2"},
        "triviaqa": {"question": "Who", "answer": {"aliases": ["Ann", "Bea"]}},
        "nq_open": {"question": "who", "answer": ["Ann"]},
        "humaneval": {"prompt": "def f():\n", "test": "def check(f): pass", "entry_point": "f",
                      "canonical_solution": "    return 1"},
        "mbpp": {"text": "Write f.", "code": "def f(): return 1", "task_id": 11,
                 "test_setup_code": "", "test_list": ["assert f() == 1"]},
        "bbh": {"examples": [{"input": "In?", "target": "Out"}]},
    }
    for name, row in rows.items():
        content = row if name == "bbh" else [row]
        yield Subject(f"task {name}", content, lambda p, n=name: read_task(TASKS[n], p))
    own = [{"query": "Own?", "choices": ["a", "b"], "gold": 1},
           {"context": "The cat", "continuation": " sat"},
           {"context": "Two and two", "answer": "four", "aliases": ["4"]},
           {"context_options": ["He", "She"], "continuation": " went", "gold": 0}]
    yield Subject("task generic", own, lambda p: read_task(GENERIC, p))


def read_ranked(path: Path) -> Any:
    rows = read_jsonl(path)
    check_rows(rows, path, 2)
    return [ranked_of(row, f"{path}:{n}") for n, row in enumerate(rows, 1)]


def read_task(task: Task, path: Path) -> Any:
    return read_items(task, (path.name,), path.parent)


def other_subjects(folder: Path) -> Iterator[Subject]:
    """Weights, configurations, judgments, and what a run leaves."""
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    stored = folder / "stored.safetensors"
    write_safetensors(stored, tensors)
    whole = stored.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:8 + length])

    def read_header(path: Path) -> Any:
        """Put the header's JSON before the tensors, and read the file."""
        text = path.read_bytes()
        path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length:])
        return dict(read_safetensors(path))

    yield Subject("safetensors", whole, lambda p: dict(read_safetensors(p)), strict=False)
    yield Subject("safetensors header", header, read_header, strict=False)
    torch.save(tensors, folder / "stored.bin")
    pickled = (folder / "stored.bin").read_bytes()
    yield Subject("pickle", pickled, lambda p: dict(read_bin(p)), strict=False)
    index = {"metadata": {}, "weight_map": {"a": "stored.bin", "b": "stored.bin"}}
    yield Subject("index of pickles", index, lambda p: dict(read_indexed(p, read_bin)), False)
    index = {"metadata": {}, "weight_map": {"a": "stored.safetensors", "b": "stored.safetensors"}}
    yield Subject("index of safetensors", index,
                  lambda p: dict(read_indexed(p, read_safetensors)), strict=False)

    def read_model(path: Path) -> Any:
        target = path.with_name("config.json")
        path.replace(target)
        return read_config(target.parent)

    config = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1,
              "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32,
              "intermediate_size": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
              "rope_theta": 1e4, "tie_word_embeddings": False, "hidden_act": "silu"}
    yield Subject("model config", config, read_model, strict=False)
    judgments = [{"instruction": "Judge?", "output_1": "one", "generator_1": "A",
                  "output_2": "two", "generator_2": "B", "preference": 1.5},
                 {"instruction": "Judge?", "output_1": "two", "generator_1": "B",
                  "output_2": "one", "generator_2": "A", "preference": 2}]
    yield Subject("judgments", judgments, lambda p: read_judgments(p, "A", "B")[0])
    prompt = {"prompt": "Held out?", "answer": "Yes.", "task": "copy"}
    yield Subject("heldout.jsonl", [prompt] * 2, lambda p: [
        prompt_of(row, f"{p}:{n}") for n, row in enumerate(read_jsonl(p), 1)], strict=False)
    ranked = [{"id": i, **prompt, "responses": ["x", "y"], "ranks": [1, 2],
               "prompt_ids": [1, 2], "response_ids": [[3], [4, 5]]} for i in (0, 1)]
    yield Subject("ranked.jsonl", ranked, read_ranked, strict=False)
    # of these nothing is said here but that they are read
    yield Subject("any jsonl", [{"step": 1}] * 3, lambda p: len(read_jsonl(p)), strict=False)
    yield Subject("any json", {"config": {"seed": 1}}, lambda p: len(read_json(p)), strict=False)


# ---------------------------------------------------------------------------------------------
# Faults

# Stand for what json.dumps cannot write: digits without end, nesting without end, a key twice.
RAW = {'"<digits>"': "9" * 5000, '"<nested>"': "[" * 100_000 + "]" * 100_000,
       '"<objects>"': '{"a":' * 100_000 + "1" + "}" * 100_000}
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 2, 1e9, 10 ** 9, 10 ** 18, 10 ** 300, 1e308, -1e308, 0.5, math.nan,
    math.inf, "", [], {}, [None], [[]], {"": None}, "<digits>", "<nested>", "<objects>",
)


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return a file with one to three faults in its bytes."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(found) + 1)
        size = rng.choice((1, 2, 8, 64))
        kind = rng.randrange(6)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del found[at:]
        elif kind == 2:
            del found[at:at + size]
        elif kind == 3:
            found[at:at] = found[at:at + size]
        elif kind == 4:
            found[at:at] = rng.randbytes(size)
        else:
            found[at:at + size] = rng.choice((b"\0", b"\xff", b"\n", b'"', b"{", b"9")) * size
    return bytes(found)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of every value in a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places(value[key])


def damaged_json(content: Any, rng: random.Random) -> tuple[bytes, bool]:
    """Return a file with a fault in one value, and whether a key is named twice."""
    value = json.loads(json.dumps(content))
    container, key = rng.choice([place for place in places(value) if place[0] is not content])
    is_object = isinstance(container, dict)
    kind = rng.randrange(4)
    twice = kind == 1 and is_object
    if kind == 0 and is_object:
        del container[key]
    elif twice:
        container["<twice>" + key] = rng.choice(STRANGE)
    else:
        container[key] = rng.choice(STRANGE)
    rows = value if isinstance(content, list) else [value]
    text = "\n".join(json.dumps(row) for row in rows).replace("<twice>", "")
    for mark, raw in RAW.items():
        text = text.replace(mark, raw)
    return text.encode(), twice


# ---------------------------------------------------------------------------------------------
# Verdicts

class Hang(BaseException):
    """Raised by the alarm; no reader catches it as an exception of its own."""


def leaves(value: Any) -> Iterator[str | float]:
    """Yield the texts and numbers of whatever a reader returns."""
    if isinstance(value, (str, int, float)):
        yield value
    elif isinstance(value, dict):
        yield from leaves(list(value.items()))
    elif isinstance(value, (list, tuple, set)):
        for part in value:
            yield from leaves(part)
    elif hasattr(value, "__dict__"):
        yield from leaves([part for name, part in vars(value).items() if name != "source"])


def wrong(found: Any, sound: str) -> str:
    """Return what is in a result and cannot be; "" if all can. sound: the texts of a good one."""
    for leaf in leaves(found):
        if isinstance(leaf, str) and leaf not in sound:
            return f"text {leaf[:80]!r}"
        if isinstance(leaf, float) and not math.isfinite(leaf):
            return f"number {leaf}"
    return ""


def written(content: Any) -> bytes:
    if isinstance(content, bytes):
        return content
    rows = content if isinstance(content, list) else [content]
    return "\n".join(map(json.dumps, rows)).encode()


def outcome(subject: Subject, path: Path, content: bytes, sound: str | None, twice: bool) -> str:
    """Read one variant; return "read", "refused", or what is wrong with it."""
    path.write_bytes(content)
    began = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        found = subject.read(path)
        fault = wrong(found, sound) if sound is not None else ""
    except (ValueError, OSError):
        return "refused"
    except Hang:
        return "hang"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"traceback {type(error).__name__} {Path(where.filename).name}:{where.lineno}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if time.perf_counter() - began > SECONDS:
        return "hang"
    if twice and subject.strict and sound is not None:
        fault = fault or "key named twice"
    return f"wrong {fault}" if fault else "read"


def fuzz(subject: Subject, variants: int, folder: Path, seed: int = 0) -> Counter[str]:
    """Return how often which outcome came; the first variant of each fault stays in the folder."""
    rng = random.Random(f"{subject.name} {seed}")
    path = folder / "variant.jsonl"
    path.write_bytes(written(subject.content))
    texts = [leaf for leaf in leaves(subject.read(path)) if isinstance(leaf, str)]
    sound = "\n".join([path.stem, *texts])
    counts: Counter[str] = Counter()
    is_json = not isinstance(subject.content, bytes)
    for _ in range(variants):
        if is_json and rng.random() < 0.6:
            content, twice = damaged_json(subject.content, rng)
            said = outcome(subject, path, content, sound, twice)
        else:
            content = damaged_bytes(written(subject.content), rng)
            said = outcome(subject, path, content, None, False)
        counts[said] += 1
        if said not in ("read", "refused") and counts[said] == 1:
            name = f"{subject.name} {said}".replace("/", "_")[:100]
            (folder / name).write_bytes(content)
    return counts


def subjects(folder: Path) -> list[Subject]:
    return [*data_subjects(), *task_subjects(), *other_subjects(folder)]


def main(args: Sequence[str]) -> None:
    """Fuzz all formats, or those whose names hold a given word; status 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of the names of formats")
    parser.add_argument("--variants", type=int, default=10_000, help="of each; default 10000")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(args)
    signal.signal(signal.SIGALRM, stop)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    faults = 0
    for subject in subjects(folder):
        if options.names and not any(name in subject.name for name in options.names):
            continue
        began = time.perf_counter()
        counts = fuzz(subject, options.variants, folder, options.seed)
        good = {name: counts.pop(name, 0) for name in ("read", "refused")}
        faults += counts.total()
        print(f"{subject.name:24}{good['read']:7} read{good['refused']:7} refused"
              f"{counts.total():6} faults{time.perf_counter() - began:7.1f} s", flush=True)
        for name, count in counts.most_common():
            print(f"    {count:6} {name}")
    print(f"{faults} faults" + (f"; the first of each kind is in {folder}" if faults else ""))
    sys.exit(bool(faults))


def stop(signum: int, frame: object) -> None:
    raise Hang


if __name__ == "__main__":
    main(sys.argv[1:])
