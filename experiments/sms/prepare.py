"""Text messages to demonstrations, prompts and unseen prompts, as files that train.py reads.

    python experiments/sms/prepare.py SMSSpamCollection sms --general=alpaca.json --seed=0

The first file is the UCI SMS Spam Collection, a label and a message a line, with a tab between them
(archive.ics.uci.edu/dataset/228). --general mixes as many general instructions (any format that
--sft.data reads) into the demonstrations as there are messages: ICE-Instruct is blended.

Writes sms/demonstrations.jsonl, sms/prompts.jsonl and sms/unseen.jsonl. No message stands in two of
the halves: one that is asked about in the evaluation, or its double, is in no training file.
"""
from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any, Sequence

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # run as a file, it imports its neighbours

from formats import Dialogue, read_dialogues
from formats.files import write_jsonl
from signs import signs_of, write_answer

QUESTION = ("Is this text message spam? Give the verdict, then every sign of spam with the words "
            "that show it.\n\nMessage: ")
LONGEST = 220       # characters; longer ones would make every batch as long
UNSEEN = 140        # messages for the evaluation
NOTICED = 0.3       # people are hasty: the chance that a demonstration names a sign
RIGHT = 0.97        # the chance that its verdict is right


def read_messages(path: Path) -> list[tuple[bool, str]]:
    """Return (is spam, message), doubles once, as many of either kind, in the file's order."""
    messages: dict[str, bool] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        label, tab, text = line.partition("\t")
        text = " ".join(text.split())
        if not line.strip():
            continue
        if not tab or label not in ("ham", "spam"):
            raise ValueError(f"{path}:{number}: expected ham or spam, a tab and a message")
        if text and len(text) < LONGEST:
            messages.setdefault(text, label == "spam")
    kinds = [[(is_spam, text) for text, is_spam in messages.items() if is_spam == kind]
             for kind in (True, False)]
    size = min(map(len, kinds))
    return [one for kind in kinds for one in kind[:size]]


def asked(message: str, answer: str) -> dict[str, Any]:
    """Return a row with a prompt and its answer."""
    return {"prompt": QUESTION + message, "response": answer}


def hasty_answer(is_spam: bool, message: str, rng: random.Random) -> str:
    """Write what somebody in a hurry writes: a sign here, a sign there."""
    seen = {kind: words for kind, words in signs_of(message).items() if rng.random() < NOTICED}
    return write_answer(is_spam == (rng.random() < RIGHT), seen)


def true_answer(is_spam: bool, message: str) -> str:
    return write_answer(is_spam, signs_of(message))


def general_rows(record: Dialogue) -> dict[str, Any]:
    """Return a general instruction as a row."""
    return {"messages": [{"role": one.role, "content": one.content} for one in record.messages]}


def main(args: Sequence[str]) -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("messages", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--general", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(args)

    rng = random.Random(options.seed)
    messages = read_messages(options.messages)
    rng.shuffle(messages)
    unseen, seen = messages[:UNSEEN], messages[UNSEEN:]
    shown = [asked(text, hasty_answer(is_spam, text, rng)) for is_spam, text in seen]
    if options.general:
        records, report = read_dialogues([options.general])
        print(f"general: {report}")
        short = [one for one in records if sum(len(turn.content) for turn in one.messages) < 600]
        shown += [general_rows(one) for one in rng.sample(short, min(len(seen), len(short)))]
    options.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(options.out / "demonstrations.jsonl", shown)
    for name, part in (("prompts", seen), ("unseen", unseen)):
        rows = [asked(text, true_answer(is_spam, text)) for is_spam, text in part]
        write_jsonl(options.out / f"{name}.jsonl", rows)
    signs = [len(signs_of(text)) for is_spam, text in messages if is_spam]
    print(f"{len(seen)} messages to learn from, {len(unseen)} unseen, half of them spam, with "
          f"{sum(signs) / len(signs):.1f} signs each on average")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"prepare.py: error: {error}")
