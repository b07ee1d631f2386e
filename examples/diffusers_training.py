"""Unconditional training with diffusers on 8x8 digits: a diffusers script in which one import has changed.

python examples/diffusers_training.py --out runs/diffusers, which needs accelerate too.
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMPipeline, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from sklearn.datasets import load_digits

from fastdiff.interop.diffusers import DDPMScheduler

parser = argparse.ArgumentParser()
parser.add_argument("--out", required=True)
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

torch.manual_seed(args.seed)
accelerator = Accelerator()
device = accelerator.device
digits = torch.tensor(load_digits().images, dtype=torch.float32, device=device)[:, None] / 8 - 1
model = UNet2DModel(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    layers_per_block=1,
    block_out_channels=(32, 64),
    norm_num_groups=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
noise_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
lr_scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=20, num_training_steps=args.steps)
model, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
ema = EMAModel(model.parameters(), decay=0.995, use_ema_warmup=True)

losses = []
for step in range(args.steps):
    clean = digits[torch.randint(0, len(digits), (args.batch,), device=device)]
    noise = torch.randn_like(clean)
    timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (args.batch,), device=device)
    noisy = noise_scheduler.add_noise(clean, noise, timesteps)
    loss = F.mse_loss(model(noisy, timesteps).sample, noise)
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    lr_scheduler.step()
    optimizer.zero_grad()
    ema.step(model.parameters())
    losses.append(loss.item())
    if step % 100 == 0 or step == args.steps - 1:
        print(f"step {step}: loss {losses[-1]:.4f}")

ema.copy_to(model.parameters())
DDPMPipeline(accelerator.unwrap_model(model), noise_scheduler).save_pretrained(args.out)
