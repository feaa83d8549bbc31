"""Writes a small checkpoint of every layout, packed and decoded, for `benchmarks/soak.py --models FOLDER`.

Usage: `make soak`, or `python tests/write_models.py FOLDER [WORD ...]` for the layouts whose name has one of the words.
"""

import re
import sys
import tempfile
import zlib
from pathlib import Path

from helpers import save_checkpoint
from layout import write_twins
from layouts import LAYOUTS, Layout

SPREAD = 0.3


def main() -> None:
    place, words = Path(sys.argv[1]), sys.argv[2:]
    chosen = {name: one for name, one in LAYOUTS.items() if not words or any(word in name for word in words)}
    chosen["plain"] = Layout(family="qwen3_moe", quantization={}, pack=None, plain_layers=tuple(range(9)))
    for name, layout in chosen.items():
        folder = place / re.sub(r"\W+", "-", name)
        folder.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as source:
            sizes = {"num_hidden_layers": 2, **layout.sizes}
            seed = zlib.crc32(name.encode())
            save_checkpoint(Path(source), layout.family, layout.dtype, sizes, seed=seed, spread=SPREAD)
            write_twins(Path(source), folder, layout)


if __name__ == "__main__":
    main()
