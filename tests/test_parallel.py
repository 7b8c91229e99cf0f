"""The number of processes and the micro-batch size change nothing: real process groups (gloo), real FSDP."""
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from weights.files import read_safetensors

SCRIPT = Path(__file__).with_name("ranks.py")


def run(out: Path, ranks: int, sizes: list[int], **settings) -> list[tuple[dict, dict]]:
    """Return weights and numbers for each micro-batch size."""
    launcher = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run([*launcher, str(SCRIPT), str(out), json.dumps(settings), *map(str, sizes)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [(read_safetensors(out / str(size) / "weights.safetensors"), json.loads((out / str(size) / "numbers.json").read_text())) for size in sizes]


def flat(numbers) -> list[float]:
    if isinstance(numbers, dict):
        return [x for key in sorted(numbers) for x in flat(numbers[key])]
    return [x for item in numbers for x in flat(item)] if isinstance(numbers, list) else [numbers]


def assert_equal(result: tuple[dict, dict], reference: tuple[dict, dict]) -> None:
    weights, numbers = result
    assert torch.equal(weights["tokens"], reference[0]["tokens"]), "the same episodes, whoever draws them"
    for name, tensor in reference[0].items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-6, rtol=0, msg=lambda text: f"{name}: {text}")
    assert flat(numbers) == pytest.approx(flat(reference[1]), abs=1e-5, rel=1e-5)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[dict, dict]:
    return run(tmp_path_factory.mktemp("ranks"), 1, [8])[0]


@pytest.mark.line(6, 10, 11, 17)
@pytest.mark.parametrize("ranks,sizes,settings", [
    (1, [1, 2, 4], {}), (2, [1, 3, 4], {}), (4, [1, 2], {}), (1, [4], {"activation_checkpointing": True}), (2, [4], {"offload_frozen": True}),
    (4, [2], {"replicas": 2, "activation_checkpointing": True, "offload_frozen": True})])
def test_ranks_and_microbatches(reference, tmp_path, ranks, sizes, settings):
    for result in run(tmp_path, ranks, sizes, **settings):
        assert_equal(result, reference)


def test_two_nodes(reference, tmp_path):
    """Two torchrun agents of two processes each, a replica per node (HSDP), joined over the loopback device."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}", "--nproc_per_node=2",
                                "--master-addr=127.0.0.1", f"--master-port={port}", str(SCRIPT), str(tmp_path), '{"replicas": 2}', "2"],
                               stderr=subprocess.PIPE, text=True) for node in (0, 1)]
    errors = [agent.communicate(timeout=240)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    assert_equal((read_safetensors(tmp_path / "2" / "weights.safetensors"), json.loads((tmp_path / "2" / "numbers.json").read_text())), reference)


def test_the_updates_move_the_weights(reference):
    one, two = reference[0]["sft.lm_head.weight"], reference[0]["actor.lm_head.weight"]
    assert (one - two).abs().max() > 1e-3
