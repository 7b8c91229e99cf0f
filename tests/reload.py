"""What test_weights.py runs under two processes: load folders, sharded, and write them again.

`reload.py OUT FOLDER...` writes OUT/<name of the folder> for each; "reward" is a reward model.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import parallel
from model import ScalarModel, Transformer
from run import folder, settings

if __name__ == "__main__":
    torch.set_num_threads(1)
    MACHINE = parallel.start("float32")
    RUN = folder.Run(settings.Config(), MACHINE, Path(sys.argv[1]), None)
    for number, path in enumerate(map(Path, sys.argv[2:])):
        parallel.BLOCKWISE_ABOVE = 0 if number % 2 else 20_000_000  # both ways to wrap a model
        model = folder.load_model(RUN, path, ScalarModel if path.name == "reward" else Transformer)
        model(torch.tensor([[1, 5, 9]]))
        folder.save_model(RUN, model, path.name)
    parallel.stop()
