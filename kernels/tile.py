"""Which elements a program owns, and how it reads them.

All tensors of a launch are samples of `size` elements, (batch, size), without gaps inside a sample. A program owns
BLOCK elements of one sample. Grid axis 0 counts blocks; axes 1 and 2 count samples.
"""

import triton
import triton.language as tl


@triton.jit
def owner():
    """(sample, int64 block) of this program. In the last row of the grid the sample may lie beyond the batch."""
    return tl.program_id(2) * 32768 + tl.program_id(1), tl.program_id(0).to(tl.int64)


@triton.jit
def tile(block, size, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """(int64 start, int32 offsets from it, mask) of the elements that a program owns in a sample of `size` elements.

    CHANNELS = 1: memory order is logical order. Otherwise the sample is stored channels last. Then four logical
    neighbours, the group of one Philox block, stand CHANNELS apart in memory. Neighbouring threads take groups of
    neighbouring channels, so that their accesses are adjacent.
    """
    if CHANNELS == 1:
        start = block * BLOCK
        offsets = tl.arange(0, BLOCK)
        return start, offsets, offsets < tl.minimum(size - start, BLOCK).to(tl.int32)
    group = (block * (BLOCK // 4)).to(tl.int32) + tl.arange(0, BLOCK // 4)
    first = (group // CHANNELS) * (4 * CHANNELS) + group % CHANNELS
    offsets = tl.reshape(first[:, None] + CHANNELS * tl.arange(0, 4)[None, :], [BLOCK])
    return block * 0, offsets, offsets < size


@triton.jit
def table_row(index_ptr, index_stride, sample, rows):
    """(index, row, poison) of a sample; index_stride is 0 if one index serves the whole batch, else 1.

    A GPU cannot refuse an index outside the table without making the host wait. Such an index reads row 0, and its
    poison is NaN instead of 0: the kernel adds it to what it computes.
    """
    index = tl.load(index_ptr + sample * index_stride)
    known = index.to(tl.uint64, bitcast=True) < rows  # a negative index is a huge one
    return index, tl.where(known, index.to(tl.int32), 0), tl.where(known, 0.0, float("nan"))


@triton.jit
def load_float32(pointers, mask):
    """The masked elements as float32."""
    return to_float32(tl.load(pointers, mask=mask))


@triton.jit
def to_float32(x):
    """x as float32."""
    if x.dtype == tl.bfloat16:  # The upper half of a float32: one shift or mask, while the cast takes up to two.
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def float32_anew(x):
    """x of 16 bits as float32, on NVIDIA, by other instructions than to_float32's.

    After to_float32 the assembler sees no need to do it twice. It keeps the float32 instead, until registers spill."""
    BFLOAT16: tl.constexpr = "prmt.b32 $0, $2, 0, 0x1044; prmt.b32 $1, $2, 0, 0x3244;"
    # -(-x)
    FLOAT16: tl.constexpr = """{ .reg .b16 low, high; .reg .b32 minus; neg.f16x2 minus, $2; mov.b32 {low, high}, minus;
        cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; neg.f32 $0, $0; neg.f32 $1, $1; }"""
    CODE: tl.constexpr = BFLOAT16 if x.dtype == tl.bfloat16 else FLOAT16
    return tl.inline_asm_elementwise(CODE, "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2)
