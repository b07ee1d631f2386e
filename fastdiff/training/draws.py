"""The random numbers of training: functions of the seed, the step and the number of the sample in the step.

They do not depend on the processes that share a step, on the device, or on what was drawn before. So a run goes on from
any step with the same numbers. The noise of the loss is a function of the sample's number too, see fastdiff.ops.
"""

import numpy as np
import torch
from torch import Tensor

# What numbers are for: levels, and whether a step tells the network its estimate. Each purpose has its own.
LEVELS, SELF_CONDITIONING = 1, 2
WORD = 2**64 - 1


def uniforms(seed: int, step: int, count: int, purpose: int) -> Tensor:
    """(count,) float64 in [0, 1), multiples of 2^-53.

    Args:
        seed: of the run.
        step: a number below 2^64.
        count: how many, one for each sample.
        purpose: LEVELS, SELF_CONDITIONING, or a number of your own.

    Reference: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox4x64-10).
    """
    bits = np.random.Philox(key=np.array([seed & WORD, step], np.uint64), counter=[0, 0, 0, purpose]).random_raw(count)
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def noise_key(seed: int, first: int, count: int) -> tuple[int, Tensor]:
    """(seed, sample_ids (count,)) of the noise of the samples first..first+count-1 of a run.

    Sample ids have 32 bits. A run of more samples goes on with another seed.
    """
    ids = torch.arange(first % 2**32, first % 2**32 + count) % 2**32
    return signed(seed + (first >> 32)), ids


def signed(number: int) -> int:
    """The number modulo 2^64 as an int64."""
    return (number + 2**63) % 2**64 - 2**63
