"""fastdiff: fused Triton kernels for diffusion models under a small PyTorch API."""

from . import ops, reference
from .ddpm import DDPM
from .dit import DiT
from .edm import Edm
from .flow import FlowMatching
from .interop.accelerate import accelerate, restore
from .ops.dispatch import backend
from .schedule import NoiseSchedule
from .score import NCSN, ScoreSDE
from .unet import UNet

__version__ = "0.2.0"
__all__ = [
    "DDPM",
    "NCSN",
    "DiT",
    "Edm",
    "FlowMatching",
    "NoiseSchedule",
    "ScoreSDE",
    "UNet",
    "accelerate",
    "backend",
    "ops",
    "reference",
    "restore",
]
