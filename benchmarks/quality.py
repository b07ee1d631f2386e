"""`fastdiff bench --quality CHECKPOINT`: images per second against Frechet distance, sampler by sampler, for a model of
the digits."""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from fastdiff import files
from fastdiff.diffusion import Diffusion
from fastdiff.training import checkpoint, data
from fastdiff.training.evaluate import frechet_distance

RUNS = [("ddpm", 1000), *((sampler, steps) for sampler in ("ddim", "dpm++2m") for steps in (100, 50, 20, 10))]
BATCH = 256
COLOURS = {"ddpm": "#888888", "ddim": "#cc7722", "dpm++2m": "#3465a4"}


def measure(model: Diffusion, sampler: str, steps: int, n: int, held_out: torch.Tensor) -> dict[str, Any]:
    """One line of the table: n images in batches, by the clock, and their distance to the held-out digits."""
    model.sample(2, sampler=sampler, steps=2, seed=0)  # what is compiled at the first use is compiled
    start = time.perf_counter()
    batches = [torch.arange(n)[i : i + BATCH] for i in range(0, n, BATCH)]
    how: dict[str, Any] = {"sampler": sampler, "steps": steps, "seed": 0}
    images = torch.cat([model.sample(len(ids), sample_ids=ids, **how) for ids in batches])
    seconds = time.perf_counter() - start
    distance = frechet_distance(images.cpu(), held_out)
    return {"sampler": sampler, "steps": steps, "images_per_s": n / seconds, "frechet_distance": distance}


def main(args: argparse.Namespace, device: torch.device) -> int:
    """Print the table; args: quality (the checkpoint), json, plot. ValueError for a model of anything but digits."""
    model = checkpoint.load_model(args.quality).to(device)
    if model.model.sample_shape != (1, 8, 8) or getattr(model, "timesteps", 0) < RUNS[0][1]:
        raise ValueError(f"{args.quality}: expected a DDPM of the 8x8 digits with 1,000 timesteps")
    train, _, held_out, _ = data.digits()
    n = len(train)
    real = frechet_distance(train[:], held_out[:])
    print(f"{n} images of {args.quality}; two halves of the real digits are {real:.4f} apart\n")
    print(f"{'sampler':10}{'steps':>7}{'images/s':>11}{'to ddpm':>10}{'Frechet distance':>19}{'to ddpm':>10}")
    rows: list[dict[str, Any]] = []
    for sampler, steps in RUNS:
        rows.append(measure(model, sampler, steps, n, held_out[:]))
        rate, distance = (rows[-1][key] / rows[0][key] for key in ("images_per_s", "frechet_distance"))
        print(f"{sampler:10}{steps:7}{rows[-1]['images_per_s']:11.2f}{rate:9.1f}x", end="")
        print(f"{rows[-1]['frechet_distance']:19.4f}{distance:9.2f}x", flush=True)
    if args.json:
        with files.replacing(args.json) as temporary:
            temporary.write_text(json.dumps({"real": real, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        plot(rows, real, args.plot)
    return 0


def plot(rows: list[dict[str, Any]], real: float, path: Path) -> None:
    """A PNG: Frechet distance over images per second, the latter on a logarithmic axis."""
    image_module, draw_module, font_module = (files.need(f"PIL.{m}") for m in ("Image", "ImageDraw", "ImageFont"))
    width, height, left, bottom = 640, 400, 60, 350
    rates = [math.log10(row["images_per_s"]) for row in rows]
    low, high = math.floor(min(rates)), math.ceil(max(rates))
    top = 1.2 * max(real, *(row["frechet_distance"] for row in rows))
    image = image_module.new("RGB", (width, height), "white")
    draw, font = draw_module.Draw(image), font_module.load_default(13)

    def place(rate: float, distance: float) -> tuple[float, float]:
        return left + (rate - low) / (high - low) * (width - left - 30), bottom - distance / top * (bottom - 30)

    draw.text((8, 6), "Frechet distance to held-out digits, over images per second", "black", font)
    for power in range(low, high + 1):
        x, y = place(power, 0)
        draw.line((x, y, x, 30), "#dddddd")
        draw.text((x - 10, y + 6), f"{10**power:g}", "black", font)
    for tick in range(6):
        x, y = place(low, top * tick / 5)
        draw.text((8, y - 8), f"{top * tick / 5:.2f}", "black", font)
    y = place(low, real)[1]
    draw.line((left, y, width - 30, y), "#888888")
    draw.text((left + 4, y + 2), "two halves of the real digits", "#666666", font)
    for row, rate in zip(rows, rates, strict=True):
        x, y = place(rate, row["frechet_distance"])
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), COLOURS[row["sampler"]])
        above = -20 if row["sampler"] != "dpm++2m" else 6  # the two fast ones lie close together
        draw.text((x - 10, y + above), str(row["steps"]), COLOURS[row["sampler"]], font)
    for line, (name, colour) in enumerate(COLOURS.items()):
        draw.text((left + 12, bottom - 70 + 18 * line), f"{name}, steps", colour, font)
    with files.replacing(path) as temporary:
        image.save(temporary, format="PNG")
