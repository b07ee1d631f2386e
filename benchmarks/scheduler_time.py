"""How long a step of each scheduler holds up the program: microseconds on the host, beside the class of diffusers.

    python benchmarks/scheduler_time.py [--json FILE] [--only NAME ...]

A step is what a pipeline calls: scale_model_input and step (step_pred of ScoreSdeVeScheduler), from what the step
before returned. The tensors are small and lie on the CPU, so that the host decides. Both take turns, and each row is of
all steps of a run.
"""

import argparse
import gc
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import diffusers
import torch

from fastdiff.files import writable, write_json
from fastdiff.interop import diffusers as fused

SHAPES = ((1, 4, 32, 32), (1, 3, 8, 8))
STEPS, ROUNDS = 20, 60  # steps of a run; runs, of which the second fastest counts
SCHEDULERS = [name for name in fused.__all__ if name.endswith("Scheduler")]


def run_of(scheduler: Any, shape: tuple[int, ...]) -> float:
    """Seconds of the processor for the steps of one run."""
    generator = torch.Generator().manual_seed(0)
    output, x = (torch.randn(shape, generator=generator) for _ in range(2))
    ends = isinstance(scheduler, diffusers.SCMScheduler)  # its last timestep is where the run ends
    scheduler.set_timesteps(STEPS, **({"intermediate_timesteps": None} if ends else {}))
    if isinstance(scheduler, diffusers.ScoreSdeVeScheduler):
        scheduler.set_sigmas(STEPS)
    step = scheduler.step_pred if hasattr(scheduler, "step_pred") else scheduler.step
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    timesteps = list(scheduler.timesteps)[: -1 if ends else None]
    remembers = not isinstance(scheduler, diffusers.CogVideoXDPMScheduler)
    old = None
    start = time.thread_time()
    for before, t in zip((None, *timesteps), timesteps, strict=False):
        scale(x, t)
        if remembers:
            x = step(output, t, x, return_dict=False)[0]
        else:
            x, old = step(output, old, t, before, x)
    return (time.thread_time() - start) / len(timesteps)


def measure(name: str, shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """A row: microseconds a step of ours and of stock."""
    both = [getattr(library, name)() for library in (fused, diffusers)]
    taken: list[list[float]] = [[], []]
    gc.disable()
    try:
        for round_ in range(rounds + 2):  # the first two warm up
            for scheduler, times in zip(both, taken, strict=True):
                seconds = run_of(scheduler, shape)
                if round_ > 1:
                    times.append(1e6 * seconds)
    finally:
        gc.enable()
    ours, stock = (sorted(times)[min(1, rounds - 1)] for times in taken)
    return {"scheduler": name, "shape": list(shape), "ours_us": ours, "stock_us": stock, "ratio": ours / stock}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE too")
    parser.add_argument("--only", nargs="+", choices=SCHEDULERS, default=SCHEDULERS, help="(default: all)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="(default: %(default)s)")
    args = parser.parse_args()
    if args.json:
        writable(args.json)
    rows = []
    print(f"{'microseconds of the host, a step':36s}{'shape':>14s}{'ours':>8s}{'stock':>8s}{'ratio':>8s}")
    for name in args.only:
        for shape in SHAPES:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                row = measure(name, shape, args.rounds)
            rows.append(row)
            text = "x".join(map(str, shape))
            print(f"{name:36s}{text:>14s}{row['ours_us']:8.1f}{row['stock_us']:8.1f}{row['ratio']:8.2f}", flush=True)
    if args.json:
        write_json(args.json, rows)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
