"""A training loop under Hugging Face Accelerate, on 8x8 digits. It runs as it is, and with several processes:

accelerate launch examples/train_accelerate.py --out runs/accelerate
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

from fastdiff import DDPM, UNet
from fastdiff.training import digits, save_grid

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--epochs", type=int, default=40)
parser.add_argument("--batch", type=int, default=64, help="images a step of each process")
parser.add_argument("--accumulate", type=int, default=1)
args = parser.parse_args()

accelerator = Accelerator(gradient_accumulation_steps=args.accumulate)
set_seed(0)
blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
unet = UNet(8, 1, 1, block_out_channels=(24, 48), layers_per_block=1, norm_num_groups=8, **blocks)
ddpm = DDPM(unet, schedule="cosine", objective="v")
ema = torch.optim.swa_utils.AveragedModel(ddpm, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))
optimizer = torch.optim.AdamW(ddpm.parameters(), lr=1e-3)
loader = DataLoader(TensorDataset(digits()[0][:]), args.batch, shuffle=True, drop_last=True)
trained, optimizer, loader = accelerator.prepare(ddpm, optimizer, loader)
ema.to(accelerator.device)

# Each process draws levels and noise of its own.
set_seed(accelerator.process_index)
for epoch in range(args.epochs):
    for (x0,) in loader:
        with accelerator.accumulate(trained):
            loss = trained(x0)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.update_parameters(accelerator.unwrap_model(trained))
    if epoch % 10 == 0 or epoch == args.epochs - 1:
        accelerator.print(f"epoch {epoch}: loss {loss.item():.4f}")

if accelerator.is_main_process:
    args.out.mkdir(parents=True, exist_ok=True)
    save_grid(args.out / "samples.png", ema.module.sample(16, steps=20, sampler="ddim", seed=0).cpu())
