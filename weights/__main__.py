"""Accept what was edited beside the weights of a model folder: python -m weights FOLDER."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Sequence

from formats import harmless
from weights.files import accept_changed, first_of


def main(args: Sequence[str]) -> None:
    """Have the folder's checksums be those of its files as they are now."""
    if len(args) != 1 or first_of(Path(args[0])) is None:
        raise ValueError("give one folder, with the model*.safetensors of a model")
    changed = accept_changed(Path(args[0]))
    print(harmless(f"{args[0]}: accepted: {', '.join(changed) or 'nothing, no file was changed'}"))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(harmless(f"python -m weights: error: {error}"), file=sys.stderr)
        sys.exit(2)
