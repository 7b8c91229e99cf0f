"""The number of processes and the micro-batch size change nothing: real process groups (gloo), real FSDP."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import read_safetensors

SCRIPT = Path(__file__).with_name("ranks.py")


def run(out: Path, ranks: int, size: int) -> tuple[dict, dict]:
    launcher = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    out.mkdir()
    done = subprocess.run([*launcher, str(SCRIPT), str(out), str(size)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_safetensors(out / "weights.safetensors"), json.loads((out / "numbers.json").read_text())


def flat(numbers) -> list[float]:
    if isinstance(numbers, dict):
        return [x for key in sorted(numbers) for x in flat(numbers[key])]
    return [x for item in numbers for x in flat(item)] if isinstance(numbers, list) else [numbers]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[dict, dict]:
    return run(tmp_path_factory.mktemp("ranks") / "one", 1, 8)


@pytest.mark.parametrize("ranks,size", [(1, 1), (2, 4), (2, 3), (4, 1)])
def test_ranks_and_microbatches(reference, tmp_path, ranks, size):
    weights, numbers = run(tmp_path / "run", ranks, size)
    assert torch.equal(weights["tokens"], reference[0]["tokens"]), "the same episodes, whoever draws them"
    for name, tensor in reference[0].items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-6, rtol=0, msg=lambda text: f"{name}: {text}")
    assert flat(numbers) == pytest.approx(flat(reference[1]), abs=1e-5, rel=1e-5)


def test_the_updates_move_the_weights(reference):
    one, two = reference[0]["sft.lm_head.weight"], reference[0]["actor.lm_head.weight"]
    assert (one - two).abs().max() > 1e-3
