"""Add a sampler: Euler ancestral, as k-diffusion and Stable Diffusion programs know it, in one function.

python examples/extending/sampler.py

It needs no kernel and no loop. To make it part of the package, put the function into fastdiff/steps/ and its name into
SAMPLERS there.
"""

import torch
from torch import Tensor

from fastdiff import DDPM, UNet, steps
from fastdiff.schedule import NoiseSchedule, linear
from fastdiff.steps import StepTable, make_table, x0_columns


def euler_ancestral(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, eta: float = 1.0
) -> StepTable:
    """Euler ancestral: a step of Euler's rule to less noise than level s has, then fresh noise up to level s.

        r    = sigma / alpha
        up   = eta r_s sqrt(r_t^2 - r_s^2) / r_t,    down = sqrt(r_s^2 - up^2)
        x_s  = alpha_s (x0 + down / r_t (x_t / alpha_t - x0) + up z),    x0 = denoise(x_t)

    Args:
        schedule: the noise levels.
        levels: (n + 1,) decreasing, ending at 0 (data).
        objective: what the network predicts.
        clip: x0 is kept in [-clip, clip]; the update does it.
        eta: 0 is Euler's rule, 1 adds all of the noise.

    Returns: one row per step; one model call each; first order.
    Reference: Katherine Crowson's k-diffusion, sample_euler_ancestral; Karras et al. 2022, arXiv:2206.00364.
    """
    t, s = levels[:-1], levels[1:]
    alpha, ratio = schedule.alpha, schedule.sigma / schedule.alpha
    up = eta * ratio[s] * (1 - (ratio[s] / ratio[t]) ** 2).sqrt()
    keep = (ratio[s] ** 2 - up**2).clamp(min=0).sqrt() / ratio[t]  # down / r_t
    return make_table(
        schedule,
        levels,
        **x0_columns(schedule, t, s, objective, clip),  # x0_from_x and x0_from_pred, checked
        from_x0=alpha[s] * (1 - keep),
        from_x=alpha[s] / alpha[t] * keep,
        noise=alpha[s] * up,
    )


def main() -> None:
    """Draw samples with it, and see what it is: the ancestral sampler of DDPM, in other letters."""
    unet = UNet(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    images = DDPM(unet).sample(4, sampler=euler_ancestral, steps=20, seed=0)
    assert images.shape == (4, 1, 8, 8)

    levels = torch.arange(1000, -1, -50)
    ours = euler_ancestral(linear(1000), levels, "eps", 1.0).rows
    known = steps.ancestral(linear(1000), levels, "eps", 1.0).rows
    torch.testing.assert_close(ours, known, rtol=1e-9, atol=1e-12)
    print("Euler ancestral draws", tuple(images.shape), "and has the rows of the ancestral sampler")


if __name__ == "__main__":
    main()
