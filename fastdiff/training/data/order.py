"""Which image comes when: arithmetic on its global sample number, so that nothing is kept."""

import numpy as np

# Streams of `draws`, kept apart.
ORDER, FLIP, LABEL = range(3)
ROUNDS = 8


def mixed(*parts: int | np.ndarray) -> np.ndarray:
    """A hash of integers of 64 bits, elementwise: uint64 of the broadcast shape.

    Each part is added and scrambled by the finalizer of splitmix64.
    Reference: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 15.
    """
    state: np.ndarray = np.zeros(1, np.uint64)
    for part in parts:
        number = np.asarray(part if isinstance(part, np.ndarray) else part & (2**64 - 1)).astype(np.uint64)
        state = state * np.uint64(0x9E3779B97F4A7C15) + number + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def draws(seed: int, stream: int, numbers: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), float64, one for each sample number."""
    bits: np.ndarray = mixed(seed, stream, numbers) >> np.uint64(11)
    return bits * 2.0**-53


def shuffled(numbers: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The images at these global sample numbers: in each epoch of `count` numbers a permutation of all images.

    A Feistel network permutes 0 to 4^k - 1, the smallest such range that holds all images. A number that leaves the
    images is permuted again.

    Args:
        numbers: int64 (B,), from 0.
        count: how many images there are, at least 1.

    Returns: int64 (B,), from 0 to count - 1; a function of (seed, epoch, number) alone.
    Reference: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 4 and 5.
    """
    epoch, place = np.divmod(np.asarray(numbers, np.int64), count)
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    out, todo = place.astype(np.uint64), np.ones(len(place), bool)
    while todo.any():
        left, right = out[todo] >> half, out[todo] & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (mixed(seed, ORDER, epoch[todo], turn, right) & mask)
        out[todo] = (left << half) | right
        todo = out >= count
    numbered: np.ndarray = out.astype(np.int64)
    return numbered
