"""Add an objective: the velocity of flow matching, eps - x_0, as one row of the table of objectives.

python examples/extending/objective.py

Every objective is a mixture pred = p x_0 + q eps. Targets, conversions, weights and samplers follow from p and q. To
make it part of the package, put the row into OBJECTIVES in fastdiff/objective.py.
"""

import torch

from fastdiff import DDPM
from fastdiff.objective import OBJECTIVES, x0_rows

# (p, q, scale) at a level (alpha, sigma); scale is 1 but for predictions that grow without limit.
OBJECTIVES["flow"] = lambda alpha, sigma: (-1.0, 1.0, 1.0)


class Oracle(torch.nn.Module):
    """The perfect network for data that is always `data`: it knows x_0, and so the noise in x_t."""

    def __init__(self, data: torch.Tensor) -> None:
        super().__init__()
        self.data = torch.nn.Parameter(data)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (column.to(x)[t + 1].reshape(-1, *[1] * (x.ndim - 1)) for column in self.levels)
        return (x - alpha * self.data) / sigma - self.data


def main() -> None:
    """Train-time loss and sampling with the new objective."""
    torch.manual_seed(0)
    data = torch.rand(1, 1, 8, 8) * 2 - 1
    ddpm = DDPM(Oracle(data), schedule="cosine", timesteps=1000, objective="flow")
    schedule = ddpm.schedule
    ddpm.model.levels = schedule.alpha, schedule.sigma

    # x_0 = (x_t - sigma pred) / (alpha + sigma), by the general rule.
    from_x, from_pred = x0_rows(schedule, "flow")
    torch.testing.assert_close(from_x, 1 / (schedule.alpha + schedule.sigma))
    torch.testing.assert_close(from_pred, -schedule.sigma / (schedule.alpha + schedule.sigma))

    loss = ddpm(data.expand(16, -1, -1, -1))
    samples = ddpm.sample((4, 1, 8, 8), steps=10, sampler="ddim", seed=0)
    print(f"loss of a perfect network: {loss.item():.0e}; samples are the data: {(samples - data).abs().max():.0e}")
    # x_1 - x_0 is divided by sigma_1, near 0.006: float32's rounding counts a hundred times.
    assert loss < 1e-6
    torch.testing.assert_close(samples, data.expand_as(samples), rtol=0, atol=1e-4)


if __name__ == "__main__":
    main()
