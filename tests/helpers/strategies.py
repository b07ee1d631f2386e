"""What the property tests draw: shapes, layouts, types, values and where the noise comes from."""

import math

import torch
from hypothesis import strategies as st
from tolerance import INTERPRETED
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
# The kernels for CPU tensors are tested where the others are interpreted.
BACKENDS = ("triton", "reference", "cpu") if DEVICE.type == "cpu" else ("triton", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "batch_last", "swapped", "strided", "half")
# Where each sample of a special tensor is special. Subnormals are left out: a GPU may flush them in any library.
EXTREMES = (0.0, -0.0, 1e-4, -1e-4, 1e4, -1e4, math.inf, -math.inf, math.nan)

dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(-(2**63), 2**64 - 1)
salts = st.integers(0, 2**20)


@st.composite
def shapes(draw: st.DrawFn, sizes: tuple[int, ...] = (60, 600, 5000)) -> tuple[int, ...]:
    """(B, ...), 1-D to 5-D, of one element to about one of the sizes, by default three blocks of 2048 in all."""
    ndim = draw(st.integers(1, 5))
    batch = draw(st.integers(1, 3))
    if ndim == 1:
        return (batch,)
    inner = [draw(st.integers(1, 6)) for _ in range(ndim - 2)]
    most = draw(st.sampled_from(sizes))
    return (batch, *inner, draw(st.integers(1, max(1, most // (batch * math.prod(inner))))))


def tensor(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    salt: int = 0,
    extreme: bool = False,
) -> Tensor:
    """Normal values of standard deviation 2; with `extreme`, a third of them out of EXTREMES."""
    generator = torch.Generator().manual_seed(salt)
    x = 2 * torch.randn(shape, generator=generator)
    if extreme:
        special = torch.tensor(EXTREMES)[torch.randint(len(EXTREMES), shape, generator=generator)]
        x = torch.where(torch.rand(shape, generator=generator) < 0.33, special, x)
    return laid(x.to(DEVICE, dtype), layout)


def laid(x: Tensor, layout: str) -> Tensor:
    """x in another memory layout, with NaN wherever there are gaps; a layout that its rank lacks leaves x as it is."""
    if layout == "channels_last" and x.ndim > 2:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "batch_last":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "swapped" and x.ndim > 2:
        return x.transpose(1, -1).contiguous().transpose(1, -1)
    if layout == "strided":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), math.nan)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "half" and x.ndim > 1:
        wide = x.new_full((x.shape[0], 2 * x.shape[1], *x.shape[2:]), math.nan)
        wide[:, x.shape[1] :] = x
        return wide[:, x.shape[1] :]
    return x


def table(rows: int, columns: int, salt: int) -> Tensor:
    """Float32 coefficients in [-2, 2], a quarter of them 0 or 1 as in the rows of schedules and samplers."""
    generator = torch.Generator().manual_seed(salt + 1)
    drawn = 4 * torch.rand(rows, columns, generator=generator) - 2
    exact = torch.randint(2, (rows, columns), generator=generator).float()
    return torch.where(torch.rand(rows, columns, generator=generator) < 0.25, exact, drawn).to(DEVICE)


def index(rows: int, batch: int, per_sample: bool, salt: int) -> Tensor:
    """Rows of a table, one for each sample or one for the batch."""
    generator = torch.Generator().manual_seed(salt + 2)
    return torch.randint(rows, (batch if per_sample else 1,), generator=generator).to(DEVICE)


def sample_ids(batch: int, salt: int) -> Tensor:
    generator = torch.Generator().manual_seed(salt + 3)
    return torch.randint(2**32, (batch,), generator=generator).to(DEVICE)


# 32-bit words at the edges of their range.
WORDS = (0, 1, 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1)


def random_words(salt: int, *shape: int) -> Tensor:
    """Uniform words, every fourth of them one of WORDS."""
    generator = torch.Generator().manual_seed(salt)
    words = torch.randint(2**32, shape, generator=generator)
    special = torch.tensor(WORDS)[torch.randint(len(WORDS), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.25, special, words).to(DEVICE)
