"""What speed/ measures with: answers that end where they are told to, and the GPU's command in small."""

import torch

from model import Transformer, generate
from speed import iteration


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
