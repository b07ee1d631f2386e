"""Triton's interpreter computes what it did, in half of the time or less. Most of it went into types, made anew for
each operation of each program, and into checks whose outcome nobody reads. Here each type is made once, and those
checks are left out.
"""

import numpy as np
import triton
from triton.language import core, semantic
from triton.runtime import interpreter

NUMPY = {
    **{f"{sign}int{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{name: np.dtype(f"float{bits}") for name, bits in (("fp16", 16), ("fp32", 32), ("fp64", 64))},
    "int1": np.dtype(bool),
    "bf16": np.dtype(np.uint16),  # the bits
}


def numpy_type(dtype: core.dtype) -> np.dtype:
    """What an array of a type of Triton holds."""
    scalar = dtype.scalar
    return np.dtype(np.uint64) if scalar.is_ptr() else NUMPY[scalar.name]


def install() -> None:
    """From here on every launch of the process is quick, but for Triton 3.3, whose interpreter is another."""
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    import remembered

    # The checks for overflow assert by device_assert, which without debug=True does nothing.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter._get_np_dtype = numpy_type
    remember_block_types()
    compare_first()
    patch_once()
    if not triton.__version__.startswith("3.6."):  # whose interpreter does not go by what it patches
        remembered.install()


def remember_block_types() -> None:
    """By element and shape; and for each what a tensor of it says of its shape."""
    make, made, scalar = core.block_type.__init__, {}, (core.tuple([]), core.constexpr(1))

    def init(self, element_ty, shape):
        key = element_ty.name, *[size.value if isinstance(size, core.constexpr) else size for size in shape]
        if key not in made:
            make(self, element_ty, shape)
            self.of_tensor = core.tuple([core.constexpr(size) for size in self.shape]), core.constexpr(self.numel)
            made[key] = vars(self).copy()
        vars(self).update(made[key])

    def init_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.of_tensor if type.is_block() else scalar

    core.block_type.__init__, core.tensor.__init__ = init, init_tensor


def compare_first() -> None:
    """What is equal needs no broadcasting, and the same object no comparison by name."""
    broadcast, equal = semantic.TritonSemantic.broadcast_impl_value, core.dtype.__eq__

    def broadcast_unequal(self, lhs, rhs):
        blocks = lhs.type.is_block(), rhs.type.is_block()
        if not any(blocks) or (all(blocks) and lhs.type.shape.values == rhs.type.shape.values):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    semantic.TritonSemantic.broadcast_impl_value = broadcast_unequal
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)


def patch_once() -> None:
    """Triton patches its language for each launch and for each function that a kernel calls, and undoes the former."""
    patch, patched = interpreter._patch_lang, set()

    def patch_new(fn):
        if fn.__module__ not in patched:
            patched.add(fn.__module__)
            patch(fn)
        return interpreter._LangPatchScope()  # with nothing to undo

    interpreter._patch_lang = patch_new
