"""Sampling a diffusers pipeline with three schedulers: a diffusers script in which one import has changed.

python examples/diffusers_sampling.py runs/diffusers --out runs/diffusers/images
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDPMPipeline

from fastdiff.interop.diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

parser = argparse.ArgumentParser()
parser.add_argument("pipeline")
parser.add_argument("--out", required=True)
parser.add_argument("--images", type=int, default=16)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

pipeline = DDPMPipeline.from_pretrained(args.pipeline).to("cuda" if torch.cuda.is_available() else "cpu")
pipeline.set_progress_bar_config(disable=True)
for scheduler, steps in ((DDPMScheduler, 100), (DDIMScheduler, 25), (DPMSolverMultistepScheduler, 10)):
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    generator = torch.Generator().manual_seed(args.seed)
    images = pipeline(args.images, generator, num_inference_steps=steps).images
    folder = Path(args.out) / scheduler.__name__
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
    print(f"{scheduler.__name__}: {len(images)} images in {steps} steps")
