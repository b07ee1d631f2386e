"""A class-conditional model of a folder of images, in a loop of one's own: python examples/train_folder.py FOLDER OUT.

FOLDER has a sub-folder for each class. OUT.png gets a row of samples of each.
"""

import argparse
import copy

import torch

from fastdiff import DDPM, UNet
from fastdiff.data import Folder, Stream, save_grid

parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("out")
parser.add_argument("--size", type=int, default=32)
parser.add_argument("--steps", type=int, default=20_000)
parser.add_argument("--workers", type=int, default=2)
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

torch.manual_seed(0)
source = Folder(args.folder, (args.size, args.size), channels=3, classes=True)
stream = Stream(source, batch_size=64, flip=True, label_dropout=0.1, workers=args.workers)
no_label = len(source.classes)
blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "norm_num_groups": 8}
unet = UNet(args.size, block_out_channels=(32, 64), layers_per_block=1, num_class_embeds=no_label + 1, **blocks)
ddpm = DDPM(unet, schedule="cosine", objective="v").to(device)
average = copy.deepcopy(ddpm)
optimizer = torch.optim.AdamW(ddpm.parameters(), lr=1e-3)

for step, batch in zip(range(args.steps), stream.batches(), strict=False):
    images, labels = batch.to(device)
    loss = ddpm(images, class_labels=labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for kept, new in zip(average.parameters(), ddpm.parameters(), strict=True):
            kept.lerp_(new, max(1e-3, 9 / (10 + step)))
    if step % 100 == 0:
        print(f"step {step}: loss {loss.item():.4f}")

labels = torch.arange(no_label, device=device).repeat_interleave(8)
uncond = {"class_labels": torch.full_like(labels, no_label)}
samples = average.sample(len(labels), sampler="ddim", steps=50, class_labels=labels, guidance=2.0, uncond=uncond)
save_grid(f"{args.out}.png", samples.cpu(), columns=8)
