"""The flags of eval.py's commands."""

from __future__ import annotations

import argparse
import math
from typing import Any, Callable, NoReturn

from data import TEMPLATES


class Parser(argparse.ArgumentParser):
    """Argparse, with one line for an error."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see --help)")


def is_in(value: float, interval: str) -> bool:
    """Return whether a number lies in an interval; in "(0, 1]" 0 does not and 1 does."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    return (low < value or low == value and interval[0] == "[") and (
        value < high or value == high and interval[-1] == "]"
    )


def number(kind: type, interval: str, text: str) -> dict[str, Any]:
    """Return the options of a flag that is a number in an interval. text: its help."""

    def read(given: str) -> Any:
        try:
            value = kind(given)
        except ValueError:
            value = math.nan
        if not is_in(value, interval):
            raise argparse.ArgumentTypeError(f"{given}: expected {kind.__name__} in {interval}")
        return value

    return {"type": read, "metavar": "N", "help": f"{interval}: {text}"}


JUDGE_HELP = """reward model folder; or a reward function, a .py file with score(prompt, response,
answer); or a .json or .jsonl file of judgments, read if it is there, written if not"""
FOLDER = {"metavar": "DIR", "help": "model folder"}
FILES = {"metavar": "FILE", "help": "prompt files, comma-separated"}
# Flags named as in train.py have the same meaning; what is not given is as in the model's run.
TEMPLATE = {
    "choices": tuple(TEMPLATES),
    "help": "how a dialogue becomes text; default: as in the run",
}
LAYOUT = {"--data.template": TEMPLATE}
LENGTH = {
    "--data.max_response_tokens": number(
        int, "[1, 1e6]", "where answers end; default: as in the run, else 512"
    )
}
SKIP = {
    "--data.skip_bad": {"action": "store_true", "help": "leave malformed rows out and count them"}
}
SAMPLING = {
    "--temperature": {**number(float, "[0, 100]", "0 is greedy; default 1"), "default": 1.0},
    "--seed": {**number(int, "[0, 9e18]", "of the sampling noise; default 0"), "default": 0},
}
FLAGS: dict[str, dict[str, dict[str, Any]]] = {
    "compare": {
        "first": FOLDER,
        "second": FOLDER,
        "--prompts": FILES,
        "--judge": {"default": "", "metavar": "DIR|FILE", "help": JUDGE_HELP},
        "--page": {
            "default": "compare.html",
            "metavar": "FILE",
            "help": "answers side by side; default compare.html",
        },
        **LAYOUT,
        **LENGTH,
        **SKIP,
    },
    "reward": {
        "folder": FOLDER,
        "--data": {
            "required": True,
            "metavar": "FILE",
            "help": "pairs or ranked lists, comma-separated files",
        },
        **LAYOUT,
        **SKIP,
    },
    "chat": {"folder": FOLDER, **SAMPLING, **LAYOUT, **LENGTH},
    "generate": {
        "folder": FOLDER,
        "--prompts": {**FILES, "required": True},
        "--n": {**number(int, "[1, 1e6]", "answers to each prompt; default 1"), "default": 1},
        **SAMPLING,
        **LAYOUT,
        **LENGTH,
        **SKIP,
    },
}
