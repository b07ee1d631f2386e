"""The untrained model that the options of a run describe."""

from typing import Any

from fastdiff.ddpm import DDPM
from fastdiff.diffusion import Diffusion
from fastdiff.dit import DiT
from fastdiff.edm import Edm
from fastdiff.flow import FlowMatching
from fastdiff.score import NCSN, ScoreSDE
from fastdiff.training.options import OF_SIGMA, Options, resolutions
from fastdiff.unet import UNet

# The width of a DiT's tokens: 6 times the channels. 64 channels are DiT-S, 128 are DiT-B, where images are above 32x32.
WIDER = 6


def build(options: Options, classes: int = 0) -> Diffusion:
    """The untrained model of a run, with `classes` classes and "no label".

    Raises: ValueError naming what does not fit, as sigma_data of edm if it is yet to be measured.
    """
    network = (dit if options.network == "dit" else unet)(options, classes)
    same: dict[str, Any] = {"objective": options.objective, "loss": options.loss, "weighting": options.weighting}
    sigmas: dict[str, Any] = {"sigma_min": options.sigma_min, "sigma_max": options.sigma_max}
    if options.formulation == "ddpm":
        return DDPM(network, schedule=options.schedule, timesteps=options.timesteps, variance=options.variance, **same)
    if options.formulation == "ncsn":
        return NCSN(network, levels=options.timesteps, **sigmas, **same)
    if options.formulation == "flow":
        return FlowMatching(network, **same)
    if options.formulation == "edm":
        return Edm(network, sigma_data=options.sigma_data, **same)
    return ScoreSDE(network, options.formulation, **same, **(sigmas if options.formulation == "ve" else {}))


def unet(options: Options, classes: int) -> UNet:
    """A U-Net whose channels double once. Levels of 16x16 and below attend, except for 8x8 images."""
    side, channels = max(options.sides), options.shape[0]
    count = resolutions(side)
    attends = [side > 8 and side >> level <= 16 for level in range(count)]
    return UNet(
        sample_size=options.size,
        in_channels=channels,
        out_channels=outputs(options),
        block_out_channels=tuple(options.channels * min(2, level + 1) for level in range(count)),
        layers_per_block=1 if side <= 8 else 2,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        norm_num_groups=min(8, options.channels // 2),  # a norm of single channels would undo the time's shift
        num_class_embeds=classes + 1 if classes else None,
        self_condition=options.self_conditioning,
        # The network's output is divided by sigma, as a score wants.
        time_embedding_type="fourier" if options.formulation in OF_SIGMA else "positional",
    )


def dit(options: Options, classes: int) -> DiT:
    """A DiT of 4 blocks for 8x8 images, 8 up to 32x32, else 12, with heads of 64 channels, or of 48."""
    side, width = max(options.sides), WIDER * options.channels
    head = 64 if width % 64 == 0 else 48
    return DiT(
        num_attention_heads=width // head,
        attention_head_dim=head,
        in_channels=options.shape[0],
        out_channels=outputs(options),
        num_layers=4 if side <= 8 else 8 if side <= 32 else 12,
        sample_size=side,
        patch_size=options.patch,
        num_embeds_ada_norm=classes,
        self_condition=options.self_conditioning,
    )


def outputs(options: Options) -> int:
    """The network's output channels."""
    return options.shape[0] * (2 if options.variance == "learned" else 1)
