"""`python -m benchmarks --quality CHECKPOINT`: images per second and Frechet distance of a model of the digits."""

import argparse
import json
import time
from typing import Any

import torch

from fastdiff import files
from fastdiff.diffusion import Diffusion
from fastdiff.training import checkpoint, data
from fastdiff.training.evaluate import frechet_distance

RUNS = [("ddpm", 1000), *((sampler, steps) for sampler in ("ddim", "dpm++2m") for steps in (100, 50, 20, 10))]
HALF = ("ddim", 50)  # once more in bfloat16
BATCH = 256
COLOURS = {"ddpm": "#888888", "ddim": "#cc7722", "dpm++2m": "#3465a4"}


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
        args: quality (the checkpoint), json and plot (a path or None).

    Raises: ValueError if the model is not a DDPM of the digits.
    """
    model = checkpoint.load_model(args.quality).to(device)
    if model.model.sample_shape != (1, 8, 8) or getattr(model, "timesteps", 0) < RUNS[0][1]:
        raise ValueError(f"{args.quality}: expected a DDPM of the 8x8 digits with 1,000 timesteps")
    train, _, held_out, _ = data.digits()
    n = len(train)
    real = frechet_distance(train[:], held_out[:])
    print(f"{n} images of {args.quality}; two halves of the real digits are {real:.4f} apart\n")
    print(f"{'sampler':15}{'steps':>7}{'images/s':>11}{'to ddpm':>10}{'Frechet distance':>19}{'to ddpm':>10}")
    rows: list[dict[str, Any]] = []
    for sampler, steps, dtype in [*((*run, None) for run in RUNS), (*HALF, torch.bfloat16)]:
        rows.append(measure(model, sampler, steps, n, held_out[:], dtype))
        rate, distance = (rows[-1][key] / rows[0][key] for key in ("images_per_s", "frechet_distance"))
        print(f"{rows[-1]['sampler']:15}{steps:7}{rows[-1]['images_per_s']:11.2f}{rate:9.1f}x", end="")
        print(f"{rows[-1]['frechet_distance']:19.4f}{distance:9.2f}x", flush=True)
    if args.json:
        with files.replacing(args.json) as temporary:
            temporary.write_text(json.dumps({"real": real, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        from . import pictures

        pictures.save(pictures.quality(rows, real, COLOURS), args.plot)
    return 0
