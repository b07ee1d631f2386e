"""Features of images, by name: functions from images (B, C, H, W) in [-1, 1] to features (B, D), and maybe logits."""

import importlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.files import need
from fastdiff.training.data.opening import SETS, known_set
from fastdiff.training.data.pictures import as_bytes

Features = Callable[[Tensor], tuple[Tensor, Tensor | None]]
NAMES = "inception, dinov2, pixels, classifier, MODULE:FUNCTION, or a TorchScript file FILE.pt"


def features_of(name: str, data: str, device: torch.device) -> Features:
    """The features of a name.

        inception         2048 numbers and the logits of the FID's Inception (extra [eval], and its weights)
        dinov2            768 numbers of DINOv2 ViT-B/14, by torch.hub
        pixels            the pixels
        classifier        128 numbers and the logits of a small network trained on the digits, or on MNIST
        MODULE:FUNCTION   what the function returns: features, or (features, logits)
        FILE.pt           the same of a TorchScript module

    Args:
        name: one of these.
        data: of the run; "classifier" is trained on it.
        device: where to compute.

    Raises: ValueError for another name, or where "classifier" has no set to be trained on; OSError or ImportError if
        something is missing.
    """
    if name == "pixels":
        return lambda images: (images.flatten(1), None)
    if name == "classifier":
        if data not in SETS:
            raise ValueError(f"features: classifier is trained on {' or '.join(SETS)}, got {data}")
        return lambda images: classified(data, images)
    if name == "inception":
        return _inception(device)
    if name == "dinov2":
        return _dino(device)
    if name.endswith(".pt"):
        if not Path(name).is_file():
            raise FileNotFoundError(2, "No such file or directory", name)
        try:
            network = torch.jit.load(name, map_location=device).eval()
        except RuntimeError as error:
            raise ValueError(f"features: expected a file that torch.jit.save wrote, got {name}") from error
        return lambda images: _pair(network(images.to(device)))
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"features: expected {NAMES}, got {name!r}")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except AttributeError as error:
        raise ValueError(f"features: {module} has no {attribute!r}") from error
    if not callable(function):
        raise TypeError(f"features: expected a function, got {name} of type {type(function).__name__}")
    return lambda images: _pair(function(images.to(device)))


def _pair(result: Any) -> tuple[Tensor, Tensor | None]:
    """(features, logits or None) of what a function returned. Raises TypeError for something else."""
    features, logits = result if isinstance(result, tuple) else (result, None)
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise TypeError(f"features: expected a tensor (B, D), got {getattr(features, 'shape', type(features))}")
    return features, logits


def _inception(device: torch.device) -> Features:
    try:
        fid = need("torchmetrics.image.fid", "eval")
        need("torch_fidelity", "eval")
    except ImportError as error:
        raise ImportError(f"{error}; --features pixels does without it") from error
    network = fid.NoTrainInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"]).to(device).eval()

    def features(images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = network._torch_fidelity_forward(as_bytes(_coloured(images)).to(device))
        return features, logits

    return features


def _dino(device: torch.device) -> Features:
    network = torch.hub.load("facebookresearch/dinov2", "dinov2_vitb14").to(device).eval()
    mean, std = (
        torch.tensor(x, device=device).reshape(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )

    def features(images: Tensor) -> tuple[Tensor, None]:
        sized = F.interpolate(_coloured(images).to(device), (224, 224), mode="bicubic", antialias=True)
        return network(((sized.clamp(-1, 1) + 1) / 2 - mean) / std), None

    return features


def _coloured(images: Tensor) -> Tensor:
    """Three channels. Raises ValueError for images with another number than 1 or 3."""
    if images.shape[1] not in (1, 3):
        raise ValueError(f"features: expected images of 1 or 3 channels, got {images.shape[1]}")
    return images.expand(-1, 3, -1, -1)


@lru_cache
def classifier(data: str) -> Any:
    """A network of one hidden layer, of 128, of scikit-learn, trained on the train half of the digits or of MNIST."""
    images, labels, _, _ = known_set(data)
    network = need("sklearn.neural_network").MLPClassifier((128,), max_iter=400, random_state=0)
    with need("threadpoolctl").threadpool_limits(1):  # the matrices are too small for more
        return network.fit(images[:].flatten(1).numpy(), labels.numpy())


def classified(data: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """(the hidden layer, the logits) of the classifier of a set."""
    network = classifier(data)
    (w1, w2), (b1, b2) = ([torch.from_numpy(x) for x in group] for group in (network.coefs_, network.intercepts_))
    hidden = (images.cpu().flatten(1).to(w1.dtype) @ w1 + b1).relu()
    return hidden, hidden @ w2 + b2
