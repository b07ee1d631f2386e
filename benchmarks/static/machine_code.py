"""Compiles Triton kernels for a named GPU, which need not be in this machine, and counts their machine code."""

import bisect
import itertools
import math
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# Philox's two multipliers, as assemblers spell them: a 32-bit immediate, with or without sign.
PHILOX = [f"0x{m:x}|-0x{2**32 - m:x}" for m in (0xD2511F53, 0xCD9E8D57)]


def target_of(name: str) -> GPUTarget:
    """The target of a name such as sm_90 (NVIDIA) or gfx942 (AMD)."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64)


class _Device:
    """What Triton asks its driver for on the way from a launch to machine code."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return str(self.target)  # the key of Triton's cache of compiled kernels

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextmanager
def compile_only(target: GPUTarget, fast: bool = True) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """Inside the block a launch compiles for `target` and runs nothing.

    Triton specialises on the arguments of the launch itself, so what is compiled is what would run.

    Args:
        fast: the value of FAST, which launchers otherwise take from the device of their tensors.

    Yields: a list that gets (compiled kernel, arguments by name) of each launch.
    """
    compiled: list[tuple[Any, dict[str, Any]]] = []
    run = JITFunction.run

    def compile_launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if "FAST" in kwargs:
            kwargs["FAST"] = fast
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((kernel, dict(zip(self.arg_names, args, strict=False)) | kwargs))

    JITFunction.run = compile_launch
    driver.set_active(_Device(target))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = None  # chosen anew at the next use


def measure(kernels: Sequence[tuple[Any, int]]) -> list[dict[str, Any]]:
    """The counts of compiled kernels for one target.

    Bytes are those of the tensors that Triton's GPU IR loads and stores. The accesses in the machine code have to add
    up to them; load_bits and store_bits are the narrowest of these accesses.

    Instructions are all that a thread cannot avoid between entry and exit, without NOPs. The prologue and instructions
    that a predicate turns off count; paths for rare arguments do not. A loop counts once, and one that the assembler
    unrolled has that many times the elements.

    Args:
        kernels: (compiled kernel, elements that one program owns).
    """
    nvidia = kernels[0][0].metadata.target.backend == "cuda"
    listings = _disassemble([kernel for kernel, _ in kernels]) if nvidia else [k.asm["amdgcn"] for k, _ in kernels]
    count = _nvidia if nvidia else _amd
    return [
        _per_element(kernel, elements, count(kernel, listing), listing)
        for (kernel, elements), listing in zip(kernels, listings, strict=True)
    ]


def plan_for(target: GPUTarget) -> None:
    """Let the kernels plan for the target, not for the PyTorch at hand."""
    from fastdiff.kernels import group_norm, launch

    launch.WARP = target.warp_size
    group_norm.LIMITS = group_norm.LIMITS._replace(warp=target.warp_size, halves=target.backend == "cuda")


def elements(arguments: dict[str, Any]) -> int:
    """The elements that a program works on at a time, by the arguments of its launch."""
    if "BLOCK" in arguments:
        return arguments["BLOCK"]
    a = arguments  # of a norm
    if "CHUNK" in a:
        return a["ROWS"] * a["CHANNELS"]
    return min(a["GROUPS"] * a["DEPTH"], a["BLOCKS"] * a["LANES"]) * min(a["PIXELS"], a["TILES"] * a["TILE"])


def _per_element(kernel: Any, elements: int, counts: dict[str, Any], listing: str) -> dict[str, Any]:
    threads = kernel.metadata.num_warps * kernel.metadata.target.warp_size
    moved = tensor_bytes(kernel.asm["ttgir"], threads)
    loads, stores = counts.pop("loads"), counts.pop("stores")
    widths, tensors = (stores, moved["store"]) if moved["store"] >= 8 * threads else (loads, moved["load"])
    unrolled = sum(widths) // 8 * threads // tensors
    per_thread = unrolled * elements / threads
    return {
        "elements_per_thread": int(per_thread),
        "bytes_per_element": (moved["load"] + moved["store"]) / elements,
        "load_bits": narrowest(loads, unrolled * moved["load"] // threads),
        "store_bits": narrowest(stores, unrolled * moved["store"] // threads),
        "instructions_per_element": counts.pop("instructions") / per_thread,
        "mufu_per_element": counts.pop("mufu") / per_thread,
        "integer_multiply_per_element": counts.pop("integer_multiply") / per_thread,
        **counts,
        "philox": all(re.search(constant, listing) for constant in PHILOX),
        "assembly": listing,
    }


# A load or store of a tensor in Triton's GPU IR: kind, attributes, shape, bits.
ACCESS = re.compile(
    r"\b(?:tt|amdg|amdgpu)\.(?:buffer_)?(load|store)\b(.*) : (?:!tt\.ptr<\w+> -> )?"
    r"tensor<([\dx]+)x(?:!tt\.ptr<)?[a-z]+(\d+)"
)
# What is evicted last, but AMD's buffer loads do not say so.
ROW = re.compile(r" %(?:weight|bias|gate|scale|shift|cos|sin)_ptr\[")


def tensor_bytes(ttgir: str, threads: int = 1) -> dict[str, int]:
    """Bytes of the tensors that one program loads and stores, by their types in Triton's GPU IR.

    Two kinds do not count. What is evicted last is the same few numbers for many elements; for AMD the names tell these
    rows. A tensor with fewer elements than the program has threads is not the data.

    Returns: {"load": bytes, "store": bytes}.
    """
    moved = {"load": 0, "store": 0}
    for kind, attributes, shape, bits in ACCESS.findall(ttgir):
        if "evict_last" not in attributes and not ROW.match(attributes) and _elements(shape) >= threads:
            moved[kind] += _elements(shape) * max(1, int(bits) // 8)
    return moved


def largest_tensor(ttgir: str) -> int:
    """Elements of the largest tensor that is loaded or stored."""
    return max(_elements(shape) for _, _, shape, _ in ACCESS.findall(ttgir))


def _elements(shape: str) -> int:
    return math.prod(int(size) for size in shape.split("x"))


def narrowest(widths: list[int], tensor_bytes: int) -> int | None:
    """Bits of the narrowest access that moves a part of the tensors, or None if no tensor is moved.

    The widest accesses are counted first, and those left over move scalars. Raises RuntimeError if the accesses do not
    add up to the tensors.
    """
    moved, bits = 0, None
    for width in sorted(widths, reverse=True):
        if moved < tensor_bytes:
            moved, bits = moved + width // 8, width
    if moved != tensor_bytes:
        raise RuntimeError(f"{tensor_bytes} bytes per thread in the IR, but accesses of {widths} bits")
    return bits


def _nvidia(kernel: Any, listing: str) -> dict[str, Any]:
    code = hot_path(listing)
    resources = _resources(kernel.asm["cubin"])
    registers, shared = resources["REG"], kernel.metadata.shared
    arch, warps = kernel.metadata.target.arch, kernel.metadata.num_warps
    # A multiprocessor holds 64 warps, 32 blocks and 65,536 registers, which a warp takes by 256.
    blocks = min(32, 64 // warps, 65536 // (256 * math.ceil(registers / 8)) // warps)
    if shared:
        blocks = min(blocks, (164 if arch == 80 else 228) * 1024 // (shared + 1024))
    bits = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
    accesses = {
        kind: [next((bits[m] for m in c.split()[0].split(".") if m in bits), 32) for c in code if c.startswith(opcode)]
        for kind, opcode in (("loads", "LDG"), ("stores", "STG"))
    }
    return {
        "instructions": len(code),
        "mufu": _matching(code, "MUFU"),
        "integer_multiply": _matching(code, r"U?IMAD(?!\.(MOV|IADD|SHL|U32|X))|IMUL"),
        **accesses,
        "barriers": _matching(code, "BAR"),
        "registers": registers,
        "stack": resources["STACK"] + resources["LOCAL"],
        "spills": _matching(code, "LDL|STL"),
        "shared": shared,
        "occupancy": blocks * warps / 64,
    }


def hot_path(listing: str) -> list[str]:
    """The instructions of the shortest way from entry to exit past the last load and the last store, without NOPs."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?(\S.*?) ?;", listing, re.MULTILINE)
    at = {int(address, 16): i for i, (address, _, _) in enumerate(lines)}

    def following(i: int) -> list[int]:
        _, condition, text = lines[i]
        if text.startswith("EXIT") and not condition:
            return []
        if not (branch := re.fullmatch(r"(?:BRA|CALL)\S* (.*, )?0x([0-9a-f]+)", text)):
            return [i + 1]
        passes = condition or branch[1] or text.startswith("CALL")  # sm_80 leaves loops by a call that never returns
        return [at[int(branch[2], 16)]] + ([i + 1] if passes else [])

    def shortest(start: int, end: int) -> list[int]:
        cost, before = {start: 0}, {}
        for i in range(start, end):  # every branch forward: in order of address each cost is final when it is used
            for j in following(i) if i in cost else []:
                if i < j <= end and cost[i] + 1 < cost.get(j, math.inf):
                    cost[j], before[j] = cost[i] + 1, i
        way = [end]
        while way[-1] != start:
            way.append(before[way[-1]])
        return way[::-1]

    last = {text.split(".")[0].split()[0]: i for i, (_, _, text) in enumerate(lines)}
    stops = sorted({0, *(last[opcode] for opcode in ("LDG", "STG", "EXIT"))})
    way = [0] + [i for stop, following_stop in itertools.pairwise(stops) for i in shortest(stop, following_stop)[1:]]
    return [lines[i][2] for i in way if not lines[i][2].startswith("NOP")]


def _disassemble(kernels: Sequence[Any]) -> list[str]:
    """A listing of each kernel. One run of nvdisasm makes all of them, because its start takes longest."""
    sections = [_text_section(kernel.asm["cubin"]) for kernel in kernels]
    tool = triton.knobs.nvidia.nvdisasm.path
    listing = _run(b"".join(sections), tool, "--binary", f"SM{kernels[0].metadata.target.arch}")
    lines: list[list[str]] = [[] for _ in sections]
    ends = list(itertools.accumulate(map(len, sections)))
    for line in listing.splitlines():
        if address := re.match(r"\s+/\*([0-9a-f]{4,})\*/", line):
            lines[bisect.bisect_right(ends, int(address[1], 16))].append(line)
    return ["\n".join(part) for part in lines]


def _text_section(cubin: bytes) -> bytes:
    """The machine code in an ELF file of one kernel: its section named .text.NAME."""
    table = struct.unpack_from("<Q", cubin, 40)[0]
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<I20xQQ", cubin, table + i * size) for i in range(count)]
    start_of_names = headers[names][1]
    return next(
        cubin[start : start + length]
        for name, start, length in headers
        if cubin.startswith(b".text.", start_of_names + name)
    )


def _resources(cubin: bytes) -> dict[str, int]:
    usage = _run(cubin, triton.knobs.nvidia.cuobjdump.path, "-res-usage")
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage)}


def _run(code: bytes, *command: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout


def _amd(kernel: Any, listing: str) -> dict[str, Any]:
    code = re.findall(r"^\t([a-z]\w+.*?)\s*(?:;.*)?$", listing.split(".Lfunc_end0")[0], re.MULTILINE)
    code = [instruction for instruction in code[: code.index("s_endpgm") + 1] if not instruction.startswith("s_nop")]
    resources = {name: int(value) for name, value in re.findall(r"\.(\w+): +(\d+)$", listing, re.MULTILINE)}
    registers = resources["vgpr_count"]
    bits = {"ubyte": 8, "byte": 8, "ushort": 16, "short": 16, "dword": 32, "dwordx2": 64, "dwordx4": 128}
    accesses: dict[str, list[int]] = {"loads": [], "stores": []}
    for instruction in code:
        if access := re.match(r"(?:global|buffer)_(load|store)_(?:short_)?(?:d16_)?(?:hi_)?(\w+)", instruction):
            accesses[access[1] + "s"].append(bits[access[2]])
    return {
        "instructions": len(code),
        "mufu": _matching(code, "v_(exp|log|rcp|rsq|sqrt|sin|cos)_"),
        "integer_multiply": _matching(code, "[sv]_(mul_lo|mul_hi|mul_i32|mad_[ui]64)"),
        **accesses,
        "barriers": _matching(code, "s_barrier"),
        "registers": registers,
        "stack": resources["private_segment_fixed_size"],
        "spills": resources["vgpr_spill_count"] + resources["sgpr_spill_count"],
        "shared": kernel.metadata.shared,
        # A SIMD holds 8 waves and 512 registers per lane, which a wave takes by 8.
        "occupancy": min(8, 512 // (8 * math.ceil(registers / 8))) / 8,
    }


def _matching(code: list[str], pattern: str) -> int:
    return sum(bool(re.match(pattern, instruction)) for instruction in code)
