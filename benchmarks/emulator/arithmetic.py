"""What instructions compute: for the parts of a name, such as mul.wide.u32, the types that it reads and a function.

Integers, conversions, +, -, * and fma give the bits of the hardware; .ftz flushes subnormal numbers. Of max and min,
zeros of two signs are in no order. Approximations (APPROXIMATE) are only modelled. They are off by at most what the
PTX manual allows; bits of the argument decide by how much. They are exact where the result is 0, 1 or infinite.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
LETTERS = {"u": "u", "s": "i", "b": "u", "f": "f"}
F32, F64, U16, U32 = np.dtype("f4"), np.dtype("f8"), np.dtype("u2"), np.dtype("u4")
NAN = np.uint32(0x7FFFFFFF).view(F32)  # the one that arithmetic gives
TINY = np.float32(2.0**-126)  # smaller numbers are subnormal
# Of each approximation the function, and its largest error: relative, or absolute of lg2 and sines (PTX ISA, 9.7.3).
APPROXIMATE: dict[str, tuple[Callable[..., Array], float]] = {
    "ex2": (np.exp2, 2.0**-22),
    "lg2": (np.log2, 2.0**-22),
    "sin": (np.sin, 2.0**-20.5),
    "cos": (np.cos, 2.0**-20.5),
    "rcp": (lambda x: 1 / x, 2.0**-23),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 2.0**-22.9),
    "sqrt": (np.sqrt, 2.0**-23),
    "div": (lambda x, y: x / y, 2.0**-22),
}
COMPARE: dict[str, Callable[..., Array]] = {
    name: getattr(operator, name.removesuffix("u") if name != "eq" else name)
    for name in ("eq", "ne", "lt", "le", "gt", "ge", "ltu", "leu", "gtu", "geu")
}
BITWISE: dict[str, Callable[..., Array]] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


# Of pairs in half precision. NumPy has no fma, and a product and a sum round twice.
HALF: dict[str, Callable[..., Array]] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


class Operation(NamedTuple):
    """An instruction that only computes: types of its operands, and a function of arrays of these."""

    sources: list[np.dtype[Any]]
    function: Callable[..., Array]


def kind(name: str) -> np.dtype[Any]:
    """The type of numbers such as s32; bf16 and f16x2 are not numbers of NumPy."""
    if name == "pred":
        return np.dtype(bool)
    return np.dtype(f"{LETTERS[name[0]]}{int(name[1:]) // 8}")


def _select(a: Array, b: Array, p: Array) -> Array:
    return np.where(p, a, b)


def resolve(parts: list[str]) -> Operation:
    """Raises: KeyError or ValueError for an unknown instruction."""
    name, *modifiers = parts
    if name == "cvt":
        return _conversion(modifiers)
    if modifiers[-1] in ("f32x2", "f16x2"):
        return _packed(name, modifiers)
    if modifiers[-1] in ("s16x2", "u16x2"):
        half = kind(modifiers[-1][:-2])
        sources, function = _integer(name, [*modifiers[:-1], ""], half)
        return Operation([U32] * len(sources), lambda *x: _pairs(function, half, x).view(U32).ravel())
    if name in ("add", "sub", "fma") and modifiers[-2:-1] == ["f32"]:  # of half and single precision
        narrow = np.dtype("u2") if modifiers[-1] == "bf16" else np.dtype("f2")
        sources = [narrow] * (1 + (name == "fma")) + [F32]
        return Operation(sources, lambda *x: _float(name, modifiers[:-1])(*map(_single, x)))
    own = kind(modifiers[-1])
    if name == "selp":
        return Operation([own, own, np.dtype(bool)], _select)
    if own.kind == "f":
        return Operation([own] * (1 + (name not in ONE) + (name == "fma")), _float(name, modifiers))
    return _integer(name, modifiers, own)


# --- integers ---------------------------------------------------------------------------------------------------


def _integer(name: str, modifiers: list[str], own: np.dtype[Any]) -> Operation:
    bits = 8 * own.itemsize
    if name == "setp":
        return Operation([own, own], COMPARE[modifiers[0]])
    if name in BITWISE:
        return Operation([own, own], BITWISE[name])
    if name in ("shl", "shr"):
        shift = np.left_shift if name == "shl" else np.right_shift
        return Operation([own, U32], lambda a, n: shift(a, np.minimum(n, bits).astype(own)))
    if name in ("mul", "mad"):
        product = _product(modifiers[0], own)
        if name == "mul":
            return Operation([own, own], product)
        wide = np.dtype(f"{own.kind}{own.itemsize * 2}") if modifiers[0] == "wide" else own
        return Operation([own, own, wide], lambda a, b, c: product(a, b) + c)
    if name == "bfe" and own.itemsize == 4:
        # The widths that compilers write keep inside the register.
        return Operation([own, U32, U32], lambda a, at, n: a << (32 - at - n).astype(own) >> (32 - n).astype(own))
    if name == "prmt" and not modifiers[:-1]:
        return Operation([U32] * 3, _bytes)
    if name == "div" and own.itemsize == 4:
        return Operation([own, own], lambda a, b: np.trunc(a.astype(F64) / np.where(b == 0, 1, b)).astype(own))
    simple: dict[str, Callable[..., Array]] = {
        "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum,
        "mov": np.array, "neg": np.negative, "not": np.invert,
    }  # fmt: skip
    return Operation([own] * (1 + (name not in ONE)), simple[name])


def _product(part: str, own: np.dtype[Any]) -> Callable[..., Array]:
    if part == "lo":
        return np.multiply
    if own.itemsize > 4:
        raise ValueError("no high half of 64-bit products")
    wide = np.dtype(f"{own.kind}{own.itemsize * 2}")
    if part == "wide":
        return lambda a, b: a.astype(wide) * b
    return lambda a, b: ((a.astype(wide) * b) >> (8 * own.itemsize)).astype(own)


def _bytes(a: Array, b: Array, selector: Array) -> Array:
    """prmt: four bytes of eight, by a digit each, whose top bit repeats the byte's sign."""
    both = a.astype("u8") | b.astype("u8") << np.uint64(32)
    result = np.zeros_like(a)
    for i in range(4):
        digit = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> (8 * (digit & np.uint32(7))).astype("u8") & np.uint64(255)).astype(U32)
        byte = np.where(digit & np.uint32(8), (byte >> np.uint32(7)) * np.uint32(255), byte)
        result = result | byte << np.uint32(8 * i)
    return result


# --- floating point ---------------------------------------------------------------------------------------------

ONE = ("abs", "neg", "mov", "not", "ex2", "lg2", "sin", "cos", "rcp", "rsqrt", "sqrt")  # of one operand


def _float(name: str, modifiers: list[str]) -> Callable[..., Array]:
    """Of float32 operands."""
    if name == "setp":
        compare, unordered = COMPARE[modifiers[0]], modifiers[0].endswith("u") and modifiers[0] != "equ"
        if unordered:
            return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)
        return lambda a, b: compare(a, b) & ~(np.isnan(a) | np.isnan(b))
    exact: dict[str, Callable[..., Array]] = {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fma,
        "abs": np.abs, "neg": np.negative, "mov": np.array,
    }  # fmt: skip
    if name in ("min", "max"):
        function = _extreme(name, modifiers)
    elif name in APPROXIMATE and ("approx" in modifiers or "full" in modifiers):
        function = functools.partial(_approximate, name)
    else:
        function = exact[name]
        if name not in ("abs", "neg", "mov"):
            inner = function
            function = lambda *x: _canonical(inner(*x))  # noqa: E731
    return (lambda *x: _flush(function(*map(_flush, x)))) if "ftz" in modifiers else function


def fma(a: Array, b: Array, c: Array) -> Array:
    """a b + c, rounded once. The product is exact in float64; the sum is rounded to odd there, so that the rounding to
    float32 is as if it were the only one."""
    product, wide = a.astype(F64) * b.astype(F64), c.astype(F64)
    total = product + wide
    rest = total - product
    error = (product - (total - rest)) + (wide - rest)
    bits = total.view("i8")
    inexact = ((error > 0) | (error < 0)) & ((bits & 1) == 0)
    return (bits + np.where(inexact, np.where((error > 0) == (total > 0), 1, -1), 0)).view(F64).astype(F32)


def _extreme(name: str, modifiers: list[str]) -> Callable[..., Array]:
    loose, strict = (np.fmin, np.minimum) if name == "min" else (np.fmax, np.maximum)
    choose = strict if "NaN" in modifiers else loose
    if "xorsign" not in modifiers:
        return lambda a, b: _canonical(choose(a, b))
    return lambda a, b: _canonical(np.copysign(choose(np.abs(a), np.abs(b)), np.copysign(1, a) * np.copysign(1, b)))


def _approximate(name: str, *x: Array) -> Array:
    function, bound = APPROXIMATE[name]
    exact = function(*(v.astype(F64) for v in x))
    # By chance of the argument's bits: a hash, as every run is the same.
    by = (x[-1].view(U32) * np.uint32(0x9E3779B1)).astype(F64) * 2.0**-31 - 1
    if name == "lg2":
        off = bound * np.where((x[0] > 0.5) & (x[0] < 2), 1, np.abs(exact))
    else:
        off = np.asarray(bound) if name in ("sin", "cos") else bound * np.abs(exact)
    kept = np.isinf(exact) | (exact == 0) | ((exact == 1) & (name not in ("sin", "cos")))
    return _canonical(np.where(kept, exact, exact + by * off).astype(F32))


def _canonical(x: Array) -> Array:
    return np.where(np.isnan(x), NAN, x)


def _flush(x: Array) -> Array:
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def _pairs(function: Callable[..., Array], half: np.dtype[Any], x: Sequence[Array]) -> Array:
    """The function of the halves of registers, in a last dimension."""
    return np.ascontiguousarray(function(*(v.view(half).reshape(-1, 2) for v in x)))


def _packed(name: str, modifiers: list[str]) -> Operation:
    """Two numbers in a register. Of a comparison the results are in a new last dimension."""
    pair, single = (U32, np.dtype("f2")) if modifiers[-1] == "f16x2" else (np.dtype("u8"), F32)
    if name == "setp":
        function = _float(name, [*modifiers[:-1], "f16"])
        return Operation([pair, pair], lambda *x: _pairs(function, single, x))
    if (name, modifiers) == ("neg", ["f16x2"]):
        return Operation([pair], lambda x: x ^ np.uint32(0x80008000))
    if single != F32:
        if set(modifiers[:-1]) - {"rn"}:
            raise ValueError("no such arithmetic of pairs in half precision")
        return Operation([pair, pair], functools.partial(_halves, HALF[name]))
    function = _float(name, [*modifiers[:-1], "f32"])
    count = 1 + (name not in ONE) + (name == "fma")
    return Operation([pair] * count, lambda *x: _pairs(function, F32, x).view(pair).ravel())


def _halves(function: Callable[..., Array], *x: Array) -> Array:
    result = function(*(v.view("f2").reshape(-1, 2) for v in x))
    return np.where(np.isnan(result), U16.type(0x7FFF).view("f2"), result).view(U32).ravel()


# --- conversions ------------------------------------------------------------------------------------------------


def _conversion(modifiers: list[str]) -> Operation:
    rounding = [m for m in modifiers if m in ("rn", "rzi")]
    to, source = modifiers[-2:]
    if set(modifiers[:-2]) - {"rn", "rzi"}:
        raise ValueError("no such conversion")
    if to in ("bf16x2", "f16x2") and rounding == ["rn"] and source == "f32":
        narrow = _conversion(["rn", to[:-2], "f32"]).function
        bits = lambda x: narrow(x).view(U16).astype(U32)  # noqa: E731
        return Operation([F32, F32], lambda high, low: bits(high) << np.uint32(16) | bits(low))
    if (to, source) == ("f32", "bf16"):
        return Operation([U16], _single)
    if (to, source) == ("bf16", "f32") and rounding == ["rn"]:
        return Operation([F32], _bfloat16)
    if (to, source) == ("f16", "f32") and rounding == ["rn"]:
        return Operation([F32], lambda x: np.where(np.isnan(x), U16.type(0x7FFF).view("f2"), x.astype("f2")))
    old, new = kind(source), kind(to)
    if old.kind == "f" and new.kind == "i" and rounding == ["rzi"]:
        least, most = -(2.0 ** (8 * new.itemsize - 1)), 2.0 ** (8 * new.itemsize - 1)
        if new.itemsize > 4:
            raise ValueError("no such conversion")
        return Operation([old], lambda x: np.clip(np.nan_to_num(x.astype(F64), nan=0.0), least, most - 1).astype(new))
    if old.kind == "f" and (new, bool(rounding)) != (F32, False):
        raise ValueError("no such conversion")
    return Operation([old], lambda x: x.astype(new))


def _single(x: Array) -> Array:
    """float32 of half precision, or of the bits of bfloat16."""
    return (x.astype(U32) << np.uint32(16)).view(F32) if x.dtype == U16 else x.astype(F32)


def _bfloat16(x: Array) -> Array:
    """The bits, rounded to nearest, ties to even."""
    bits = x.view(U32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(U16)
