"""What a normal costs, as a Markdown table: forward noising with Triton's own generators and with the library's.

It is compiled for an H100, and its machine code is counted as in the static roofline. This needs no GPU.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from fastdiff.kernels.launch import FUSED
from fastdiff.kernels.tile import load_float32, owner, table_row, tile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.static import machine_code, roofline, variants
from benchmarks.workloads import refuse_interpreter

BLOCK = 2048  # 16 elements a thread, as in the library


@triton.jit
def trial_kernel(
    x0_ptr, out_ptr, t_ptr, table_ptr, seed_ptr, batch, n, levels, FOUR: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """noising_kernel with tl.randn, one Philox block an element, or tl.randn4x, one for four."""
    sample, block = owner()
    if sample >= batch:
        return
    _, row, poison = table_row(t_ptr, 1, sample, levels)
    alpha, sigma = tl.load(table_ptr + row * 2) + poison, tl.load(table_ptr + row * 2 + 1)
    start, offsets, mask = tile(block, n, 1, BLOCK)
    start += sample.to(tl.int64) * n
    x0 = load_float32(x0_ptr + start + offsets, mask)
    seed = tl.load(seed_ptr)
    if FOUR:
        group = (start // 4).to(tl.int32) + tl.arange(0, BLOCK // 4)
        z0, z1, z2, z3 = tl.randn4x(seed, group)
        z = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [BLOCK])
    else:
        z = tl.randn(seed, start.to(tl.int32) + offsets)
    tl.store(out_ptr + start + offsets, alpha * x0 + sigma * z, mask=mask)


def rows(dtype: torch.dtype) -> list[dict[str, Any]]:
    """tl.randn, tl.randn4x, and the library's noising by the polynomials and by the approximations."""
    noising = variants.Variant("noising", dtype, "generated", "")
    target, x0 = machine_code.target_of("sm_90"), noising.data()
    t, table, seed = variants.integers(len(x0)), variants.floats(variants.LEVELS, 2), variants.integers(1)
    with machine_code.compile_only(target) as compiled:
        for four in (False, True):
            sizes = len(x0), x0[0].numel(), len(table)
            trial_kernel[(1,)](x0, x0, t, table, seed, *sizes, FOUR=four, BLOCK=BLOCK, num_warps=4, **FUSED)
    names = [
        {"source": s, "kernel": "noising", "target": "sm_90", "dtype": str(dtype)}
        for s in ("tl.randn", "tl.randn4x and tl.join")
    ]
    trials = roofline.rows_of(names, [(kernel, BLOCK) for kernel, _ in compiled], None)
    return trials + [roofline.compile_cases([(noising, "sm_90", way)], None)[0] for way in (True, False)]


COLUMNS = {
    "instructions_per_element": ("instructions per element", ".1f"),
    "mufu_per_element": ("MUFU", ".2g"),
    "integer_multiply_per_element": ("integer multiply", ".2g"),
    "barriers": ("barriers", "d"),
    "registers": ("registers", "d"),
    "H100": ("predicted fraction of the H100's memory roofline", ".2f"),
}


def main() -> None:
    refuse_interpreter()
    titles = [title for title, _ in COLUMNS.values()]
    print(f"| float32 / bfloat16 | {' | '.join(titles)} |\n|{'---|' * (len(titles) + 1)}")
    for pair in zip(rows(torch.float32), rows(torch.bfloat16), strict=True):
        both = [r | r["predicted_roofline"] for r in pair]
        cells = [" / ".join(f"{r[key]:{form}}" for r in both) for key, (_, form) in COLUMNS.items()]
        print(f"| {pair[0]['source']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
