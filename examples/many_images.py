"""A folder of generated images, the speed of its stream alone and of training, and the memory that each takes.

python examples/many_images.py --images 20000
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from fastdiff import DDPM, UNet
from fastdiff.data import Folder, Stream

parser = argparse.ArgumentParser()
parser.add_argument("--images", type=int, default=20_000)
parser.add_argument("--size", type=int, default=32)
parser.add_argument("--steps", type=int, default=100, help="of training, 64 images each")
parser.add_argument("--workers", type=int, default=2)
args = parser.parse_args()
process = psutil.Process()
torch.set_num_threads(1)  # the network is tiny, and the workers need cores


def resident() -> int:
    """Resident memory in MB of this process and its workers, shared pages counted once for each."""
    return sum(part.memory_info().rss for part in (process, *process.children())) >> 20


with tempfile.TemporaryDirectory() as folder:
    rng = np.random.default_rng(0)
    for k in range(args.images):
        path = Path(folder, f"{k % 10}", f"{k}.png")
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (args.size, args.size, 3), np.uint8)).save(path)
    stream = Stream(Folder(folder, (args.size, args.size), channels=3), batch_size=64, workers=args.workers)
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "norm_num_groups": 8}
    ddpm = DDPM(
        UNet(args.size, block_out_channels=(8, 16), layers_per_block=1, **blocks), schedule="cosine", objective="v"
    )
    optimizer = torch.optim.AdamW(ddpm.parameters())
    for name, steps in (("stream alone", len(stream) // 64), ("training", args.steps)):
        start = None
        for step, batch in zip(range(steps), stream.batches(), strict=False):
            if name == "training":
                ddpm(batch.images).backward()
                optimizer.step()
                optimizer.zero_grad()
            start = start or time.perf_counter()  # the workers have started
            if step % max(1, steps // 5) == 0:
                print(f"{name}: {64 * (step + 1)} images, {resident()} MB")
        print(f"{name}: {64 * (steps - 1) / (time.perf_counter() - start):.0f} images/s")
print(f"peak of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MB")
