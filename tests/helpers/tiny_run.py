"""A training run of a few steps of a small network, and what tests of its checkpoint need."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tolerance import SAME_WEIGHTS

from fastdiff import training
from fastdiff.training import DIGITS, Options, checkpoint

CPU = torch.device("cpu")
TINY = {**DIGITS, "data": "digits", "channels": 8, "batch_size": 16, "timesteps": 20, "warmup": 2, "sample_every": 0}


def run(out: Path, resume: bool = False, **options: Any) -> int:
    """Train in a folder, from its checkpoint if `resume`. Returns the steps done."""
    state = checkpoint.load(out / "model.safetensors") if resume else None
    return training.train(Options(**{**TINY, **options}), out, CPU, state)


def files_of(folder: Path) -> set[str]:
    """The names in a folder of a run, but those of its log."""
    return {path.name for path in folder.iterdir()} - {"config.json", "log.csv"}


def assert_same_files(a: Path, b: Path) -> None:
    """Fail unless two checkpoints hold the same tensors."""
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def assert_same_weights(a: Path, b: Path) -> None:
    """Fail unless the weights of two checkpoints, and their averages, are the same but for rounding (SAME_WEIGHTS)."""
    first, second = load_file(a), load_file(b)
    for name in first:
        if name.startswith(("model.", "ema.")):
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=SAME_WEIGHTS, msg=name)


def metadata_of(path: Path) -> dict[str, Any]:
    """What a checkpoint notes in JSON."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["fastdiff"])


def rewrite(path: Path, tensors: dict[str, Any] | None = None, **changes: Any) -> None:
    """Save a checkpoint again with some tensors (None: left out) and metadata changed."""
    metadata = metadata_of(path)
    kept = {name: tensor for name, tensor in {**load_file(path), **(tensors or {})}.items() if tensor is not None}
    save_file(kept, path, {"fastdiff": json.dumps({**metadata, **changes})})
