"""Averages of the weights over the steps of a run, kept beside the one to sample from.

A plain one has a decay. A power-function average has a relative width sigma_rel: the weights of step t count by
t^gamma. From two of those, noted every so often, that of any other width is put together after the run.

Reference: Karras et al. 2024, arXiv:2312.02696, section 3 and appendix C.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff.support import run_file, walk
from fastdiff.support.errors import blaming
from fastdiff.support.plain import is_ordinary
from fastdiff.support.run_file import RunFile
from fastdiff.support.scalars import as_share
from fastdiff.support.weights import TensorFile, check_shapes, save_tensors

DECAY, WIDTH = "decay", "sigma_rel"
# The folder of a run with its power-function averages of some steps, and what the metadata of its files holds.
FOLDER, STEP, NAMES = "averages", "step", "names"
# gamma = 0, an average that is even over all steps.
WIDEST = 12**-0.5


def parse(name: str, text: str) -> list[float]:
    """The numbers of an option like "0.05,0.1". Raises ValueError naming the option if they are out of range."""
    high, bound = (1.0, "1") if name == "ema_decays" else (WIDEST, "0.288")
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{name}: expected numbers with commas between them, got {text!r}") from None
    if not all(0 < value < high for value in values) or len(set(values)) < len(values):
        raise ValueError(f"{name}: expected different numbers between 0 and {bound}, got {text!r}")
    return values


def average_names(decays: str, widths: str) -> list[str]:
    """The names of the averages that two options ask for: "decay=0.99", "sigma_rel=0.05"."""
    return [
        *(f"{DECAY}={value}" for value in parse("ema_decays", decays)),
        *(f"{WIDTH}={value}" for value in parse("ema_sigma_rel", widths)),
    ]


def warmed(decay: float, step: int) -> float:
    """The decay after `step` steps. It grows from 0.1, so that the random weights of the start are soon forgotten."""
    return min(decay, (1 + step) / (10 + step))


def decay_of(name: str, step: int) -> float:
    """The share that an average keeps of itself when step `step`, from 0, is done.

    (1 - 1/t)^(gamma + 1) for a width, with t = step + 1.
    """
    kind, _, value = name.partition("=")
    if kind == DECAY:
        return warmed(float(value), step)
    return float((1 - 1 / (step + 1)) ** (exponent(float(value)) + 1))


def exponent(sigma_rel: float) -> float:
    """gamma of a width sigma_rel in (0, 0.288]: sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    Reference: Karras et al. 2024, algorithm 2.
    """
    inverse = sigma_rel**-2
    roots: np.ndarray = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(roots.real.max())


@torch.no_grad()
def update_averages(averages: Mapping[str, Sequence[Tensor]], weights: Iterable[Tensor], step: int) -> None:
    """Take the weights of step `step` into each average, in place."""
    weights = list(weights)
    for name, average in averages.items():
        torch._foreach_lerp_(list(average), weights, 1 - decay_of(name, step))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float | Tensor) -> None:
    """In place, for each parameter: ema <- decay ema + (1 - decay) model.

    Args:
        ema: a copy of the model, whose average it becomes. It may be of another type, float32 for a bfloat16 model: an
            average in bfloat16 stands still where decay is near 1. Buffers stay as they are.
        model: what is trained.
        decay: in [0, 1]; a tensor () stays on its device, unchecked.

    Raises: TypeError or ValueError, naming the argument.
    """
    averages: list[Tensor] = [*walk.parameters(ema)]
    weights: list[Tensor] = [*walk.parameters(model)]
    if [average.shape for average in averages] != [weight.shape for weight in weights]:
        raise ValueError(f"ema: expected the {len(weights)} parameters of model, got {len(averages)} or other shapes")
    if not isinstance(decay, Tensor):
        as_share("decay", decay)
    if not isinstance(decay, Tensor) and all(a.dtype == w.dtype for a, w in zip(averages, weights, strict=True)):
        torch._foreach_lerp_(averages, weights, 1 - decay)
    elif isinstance(decay, Tensor) and averages and are_alike(averages, weights):
        # lerp has no form for this; a step of SGD, with a gradient of weights and a weight decay of -1, is one pass.
        torch._fused_sgd_(
            averages, weights, [], weight_decay=-1.0, momentum=0.0, lr=(decay - 1).float(), dampening=0.0,
            nesterov=False, maximize=False, is_first_step=False,
        )  # fmt: skip
    else:
        change = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(change, 1 - decay)
        torch._foreach_add_(averages, change)


def are_alike(averages: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Whether all are float32, lie in memory without gaps, and each pair in the same order.

    The kernel rounds a rate for float64 to float32. For half precision PyTorch's kernel of CPUs is wrong.
    """
    return all(
        is_ordinary(a)
        and is_ordinary(w)
        and a.dtype == w.dtype == torch.float32
        and a.stride() == w.stride()
        and (a.is_contiguous() or a.is_contiguous(memory_format=torch.channels_last))
        for a, w in zip(averages, weights, strict=True)
    )


# --- after the run ----------------------------------------------------------------------------------------------


def overlap(t1: float, gamma1: float, t2: float, gamma2: float) -> float:
    """The integral over t of two profiles (gamma + 1) t^gamma / t_i^(gamma + 1), each on [0, t_i].

    Reference: Karras et al. 2024, algorithm 3.
    """
    power = gamma2 if t1 < t2 else -gamma1
    ratio = math.exp(power * math.log(t1 / t2))
    return (gamma1 + 1) * (gamma2 + 1) * ratio / ((gamma1 + gamma2 + 1) * max(t1, t2))


def coefficients(known: Sequence[tuple[int, float]], wanted: tuple[int, float]) -> np.ndarray:
    """The factors, of sum 1, of known profiles (step, gamma) whose sum is nearest to the wanted one in least squares.

    Reference: Karras et al. 2024, algorithm 3.
    """
    matrix = np.array([[overlap(*a, *b) for b in known] for a in known])
    found = np.linalg.lstsq(matrix, np.array([overlap(*a, *wanted) for a in known]), rcond=None)[0]
    scaled: np.ndarray = found / found.sum()  # each profile sums to 1, so weights that never move stay as they are
    return scaled


def note_averages(run: Path, step: int, averages: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Keep the power-function averages of a step in the run's folder."""
    wide = {name: kept for name, kept in averages.items() if name.startswith(WIDTH)}
    if wide:
        folder = run / FOLDER
        folder.mkdir(exist_ok=True)
        tensors = {f"{name}.{key}": tensor for name, kept in wide.items() for key, tensor in kept.items()}
        save_tensors(folder / f"step-{step:08d}.safetensors", tensors, {STEP: str(step), NAMES: ",".join(wide)})


def extract(run: str | Path, name: str, out: Path) -> None:
    """Write a file for `fastdiff sample` with another average of a run in place of the usual one.

    Args:
        run: the run's folder.
        name: "decay=D" for one that the run kept, or "sigma_rel=S" for one of any width, put together.
        out: the file.

    Raises: OSError if a file cannot be read or written. ValueError if the run kept no such average.
    """
    stored = RunFile.open(run)
    folder = stored.file.path.parent / FOLDER
    shapes = stored.file.floating("ema.")
    if name.startswith(WIDTH):
        tensors = _put_together(folder, float(name.partition("=")[2]), stored.step)
    else:
        tensors = stored.tensors(f"averages.{name}")
        if not tensors:
            raise ValueError(f"{stored.file.path} has no average {name}: train with --ema-decays")
    with stored.blamed():
        buffers = {key: tensor for key, tensor in stored.tensors("ema").items() if key not in tensors}
        tensors = {**buffers, **tensors}
        check_shapes(shapes, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    metadata = {name: getattr(stored, name) for name in ("step", "model", "config", "options", "classes")}
    run_file.write(out, {"ema": tensors}, {**metadata, stored.kind: stored.arguments})


def _put_together(folder: Path, sigma_rel: float, step: int) -> dict[str, Tensor]:
    """The average of a width at the last noted step, from all that were noted until then."""
    if not 0 < sigma_rel < WIDEST:
        raise ValueError(f"sigma_rel: expected a number between 0 and 0.288, got {sigma_rel}")
    known = []  # (file, name, (step, gamma))
    for path in sorted(folder.glob("step-*.safetensors")):
        file = TensorFile.open(path)
        with blaming(path, "a file of averages"):
            noted = int(file.metadata[STEP])
            widths = {name: exponent(float(name.partition("=")[2])) for name in file.metadata[NAMES].split(",")}
        if noted <= step:
            known += [(file, name, (noted, gamma)) for name, gamma in widths.items()]
    if not known:
        raise ValueError(f"{folder} has no averages: train with --ema-sigma-rel 0.05,0.1")
    profiles = [profile for *_, profile in known]
    factors = coefficients(profiles, (profiles[-1][0], exponent(sigma_rel)))
    total: dict[str, Tensor] = {}
    for (file, name, _), factor in zip(known, factors, strict=True):
        for key, tensor in file.read(f"{name}.").items():
            part = tensor.double() * factor
            total[key] = total[key].add_(part) if key in total else part
    return {key: tensor.float() for key, tensor in total.items()}
