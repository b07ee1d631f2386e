"""fastdiff: fused Triton kernels for diffusion models under a small PyTorch API.

    DDPM, NCSN, ScoreSDE, FlowMatching, Edm     formulations: a network that trains, samples and has likelihoods
    UNet, DiT                                   networks with the weights of diffusers
    NoiseSchedule                               the noise levels of a chain
    accelerate, restore                         the kernels inside a pipeline of diffusers, and out again
    ops, reference, backend                     the operations, the same in plain PyTorch, and which of them runs

Samplers are in fastdiff.steps, grids of levels in fastdiff.grids, rules of guidance in fastdiff.guidance, recipes of
training in fastdiff.recipes, drop-ins for other libraries in fastdiff.interop, and the command in fastdiff.training.
"""

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
