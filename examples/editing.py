"""Edited held-out digits as a picture, a row for each: images; drawn from them, strength 0.3 and 0.6; with the lower
half hidden; that half drawn anew by replacement; and the same with each step taken ten times.

python examples/editing.py MODEL.safetensors EDITING.png, with a model that `fastdiff train --data digits` wrote.
"""

import sys
from pathlib import Path

import torch

from fastdiff.training.checkpoint import load_model
from fastdiff.training.data import digits, save_grid

SHOWN, STEPS = 10, 50


def main(checkpoint: Path, picture: Path) -> None:
    torch.set_num_threads(1)
    model, data = load_model(checkpoint), digits()[2]
    images = torch.stack([data[i] for i in range(SHOWN)])
    known = torch.zeros(8, 1)
    known[:4] = 1  # the upper half
    known = known.expand(1, 1, 8, 8)
    how = {"sampler": "ddim", "steps": STEPS, "seed": 3, "x_init": images}
    rows = [
        images,
        model.sample(SHOWN, strength=0.3, **how),
        model.sample(SHOWN, strength=0.6, **how),
        images * known,
        model.sample(SHOWN, known=known, **how),
        model.sample(SHOWN, known=known, resample=10, **how),
    ]
    save_grid(picture, torch.cat(rows), columns=SHOWN)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
