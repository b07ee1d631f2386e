"""A training loop whose weights are split over processes by FSDP2, on 8x8 digits.

torchrun --nproc-per-node 2 examples/train_fsdp.py --out runs/fsdp

The noise of a sample is a function of its number, so any number of processes trains the same weights to rounding.
"""

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from fastdiff import DDPM, UNet
from fastdiff.training import digits, save_grid

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--batch", type=int, default=64, help="images a step, of all processes together")
args = parser.parse_args()

cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
dist.init_process_group("nccl" if cuda else "gloo")
rank, size = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)  # the same weights everywhere
blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
unet = UNet(8, 1, 1, block_out_channels=(24, 48), layers_per_block=1, norm_num_groups=8, **blocks)
ddpm = DDPM(unet, schedule="cosine", objective="v").to(device)
for block in (*unet.mid_block.resnets, *unet.up_blocks[0].resnets):
    fully_shard(block)
fully_shard(ddpm)
optimizer = torch.optim.AdamW(ddpm.parameters(), lr=1e-3)

images = digits()[0][:]
for step in range(args.steps):
    numbers = torch.arange(step * args.batch, (step + 1) * args.batch)  # of the step's samples, in all processes
    generator = torch.Generator().manual_seed(step)
    chosen = torch.randint(len(images), (args.batch,), generator=generator)
    levels = torch.randint(1, ddpm.timesteps + 1, (args.batch,), generator=generator)
    mine = slice(args.batch * rank // size, args.batch * (rank + 1) // size)
    x0, t = images[chosen[mine]].to(device), levels[mine].to(device)
    losses = ddpm(x0, t=t, seed=0, sample_ids=numbers[mine], reduction="none")
    (losses.sum() * size / args.batch).backward()  # FSDP takes the mean over the processes
    torch.nn.utils.clip_grad_norm_(ddpm.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0 and (step % 100 == 0 or step == args.steps - 1):
        print(f"step {step}: loss {losses.mean().item():.4f}")

drawn = ddpm.sample(16, steps=20, sampler="ddim", seed=0)  # all processes call it, and each has all images
if rank == 0:
    args.out.mkdir(parents=True, exist_ok=True)
    save_grid(args.out / "samples.png", drawn.cpu())
time.sleep(0.2)  # gloo's threads free the last tensors; the next line would keep them from it, and wait for them
dist.destroy_process_group()
