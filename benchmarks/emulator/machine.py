"""One launch, executed: every register is an array over the threads of several programs, which go in lock step.

Threads that branch apart are run by the first block in which any stands, so that they meet again. A barrier is passed
when all threads of a program that still run stand at it. What memory.py calls a Fault is an error, and so is an
instruction that is not known.

What is not modelled: time, caches, the order in which warps run, and how programs share a processor.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arithmetic import kind, resolve
from .memory import EPOCHS, NAMES, Fault, Memory, Range
from .ptx import SHARED, Block, Instruction, Kernel, size_of

WARP = 32
TOGETHER = 8192  # threads that run at a time
Array = NDArray[Any]
Mask = Array | None  # of the threads; None is all of them


def execute(kernel: Kernel, grid: Sequence[int], values: list[bytes], shared: int, tensors: Memory) -> tuple[int, int]:
    """Run all programs. values: the parameters' bytes; shared: bytes of a program.

    Returns: the instructions that warps executed, and the ties of shared memory.
    """
    total, step, count, ties = int(np.prod(grid)), max(1, TOGETHER // kernel.threads), 0, 0
    for first in range(0, total, step):
        programs = np.arange(first, min(first + step, total))
        machine = Machine(kernel, grid, programs, values, shared, tensors)
        with np.errstate(all="ignore"):
            count += machine.run()
        ties += machine.shared.ranges[0].ties
    return count, ties


class Machine:
    """Some programs of a launch."""

    def __init__(
        self, kernel: Kernel, grid: Sequence[int], programs: Array, values: list[bytes], shared: int, tensors: Memory
    ) -> None:
        self.kernel, self.tensors, self.shared_size = kernel, tensors, shared
        self.threads = len(programs) * kernel.threads
        self.local = np.repeat(np.arange(len(programs)), kernel.threads)  # the place of a thread's program here
        self.program = programs[self.local]
        thread = np.tile(np.arange(kernel.threads), len(programs))
        self.warp = self.program * (-(-kernel.threads // WARP)) + thread // WARP + 1
        self.epoch = np.zeros(len(programs), np.int64)
        self.shared = Memory([Range.empty(len(programs) * shared, kernel.grain)])
        self.values = dict(zip(kernel.parameters, values, strict=True))
        x, y, z = (self.program % grid[0], self.program // grid[0] % grid[1], self.program // (grid[0] * grid[1]))
        numbers = {"%tid.x": thread, "%ctaid.x": x, "%ctaid.y": y, "%ctaid.z": z}
        self.registers = {name: number.astype(np.uint32) for name, number in numbers.items()}
        self.registers |= {f"%nctaid.{axis}": np.array([n], np.uint32) for axis, n in zip("xyz", grid, strict=True)}

    def run(self) -> int:
        """Returns the instructions that warps executed."""
        count = 0
        ready: dict[int, Array] = {0: np.ones(self.threads, bool)}  # by their block
        waiting: dict[int, Array] = {}  # at a barrier, by the block after it
        while ready or waiting:
            if not ready:
                ready = self._pass(waiting)
                continue
            place = min(ready)
            active = ready.pop(place)
            block = self.kernel.blocks[place]
            mask = None if active.all() else active
            for instruction in block.instructions:
                self._step(instruction, mask)
            count += len(block.instructions) * int(active.reshape(-1, WARP).any(1).sum())
            for there, leaving, barrier in self._next(place, block, active):
                found = waiting if barrier else ready
                if leaving.any():
                    found[there] = found[there] | leaving if there in found else leaving
        return count

    def _next(self, place: int, block: Block, active: Array) -> list[tuple[int, Array, bool]]:
        """(block, who goes there, whether a barrier is before it)."""
        end = block.end
        if end is None:
            return [(place + 1, active, False)]
        goes = active & self._guard(end)
        stays = (place + 1, active & ~goes, False)
        if end.parts[0] == "ret":
            return [stays]
        if end.parts[0] == "bra":
            return [(block.target, goes, False), stays]
        if end.parts != ["bar", "sync"] or end.operands != ["0"]:
            raise Fault(f"an unknown instruction, {end}")
        return [(place + 1, goes, True), stays]

    def _pass(self, waiting: dict[int, Array]) -> dict[int, Array]:
        """The programs go on whose threads all wait. Here none runs, so that others have ended or wait elsewhere."""
        arrived = np.zeros(len(self.epoch), int)
        for mask in waiting.values():
            arrived[np.unique(self.local[mask])] += 1
        if (arrived > 1).any():
            raise Fault(f"threads of a program wait at barriers of their own, before blocks {sorted(waiting)}")
        self.epoch[arrived > 0] += 1
        released = dict(waiting)
        waiting.clear()
        return released

    # --- registers ----------------------------------------------------------------------------------------------

    def _guard(self, i: Instruction) -> Array:
        if i.guard is None:
            return np.ones(1, bool)
        return self.registers[i.guard] ^ i.inverted

    def _value(self, operand: str, wanted: np.dtype[Any]) -> Array:
        """An operand as numbers of a type: of a wider register the lower bits."""
        if (value := self.registers.get(operand)) is not None:
            if bool in (wanted, value.dtype):
                return value
            if value.itemsize > wanted.itemsize:
                value = value.astype(NAMES[wanted.itemsize])
            if value.itemsize < wanted.itemsize:
                raise Fault(f"{operand} is narrower than {wanted}")
            return value.view(wanted)
        if operand == SHARED:
            return np.zeros(1, wanted)
        if wanted.kind == "b":
            return np.array([int(operand) != 0])
        if operand.startswith("0f"):
            return np.array([int(operand[2:], 16)], np.uint32).view(wanted)
        # Half of a pair may be of no use: it is never written, and read as ones, which are NaN.
        number = -1 if operand[0] == "%" else int(operand.rstrip("U"), 0)
        return np.array([number % (1 << 8 * wanted.itemsize)], NAMES[wanted.itemsize]).view(wanted)

    def _set(self, register: str, value: Array, mask: Mask) -> None:
        if register == "_":
            return
        width = self.kernel.width(register)
        if width:
            if value.itemsize != width:  # the sign goes on
                value = value.astype(np.dtype(f"{'i' if value.dtype.kind == 'i' else 'u'}{width}"))
            value = value.view(NAMES[width])
        if mask is not None:
            old = self.registers.get(register)
            value = np.where(mask, value, ~np.zeros(1, value.dtype) if old is None else old)
        self.registers[register] = value

    # --- instructions -------------------------------------------------------------------------------------------

    def _step(self, i: Instruction, mask: Mask) -> None:
        if i.guard is not None:
            guard = self._guard(i)
            mask = np.broadcast_to(guard, (self.threads,)) if mask is None else mask & guard
            if not mask.any():
                return
        try:
            special = getattr(self, f"_do_{i.parts[0]}", None)
            if special is not None and special(i, mask):
                return
            if i.does is None:
                try:
                    i.does = resolve(i.parts)
                except (KeyError, ValueError) as error:
                    raise Fault("an unknown instruction (arithmetic.py has the known ones)") from error
            target, *sources = i.operands
            kinds, function = i.does
            value = function(*(self._value(s, k) for s, k in zip(sources, kinds, strict=True)))
            if "|" in target:
                for half, register in enumerate(target.split("|")):
                    self._set(register, value[..., half], mask)
            else:
                self._set(target, value, mask)
        except Fault as error:
            raise Fault(f"{self.kernel.name}: {error}, {i}") from error

    def _do_createpolicy(self, i: Instruction, mask: Mask) -> bool:
        self._set(i.operands[0], np.zeros(1, np.uint64), mask)
        return True

    def _do_mov(self, i: Instruction, mask: Mask) -> bool:
        """Of halves of a register; any other is arithmetic."""
        target, source = i.operands
        if target[0] != "{" and source[0] != "{":
            return False
        names = (target if target[0] == "{" else source)[1:-1].split(",")
        bits = 8 * size_of(i.parts[-1]) // len(names)
        whole, part = NAMES[bits // 8 * len(names)], NAMES[bits // 8]
        if target[0] == "{":
            value = self._value(source, np.dtype(whole))
            for k, name in enumerate(names):
                self._set(name, (value >> whole(k * bits)).astype(part), mask)
        else:
            total = np.zeros(1, whole)
            for k, name in enumerate(names):
                total = total | self._value(name, np.dtype(part)).astype(whole) << whole(k * bits)
            self._set(target, total, mask)
        return True

    def _do_bar(self, i: Instruction, mask: Mask) -> bool:
        self._warps(mask)
        return i.parts == ["bar", "warp", "sync"]

    def _do_shfl(self, i: Instruction, mask: Mask) -> bool:
        target, source, by, clamp, members = i.operands
        if (clamp, members) != ("31", "-1") or i.parts[2] not in ("bfly", "idx"):
            return False
        self._warps(mask)
        value = np.broadcast_to(self._value(source, np.dtype(np.uint32)), (self.threads,))
        lane, by_lane = np.arange(self.threads) % WARP, self._value(by, np.dtype(np.uint32)).astype(np.int64)
        other = lane ^ by_lane if i.parts[2] == "bfly" else np.broadcast_to(by_lane, lane.shape)
        self._set(target, value[np.arange(self.threads) - lane + other % WARP], mask)
        return True

    def _warps(self, mask: Mask) -> None:
        """Of each warp all threads take part, or none."""
        if mask is not None and (mask.reshape(-1, WARP).any(1) != mask.reshape(-1, WARP).all(1)).any():
            raise Fault("threads of a warp are missing")

    # --- memory -------------------------------------------------------------------------------------------------

    def _do_ld(self, i: Instruction, mask: Mask) -> bool:
        kind_ = i.parts[-1]
        if i.parts[1] == "param":
            value = np.frombuffer(self.values[i.operands[1][1:-1]], kind(kind_))
            self._set(i.operands[0], value, mask)
            return True
        names = i.operands[0].strip("{}").split(",")
        at, who, memory = self._addresses(i.operands[1], i.parts[1], mask)
        size = size_of(kind_)
        value = memory.read(at[:, None] + size * np.arange(len(names)), who, size, size * len(names))
        for k, name in enumerate(names):
            self._set_some(name, np.ascontiguousarray(value[:, k]).view(kind(kind_)), mask)
        return True

    def _do_st(self, i: Instruction, mask: Mask) -> bool:
        names, size = i.operands[1].strip("{}").split(","), size_of(i.parts[-1])
        at, who, memory = self._addresses(i.operands[0], i.parts[1], mask)
        columns = [self._some(self._value(name, np.dtype(NAMES[size])), mask) for name in names]
        memory.write(at[:, None] + size * np.arange(len(names)), np.stack(columns, 1), who, size, size * len(names))
        return True

    def _addresses(self, operand: str, space: str, mask: Mask) -> tuple[Array, tuple[Array, Array], Memory]:
        """(addresses of the active threads, their warps and times, the memory)."""
        base, _, offset = operand[1:-1].partition("+")
        wide = space == "global"
        at = self._value(base, np.dtype(np.uint64 if wide else np.uint32))
        at = self._some(at.astype(np.int64) + int(offset or 0), mask)
        local, warp = self._some(self.local, mask), self._some(self.warp, mask)
        who = warp, self._some(self.program, mask) * EPOCHS + self.epoch[local] + 1
        if wide:
            return at, who, self.tensors
        if ((at < 0) | (at >= self.shared_size)).any():
            raise Fault("an address beyond shared memory")
        return at + local * self.shared_size, who, self.shared

    def _some(self, value: Array, mask: Mask) -> Array:
        """Of the active threads."""
        value = np.broadcast_to(value, (self.threads,))
        return value if mask is None else value[mask]

    def _set_some(self, register: str, value: Array, mask: Mask) -> None:
        """Of the active threads alone."""
        if mask is not None:
            whole = np.zeros(self.threads, value.dtype)
            whole[mask] = value
            value = whole
        self._set(register, value, mask)

    def _do_ldmatrix(self, i: Instruction, mask: Mask) -> bool:
        """Matrices of 8 rows of 16 bytes, whose addresses are those of 8 threads each; every thread gets two numbers of
        a row, or with .trans of a column."""
        names, at, who = self._matrices(i, i.operands[0], i.operands[1], mask)
        lane = np.arange(WARP)
        places: Array
        for k, name in enumerate(names):
            rows = at[:, 8 * k : 8 * k + 8]
            if "trans" in i.parts:
                places = rows[:, (2 * (lane % 4))[:, None] + [0, 1]] + 2 * (lane // 4)[:, None]
            else:
                places = rows[:, lane // 4][:, :, None] + 4 * (lane % 4)[:, None] + [0, 2]
            value = self.shared.read(places.reshape(-1, 2), who, 2, 2)
            self._set_some(name, np.ascontiguousarray(value).view(np.uint32).ravel(), mask)
        return True

    def _do_stmatrix(self, i: Instruction, mask: Mask) -> bool:
        names, at, who = self._matrices(i, i.operands[1], i.operands[0], mask)
        lane = np.arange(WARP)
        if "trans" in i.parts:
            return False
        for k, name in enumerate(names):
            places = at[:, 8 * k : 8 * k + 8][:, lane // 4][:, :, None] + 4 * (lane % 4)[:, None] + [0, 2]
            value = self._some(self._value(name, np.dtype(np.uint32)), mask)
            self.shared.write(
                places.reshape(-1, 2), np.ascontiguousarray(value).view(np.uint16).reshape(-1, 2), who, 2, 2
            )
        return True

    def _matrices(self, i: Instruction, registers: str, address: str, mask: Mask) -> tuple[list[str], Array, Any]:
        """(registers, addresses (warps, 32), who)."""
        self._warps(mask)
        at, who, _ = self._addresses(address, "shared", mask)
        if (at % 16).any():
            raise Fault("a row of a matrix at an address that is no multiple of 16")
        return registers.strip("{}").split(","), at.reshape(-1, WARP), who
