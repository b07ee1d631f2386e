"""What a whole step of training launches and moves, counted without a GPU: `python benchmarks/training_cost.py`.

The step is forward, backward, clipping, AdamW and the moving average, of the 35.7M U-Net of google/ddpm-cifar10-32
under autocast to bfloat16. It is built by what a GPU measures (gpu/training.py), and run on tensors without values.
`meter.py` has the rules. With `--operators` the bytes and kernels of each operator are shown. A second table counts
what Inductor writes for two resnet blocks with their gradients, as that of `network_cost.py` does for a forward.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.compiled_blocks import inductor_kernels
from benchmarks.gpu.rows import Setup
from benchmarks.gpu.training import Step, own_step, stock_step
from benchmarks.meter import Meter, Row, as_on_a_gpu, row
from fastdiff.files import write_json

BATCHES = (16, 128)
# A captured step runs the same operators as one that would be captured if this device could.
COUNTED: dict[str, Callable[..., Step]] = {
    "fastdiff eager": own_step,
    "fastdiff graph": partial(own_step, graph=None),
    "diffusers eager": partial(stock_step, compiled=False),
}
BLOCKS = {"fastdiff": "fastdiff's, as TrainingStep runs them", "diffusers": "diffusers', under autocast"}


def count(method: str, batch: int, toy: bool = False) -> tuple[Row, Meter]:
    """One step: the second, as the first makes the optimizer's state."""
    setup, size = Setup(torch.device("cpu"), toy), 8 if toy else 32
    with (
        as_on_a_gpu(),
        mock.patch.object(nn.Module, "to", lambda module, device: module),  # weights without values cannot move
        mock.patch("fastdiff.training.step.what_forbids_here", return_value=None),
        warnings.catch_warnings(),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        warnings.simplefilter("ignore")
        step = COUNTED[method](torch.empty(batch, 3, size, size), setup)
        step()
        with Meter() as meter:
            step()
    return row(method, batch, meter), meter


def main(argv: Sequence[str] | None = None) -> int:
    """Print both tables; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    parser.add_argument("--operators", action="store_true", help="also show what each operator costs")
    args = parser.parse_args(argv)
    counted = []
    print("| step | batch | kernels | MB an image |\n|---|---:|---:|---:|")
    for batch in BATCHES:
        for method in COUNTED:
            step, meter = count(method, batch)
            print(f"| {method} | {batch} | {step.kernels} | {step.megabytes_per_image:.1f} |", flush=True)
            counted.append(step)
            for name, moved in meter.bytes_by.most_common() if args.operators else ():
                print(f"|   {name} | | {meter.kernels[name]} | {moved / 1e6 / batch:.2f} |")
    blocks = []
    print("\n| two resnet blocks with gradients, compiled | Triton kernels | calls | passes |\n|---|---:|---:|---:|")
    for kind, name in BLOCKS.items():
        made = inductor_kernels(kind, channels_last=True, gradient=True)
        blocks.append({"blocks": kind} | made._asdict())
        print(f"| {name} | {made.triton} | {made.calls} | {made.passes} |")
    if args.json:
        write_json(args.json, {"step": [step._asdict() for step in counted], "compiled": blocks})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
