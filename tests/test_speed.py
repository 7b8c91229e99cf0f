"""What speed/ measures with: answers that end where they are told to, and the GPU's command in small."""

import sys

import torch

from model import Transformer, generate
from speed import gpu, iteration


def test_ragged_answers_end_where_foretold_whatever_the_schedule():
    model = iteration.made(Transformer, 0)
    prompts = iteration.draw_prompts()[:12]
    ends = iteration.EndOurs(4, 8)
    lengths = ends.foretell(model, prompts).tolist()
    assert len(set(lengths)) > 3 and max(lengths) <= 8
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    for size in (1, 5, 12):
        written = generate(model, [prompts[i] for i in order], 8, rows=order, batch_size=size,
                           stop=ends).tokens
        assert [len(answer) for answer in written] == [lengths[i] for i in order]


def test_the_gpus_command_says_a_line_of_everything(monkeypatch, capsys):
    def too_large(bench):
        raise torch.OutOfMemoryError("out of memory\nby far")

    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(gpu, "PARTS", {"large": too_large, **gpu.PARTS})
    gpu.main(["--toy"])
    said = {line[:40].rstrip(): line[40:] for line in capsys.readouterr().out.splitlines()}
    assert said["large"] == "failed: OutOfMemoryError: out of memory"
    assert said["SFT, transformers"] == "left out: transformers is not installed"
    assert "tokens/s" in said["SFT"] and "plan" in said["SFT"]
    for weights in ("float32 weights, cast", "bfloat16 weights"):
        for batch in gpu.TOY.batches:
            assert "ms a step" in said[f"decode, {weights}, batch {batch}"]
    assert "plan" in said["PPO rollout"] and "plan" in said["PPO update"]
    assert "tokens/s" in said["PPO iteration"]
