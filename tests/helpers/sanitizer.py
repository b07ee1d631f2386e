"""Every load and store of every interpreted launch of the suite, address by address: inside the elements of a tensor
that the launch was given, no element written twice, none written by one program and read by another.

Triton's interpreter is made to report the addresses.
"""

import numpy as np
import torch
from triton.runtime import interpreter


class Launch:
    """What the programs of one launch read and wrote: byte addresses, and the program of each."""

    def __init__(self, tensors):
        self.starts = {t.data_ptr() for t in tensors}
        self.elements = np.sort(np.concatenate([addresses(t) for t in tensors]), kind="stable")  # quick on runs
        self.read, self.written = ([], []), ([], [])

    def note(self, log, kind, pointers, mask):
        """Keep what is read or written, which fails before it is done where it lies outside."""
        at = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].ravel().astype(np.int64)
        place = np.minimum(np.searchsorted(self.elements, at), len(self.elements) - 1)
        outside = at[self.elements[place] != at]
        assert not len(outside), f"{len(outside)} of {len(at)} elements that a program {kind} lie outside"
        x, y, z = interpreter.interpreter_builder.grid_idx
        log[0].append(at)
        log[1].append(np.full(at.shape, (z << 40) + (y << 20) + x))

    def check(self):
        none = np.empty(0, np.int64)
        read, reader, written, writer = (np.concatenate((none, *part)) for part in (*self.read, *self.written))
        order = np.argsort(written, kind="stable")
        written, writer = written[order], writer[order]
        assert not (written[1:] == written[:-1]).any(), "an element is written twice"
        if len(written):
            place = np.minimum(np.searchsorted(written, read), len(written) - 1)
            assert not ((written[place] == read) & (writer[place] != reader)).any(), "read and written by two programs"
        del self.elements, self.read, self.written  # the suite has many launches


def addresses(t):
    offsets = np.zeros(1, np.int64)
    for size, stride in zip(t.shape, t.stride(), strict=True):
        offsets = (offsets[:, None] + np.arange(size) * stride).ravel()
    return t.data_ptr() + t.element_size() * offsets


launches: list[Launch] = []  # the one that runs is the last


def install() -> None:
    """From here on every launch is checked: what lies outside when it is touched, races when the launch ends."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def noted_load(self, pointers, mask, *rest):
        launches[-1].note(launches[-1].read, "reads", pointers, mask)
        return load(self, pointers, mask, *rest)

    def noted_store(self, pointers, value, mask, *rest):
        launches[-1].note(launches[-1].written, "writes", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def checked(self, *args, **kwargs):
        launches.append(Launch([a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]))
        call(self, *args, **kwargs)
        launches[-1].check()

    builder.create_masked_load, builder.create_masked_store, executor.__call__ = noted_load, noted_store, checked
