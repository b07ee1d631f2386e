"""The other diffusions of denoising-diffusion-pytorch, stock and ours side by side, with small networks."""

import importlib
import types
from typing import Any

import torch
from diffusions import stock
from torch import Tensor, nn

from fastdiff.interop import denoising_diffusion as ours
from fastdiff.interop.denoising_diffusion import classifier_free_guidance

theirs = importlib.import_module(stock.__package__)
SIDE = 4


class Net(nn.Module):
    """A bounded network with the attributes of theirs, of images or sequences, and with or without classes."""

    channels = 2
    cond_drop_prob = 0.5

    def __init__(self, outputs: int = 2, dims: int = 2, self_condition: bool = False, continuous: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.out_dim, self.self_condition, self.random_or_learned_sinusoidal_cond = outputs, self_condition, continuous
        conv: Any = nn.Conv2d if dims == 2 else nn.Conv1d
        self.conv = conv(4 if self_condition else 2, outputs, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None, scale: float = 1.0) -> Tensor:
        assert t.shape == (len(x),)
        if self.self_condition:
            x = torch.cat((torch.zeros_like(x) if x_self_cond is None else x_self_cond, x), 1)
        return scale * torch.tanh(self.conv(x)) * torch.cos(t / 7).reshape(-1, *[1] * (x.ndim - 1))


class ClassNet(Net):
    """With their way of guidance: classes are dropped by chance, and one call gives two predictions."""

    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, classes: Tensor, drop: float = 0.5, cond_keep_mask: Tensor | None = None
    ) -> Tensor:
        kept = torch.rand(len(x), device=x.device) >= drop if cond_keep_mask is None else cond_keep_mask
        return super().forward(x + 0.1 * (classes * kept)[:, None, None, None], t)

    def forward_with_cond_scale(
        self, x: Tensor, t: Tensor, classes: Tensor, cond_scale: float = 1.0, rescaled_phi: float = 0.0
    ) -> Any:
        output, null = self(x, t, classes, 0.0), self(x, t, classes, 1.0)
        guided = null + cond_scale * (output - null)
        return output if cond_scale == 1 else (guided * (1 - 0.1 * rescaled_phi), null)


# By name: both classes, arguments of the network, and options.
KINDS: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "1d": (theirs.GaussianDiffusion1D, ours.GaussianDiffusion1D, {"dims": 1}, {"seq_length": 6, "timesteps": 8}),
    "classes": (
        importlib.import_module(f"{stock.__package__}.classifier_free_guidance").GaussianDiffusion,
        classifier_free_guidance.GaussianDiffusion,
        {},
        {"image_size": SIDE, "timesteps": 8},
    ),
    "learned": (
        theirs.LearnedGaussianDiffusion,
        ours.LearnedGaussianDiffusion,
        {"outputs": 4},
        {"image_size": SIDE, "timesteps": 8, "beta_schedule": "cosine"},
    ),
    "continuous": (
        theirs.ContinuousTimeGaussianDiffusion,
        ours.ContinuousTimeGaussianDiffusion,
        {"continuous": True},
        {"image_size": SIDE, "channels": 2, "num_sample_steps": 7},
    ),
    "v": (
        theirs.VParamContinuousTimeGaussianDiffusion,
        ours.VParamContinuousTimeGaussianDiffusion,
        {"continuous": True},
        {"image_size": SIDE, "channels": 2, "num_sample_steps": 7},
    ),
    "elucidated": (
        theirs.ElucidatedDiffusion,
        ours.ElucidatedDiffusion,
        {"continuous": True},
        {"image_size": SIDE, "channels": 2, "num_sample_steps": 7},
    ),
}


def pair(kind: str, self_condition: bool = False, method: str = "", how: str = "subclass", **options: Any) -> list[Any]:
    """Stock's diffusion and ours, of equal networks.

    method: the results of this one are multiplied by 0.9, by a subclass or on the object.
    """
    *classes, of_net, config = KINDS[kind]
    net = ClassNet if kind == "classes" else Net
    made = []
    for base in classes:
        changed = scaled(getattr(base, method)) if method else None
        derived = type("Derived", (base,), {method: changed}) if changed and how == "subclass" else base
        made.append(derived(net(**of_net, self_condition=self_condition), **(config | options)))
        if changed and how == "object":
            setattr(made[-1], method, types.MethodType(changed, made[-1]))
    return made


def scaled(original: Any) -> Any:
    def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if isinstance(result, Tensor):
            return 0.9 * result
        parts = [0.9 * part for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)

    return replacement
