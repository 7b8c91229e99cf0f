"""A whole run small enough to compare number by number. `python tests/golden.py` writes golden.json anew: do that
only when a change of results is meant, and say in the commit why."""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import train

FILE = Path(__file__).with_name("golden.json")
FLAGS = [
    "--model.dim=32",
    "--model.n_heads=2",
    "--model.n_kv_heads=1",
    "--model.ffn_dim=64",
    "--sft.examples=1024",
    "--sft.batch_size=64",
    "--sft.epochs=4",
    "--reward.sampled_prompts=40",
    "--reward.batch_size=16",
    "--ppo.iterations=3",
    "--ppo.batch_size=16",
    "--ppo.minibatch_size=8",
    "--eval.in_domain=20",
    "--eval.general=24",
    "--data.max_response_tokens=12",
    "--reward.holdout=0.3",
    "--model.max_seq_len=128",
]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tiny_run(out: Path, *flags: str) -> dict:
    """Run every stage, and return what a reader of the run folder finds, without times."""
    train.main([*FLAGS, f"--out={out}", *flags])
    metrics = [
        {k: v for k, v in row.items() if "second" not in k} for row in lines(out / "metrics.jsonl")
    ]
    results = json.loads((out / "eval.json").read_text())
    results.pop("seconds")
    return {
        "metrics": metrics,
        "eval": results,
        "answers": [row["response"] for row in lines(out / "samples.jsonl")],
    }


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        FILE.write_text(json.dumps(tiny_run(Path(folder) / "run"), indent=1) + "\n")


if __name__ == "__main__":
    main()
