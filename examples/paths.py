"""One image's path from noise to data under four samplers, as a picture: a row for each, x_t divided by its spread.

python examples/paths.py MODEL.safetensors PATHS.png, with a model that `fastdiff train` wrote.
"""

import sys
from pathlib import Path

import torch

from fastdiff.training.checkpoint import load_model
from fastdiff.training.data import save_grid

SAMPLERS = {"ddpm": None, "ddim": 50, "dpm++2m": 20, "heun": 18}
SHOWN = 10


def main(checkpoint: Path, picture: Path) -> None:
    torch.set_num_threads(1)
    model = load_model(checkpoint)
    rows = []
    for sampler, steps in SAMPLERS.items():
        path = model.sample(1, sampler=sampler, steps=steps, seed=3, return_trajectory=True)[:, 0]
        shown = path[torch.linspace(0, len(path) - 1, SHOWN).round().long()]
        rows.append(shown / shown.flatten(1).std(1).clamp(min=1).view(-1, 1, 1, 1))
    save_grid(picture, torch.cat(rows), columns=SHOWN)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
