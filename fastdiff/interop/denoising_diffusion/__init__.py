"""The diffusions of denoising-diffusion-pytorch 2.3.4 on the fused operations: change the import, keep the code.

    from fastdiff.interop.denoising_diffusion import GaussianDiffusion

GaussianDiffusion, LearnedGaussianDiffusion, GaussianDiffusion1D, ContinuousTimeGaussianDiffusion,
VParamContinuousTimeGaussianDiffusion and ElucidatedDiffusion are here. GaussianDiffusion of classes is in
`fastdiff.interop.denoising_diffusion.classifier_free_guidance`, as it is in stock.

Constructors, methods, buffers and state_dicts are stock's. Their networks are the models and their trainers train them,
but nothing of the package itself is imported. PyTorch draws the noise in stock's order, so for the same generator the
result is stock's to rounding: tables are computed in stock's order of operations. On the CPU GaussianDiffusion,
GaussianDiffusion1D and the one of classes have stock's bits in everything but the sums of losses. The others have them
in noising. Their walks agree to rounding. On a GPU multiplications are fused with additions.

A step of a sampler is one pass over x, the prediction and the noise, with these exceptions:
    - p_sample of the classes with timesteps, and self-conditioning, ask for x_0: two passes.
    - DDIM with self-conditioning, with use_cfg_plus_plus, and on the CPU: up to four passes.
    - ElucidatedDiffusion.sample: three passes for two calls of the network, two more with self-conditioning.
If a subclass, a patch or the object overrides a method, it is called wherever stock calls it. A step then takes more
passes. A loss is one pass for the noising and one for itself with its gradient, and one more for the learned variance.

Tables are kept until a buffer changes. On the CPU the values are compared, so every change is seen. On a GPU a change
through `.data` is not seen, nor one in place of a buffer that was made in inference mode: assign a new buffer instead.
Built on the meta device, the buffers get their values when `to_empty` or a checkpoint brings them off it.

Differences from stock:
    - Wrong arguments are a ValueError or TypeError, not an AssertionError. Betas outside [0, 1) are one of them: stock
      turns them into NaN, as it does in the linear schedule with 20 timesteps or fewer.
    - Offset noise is added to a copy. Stock adds it to the tensor that the caller passed as noise.
    - With immiscible=True the loss is that of the noise that was assigned. Stock permutes the noise within q_sample
      and compares the prediction with the unpermuted one, of other samples.
    - The loss is float32; its gradient is computed in the same pass. A second walk backward computes it anew.
    - A prediction that is infinite gives NaN. Stock clips it to 1 or -1.
    - GaussianDiffusion1D.ddim_sample(return_noise=True) returns x_T. Stock returns the noise of the last step.
    - With classes, cond_scale=1 takes the one prediction that their Unet returns then. Stock takes it apart as two, by
      samples, which fails unless there are two.
    - LearnedGaussianDiffusion has model_predictions and DDIM. In stock they are a NameError.
    - ElucidatedDiffusion takes one step, from sigma_max to data. In stock that is NaN.
As in stock:
    - interpolate takes and returns images in [-1, 1] whatever auto_normalize is, and its first step from level t is
      that of level t - 1.
    - The output of LearnedGaussianDiffusion is noise whatever `objective` says. Its loss ignores offset_noise_strength
      and the weights, and takes an approximation of the normal distribution function at t = 0.
    - The continuous classes draw random times even if times are given.
"""

try:
    import scipy.optimize  # noqa: F401
    import tqdm.auto  # noqa: F401
except ImportError as error:
    from ...files import install

    message = f"fastdiff.interop.denoising_diffusion needs scipy and tqdm: {install('denoising-diffusion')}"
    raise ImportError(f"{message} ({error})") from error

from .continuous_time import ContinuousTimeGaussianDiffusion
from .diffusion import GaussianDiffusion
from .diffusion_1d import GaussianDiffusion1D
from .elucidated import ElucidatedDiffusion
from .images import identity, normalize_to_neg_one_to_one, unnormalize_to_zero_to_one
from .learned import LearnedGaussianDiffusion
from .schedules import SCHEDULES, cosine_beta_schedule, linear_beta_schedule, sigmoid_beta_schedule
from .tables import OBJECTIVES, ModelPrediction
from .v_param import VParamContinuousTimeGaussianDiffusion

__all__ = [
    "OBJECTIVES",
    "SCHEDULES",
    "ContinuousTimeGaussianDiffusion",
    "ElucidatedDiffusion",
    "GaussianDiffusion",
    "GaussianDiffusion1D",
    "LearnedGaussianDiffusion",
    "ModelPrediction",
    "VParamContinuousTimeGaussianDiffusion",
    "cosine_beta_schedule",
    "identity",
    "linear_beta_schedule",
    "normalize_to_neg_one_to_one",
    "sigmoid_beta_schedule",
    "unnormalize_to_zero_to_one",
]
