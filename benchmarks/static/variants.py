"""The variants of every kernel that the static roofline counts: what training and sampling launch, and what is rare."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

BATCH, SHAPE, LEVELS, STREAM = 64, (3, 128, 128), 1001, 1
# Activations inside a U-Net: enough groups to fill a GPU, or one image, whose groups are cut into parts.
GROUPS, INNER = 32, (BATCH, 128, 32, 32)
SHAPES = {"concat": (64, 384, 32, 32), "64x64": (64, 128, 64, 64), "128x128": (64, 128, 128, 128)}
SHAPES |= {"4x4": (64, 256, 4, 4), "16x16": (64, 384, 16, 16), "320x64x64": (64, 320, 64, 64)}
SHAPES["parts"] = (1, 128, 256, 256)
# Tokens of a transformer: rows of six tiles, and those of Stable Diffusion 1.5, DiT-XL and larger ones.
TOKENS = {"320": (BATCH, 1024, 320), "1152": (BATCH, 256, 1152), "5120": (BATCH, 256, 5120)}
NORMS = ("moments", "norm", "norm_sums", "norm_grad")


@dataclass(frozen=True)
class Variant:
    """One way to launch a kernel."""

    kernel: str
    dtype: torch.dtype
    noise: str  # generated, given or none
    options: str  # joined by +

    def has(self, option: str) -> bool:
        return option in self.options.split("+")

    def one_of(self, *options: str) -> str:
        """The first of them that is set, or the last."""
        return next((o for o in options if self.has(o)), options[-1])

    def data(self, dtype: torch.dtype | None = None, channels: int | None = None) -> Tensor:
        """(B, ...) without storage, which Triton takes for aligned. channels: others than the variant's."""
        odd = int(self.has("unaligned"))
        if self.kernel == "layer_norm":
            batch, tokens, width = next((TOKENS[o] for o in TOKENS if self.has(o)), (BATCH, 256, 1536))
            return torch.empty(batch, tokens, width - odd, dtype=dtype or self.dtype, device="meta")
        layout = torch.channels_last if self.has("channels_last") else torch.contiguous_format
        if self.kernel in NORMS:
            batch, own, height, width = next((SHAPES[o] for o in SHAPES if self.has(o)), INNER)
        else:
            batch, (own, height, width) = BATCH, SHAPE
        shape = (batch, channels or own, height - odd, width - odd)
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta", memory_format=layout)


def subsets(*options: str) -> list[str]:
    chosen = itertools.product((False, True), repeat=len(options))
    return ["+".join(itertools.compress(options, choice)) for choice in chosen]


DRAWN = ("generated", "given")
VLB = [o for o in subsets("clip", "raw", "by_pred", "by_raw") if "by_raw" not in o or "+raw" in f"+{o}"]
# Of a norm: larger images, and the concatenations of a U-Net, whose groups are of 12 channels, as one tensor and as
# two, in both layouts.
MAPS = [m + c for m in ("64x64", "128x128", "concat", "concat+skip") for c in ("+channels_last", "")]
# Kernel, sources of noise, options: what training and sampling loops launch every day, and what else can be launched.
COMMON = [
    ("normal", ("generated",), [""]),
    ("noising", DRAWN, [""]),
    ("loss", DRAWN, subsets("grad")),
    ("reduce", ("none",), [""]),
    ("scale", ("none",), [""]),
    # The bound alone, evaluated and trained on, and beside another loss, which leaves the mean to that.
    ("vlb", ("none",), ["clip", "clip+raw", "raw+by_pred+by_raw", "raw+by_raw"]),
    ("update", DRAWN, subsets("clip")),
    ("inner", ("none",), ["", "guidance+centred"]),
    ("gated_gelu", ("none",), [""]),
    ("layer_norm", ("none",), ["add+gate+scale"]),
    ("norm", ("none",), [*subsets("scale", "channels_last"), "scale+add+channels_last", *MAPS]),
    ("norm_grad", ("none",), [*subsets("scale", "channels_last"), "scale+add+channels_last", *MAPS]),
]
RARE = [
    ("normal", ("generated",), ["channels_last", "ids"]),
    ("noising", ("generated",), ["channels_last", "ids", "unaligned"]),
    ("loss", DRAWN, subsets("x0", "grad")),
    ("loss", ("none",), ["x0", "x0+grad"]),
    ("loss", ("generated",), ["grad+l1", "grad+huber", "grad+ids", "grad+channels_last", "x0+grad+mixed"]),
    ("vlb", ("none",), [*VLB, "raw+by_raw+mixed"]),
    ("update", DRAWN, subsets("clip", "uncond", "raw", "x0hat")),
    ("update", ("none",), subsets("clip", "uncond", "x0hat")),
    ("update", ("none", "generated"), ["clip+x0hat+slots", "clip+mix+slots"]),
    ("update", ("generated",), ["clip+x", "clip+new x0hat", "clip+ids", "clip+channels_last", "clip+mixed"]),
    ("inner", ("none",), ["channels_last", "centred", "guidance"]),
    ("gated_gelu", ("none",), ["unaligned"]),
    ("merge", ("none",), ["centred"]),
    ("layer_norm", ("none",), ["affine", "add+affine", "scale+1152", "add+gate+scale+1152", "add+gate+scale+5120"]),
    ("layer_norm", ("none",), ["affine+320", "affine+mixed", "scale+unaligned"]),
    ("norm", ("none",), [*subsets("scale", "parts", "channels_last", "add"), "unaligned", "mixed", "linear"]),
    ("norm_grad", ("none",), [*subsets("scale", "parts", "channels_last", "add"), "unaligned", "mixed", "linear"]),
    ("norm_grad", ("none",), ["4x4+channels_last", "16x16+add+channels_last"]),
    ("moments", ("none",), [*subsets("parts", "channels_last", "add")[4:], "128x128"]),
    ("norm_sums", ("none",), [*subsets("parts", "scale", "channels_last", "add")[8:], "320x64x64+channels_last"]),
]


def variants(common: bool) -> list[Variant]:
    """The common variants in float32 and bfloat16, or all; what float16 shares with bfloat16 is left out."""
    table = COMMON if common else COMMON + RARE
    dtypes = (torch.float32, torch.bfloat16)
    products = (
        [(dtype, *entry) for entry in table for dtype in dtypes],
        [] if common else [(torch.float16, *entry) for entry in COMMON],
    )
    chosen = [
        Variant(kernel, dtype, noise, option)
        for dtype, kernel, noises, options in itertools.chain(*products)
        for noise in noises
        for option in options
        if kernel not in ("reduce", "merge") or dtype == torch.float32  # partial sums are
    ]
    return list(dict.fromkeys(chosen))
