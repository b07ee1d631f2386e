"""`python -m benchmarks --quality CHECKPOINT ...`: Frechet distance and cost of models of the digits, for every sampler
at equal numbers of model calls."""

import argparse
import statistics
import time
from typing import Any

import torch

from benchmarks import timing
from fastdiff.diffusion import Diffusion
from fastdiff.files import write_json
from fastdiff.steps import SAMPLERS, StepTable
from fastdiff.training import checkpoint, data
from fastdiff.training.evaluate import frechet_distance
from fastdiff.training.samples import conditions

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
        if calls_of(table) <= calls:
            return steps
    return None


def calls_of(table: StepTable) -> int:
    """How often a run over the table asks the model."""
    return sum(kind != "add" for kind in table.kinds)


def group_of(model: Diffusion, sampler: str) -> str:
    """What a sampler has in common with others: noise or none, and one call of the model a step or several."""
    steps = next(filter(None, (steps_of(model, sampler, calls) for calls in reversed(CALLS))))
    table = model.step_table(sampler, steps)
    several = calls_of(table) >= 1.5 * steps  # some rules leave out a call, or add one
    return f"{'noise' if table.noisy else 'no noise'}, {'several calls' if several else 'one call'} a step"


def measure(
    model: Diffusion, sampler: str, steps: int, n: int, held_out: torch.Tensor, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """One line of the table: what it costs to draw n images, and their distance to the held-out digits.

    The cost is a ratio: the time to draw a batch over that of a call of the network, timed just before. So the load of
    the machine mostly cancels.
    """
    batches = torch.arange(n).split(BATCH)
    how: list[dict[str, Any]] = [{"sample_ids": ids, **conditions(model, ids)} for ids in batches]
    of_network = {name: value.to(model.device) for name, value in conditions(model, batches[0]).items()}
    x, t = torch.zeros(len(batches[0]), *held_out.shape[1:], device=model.device), torch.ones(1, device=model.device)
    # The first call compiles what is compiled then.
    model.sample(len(x), sampler=sampler, steps=2, seed=0, dtype=dtype, **how[0])
    clocks, drawn = [_clock(model.device)], []
    with torch.no_grad():
        model.model(x, t.expand(len(x)), **of_network)
    clocks.append(_clock(model.device))
    for ids, options in zip(batches, how, strict=True):
        drawn.append(model.sample(len(ids), sampler=sampler, steps=steps, seed=0, dtype=dtype, **options))
        clocks.append(_clock(model.device))
    return {
        "sampler": sampler if dtype is None else f"{sampler}, {str(dtype).removeprefix('torch.')}",
        "group": group_of(model, sampler),
        "steps": steps,
        "model_calls": calls_of(model.step_table(sampler, steps)),
        "cost": (clocks[2] - clocks[1]) / (clocks[1] - clocks[0]),
        "frechet_distance": frechet_distance(torch.cat(drawn).cpu(), held_out),
    }


def _clock(device: torch.device) -> float:
    """Seconds: on a CPU those of this process alone, whatever else the machine does."""
    return time.process_time() if device.type == "cpu" else timing.clock(device)


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
    print(f"{'model':14}{'sampler':22}{'calls':>6}{'steps':>7}{'cost in calls':>15}{'Frechet distance':>18}")
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
            cost, distance = row["cost"], row["frechet_distance"]
            print(f"{name:14}{row['sampler']:22}{calls:6}{steps:7}{cost:15.2f}{distance:18.4f}", flush=True)
    low, middle, high = statistics.quantiles((row["cost"] / row["model_calls"] for row in rows), n=4)
    print(f"\ncost / calls: half of the rows between {low:.2f} and {high:.2f}, median {middle:.2f}")
    if args.json:
        write_json(args.json, {"real": real, "rows": rows})
    if args.plot:
        from . import pictures

        pictures.save(pictures.quality(rows, real), args.plot)
    return 0
