"""Stands in for torchvision, so that denoising-diffusion-pytorch imports beside a CPU build of torch.

PyPI has torchvision for CUDA only, which such a build cannot load. `stock` imports the package with this in the place
of torchvision, and then takes it away again, so that other libraries do not see it.
"""

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class Compose:
    """torchvision.transforms.Compose: one step after another."""

    def __init__(self, steps: list[Any]) -> None:
        self.steps = steps

    def __call__(self, image: Any) -> Any:
        for step in self.steps:
            image = step(image)
        return image


def to_tensor(image: Any) -> Tensor:
    """(C, H, W) in [0, 1]."""
    pixels = torch.from_numpy(np.array(image)).float() / 255
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def random_flip(image: Any) -> Any:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(1) < 0.5 else image


def save_image(images: Tensor, path: str, nrow: int = 8) -> None:
    pixels = images.mul(255).clamp(0, 255).byte().cpu()
    rows = [torch.cat(list(pixels[i : i + nrow]), dim=2) for i in range(0, len(pixels), nrow)]
    Image.fromarray(torch.cat(rows, dim=1).permute(1, 2, 0).squeeze(-1).numpy()).save(path)


def stock() -> Any:
    """The module denoising_diffusion_pytorch.denoising_diffusion_pytorch. Raises ImportError if there is none."""
    importlib.import_module("accelerate")  # looks for torchvision when it is imported
    transforms = SimpleNamespace(
        Compose=Compose,
        Lambda=lambda function: function,
        Resize=lambda size: lambda image: image.resize(size[::-1]),
        RandomHorizontalFlip=lambda: random_flip,
        CenterCrop=lambda size: lambda image: image,  # of what was resized to the same size
        ToTensor=lambda: to_tensor,
    )
    torchvision: Any = ModuleType("torchvision")
    torchvision.transforms, torchvision.utils = transforms, SimpleNamespace(save_image=save_image)
    before = sys.modules.get("torchvision")
    sys.modules["torchvision"] = torchvision
    try:
        return importlib.import_module("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
    finally:
        del sys.modules["torchvision"]
        if before is not None:
            sys.modules["torchvision"] = before
