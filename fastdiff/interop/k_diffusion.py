"""Models of fastdiff as the denoisers D(x, sigma) of k-diffusion and EDM. `ScoreSDE.from_edm` is the other way."""

from typing import Any

from torch import Tensor, nn

from .. import ops
from ..arguments import merged
from ..denoiser import Denoiser, own_rows
from ..ops.checks import check_floating, check_shape
from ..steps import denoise_rows
from ..support.sharded import as_forward


class KDiffusionDenoiser(nn.Module):
    """See `as_k_diffusion`."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        if not isinstance(denoiser, Denoiser):
            raise TypeError(f"denoiser: expected a fastdiff Denoiser, got {type(denoiser).__name__}")
        self.denoiser = denoiser

    def forward(self, x: Tensor, sigma: Tensor, **model_kwargs: Any) -> Tensor:
        """The estimate of x_0.

        Args:
            x: (B, ...), x_0 + sigma eps.
            sigma: (B,).
            model_kwargs: the model's further arguments; those that are named x or sigma go into a dict of that name.
        """
        check_floating("x", x)
        check_floating("sigma", sigma)
        check_shape("sigma", sigma, x.shape[:1])
        denoiser = self.denoiser
        times = denoiser.process.time_of(sigma.double())
        made = denoiser.process.at(times)
        state = made.alpha.to(x.dtype).view(-1, *[1] * (x.ndim - 1)) * x
        call_model = as_forward(denoiser, denoiser.call_model)
        pred = call_model(state, denoiser.condition(times), merged(model_kwargs)).pred
        rows, row = own_rows(denoise_rows(made, denoiser.objective), x.dtype)
        return ops.update(state, pred, rows, row, clip=denoiser.clip, noisy=False)


def as_k_diffusion(denoiser: Denoiser) -> nn.Module:
    """A model of any formulation as a denoiser of k-diffusion: module(x, sigma, **model_kwargs) gives x0hat.

        module = as_k_diffusion(ddpm)
        sigmas = k_diffusion.sampling.get_sigmas_karras(18, 0.01, 80.0)
        x_0 = k_diffusion.sampling.sample_dpmpp_2m(module, 80.0 * torch.randn(16, 3, 32, 32), sigmas)

    At x = x_0 + sigma eps the model is asked for the state alpha x, at the time where its own sigma / alpha is sigma.

    Args:
        denoiser: DDPM, NCSN, ScoreSDE, FlowMatching, Edm, or any Denoiser. Its clip holds. A chain is asked between its
            levels, so its network has to take real times.

    Raises: TypeError for anything else. The module raises ValueError for levels that a chain does not have.
    Reference: Karras et al. 2022, arXiv:2206.00364, eq. 3 and table 1.
    """
    return KDiffusionDenoiser(denoiser)
