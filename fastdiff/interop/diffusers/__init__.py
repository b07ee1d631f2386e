"""Schedulers of diffusers with their arithmetic on the fused operations: change the import, keep the code.

    from fastdiff.interop.diffusers import DDPMScheduler

A class here is the stock class of that name. It overrides only add_noise (scale_noise), get_velocity, step (step_pred)
and the search for the first step, so configurations, files, set_timesteps and signatures are stock's. What it saves
loads in diffusers on a machine without fastdiff. For the same `generator` it draws stock's noise in stock's order, and
the result is stock's to rounding. The coefficients of alphas_cumprod are computed in float32 in stock's order of
operations, those of sigmas in float64. On the CPU DDPM and DDIM give stock's bits, except for learned_range. On a GPU
multiplications are fused with additions.

    fused_noise: a keyword of the constructor, from_config and from_pretrained, and an attribute; it is not saved. True
        draws the noise of step (step_pred) in the kernel: z(seed, sample, timestep), the same whatever the batch or
        device. The seed is generator.initial_seed(). One generator serves the batch; of a list, each generator serves
        one sample, which is then sample 0 of its seed. Without a generator every step draws a seed. The generator does
        not advance, so a seed stands for one run. A second run that goes on with it has the same noise and warns.

Neither a step nor add_noise waits for the device or breaks a graph. A timestep is read only if that is free: a number,
a CPU tensor, or an element of self.timesteps, which the first step after set_timesteps copies to the host. If a DDPM
step cannot tell whether t > 0, it draws noise at t = 0 too and multiplies it by 0. That is so for another GPU tensor,
and for any tensor under torch.compile, where LTX's last step draws such noise too. The other schedulers but DDIM's and
ScoreSdeVe's count their steps. If one must look for the first step in a tensor that is not free to read, it does as
stock, unless set_begin_index was called. Their fused noise is z(seed, sample, place in self.timesteps). So is that of
CogVideoXDPMScheduler, whose step is stock's if its timesteps are not free to read.

If a subclass, a patch or the object overrides a method that stock's step (or add_noise) calls, such as _get_variance,
previous_timestep or convert_model_output, stock's step runs and calls it. It also runs for arguments that no kernel
takes: tensors that broadcast, whole numbers. It draws the noise itself, so with fused_noise=True a warning says so.
A setting that is not fused runs stock's step too, and one warning says so: UniPCMultistepScheduler with solver_p, of an
order above 3, or with bh1 on beta sigmas, and LMSDiscreteScheduler of an order above 4.

What a multistep scheduler remembers lies in one tensor. model_outputs are views of it, overwritten after as many steps
as the solver has orders: clone what you keep. So are the derivatives of LMSDiscreteScheduler and the ets of
IPNDMScheduler, which hold the last three: no later step needs more, and stock's ets grow for ever.

Tables are kept until their sources change: alphas_cumprod, timesteps, sigmas and the like. On the CPU, where schedulers
keep them, the values are compared, so every change is seen. On a GPU a change through `.data` is not seen, nor one in
place of a tensor that was made in inference mode: assign a new tensor instead.

Differences from stock, all of them defects there:
    - variance_type "fixed_large_log" gives what "fixed_large" gives. Stock takes the root of a logarithm: NaN.
    - bfloat16 and float16 are computed in float32; x_0 and the result are rounded once. In stock's bfloat16 add_noise
      alpha_bar rounds to 1 for t = 0 to 9 of the default schedule, so no noise is added at all. A timestep of shape
      (1,) makes stock's result float32. Here it keeps its type, as for a timestep without a shape.
    - The second halves of Heun's and DPM2's steps take the distance of x from x_0 out of the prediction. Stock takes it
      from the rounded x_0, and multiplies its rounding by dt / (2 sigma), or dt / sigma.
    - The second halves of FlowMatchHeunDiscreteScheduler take v as it is. Stock takes it from a rounded x_0.
    - FlowMatchEulerDiscreteScheduler with stochastic_sampling draws from `generator`. Stock's ignores it before 0.39.
    - LMSDiscreteScheduler has the exact integrals. Stock integrates by quadrature, in float32.
    - IPNDMScheduler: the gradient at the first level, where alpha = 0, is right in float32 too.
    - The multistep solvers of DPM and DEIS: a step between equal sigmas, as the last one with
      use_karras_sigmas and final_sigmas_type "sigma_min", returns its sample. Some solvers of stock give NaN.
    - UniPCMultistepScheduler: "bh1" is finite in a last step to sigma = 0. Stock's is NaN. A result that is edited in
      place counts as edited. Stock's corrector ignores edits, and so does this if the edited sample is a new tensor.
    - A timestep below 0 is an error (NaN on a GPU). Stock counts it from the end of the schedule.

EulerDiscreteScheduler.get_velocity is stock's, and looks up alphas_cumprod by the place in self.timesteps, a defect.
With s_churn the network is asked before the noise is added, as in stock. It should be asked after it.

DDIMPipeline converts what it is given to the stock DDIMScheduler: assign pipeline.scheduler afterwards.
"""

from typing import Any

try:
    import diffusers.schedulers.scheduling_utils
except ImportError as error:
    from ...files import install

    message = f"fastdiff.interop.diffusers needs diffusers: {install('diffusers')}"
    raise ImportError(f"{message} ({error})") from error

from ...support.versions import numbers, warn_if_untested

warn_if_untested("diffusers", diffusers.__version__)
VERSION = numbers(diffusers.__version__)
if VERSION < (0, 30):
    raise ImportError(f"fastdiff.interop.diffusers needs diffusers 0.30 or later, got {diffusers.__version__}")
# The first versions whose schedulers give what those of 0.42.1 give. Of an older version only layers are fused.
SCHEDULERS_SINCE = (0, 32)
NEWER = {"SCMScheduler": (0, 33), "FlowMatchLCMScheduler": (0, 34), "LTXEulerAncestralRFScheduler": (0, 37)}

if VERSION >= SCHEDULERS_SINCE:
    from .common import FusedScheduler
    from .consistency_models import CMStochasticIterativeScheduler
    from .ddim import DDIMScheduler
    from .ddim_cogvideox import CogVideoXDDIMScheduler
    from .ddim_inverse import DDIMInverseScheduler
    from .ddpm import DDPMScheduler
    from .deis import DEISMultistepScheduler
    from .dpm_cogvideox import CogVideoXDPMScheduler
    from .dpm_solver import DPMSolverMultistepScheduler
    from .dpm_solver_inverse import DPMSolverMultistepInverseScheduler
    from .dpm_solver_singlestep import DPMSolverSinglestepScheduler
    from .edm_dpm_solver import EDMDPMSolverMultistepScheduler
    from .edm_euler import EDMEulerScheduler
    from .euler import EulerDiscreteScheduler
    from .euler_ancestral import EulerAncestralDiscreteScheduler
    from .flow_match_euler import FlowMatchEulerDiscreteScheduler
    from .flow_match_heun import FlowMatchHeunDiscreteScheduler
    from .heun import HeunDiscreteScheduler
    from .ipndm import IPNDMScheduler
    from .kdpm2 import KDPM2DiscreteScheduler
    from .kdpm2_ancestral import KDPM2AncestralDiscreteScheduler
    from .lcm import LCMScheduler
    from .lms import LMSDiscreteScheduler
    from .pndm import PNDMScheduler
    from .score_sde_ve import ScoreSdeVeScheduler
    from .tcd import TCDScheduler
    from .unipc import UniPCMultistepScheduler
if NEWER["SCMScheduler"] <= VERSION:
    from .scm import SCMScheduler
if NEWER["FlowMatchLCMScheduler"] <= VERSION:
    from .flow_match_lcm import FlowMatchLCMScheduler
if NEWER["LTXEulerAncestralRFScheduler"] <= VERSION:
    from .ltx_euler_ancestral import LTXEulerAncestralRFScheduler

__all__ = [
    "SCHEDULERS",
    "CMStochasticIterativeScheduler",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "LTXEulerAncestralRFScheduler",
    "PNDMScheduler",
    "SCMScheduler",
    "ScoreSdeVeScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
]

# All that this version has, for those that look up the one of a stock class.
SCHEDULERS: "tuple[type[FusedScheduler], ...]" = tuple(globals()[name] for name in __all__[1:] if name in globals())


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    first = ".".join(map(str, NEWER.get(name, SCHEDULERS_SINCE)))
    raise ImportError(f"fastdiff's {name} needs diffusers {first} or later, got {diffusers.__version__}")
