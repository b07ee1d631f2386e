"""Write the tables of docs/scale.md: what training on many GPUs moves and takes, on paper.

python docs/scale.py           writes them
python docs/scale.py --check   writes nothing; fails if the page has others

Parameters and operations are counted on the networks. The rest is arithmetic on the figures of HARDWARE.
"""

import re
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastdiff import UNet

PAGE = Path(__file__).with_suffix(".md")
# H100 SXM: dense bfloat16, memory, NVLink in one direction, one 400 Gb/s adapter a GPU (NVIDIA's data sheet); and what
# is assumed of them: the share of the peak that a U-Net reaches, that collectives reach, and a file system's rate.
PEAK, MEMORY, NVLINK, ADAPTER = 989e12, 80e9, 450e9, 50e9
UTILISATION, REACHED, DISK = 0.3, 0.8, 2e9
# Bytes of a parameter in float32: weights, gradients, two moments of AdamW, the average.
STATE, SAVED = 20, 16
SAMPLES, CALLS = 50_000, 50

NETWORKS = {
    "CIFAR-10, 32x32": (
        {
            "sample_size": 32,
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": None,
        },
        128,
    ),
    "UNet by default, 64x64": ({"sample_size": 64}, 64),
    "wide, 64x64": ({"sample_size": 64, "block_out_channels": (704, 1408, 2112, 2816)}, 16),
}


def count(config: dict) -> tuple[int, int]:
    """(parameters, floating-point operations of a forward of one image) of UNet(**config)."""
    with torch.device("meta"):
        unet = UNet(**config)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            unet(torch.empty(1, *unet.sample_shape), torch.zeros(1, dtype=torch.int64))
    return sum(p.numel() for p in unet.parameters()), counter.get_total_flops()


def step_seconds(operations: int, batch: int) -> float:
    """Forward and backward, three times the operations of a forward."""
    return 3 * operations * batch / (UTILISATION * PEAK)


def all_reduce(parameters: int, gpus: int) -> tuple[float, float]:
    """(bytes that a GPU sends, seconds) of a ring over the gradients."""
    sent = 2 * (gpus - 1) / gpus * 4 * parameters
    return sent, sent / (REACHED * (NVLINK if gpus <= 8 else ADAPTER))


def table(header: str, rows: list[list[str]]) -> str:
    names = header.split("|")
    cells = [[re.sub(r"(?<=\d) (?=[a-zA-Z])", "\u00a0", cell) for cell in row] for row in rows]  # "16 ms" stays whole
    return "\n".join("| " + " | ".join(row) + " |" for row in (names, ["---"] * len(names), *cells))


def tables() -> dict[str, str]:
    steps, memory, rest = [], [], []
    for name, (config, batch) in NETWORKS.items():
        parameters, operations = count(config)
        seconds = step_seconds(operations, batch)
        for gpus in (8, 64):
            sent, taken = all_reduce(parameters, gpus)
            steps.append(
                [
                    name,
                    f"{parameters / 1e6:,.0f} M",
                    str(gpus),
                    f"{batch}",
                    f"{1000 * seconds:.0f} ms",
                    f"{sent / 1e9:.2f} GB",
                    f"{1000 * taken:.1f} ms",
                    f"{taken / seconds:.0%}",
                    f"{batch / seconds:,.0f}",
                ]
            )
        memory.append(
            [name, f"{STATE * parameters / 1e9:.1f} GB", *(f"{STATE * parameters / n / 1e9:.2f} GB" for n in (8, 64))]
        )
        drawing = SAMPLES * CALLS * operations / (UTILISATION * PEAK) / 3600
        saving = SAVED * parameters
        minutes = (f"{60 * drawing / n:,.1f} min" for n in (1, 8, 64))
        rest.append([name, *minutes, f"{saving / 1e9:.1f} GB", f"{saving / DISK:.1f} s"])
    return {
        "steps": table(
            "network|parameters|GPUs|images a GPU|step|sent by a GPU|all-reduce|of the step|images/s a GPU loads", steps
        ),
        "memory": table("network|one GPU, or DDP|FSDP on 8|FSDP on 64", memory),
        "rest": table("network|1 GPU|8 GPUs|64 GPUs|checkpoint|to write it", rest),
        "limit": f"80 GB hold {MEMORY / 2 / STATE / 1e9:.0f} billion parameters if half is left to activations.",
    }


def filled(page: str) -> str:
    """The page with its tables, each between two comments with its name."""
    for name, text in tables().items():
        page = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=text: f"{m[1]}\n{t}\n\n{m[2]}", page, flags=re.S
        )
    return page


if __name__ == "__main__":
    before = PAGE.read_text(encoding="utf-8")
    after = filled(before)
    if "--check" not in sys.argv:
        PAGE.write_text(after, encoding="utf-8")
    elif after != before:
        sys.exit(f"{PAGE} has other tables: run python docs/scale.py")
