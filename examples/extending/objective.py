"""Add an objective: the residual x_t - x_0, which denoisers such as DnCNN predict, as one row of a table.

python examples/extending/objective.py

Every objective is a mixture pred = p x_0 + q eps. Targets, conversions, weights and samplers follow from p and q. To
make it part of the package, put the row into OBJECTIVES in fastdiff/objective.py.
"""

import torch

from fastdiff import DDPM
from fastdiff.objective import OBJECTIVES, x0_rows

# (p, q, scale) at a level (alpha, sigma); scale is 1 but for predictions that grow without limit.
# x_t - x_0 = (alpha - 1) x_0 + sigma eps (Zhang et al. 2017, arXiv:1608.03981, where alpha = 1).
OBJECTIVES["residual"] = lambda alpha, sigma: (alpha - 1, sigma, 1.0)


class Oracle(torch.nn.Module):
    """The perfect network for data that is always `data`: it knows x_0, and so the noise in x_t."""

    def __init__(self, data: torch.Tensor) -> None:
        super().__init__()
        self.data = torch.nn.Parameter(data)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x - self.data


def main() -> None:
    """Train-time loss and sampling with the new objective."""
    torch.manual_seed(0)
    data = torch.rand(1, 1, 8, 8) * 2 - 1
    ddpm = DDPM(Oracle(data), schedule="cosine", timesteps=1000, objective="residual")

    # x_0 = x_t - pred, by the general rule.
    from_x, from_pred = (column[1:] for column in x0_rows(ddpm.schedule, "residual"))
    torch.testing.assert_close(from_x, torch.ones_like(from_x))
    torch.testing.assert_close(from_pred, -torch.ones_like(from_pred))

    loss = ddpm(data.expand(16, -1, -1, -1))
    samples = ddpm.sample((4, 1, 8, 8), steps=10, sampler="ddim", seed=0)
    print(f"loss of a perfect network: {loss.item():.0e}; samples are the data: {(samples - data).abs().max():.0e}")
    assert loss < 1e-12  # float32's rounding of numbers below 8, squared
    torch.testing.assert_close(samples, data.expand_as(samples), rtol=0, atol=1e-5)


if __name__ == "__main__":
    main()
