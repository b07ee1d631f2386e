"""The noise as a function: its bits against Random123, its normals against float64, its statistics, its seeds."""

import math

import pytest
import torch
import triton
import triton.language as tl
from fastdiff.kernels.launch import on_nvidia
from fastdiff.kernels.noise import box_muller, normal_kernel, philox4x32
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    BACKENDS,
    DEVICE,
    LAYOUTS,
    WORDS,
    dtypes,
    index,
    laid,
    layouts,
    random_words,
    salts,
    sample_ids,
    seeds,
    shapes,
)
from tolerance import NORMAL, assert_close, assert_same_bits, fast_error, normals, radius
from torch import Tensor

import fastdiff
from fastdiff import ops, reference
from fastdiff.ops.checks import as_seed

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
LANES = 256
# Nothing in a sample of n standard normals with independent terms should leave this band around its mean.
SIGMAS = 5
DRAWS = 2**20


@triton.jit
def philox_kernel(out_ptr, counter_ptr, key_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    c0 = tl.load(counter_ptr + at).to(tl.uint32)
    c1 = tl.load(counter_ptr + BLOCK + at).to(tl.uint32)
    c2 = tl.load(counter_ptr + 2 * BLOCK + at).to(tl.uint32)
    c3 = tl.load(counter_ptr + 3 * BLOCK + at).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(c0, c1, c2, c3, tl.load(key_ptr).to(tl.uint32), tl.load(key_ptr + 1).to(tl.uint32))
    tl.store(out_ptr + at, w0.to(tl.int64))
    tl.store(out_ptr + BLOCK + at, w1.to(tl.int64))
    tl.store(out_ptr + 2 * BLOCK + at, w2.to(tl.int64))
    tl.store(out_ptr + 3 * BLOCK + at, w3.to(tl.int64))


@triton.jit
def box_muller_kernel(out_ptr, words_ptr, FAST: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    first, second = tl.load(words_ptr + 2 * at).to(tl.uint32), tl.load(words_ptr + 2 * at + 1).to(tl.uint32)
    z0, z1 = box_muller(first, second, FAST)
    tl.store(out_ptr + 2 * at, z0)
    tl.store(out_ptr + 2 * at + 1, z1)


def philox_of_kernel(counter: Tensor, key: Tensor) -> Tensor:
    out = torch.empty_like(counter)
    philox_kernel[(1,)](out, counter, key, BLOCK=LANES)
    return out


def int64(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)




# --- bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, words):
    one = [int64(c) for c in counter]
    assert tuple(int(w) for w in reference.philox4x32(one, [int64(k) for k in key])) == words
    lanes = int64(*counter)[:, None].expand(4, LANES).contiguous()
    assert torch.equal(philox_of_kernel(lanes, int64(*key)), int64(*words)[:, None].expand(4, LANES))


@pytest.mark.slow
@given(salt=salts)
def test_philox_of_the_kernel_is_that_of_the_reference(salt):
    counter, key = random_words(salt, 4, LANES), random_words(salt + 1, 2)
    assert torch.equal(
        philox_of_kernel(counter, key), torch.stack(reference.philox4x32(counter.unbind(), key.unbind()))
    )


@given(seed=seeds, salt=salts, stream=st.integers(0, 2**32 - 1))
def test_counter_and_key_are_laid_out_as_documented(seed, salt, stream):
    ids, step, n = sample_ids(3, salt), index(2**31, 3, True, salt), 10
    words = reference.uniform_bits(3, n, as_seed(seed, DEVICE), ids, step, stream)
    key = [int64((seed >> shift) & 0xFFFFFFFF) for shift in (0, 32)]
    assert words.shape == (3, 3, 4)
    for i in range(3):
        for block in range(3):
            counter = [int64(block), ids[i : i + 1], step[i : i + 1], int64(stream)]
            assert torch.equal(words[i, block], torch.cat(reference.philox4x32(counter, key)))


# --- normals ----------------------------------------------------------------------------------------------------


def check_box_muller(words: Tensor, fast: bool) -> None:
    out = torch.empty(len(words), dtype=torch.float32, device=DEVICE)
    box_muller_kernel[(1,)](out, words, FAST=fast, BLOCK=len(words) // 2)
    assert bool(out.isfinite().all())
    r = radius(words[0::2]).repeat_interleave(2)
    x = (words[1::2] - ((words[1::2] >> 31) << 32)).float() * 2.0**-31
    want = r * torch.stack(((math.pi * x.double()).cos(), (math.pi * x.double()).sin()), -1).flatten()
    assert_close(reference.box_muller(words.reshape(-1, 4), torch.float64).flatten(), want, 1e-14)
    assert_close(out, want, fast_error(r) if fast else NORMAL, roundings=0)


@given(salt=salts)
def test_box_muller(salt):
    check_box_muller(random_words(salt, 512), fast=False)


@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_box_muller_of_extreme_words(fast):
    radii, angles = torch.tensor(WORDS, device=DEVICE), torch.tensor(WORDS, device=DEVICE)
    pairs = torch.cartesian_prod(radii, angles).flatten()
    check_box_muller(pairs, fast)


@pytest.mark.gpu
def test_fast_box_muller():
    check_box_muller(random_words(0, 4096), fast=True)


def test_the_radius_uses_every_bit():
    """Words 0 and 1 are 2^-33 and 1.5 2^-32: 6.76 and 6.60 standard deviations, not the 5.77 of 24 bits."""
    z = reference.box_muller(torch.tensor([0, 0, 1, 0]), torch.float64)
    assert z[0].item() == pytest.approx(math.sqrt(66 * math.log(2)), abs=1e-12)
    assert z[2].item() == pytest.approx(math.sqrt(64 * math.log(2) - 2 * math.log(1.5)), abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@given(
    shape=shapes(),
    dtype=dtypes,
    layout=layouts,
    seed=seeds,
    salt=salts,
    numbered=st.booleans(),
    per_sample=st.booleans(),
    stream=st.integers(0, 2**32 - 1),
)
def test_normal(backend, shape, dtype, layout, seed, salt, numbered, per_sample, stream):
    out = laid(torch.full(shape, math.nan, dtype=dtype, device=DEVICE), layout)
    ids = sample_ids(shape[0], salt) if numbered else None
    step, key = index(2**31, shape[0], per_sample, salt), as_seed(seed, DEVICE)
    with fastdiff.backend(backend):
        torch.ops.fastdiff.normal_(out, key, ids, step, stream)
    want, error = normals(shape, key, ids, step, stream, fast=backend == "triton" and on_nvidia(out))
    assert_close(out, want, error, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_normal_in_float64_is_computed_in_float64(backend):
    with fastdiff.backend(backend):
        z = ops.normal((2, 9), 3, dtype=torch.float64, device=DEVICE)
    assert_close(z, reference.normal((2, 9), int64(3), None, int64(0), ops.PRIOR, torch.float64), 0.0)
    assert not torch.equal(z, z.float().double())


def drawn(out: Tensor, block: int, vec: int) -> Tensor:
    batch, n = out.shape
    normal_kernel[(triton.cdiv(n, block), batch, 1)](
        out, int64(7), None, int64(5), batch, n, 0,
        STREAM=1, FAST=on_nvidia(out), CHANNELS=1, BLOCK=block, VEC=vec,
    )  # fmt: skip
    return out


@pytest.mark.slow
def test_normals_do_not_depend_on_the_block():
    shape = (2, 2051)
    first = drawn(torch.empty(shape, device=DEVICE), 2048, 4)
    for block, vec in ((256, 4), (512, 8), (1024, 4), (2048, 8)):
        assert_same_bits(drawn(torch.empty(shape, device=DEVICE), block, vec), first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_normals_do_not_depend_on_the_batch(backend):
    with fastdiff.backend(backend):
        whole = ops.normal((5, 3, 7), 11, device=DEVICE)
        order = [4, 0, 2]
        assert_same_bits(ops.normal((3, 3, 7), 11, sample_ids=int64(*order), device=DEVICE), whole[order])
        assert_same_bits(ops.normal((2, 3, 7), 11, device=DEVICE), whole[:2])
        steps = int64(3, 9, 3)
        apart = ops.normal((3, 3, 7), 11, step=steps, sample_ids=int64(1, 1, 1), device=DEVICE)
        assert_same_bits(apart[0], apart[2])
        assert_same_bits(apart[1:2], ops.normal((1, 3, 7), 11, step=9, sample_ids=int64(1), device=DEVICE))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 3, 4, 6), torch.float32),
        ((2, 3, 3, 5), torch.bfloat16),
        ((1, 2, 2, 6, 90), torch.float16),
        ((2, 7, 8), torch.float16),
    ],
)
def test_normals_do_not_depend_on_the_layout(shape, dtype):
    args = int64(11), None, int64(2), ops.FORWARD
    with fastdiff.backend("triton"):
        plain = torch.empty(shape, dtype=dtype, device=DEVICE)
        torch.ops.fastdiff.normal_(plain, *args)
        for layout in LAYOUTS[1:]:
            out = laid(torch.full_like(plain, math.nan), layout)
            torch.ops.fastdiff.normal_(out, *args)
            assert_same_bits(out, plain)


def test_samples_beyond_the_second_grid_axis():
    """The third axis counts in units of the most that the second may hold."""
    out = torch.full((32769, 1), math.nan, device=DEVICE)
    normal_kernel[(1, 1, 2)](
        out, int64(7), None, int64(5), len(out), 1, 0,
        STREAM=1, FAST=on_nvidia(out), CHANNELS=1, BLOCK=256, VEC=4,
    )  # fmt: skip
    assert out.isnan().sum() == len(out) - 2
    want, error = normals((2, 1), int64(7), int64(0, 32768), int64(5), 1, on_nvidia(out))
    assert_close(out[[0, 32768]], want, error)


# --- statistics (of the reference, whose normals are those of the kernels) ----------------------------------------


@pytest.fixture(scope="module")
def draws() -> Tensor:
    """(4, DRAWS): four samples of one seed."""
    return reference.normal((4, DRAWS), torch.tensor([2024]), None, torch.tensor([0]), ops.PRIOR).double()


@pytest.mark.slow
def test_moments(draws):
    for z in (draws.flatten(), *draws.reshape(-1, 4).unbind(1)):
        n = z.numel()
        assert abs(z.mean().item()) < SIGMAS / math.sqrt(n)
        assert abs((z**2).mean().item() - 1) < SIGMAS * math.sqrt(2 / n)
        assert abs((z**3).mean().item()) < SIGMAS * math.sqrt(15 / n)
        assert abs((z**4).mean().item() - 3) < SIGMAS * math.sqrt(96 / n)


@pytest.mark.slow
def test_distribution(draws):
    """Kolmogorov-Smirnov at the level 10^-3."""
    z = draws.flatten().sort().values
    n = z.numel()
    expected = torch.special.ndtr(z)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((steps[1:] - expected).max(), (expected - steps[:-1]).max()).item()
    assert distance < 1.95 / math.sqrt(n)


@pytest.mark.parametrize("bound", [3, 4, 5])
def test_tails(draws, bound):
    p = math.erfc(bound / math.sqrt(2)) / 2
    expected = draws.numel() * p
    for tail in (draws, -draws):
        assert abs(int((tail > bound).sum()) - expected) < SIGMAS * math.sqrt(expected * (1 - p))


def assert_uncorrelated(a: Tensor, b: Tensor) -> None:
    """Neither the values nor the magnitudes: both are means of n products of mean 0 and variance 1."""
    assert not torch.equal(a, b)
    bound = SIGMAS / math.sqrt(a.numel())
    assert abs((a * b).mean().item()) < bound
    assert abs(((a**2 - 1) * (b**2 - 1) / 2).mean().item()) < bound


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 64, 256, 2048])
def test_elements_are_uncorrelated(draws, lag):
    assert_uncorrelated(draws[0, lag:], draws[0, :-lag])


@pytest.mark.parametrize(
    "other",
    [
        {"stream": 1},
        {"sample": 1},
        {"sample": 2**31},
        {"step": 1},
        {"step": 2**31},
        {"seed": 2025},
        {"seed": 2024 + 2**32},
        {"seed": 2024 - 2**63},
    ],
)
def test_draws_are_kept_apart(draws, other):
    seed, sample, step, stream = ({"seed": 2024, "sample": 0, "step": 0, "stream": 0} | other).values()
    z = reference.normal((1, DRAWS), torch.tensor([seed]), torch.tensor([sample]), torch.tensor([step]), stream)
    assert_uncorrelated(draws[0], z[0].double())


# --- seeds ------------------------------------------------------------------------------------------------------


@given(seed=seeds)
def test_a_seed_is_64_bits(seed):
    z = ops.normal((1, 8), seed)
    signed = (seed + 2**63) % 2**64 - 2**63
    assert_same_bits(ops.normal((1, 8), signed % 2**64), z)
    assert_same_bits(ops.normal((1, 8), torch.tensor(signed)), z)
    assert_same_bits(ops.normal((1, 8), torch.tensor([[signed]])), z)
    for bit in (0, 31, 32, 63):
        assert not torch.equal(ops.normal((1, 8), (signed ^ (1 << bit)) % 2**64), z)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_beyond_64_bits_is_refused(seed):
    with pytest.raises(ValueError, match=f"seed: expected 64 bits, got {seed}"):
        ops.normal((1, 8), seed)


def test_without_a_seed_the_default_generator_rules():
    torch.manual_seed(5)
    first, second = ops.normal((2, 8), device=DEVICE), ops.normal((2, 8), device=DEVICE)
    torch.manual_seed(5)
    assert_same_bits(ops.normal((2, 8), device=DEVICE), first)
    assert not torch.equal(first, second)
    torch.manual_seed(6)
    assert not torch.equal(ops.normal((2, 8), device=DEVICE), first)


def test_a_drawn_seed_uses_the_high_word():
    torch.manual_seed(0)
    high = torch.cat([as_seed(None, DEVICE) for _ in range(64)]) >> 32
    assert len(high.unique()) == 64
