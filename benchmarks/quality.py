"""`python -m benchmarks --quality CHECKPOINT ...`: images per second and Frechet distance of models of the digits, for
every sampler at equal numbers of model calls."""

import argparse
import json
import time
from typing import Any

import torch

from fastdiff import files
from fastdiff.diffusion import Diffusion
from fastdiff.steps import SAMPLERS
from fastdiff.training import checkpoint, data
from fastdiff.training.evaluate import frechet_distance

CALLS = (5, 10, 20, 50)
HALF = ("ddim", 50)  # once more in bfloat16
BATCH = 256


def steps_of(model: Diffusion, sampler: str, calls: int) -> int | None:
    """The most steps of the sampler that take at most so many calls of the model; None if it cannot run like that."""
    for steps in range(calls, 0, -1):
        try:
            table = model.step_table(sampler, steps)
        except ValueError:  # it cannot start where the model does, or needs another process
            return None
        if sum(kind != "add" for kind in table.kinds) <= calls:
            return steps
    return None


def measure(
    model: Diffusion, sampler: str, steps: int, n: int, held_out: torch.Tensor, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """One line of the table: the rate at which n images are drawn, and their distance to the held-out digits."""
    model.sample(2, sampler=sampler, steps=2, seed=0, dtype=dtype)  # compiles what is compiled at its first use
    start = time.perf_counter()
    batches = [torch.arange(n)[i : i + BATCH] for i in range(0, n, BATCH)]
    how: dict[str, Any] = {"sampler": sampler, "steps": steps, "seed": 0, "dtype": dtype}
    images = torch.cat([model.sample(len(ids), sample_ids=ids, **how) for ids in batches])
    seconds = time.perf_counter() - start
    distance = frechet_distance(images.cpu(), held_out)
    shown = sampler if dtype is None else f"{sampler}, {str(dtype).removeprefix('torch.')}"
    return {"sampler": shown, "steps": steps, "images_per_s": n / seconds, "frechet_distance": distance}


def main(args: argparse.Namespace, device: torch.device) -> int:
    """Print the table, and write the files that are asked for.

    Args:
        args: quality (the checkpoints), json and plot (a path or None).

    Raises: ValueError if a model is not of the digits.
    """
    models = [checkpoint.load_model(path).to(device) for path in args.quality]
    for path, model in zip(args.quality, models, strict=True):
        if model.model.sample_shape != (1, 8, 8):
            raise ValueError(f"{path}: expected a model of the 8x8 digits, it draws {model.model.sample_shape}")
    train, _, held_out, _ = data.digits()
    n = len(train)
    real = frechet_distance(train[:], held_out[:])
    print(f"{n} images of each model; two halves of the real digits are {real:.4f} apart\n")
    print(f"{'model':14}{'sampler':22}{'calls':>6}{'steps':>7}{'images/s':>11}{'Frechet distance':>19}")
    rows: list[dict[str, Any]] = []
    for model in models:
        name = type(model).__name__
        runs: list[tuple[str, int, torch.dtype | None]] = [(s, calls, None) for s in SAMPLERS for calls in CALLS]
        for sampler, calls, dtype in (*runs, (*HALF, torch.bfloat16)):
            steps = steps_of(model, sampler, calls)
            if steps is None:
                continue
            row = measure(model, sampler, steps, n, held_out[:], dtype)
            rows.append({"model": name, "calls": calls, **row})
            rate, distance = row["images_per_s"], row["frechet_distance"]
            print(f"{name:14}{row['sampler']:22}{calls:6}{steps:7}{rate:11.2f}{distance:19.4f}", flush=True)
    if args.json:
        with files.replacing(args.json) as temporary:
            temporary.write_text(json.dumps({"real": real, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        from . import pictures

        pictures.save(pictures.quality(rows, real), args.plot)
    return 0
