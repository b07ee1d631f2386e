"""The variational bound of held-out digits in bits per dimension, by the variance of the reverse steps.

python examples/bound.py MODEL.safetensors ..., with models that `fastdiff train --data digits` wrote. A model with a
fixed variance is evaluated with both fixed ones, as neither is part of its training.
"""

import sys
from pathlib import Path

import torch

from fastdiff.training.checkpoint import load_model
from fastdiff.training.data import digits

IMAGES = 64


def main(*checkpoints: Path) -> None:
    torch.set_num_threads(1)
    x0 = digits()[2][:IMAGES]
    print(f"{'model':50}{'variance':>10}{'bits/dim':>10}{'prior':>10}{'decoder':>10}")
    for checkpoint in checkpoints:
        model = load_model(checkpoint)
        for variance in ("learned",) if model.variance == "learned" else ("posterior", "beta"):
            model.variance = variance
            bound = model.bits_per_dim(x0, seed=0)
            figures = (bound.total, bound.prior, bound.terms[:, -1])
            print(f"{checkpoint!s:50}{variance:>10}" + "".join(f"{v.mean().item():10.4g}" for v in figures))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
