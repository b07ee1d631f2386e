"""The operations: each has a kernel, a reference in plain PyTorch (`fastdiff.reference`), and checks its arguments.

Arguments that several operations have:

- table, rows: contiguous, float32; for float64 data they may be float64.
- seed: the 64-bit key of the noise: an int, an int64 tensor of one element, or None. With None it is drawn on the
  device from PyTorch's default generator.
- sample_ids: (B,) int64 in [0, 2^32): the number of each sample in the noise; 0..B-1 if None.
- noise: a floating tensor shaped like the data; it takes the place of generated noise.
- out: a tensor shaped and typed like the result, which is written into it. It is none of the operands, and no gradient
  is wanted.
"""

from .gate import gated_gelu
from .group_norm import group_norm_silu
from .inner import inner
from .layer_norm import add_layer_norm, layer_norm
from .loss import LOSSES, loss
from .noise import FORWARD, PRIOR, REVERSE, normal
from .noising import noising
from .update import KEEPS, combine, update
from .vlb import vlb

__all__ = [
    "FORWARD",
    "KEEPS",
    "LOSSES",
    "PRIOR",
    "REVERSE",
    "add_layer_norm",
    "combine",
    "gated_gelu",
    "group_norm_silu",
    "inner",
    "layer_norm",
    "loss",
    "noising",
    "normal",
    "update",
    "vlb",
]
