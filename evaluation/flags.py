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


JUDGE_HELP = """reward model folder; or a reward function, a .py file with score(prompt, response,
answer); or a .json or .jsonl file of judgments, read if it is there, written if not"""
FOLDER = {"metavar": "DIR", "help": "model folder"}
FILES = {"metavar": "FILE", "help": "prompt files, comma-separated"}
COUNT = {"type": at_least(1, int), "metavar": "N"}
# Flags named as in train.py have the same meaning; what is not given is as in the model's run.
TEMPLATE = {
    "choices": tuple(TEMPLATES),
    "help": "how a dialogue becomes text; default: as in the run",
}
LAYOUT = {"--data.template": TEMPLATE}
LENGTH = {
    "--data.max_response_tokens": {
        **COUNT,
        "help": "where answers end; default: as in the run, else 512",
    }
}
SKIP = {
    "--data.skip_bad": {"action": "store_true", "help": "leave malformed rows out and count them"}
}
SAMPLING = {
    "--temperature": {
        "type": at_least(0, float),
        "default": 1.0,
        "metavar": "T",
        "help": "0 is greedy; default 1",
    },
    "--seed": {
        "type": at_least(0, int),
        "default": 0,
        "metavar": "N",
        "help": "of the sampling noise; default 0",
    },
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
        "--n": {**COUNT, "default": 1, "help": "answers to each prompt; default 1"},
        **SAMPLING,
        **LAYOUT,
        **LENGTH,
        **SKIP,
    },
}
