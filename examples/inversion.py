"""Held-out digits edited by DDIM inversion as a picture, a row for each: images; drawn back from their noise as the
digit that they are; and drawn from the same noise as another digit.

python examples/inversion.py MODEL.safetensors INVERSION.png, with a model that `fastdiff train --data digits --classes`
wrote.
"""

import sys
from pathlib import Path

import torch

from fastdiff.training.checkpoint import load_model
from fastdiff.training.data import digits, save_grid

STEPS, OTHERS = 100, (0, 3, 7, 8)


def main(checkpoint: Path, picture: Path) -> None:
    torch.set_num_threads(1)
    model, (data, labels) = load_model(checkpoint), digits()[2:]
    first = [int((labels == digit).nonzero()[0]) for digit in range(10)]  # one of each
    images = torch.stack([data[i] for i in first])
    own = torch.arange(10)
    noise = model.encode(images, steps=STEPS, class_labels=own)
    how = {"x_T": noise, "sampler": "ddim", "steps": STEPS}
    rows = [model.sample(10, class_labels=y, **how) for y in (own, *(torch.full((10,), k) for k in OTHERS))]
    save_grid(picture, torch.cat([images, *rows]), columns=10)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
