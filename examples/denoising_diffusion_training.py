"""Training and sampling with denoising-diffusion-pytorch: a script of theirs in which one import has changed.

python examples/denoising_diffusion_training.py photos/ --out runs/denoising_diffusion
"""

import argparse

import torch
from denoising_diffusion_pytorch import Trainer, Unet

from fastdiff.interop.denoising_diffusion import GaussianDiffusion

parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("--out", required=True)
parser.add_argument("--steps", type=int, default=100000)
parser.add_argument("--size", type=int, default=64)
parser.add_argument("--dim", type=int, default=64)
parser.add_argument("--timesteps", type=int, default=1000)
parser.add_argument("--sampling-timesteps", type=int, default=250)
parser.add_argument("--every", type=int, default=1000)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

torch.manual_seed(args.seed)
model = Unet(dim=args.dim, dim_mults=(1, 2, 4))
diffusion = GaussianDiffusion(
    model, image_size=args.size, timesteps=args.timesteps, sampling_timesteps=args.sampling_timesteps
)
trainer = Trainer(
    diffusion,
    args.folder,
    train_batch_size=16,
    train_lr=8e-5,
    train_num_steps=args.steps,
    ema_decay=0.995,
    save_and_sample_every=args.every,
    num_samples=4,
    results_folder=args.out,
    calculate_fid=False,
)
trainer.train()
