"""How normal the noise is: accuracy against float64 and the distribution of many draws, as a Markdown table.

python benchmarks/noise_quality.py --draws 1e9 runs the compiled CPU kernels: Triton's words and polynomials.
"""

import argparse
import math

import torch
from torch import Tensor

from fastdiff import backend, ops, reference

CHUNK = 2**24
BINS = 2**16
# E[z^k] for k = 1..8 and the variance of z^k, E[z^2k] - E[z^k]^2.
MOMENTS = [0, 1, 0, 3, 0, 15, 0, 105]
DOUBLE = [1, 3, 15, 105, 945, 10395, 135135, 2027025]


def accuracy(draws: int) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """The error of float32 normals against float64 normals from the same random words.

    An ulp is the distance between the two float32 numbers around the exact one; r is the radius of Box-Muller.

    Returns: ((largest, mean) |error|, (largest, 99th percentile, mean) |error| in ulp, largest |error| / r).
    """
    seed, step = torch.tensor([7]), torch.tensor([0])
    z = ops.normal((1, draws), 7).double()
    exact = reference.normal((1, draws), seed, None, step, ops.PRIOR, torch.float64)
    r = exact.view(-1, 2).norm(dim=1, keepdim=True).expand(-1, 2).reshape(1, -1)
    error = (z - exact).abs()
    some = exact.abs() > 2.0**-44  # what is not 0 is at least 2^-42; float64 has 1e-16 for sin(pi)
    ulps = error[some] / torch.exp2(exact[some].abs().log2().floor() - 23)
    ordered = ulps.max().item(), ulps.kthvalue(round(0.99 * len(ulps))).values.item(), ulps.mean().item()
    return (error.max().item(), error.mean().item()), ordered, (error / r).max().item()


def distribution(draws: int) -> tuple[Tensor, float, dict[int, tuple[int, float]], int]:
    """How the draws are distributed.

    Returns: (mean of z^k for k = 1..8, Kolmogorov-Smirnov distance, {sigma: (draws beyond, expected)}, draws).
    """
    total = torch.zeros(8, dtype=torch.float64)
    counts = torch.zeros(BINS, dtype=torch.float64)
    edges = torch.special.ndtri(torch.arange(1, BINS, dtype=torch.float64) / BINS).float()
    beyond = dict.fromkeys((3, 4, 5, 6), 0)
    chunks = -(-draws // CHUNK)
    for k in range(chunks):
        z = ops.normal((1, CHUNK), 11, sample_ids=torch.tensor([k]))[0]
        counts += torch.bincount(torch.bucketize(z, edges), minlength=BINS)
        size = z.abs()
        for sigma in beyond:
            beyond[sigma] += int((size > sigma).sum())
        z, power = z.double(), torch.ones((), dtype=torch.float64)
        for i in range(8):
            power = power * z
            total[i] += power.sum()
    n = chunks * CHUNK
    # The distribution function of the float32 edges themselves, not of their rounding.
    expected = torch.special.ndtr(edges.double())
    distance = (counts.cumsum(0)[:-1] / n - expected).abs().max().item()
    tails = {sigma: (count, n * math.erfc(sigma / math.sqrt(2))) for sigma, count in beyond.items()}
    return total / n, distance, tails, n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=float, default=1e9, help="(default: 1e9)")
    draws = int(parser.parse_args().draws)
    with backend("cpu"):
        error, ulps, relative = accuracy(2**24)
        moments, distance, tails, n = distribution(draws)
    print(f"float32 against float64, {2**24} draws: |error| <= {error[0]:.2e}, mean {error[1]:.2e}; ", end="")
    print(f"|error| / r <= {relative:.2e}\n")
    print(f"In ulp: {ulps[0]:.0f} at most, 99 of 100 below {ulps[1]:.1f}, mean {ulps[2]:.2f}\n")
    print(f"Distribution of {n} draws:\n\n| quantity | found | expected | standard deviations off |")
    print("|---|---|---|---|")
    for k, (found, expected, double) in enumerate(zip(moments.tolist(), MOMENTS, DOUBLE, strict=True), 1):
        off = (found - expected) / math.sqrt((double - expected**2) / n)
        print(f"| E[z^{k}] | {found:.6f} | {expected} | {off:+.2f} |")
    for sigma, (count, mean) in tails.items():
        off = (count - mean) / math.sqrt(mean)
        print(f"| draws beyond {sigma} sigma | {count} | {mean:.1f} | {off:+.2f} |")
    bound = 1.628 / math.sqrt(n)
    print(f"| Kolmogorov-Smirnov distance | {distance:.2e} | below {bound:.2e} (1 % level) | |")


if __name__ == "__main__":
    main()
