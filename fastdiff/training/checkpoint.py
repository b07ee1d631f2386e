"""Checkpoints: all that a run needs to go on, in one safetensors file; fastdiff.support.run_file describes it.

Where FSDP splits the weights, the tensors of the optimizer are in a folder beside it, to which each process writes its
share (torch.distributed.checkpoint). They are written first: the file names a step whose folder is whole.
"""

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.ddpm import DDPM
from fastdiff.diffusion import Diffusion
from fastdiff.edm import Edm
from fastdiff.files import replacing
from fastdiff.flow import FlowMatching
from fastdiff.importance import LossSecondMoment
from fastdiff.networks import NETWORKS, Network, name_of
from fastdiff.score import NCSN, ScoreSDE
from fastdiff.support import run_file
from fastdiff.support.errors import reason
from fastdiff.support.run_file import RunFile
from fastdiff.support.sharded import is_sharded
from fastdiff.training.ema import average_names, note_averages
from fastdiff.training.layout import whole
from fastdiff.training.ranks import ALONE, Ranks

MODELS: dict[str, type[Diffusion]] = {c.__name__: c for c in (DDPM, NCSN, ScoreSDE, FlowMatching, Edm)}
OPTIMIZER_KEYS = ("step", "exp_avg", "exp_avg_sq")
# The folder of a run with the checkpoints that it keeps beside the last one, and the shares of FSDP's processes.
FOLDER = "checkpoints"


@dataclass
class State:
    """Everything a run needs to go on as if it had never stopped, at the end of step `step`.

    Args:
        diffusion: the model with the trained weights, and what its importance sampling remembers.
        ema: the network whose weights are the moving average, the one to sample from.
        optimizer: tensors of torch.optim.AdamW, optimizer[i][key] for parameter i; or the folder with the shares of
            FSDP's processes, for `read_shares`.
        rng: states of PyTorch's default generators, by device type.
        options: the options of the run (JSON).
        step: the optimizer steps done.
        averages: further averages of the weights by name, see fastdiff.training.ema, each by the names of the weights.
        classes: the names of the classes, none without.
        data: what `fastdiff.training.feed.noted` says of the data (JSON); nothing in files of before.
    """

    diffusion: Diffusion
    ema: Network
    optimizer: dict[int, dict[str, Tensor]] | Path
    rng: dict[str, Tensor]
    options: dict[str, Any]
    step: int
    averages: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators that training on `device` draws from, as uint8 tensors."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Set the generators to the states that `rng_state` gave."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@dataclass(frozen=True)
class Snapshot:
    """A copy of a State on the CPU, to be written while the training goes on.

    Args:
        metadata: of the file, with the step.
        groups: tensors by name, by group; nothing on the processes that do not write.
        shares: what this process has of the optimizer, where FSDP splits the network; else None.
    """

    metadata: dict[str, Any]
    groups: dict[str, dict[str, Tensor]]
    shares: dict[str, Tensor] | None

    @property
    def step(self) -> int:
        """The optimizer steps done."""
        return int(self.metadata["step"])


def snapshot(state: State, ranks: Ranks = ALONE, buffers: dict[str, Tensor] | None = None) -> Snapshot:
    """Copy what a checkpoint holds. All processes of a run call this.

    Args:
        state: what to copy; its tensors may be split by FSDP.
        ranks: the processes.
        buffers: memory of an earlier copy, which this one overwrites; filled where it is empty.
    """
    if isinstance(state.optimizer, Path):
        raise TypeError(f"optimizer: expected tensors, got the folder {state.optimizer}")
    groups: dict[str, dict[str, Tensor]] = {
        "model": state.diffusion.model.state_dict(),
        "ema": state.ema.state_dict(),
        "rng": state.rng,
        **{f"averages.{name}": tensors for name, tensors in state.averages.items()},
    }
    if history := importance(state.diffusion):
        groups["importance"] = history.state_dict()
    shares = None
    if is_sharded(state.ema):
        shares = {name: tensor.detach().to("cpu", copy=True) for name, tensor in _flat(state.optimizer).items()}
    else:
        groups |= {f"optimizer.{index}": tensors for index, tensors in state.optimizer.items()}
    metadata = {
        "step": state.step,
        name_of(state.ema): state.ema.config,
        "model": type(state.diffusion).__name__,
        "config": state.diffusion.config,
        "options": state.options,
        "classes": state.classes,
        "data": state.data,
    }
    return Snapshot(metadata, _copied(groups, ranks, {} if buffers is None else buffers), shares)


def write(path: Path, taken: Snapshot, keep: int = 1, ranks: Ranks = ALONE, group: Any = None) -> None:
    """Write a checkpoint. An error on the way leaves the old file as it was. All processes of a run call this.

    Args:
        path: the file.
        taken: what to write.
        keep: how many checkpoints of the run remain. Those but the last are in the folder `checkpoints` beside it.
        ranks: the processes.
        group: of torch.distributed, in which they talk about shares; None is the default one.

    Raises: ValueError naming a tensor that holds NaN or infinity; OSError if the disk does not take the file.
    """
    if taken.shares is not None:
        _write_shares(shares_of(path, taken.step), taken.shares, ranks, group)
    if not ranks.leads:
        return
    run_file.write(path, taken.groups, taken.metadata)
    averages = {name: tensors for name, tensors in taken.groups.items() if name.startswith("averages.")}
    note_averages(path.parent, taken.step, {k.removeprefix("averages."): v for k, v in averages.items()})
    _keep(path, taken.step, keep)


def save(path: str | Path, state: State) -> None:
    """Write a checkpoint from one process. Raises: as `write`."""
    write(Path(path), snapshot(state))


def load(path: str | Path) -> State:
    """Read a checkpoint to the CPU.

    Raises: OSError if the file cannot be read. ValueError naming the file if it is cut short, is no fastdiff
        checkpoint, or does not fit the networks that its own metadata describes.
    """
    stored = RunFile.open(path)
    kind: Callable[..., Network] = NETWORKS[stored.kind]
    network, average = (stored.network(kind, group) for group in ("model", "ema"))
    with stored.blamed():
        diffusion = MODELS[stored.model](network, **stored.config)
        _load_importance(stored, diffusion)
        averages = _averages(stored, network)
        rng = stored.tensors("rng")
        if "cpu" not in rng:
            raise ValueError("it has no tensor 'rng.cpu'")
        torch.Generator().set_state(rng["cpu"])  # raises if it is no such state
        folder = shares_of(stored.file.path, stored.step)
        whole_file = any(name.startswith("optimizer.") for name in stored.file.shapes) or not folder.is_dir()
        optimizer = _optimizer(stored, network) if whole_file else folder
        return State(
            diffusion, average, optimizer, rng, stored.options, stored.step, averages, stored.classes, stored.data
        )


def check_free(path: Path, resume: State | None) -> None:
    """Raise ValueError if training would overwrite another run's checkpoint, or a later one of this run."""
    if not path.exists():
        return
    if resume is None:
        raise ValueError(f"{path} exists: go on with --resume, or train into another --out")
    step = RunFile.open(path).step
    if step != resume.step:
        raise ValueError(f"{path} is of step {step}, expected {resume.step}: another training went on from it")


def load_model(path: str | Path) -> Diffusion:
    """The model of a run, of its formulation, with the averaged weights, in eval mode on the CPU.

    Args:
        path: model.safetensors of a run, or the run's folder.

    Raises: as `load`.
    """
    stored = RunFile.open(path)
    return stored.formulation(MODELS[stored.model], NETWORKS)


def importance(diffusion: Diffusion) -> LossSecondMoment | None:
    """What importance sampling of a DDPM remembers; None without it."""
    return getattr(diffusion, "importance", None)


def _load_importance(stored: RunFile, diffusion: Diffusion) -> None:
    """Take over the losses that importance sampling remembers."""
    history, tensors = importance(diffusion), stored.tensors("importance")
    if history is None and tensors:
        raise ValueError("it holds a history of importance sampling, which its configuration does not use")
    if history is not None and tensors:
        for name, tensor in history.state_dict().items():
            if name in tensors and tensors[name].dtype != tensor.dtype:
                raise ValueError(f"importance.{name}: expected {tensor.dtype}, got {tensors[name].dtype}")
        history.load_state_dict(tensors)
    elif history is not None:
        warnings.warn(f"{stored.file.path} has no history of importance sampling: it starts anew", stacklevel=3)


def _optimizer(stored: RunFile, network: Network) -> dict[int, dict[str, Tensor]]:
    """The optimizer's tensors by parameter. Raises ValueError if they do not fit the parameters."""
    shapes = {i: tuple(parameter.shape) for i, parameter in enumerate(network.parameters())}
    expected = {f"{i}.{key}": () if key == "step" else shapes[i] for i in shapes for key in OPTIMIZER_KEYS}
    tensors = stored.fitting("optimizer", expected)
    return {i: {key: tensors[f"{i}.{key}"] for key in OPTIMIZER_KEYS} for i in shapes}


def _averages(stored: RunFile, network: Network) -> dict[str, dict[str, Tensor]]:
    """The further averages that the options of the run name. Raises ValueError if they do not fit the parameters."""
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    texts = (str(stored.options.get(name, "")) for name in ("ema_decays", "ema_sigma_rel"))
    return {name: stored.fitting(f"averages.{name}", shapes) for name in average_names(*texts)}


# --- several checkpoints, and the shares of several processes ---------------------------------------------------


def shares_of(path: Path, step: int) -> Path:
    """The folder with the optimizer's tensors of a step."""
    return path.parent / FOLDER / f"step-{step:08d}"


def read_shares(folder: Path, optimizer: dict[int, dict[str, Tensor]]) -> None:
    """Fill the optimizer's tensors, which may be split over any number of processes, from a folder.

    Raises: ValueError naming the folder if it cannot be read, or does not hold them.
    """
    from torch.distributed import is_initialized
    from torch.distributed.checkpoint.state_dict_loader import load as read

    with _first_error(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads what several wrote
        read(_flat(optimizer), checkpoint_id=folder, no_dist=not is_initialized())


def _write_shares(folder: Path, shares: dict[str, Tensor], ranks: Ranks, group: Any) -> None:
    """Write the tensors of all processes; the folder has its name when it is whole."""
    from torch.distributed import barrier
    from torch.distributed.checkpoint.state_dict_saver import save as save_shares

    temporary = folder.with_name(f".{folder.name}.tmp")
    if ranks.leads:
        for old in (temporary, folder):
            shutil.rmtree(old, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier(group)
    with _first_error(folder):
        save_shares(shares, checkpoint_id=temporary, process_group=group)
    if ranks.leads:
        os.replace(temporary, folder)


@contextmanager
def _first_error(folder: Path) -> Iterator[None]:
    """Raise the first of the errors of all processes, which PyTorch collects, with the name of the folder."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        kind = OSError if isinstance(first, OSError) and not isinstance(first, FileNotFoundError) else ValueError
        raise kind(f"{folder}: {reason(first)}") from error


def _flat(optimizer: dict[int, dict[str, Tensor]]) -> dict[str, Any]:
    return {f"{index}.{key}": tensor for index, tensors in optimizer.items() for key, tensor in tensors.items()}


def _copied(
    groups: dict[str, dict[str, Tensor]], ranks: Ranks, buffers: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The whole tensors on the CPU of the process that writes, one after the other; nothing elsewhere."""
    found: dict[str, dict[str, Tensor]] = {}
    gpus = set()
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            gathered = whole(tensor.detach())
            if ranks.leads:
                key = f"{group}.{name}"
                if gathered.is_cuda:
                    gpus.add(gathered.device)
                if key not in buffers:  # pinned, so that a GPU copies without a stop at each tensor
                    buffers[key] = torch.empty(gathered.shape, dtype=gathered.dtype, pin_memory=gathered.is_cuda)
                found.setdefault(group, {})[name] = buffers[key].copy_(gathered, non_blocking=True)
    for gpu in gpus:  # need not be the current one
        torch.cuda.current_stream(gpu).synchronize()
    return found


def _keep(path: Path, step: int, keep: int) -> None:
    """Leave the last `keep` checkpoints of a run: a link to the file just written, and no older ones."""
    folder = path.parent / FOLDER
    if keep > 1:
        folder.mkdir(exist_ok=True)
        link = folder / f"step-{step:08d}.safetensors"
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError:  # a file system without links
            with replacing(link) as temporary:
                shutil.copyfile(path, temporary)
    found: dict[int, list[Path]] = {}
    for entry in (*folder.glob("step-*"), *folder.glob(".step-*")):
        with suppress(ValueError):
            found.setdefault(int(entry.name.lstrip(".").removeprefix("step-").partition(".")[0]), []).append(entry)
    kept = sorted({step, *(number for number in found if number <= step)}, reverse=True)[:keep]
    for number in found.keys() - set(kept):  # later ones are of a run that was killed before it wrote its file
        for entry in found[number]:
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
