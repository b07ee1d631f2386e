"""Options that suit a set of images, by name; and options that a file gives."""

import json
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastdiff.files import need
from fastdiff.support.errors import blaming
from fastdiff.training.options import DIGITS, Options, typed

MNIST: dict[str, Any] = {
    "size": 28,
    "gray": True,
    "steps": 2000,
    "batch_size": 32,
    "lr": 2e-3,
    "warmup": 100,
    "ema": 0.998,
    "channels": 16,
    "save_every": 500,
    "sample_every": 500,
}
# Short trainings end better where the learning rate falls to 0. Then the average may be a short one.
SHORT: dict[str, Any] = {"classes": True, "lr_schedule": "cosine", "beta2": 0.99, "ema": 0.99}
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "data": "digits",
        **DIGITS,
        **SHORT,
        "lr": 6e-3,
        "channels": 16,
        "steps": 2400,
        "save_every": 600,
        "sample_every": 600,
    },
    "mnist28": {"data": "mnist", **MNIST, **SHORT},
    "cifar10-32": {
        "size": 32,
        "steps": 400_000,
        "batch_size": 128,
        "lr": 2e-4,
        "warmup": 5000,
        "ema": 0.9999,
        "channels": 128,
        "flip": True,
    },
    "images-64": {"size": 64, "steps": 500_000, "batch_size": 128, "lr": 1e-4, "channels": 128, "flip": True},
}


def read_config(path: Path) -> dict[str, Any]:
    """The options in a file: JSON, as a run's config.json, or YAML.

    Raises: OSError if it cannot be read; ValueError naming the file if it holds something else, or an option of a wrong
        type.
    """
    with blaming(path):
        text = path.read_text(encoding="utf-8")
        given = json.loads(text) if path.suffix == ".json" else need("yaml").safe_load(text)
    if not isinstance(given, dict):
        raise ValueError(f"{path}: expected options by name, got {type(given).__name__}")
    kinds: dict[str, Any] = {field.name: field.type for field in fields(Options)}
    for name, value in given.items():
        if name not in kinds:
            raise ValueError(f"{path}: unknown option {name!r}")
        if kinds[name] is float and isinstance(value, str):  # YAML takes 2e-4 for a text
            with suppress(ValueError):
                value = float(value)
        try:
            given[name] = typed(name, kinds[name], value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
    return given
