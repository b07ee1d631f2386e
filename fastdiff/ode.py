"""The probability-flow ODE by an adaptive solver: sampling, and the likelihood of data.

dx/dt = f(t) x - g(t)^2 / 2 s(x, t) has the marginals of the process (Song et al. 2021, arXiv:2011.13456, eq. 13), and
d log p(x_t) / dt = -div of its right side (eq. 39).

It is solved over log(sigma / alpha) in place of t: the flow of a chain then has no kinks at its levels. A straight
process is solved over t, up to t = 1, where that logarithm is infinite. The solver is torchdiffeq (extra `[ode]`). It
chooses one step for the whole batch, so a sample's last digits may depend on its neighbours.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .arguments import merged
from .denoiser import Denoiser
from .files import need
from .objective import conversion_rows
from .ops.checks import as_seed, check_floating
from .process import Process
from .support import transforms
from .support.scalars import as_positive
from .support.shapes import flat
from .support.sharded import as_forward

METHOD = "dopri5"
SAMPLING_TOLERANCE = 1e-5


def sample(denoiser: Denoiser, x: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
    """Data from x at the process's last time, by the solution at its first; without gradients and in eval mode.

    Args:
        denoiser: what predicts.
        x: (B, ...), the state to start from.
        model_kwargs: the model's further arguments.
    """
    with torch.no_grad():
        end = _solve(denoiser, (x,), backwards=True, tolerance=SAMPLING_TOLERANCE, kwargs=model_kwargs)[0]
    return end / denoiser.process.first_scale


def log_likelihood(
    denoiser: Denoiser,
    x0: Tensor,
    *,
    trace: str = "hutchinson",
    seed: int | Tensor | None = None,
    tolerance: float = 1e-5,
    **model_kwargs: Any,
) -> Tensor:
    """log p(x0) in nats; in bits per dimension it is -log p / (n ln 2).

        log p(x_0) = log N(x_T; 0, prior) + integral of the divergence from the first time to the last

    Args:
        denoiser: what predicts.
        x0: (B, ...), data, taken for the state at the process's first time.
        trace: "hutchinson" is e' J e for one e ~ {-1, 1}^n per sample: an unbiased estimate at the cost of one more
            backward pass. "exact" takes n of them.
        seed: of e; drawn if None.
        tolerance: relative and absolute, of the solver.
        model_kwargs: the model's further arguments.

    Returns: (B,) in the type of the state.
    Raises: ValueError for an unknown trace, and for a process that ends at alpha = 0. RuntimeError for an ODE that is
        too steep for the solver. ImportError without torchdiffeq.
    Reference: Song et al. 2021, eq. 39; Grathwohl et al. 2019, arXiv:1810.01367.
    """
    check_floating("x0", x0)
    if trace not in ("hutchinson", "exact"):
        raise ValueError(f"trace: expected 'hutchinson' or 'exact', got {trace!r}")
    tolerance = as_positive("tolerance", tolerance)
    check(denoiser.process, denoiser.device_for(x0))
    if x0.is_meta or not bool(x0.isfinite().all()):
        raise ValueError("x0: expected finite values")
    kwargs = merged(model_kwargs)
    scale, std, n = denoiser.process.first_scale, denoiser.prior_std(), math.prod(x0.shape[1:])
    with torch.inference_mode(False), torch.no_grad():  # the divergence is a gradient, which inference mode has not
        x = scale * x0.detach().to(denoiser.device_for(x0), denoiser.dtype)
        kwargs = {k: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for k, v in kwargs.items()}
        generator = torch.Generator(x.device).manual_seed(int(as_seed(seed, torch.device("cpu"))))
        signs = torch.randint(2, x.shape, generator=generator, device=x.device).to(x) * 2 - 1
        probe = signs if trace == "hutchinson" else None
        x_T, divergence = _solve(denoiser, (x, x.new_zeros(len(x))), False, tolerance, kwargs, probe)
        squares = flat(x_T / std).square().sum(1)
        return divergence - 0.5 * squares - n * (math.log(std / scale) + 0.5 * math.log(2 * math.pi))


def check_sampling(process: Process, device: torch.device, **options: Any) -> None:
    """None of these options of `sample` is given, since the solver takes none of them; then as `check`."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        *names, last = options
        raise ValueError(
            f"sampler: 'ode' chooses its own steps and expected no {', '.join(names)} or {last}, got {', '.join(given)}"
        )
    check(process, device)


def check(process: Process, device: torch.device) -> None:
    """ImportError without the solver. ValueError if the process ends without signal, at an infinite rate, where there
    are no numbers, and within a transform of torch.func or a level of dual tensors."""
    need("torchdiffeq", "ode")
    if device.type == "meta":
        raise ValueError("device: the ODE's solver expected numbers to look at, got the meta device")
    if transforms.stand_ins():
        raise ValueError("sampler, log_likelihood: the ODE's solver expected numbers to look at, got fakes or a trace")
    if transforms.active():
        raise ValueError("sampler, log_likelihood: the ODE's solver expected no torch.func transform or dual level")
    if not process.straight and not math.isfinite(process.sigma_range()[1]):
        raise ValueError("process: the ODE expected a finite sigma / alpha at the end, got alpha = 0")


def _solve(
    denoiser: Denoiser,
    state: tuple[Tensor, ...],
    backwards: bool,
    tolerance: float,
    kwargs: dict[str, Any],
    probe: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The state at the other end of the process; its second part, if there is one, sums up the divergence."""
    process = denoiser.process
    if process.first == process.last or state[0].numel() == 0:
        return state  # a chain of one level, or no data: nothing flows

    eval_mode = denoiser.evaluating()

    def velocity(level: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, level = state[0], level.clamp(levels[0], levels[1])
        if len(state) == 1:
            with eval_mode:
                return (_flow(denoiser, x, level, kwargs),)
        with eval_mode, torch.enable_grad():
            x = x.detach().requires_grad_()
            flow = _flow(denoiser, x, level, kwargs)
            divergence = _divergence(flow, x, probe)
        return flow.detach(), divergence

    ends = torch.tensor([process.first, process.last], dtype=torch.float64, device=state[0].device)
    levels = ends if process.straight else -process.at(ends).log_snr / 2
    try:
        path = need("torchdiffeq", "ode").odeint(
            velocity,
            state,
            levels.flip(0) if backwards else levels,
            rtol=tolerance,
            atol=tolerance,
            method=METHOD,
            options={"step_t": levels},  # its last step ends there, and does not look beyond the process
        )
    except AssertionError as error:  # how the solver says that it gets no further
        raise RuntimeError(f"the ODE is too steep for the solver: {error}") from error
    return tuple(part[-1] for part in path)


def _flow(denoiser: Denoiser, x: Tensor, level: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """dx / d level, differentiable by x: (f x - g^2 / 2 s(x, t)) 2 sigma^2 / g^2 at level = log(sigma / alpha), or the
    velocity eps - x_0 at level = t."""
    process, level = denoiser.process, level.detach().double().reshape(1)
    times = (level if process.straight else process.time_of(level.exp())).clamp(process.first, process.last)
    made = process.at(times)
    if process.straight:
        on_x, on_pred = conversion_rows(made, denoiser.objective, "flow")
    else:
        u, v = conversion_rows(made, denoiser.objective, "score")
        drift, g2 = made.rates
        var = made.sigma**2
        on_x, on_pred = 2 * var * drift / g2 - var * u, -var * v
    # Each call by itself: FSDP splits the weights again in the backward pass of a divergence.
    call_model = as_forward(denoiser, denoiser.call_model)
    pred = call_model(x, denoiser.condition(times).expand(x.shape[0]), kwargs).pred
    return on_x.to(x.dtype) * x + on_pred.to(x.dtype) * pred


def _divergence(flow: Tensor, x: Tensor, probe: Tensor | None) -> Tensor:
    """(B,): e' J e for the probe e, or the trace of J."""
    if probe is not None:
        return flat(torch.autograd.grad(flow, x, probe)[0] * probe).sum(1)
    columns = flat(flow).unbind(1)
    rows = [flat(torch.autograd.grad(c.sum(), x, retain_graph=True)[0])[:, i] for i, c in enumerate(columns)]
    return torch.stack(rows).sum(0)
