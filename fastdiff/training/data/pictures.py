"""Images as PNG, and as shards of them."""

import io
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.files import need, replacing

# The modes of PIL by the number of channels.
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def as_bytes(images: Tensor) -> Tensor:
    """uint8 of images in [-1, 1]; what is outside is cut off."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def encoded(images: Tensor) -> Iterator[bytes]:
    """The PNG of each image of (N, C, H, W) in [-1, 1], C of 1 to 4."""
    create = need("PIL.Image").frombytes
    for pixels in as_bytes(images).permute(0, 2, 3, 1):
        height, width, channels = pixels.shape
        file = io.BytesIO()
        create(MODES[channels], (width, height), pixels.numpy().tobytes()).save(file, format="PNG")
        yield file.getvalue()


def write_shard(path: Path, pictures: Mapping[str, bytes], labels: Sequence[int] | None) -> None:
    """Write a shard of a WebDataset, KEY.png and KEY.cls, or leave the old one as it was.

    Its bytes depend on what is written alone: its members have neither time nor owner.
    """
    with replacing(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as shard:
        for k, (key, picture) in enumerate(pictures.items()):
            members = {"png": picture} | ({} if labels is None else {"cls": str(labels[k]).encode()})
            for ending, content in members.items():
                entry = tarfile.TarInfo(f"{key}.{ending}")
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))
