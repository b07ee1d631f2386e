"""The variants of every kernel that the static roofline counts: what training and sampling launch, and what is rare.

They are launchers on tensors without memory, not calls of operations: each is one piece of machine code.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.rows import WIDE, WIDTH

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
        if self.kernel == "rotate":
            return torch.empty(BATCH, 256, 24, 128, dtype=dtype or self.dtype, device="meta")
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
    ("rotate", ("none",), [""]),
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
    ("rotate", ("none",), ["pairs", "norm"]),
    ("merge", ("none",), ["centred"]),
    ("layer_norm", ("none",), ["affine", "add+affine", "scale+1152", "add+gate+scale+1152", "add+gate+scale+5120"]),
    ("layer_norm", ("none",), ["affine+320", "affine+mixed", "scale+unaligned"]),
    ("norm", ("none",), [*subsets("scale", "parts", "channels_last", "add"), "unaligned", "mixed", "linear"]),
    ("norm_grad", ("none",), [*subsets("scale", "parts", "channels_last", "add"), "unaligned", "mixed", "linear"]),
    ("norm_grad", ("none",), ["4x4+channels_last", "16x16+add+channels_last"]),
    ("moments", ("none",), [*subsets("parts", "channels_last", "add")[4:], "128x128"]),
    ("norm_sums", ("none",), [*subsets("parts", "scale", "channels_last", "add")[8:], "320x64x64+channels_last"]),
]


# The fewest tensors that a common variant reads and writes; each of MORE, and noise that is given, is another.
TENSORS = {"normal": 1, "noising": 2, "loss": 1, "scale": 2, "update": 3, "reduce": 1, "vlb": 3, "norm": 2}
TENSORS |= {"norm_grad": 3, "inner": 2, "gated_gelu": 3, "layer_norm": 4, "rotate": 2}
MORE = {"grad", "raw", "by_pred", "by_raw"}


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


# --- launches ---------------------------------------------------------------------------------------------------


def floats(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def integers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def output(v: Variant) -> tuple[Tensor, Tensor | None]:
    """(pred, raw): a model that predicts the variance too returns twice the channels, of which they are halves."""
    one = v.data(torch.bfloat16 if v.has("mixed") else None)
    if not v.has("raw"):
        return one, None
    pred, raw = torch.cat([one, one], 1).chunk(2, 1)
    return pred, raw


def launch_norm(v: Variant) -> None:
    """Call the launcher of a norm, or of its gradient, as ops does."""
    from fastdiff.kernels.group_norm import norm, norm_grad

    y, wide = v.data(), torch.float32 if v.has("mixed") else v.dtype
    batch, channels = y.shape[:2]
    x, skip = (v.data(channels=n) for n in (256, channels - 256)) if v.has("skip") else (y, None)
    weight, statistics = torch.empty(channels, dtype=wide, device="meta"), floats(batch, GROUPS)
    both = torch.empty(batch, 2 * channels, dtype=v.dtype, device="meta").chunk(2, 1)
    scale, shift = both if v.has("scale") else (None, None)
    add = torch.empty(batch, channels, dtype=v.dtype, device="meta") if v.has("add") else None
    operands = {"x": x, "groups": GROUPS, "weight": weight, "bias": weight, "scale": scale, "shift": shift}
    operands |= {"add": add, "mean": statistics, "rstd": statistics, "skip": skip, "silu": not v.has("linear")}
    if v.kernel in ("moments", "norm"):
        norm(out=y, **operands, eps=1e-5)
    else:
        by_rows = {"weight_grad": weight, "bias_grad": weight, "scale_grad": scale, "shift_grad": shift}
        norm_grad(x_grad=x, **by_rows, add_grad=add, skip_grad=skip, grad=y, **operands)


def launch_layer_norm(v: Variant) -> None:
    """Call the launcher of the layer norm as ops does."""
    from fastdiff.kernels.layer_norm import layer_norm

    x, y = v.data(), v.data() if v.has("add") else None
    batch, _, channels = x.shape
    weight = None
    if v.has("affine"):
        weight = torch.empty(channels, dtype=torch.float32 if v.has("mixed") else v.dtype, device="meta")
    parts = torch.empty(batch, 3 * channels, dtype=v.dtype, device="meta").chunk(3, 1)
    gate, scale, shift = (part if v.has(o) else None for part, o in zip(parts, ("gate", "scale", "scale"), strict=True))
    rows = {"weight": weight, "bias": weight, "gate": gate, "scale": scale, "shift": shift}
    layer_norm(out=x, total=y, x=x, y=y, eps=1e-5, **rows)


def launch(v: Variant) -> None:
    """Call the launcher as ops does."""
    from fastdiff.kernels.gate import gated_gelu
    from fastdiff.kernels.inner import inner
    from fastdiff.kernels.loss import loss, scale_
    from fastdiff.kernels.noise import normal_
    from fastdiff.kernels.noising import noising
    from fastdiff.kernels.rotate import rotate
    from fastdiff.kernels.update import update
    from fastdiff.kernels.vlb import vlb

    seed = integers(1) if v.noise == "generated" else None
    ids = integers(BATCH) if v.has("ids") else None
    noise = v.data() if v.noise == "given" else None
    if v.kernel == "normal":
        normal_(v.data(), seed, ids, integers(1), STREAM)
    elif v.kernel == "noising":
        noising(v.data(), v.data(), integers(BATCH), floats(LEVELS, 2), seed, ids, noise, STREAM)
    elif v.kernel in ("loss", "reduce"):
        grad = v.data() if v.has("grad") else None
        x0 = v.data(torch.float32 if v.has("mixed") else None) if v.has("x0") else None
        t, table, rho = integers(BATCH), floats(LEVELS, 3), v.one_of("l1", "huber", "mse")
        loss(floats(1), grad, v.data(), x0, t, table, seed, ids, noise, None, STREAM, rho, 1.0, 0.5, 0.5)
    elif v.kernel == "scale":
        scale_(v.data(), floats(1), 0.5)
    elif v.kernel == "vlb":
        pred, raw = output(v)
        wide = torch.float32 if pred.dtype == torch.float16 else pred.dtype
        grads = [torch.empty_like(pred, dtype=wide) if v.has(by) else None for by in ("by_pred", "by_raw")]
        t, table, clip = integers(BATCH), floats(LEVELS, 6), 1.0 if v.has("clip") else None
        vlb(floats(1), *grads, pred, raw, v.data(), v.data(), t, table, clip, 0.5)
    elif v.kernel in ("inner", "merge"):
        inner(floats(BATCH, 3), v.data(), v.data(), floats(1) if v.has("guidance") else None, v.has("centred"))
    elif v.kernel == "gated_gelu":
        x = v.data().flatten(2)
        gated_gelu(x, torch.cat([x, x], -1))
    elif v.kernel in NORMS:
        launch_norm(v)
    elif v.kernel == "layer_norm":
        launch_layer_norm(v)
    elif v.kernel == "rotate":
        x = v.data()
        table = floats(x.shape[1], x.shape[3])[:, :: 1 + v.has("pairs")]
        weight = torch.empty(x.shape[3], dtype=v.dtype, device="meta") if v.has("norm") else None
        rotate(x, x, table, table, weight, 1e-6)
    elif v.kernel != "update":
        raise ValueError(f"kernel: expected a launch of {v.kernel} in benchmarks/static/variants.py, got none")
    else:
        pred, raw = output(v)
        uncond = pred if v.has("uncond") else None
        clip, keep = 1.0 if v.has("clip") else None, v.one_of("new x0hat", "x0hat", "x", "mix", "none")
        hist = None if keep == "none" else torch.stack([v.data()] * 3) if v.has("slots") else v.data()
        rows, step = floats(LEVELS, WIDE if v.has("slots") else WIDTH), integers(1)
        update(v.data(), v.data(), pred, rows, step, seed, ids, uncond, raw, noise, hist, clip, keep, STREAM)
