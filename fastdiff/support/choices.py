"""What a message adds for an unknown name: the name that was probably meant."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

# Names in other libraries, and ours: of objectives, losses and schedules, of arguments of `sample`, of flags.
OTHER_NAMES = {
    "epsilon": "eps",
    "noise": "eps",
    "pred_noise": "eps",
    "sample": "x0",
    "pred_x0": "x0",
    "v_prediction": "v",
    "pred_v": "v",
    "flow_prediction": "flow",
    "squaredcos_cap_v2": "cosine",
    "l2": "mse",
    "fixed_small": "posterior",
    "fixed_large": "beta",
    "learned_range": "learned",
    "num_inference_steps": "steps",
    "num_steps": "steps",
    "guidance_scale": "guidance",
    "cfg_scale": "guidance",
    "latents": "x_T",
    "image": "x_init",
    "init_image": "x_init",
    "mask": "known",
    "mask_image": "known",
    "return_all_timesteps": "return_trajectory",
    "cond_scale": "guidance",
    "y": "class_labels",
    "label": "class_labels",
    "--learning-rate": "--lr",
    "--epochs": "--steps",
}


def did_you_mean(given: Any, known: Iterable[str]) -> str:
    """The end of a message, such as "; did you mean 'eps'?", for a name of another library or a slip; else ""."""
    if not isinstance(given, str):
        return ""
    plain, names = given.lower(), list(known)
    near = [OTHER_NAMES[plain]] if OTHER_NAMES.get(plain) in names else get_close_matches(plain, names, 1)
    return f"; did you mean {near[0]!r}?" if near else ""
