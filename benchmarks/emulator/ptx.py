"""PTX as Triton's compiler writes it, line by line: parameters, registers, and instructions in blocks."""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# A statement at which a block ends: what comes next may be another place, or another time.
ENDS = ("bra", "ret", "bar")
WIDTHS = {"8": 1, "16": 2, "32": 4, "64": 8, "pred": 0}
SHARED = "global_smem"  # the one array in shared memory


@dataclass
class Instruction:
    """One statement: `@!%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 8 ];`"""

    line: int
    text: str
    guard: str | None  # the predicate that turns it on, or off if `inverted`
    inverted: bool
    parts: list[str]  # of the name
    operands: list[str]
    does: Any = None  # what the machine keeps with it

    def __str__(self) -> str:
        return f"line {self.line} of the PTX: {self.text}"


@dataclass
class Block:
    """Instructions that run one after the other; the last may go elsewhere."""

    instructions: list[Instruction] = field(default_factory=list)
    end: Instruction | None = None
    target: int = -1  # the block to which `end` goes, if it is a branch


@dataclass
class Kernel:
    """A kernel. A block that does not go elsewhere is followed by the next."""

    name: str
    threads: int
    parameters: dict[str, tuple[int, bool]]  # bytes, and whether it is a pointer, in the order of the launch
    widths: dict[str, int]  # bytes of registers, by the letters of their names; 0 for predicates
    blocks: list[Block]

    def width(self, register: str) -> int:
        return self.widths[register.rstrip("0123456789")]

    @property
    def grain(self) -> int:
        """The bytes of the narrowest access."""
        accesses = (
            i for b in self.blocks for i in b.instructions if i.parts[0] in ("ld", "st", "ldmatrix", "stmatrix")
        )
        return min([4, *(size_of(i.parts[-1]) for i in accesses if i.parts[1] != "param")])


def size_of(kind: str) -> int:
    """Bytes of a type such as b32."""
    return WIDTHS[kind.lstrip("busf")]


@functools.lru_cache(maxsize=256)
def parse(text: str) -> Kernel:
    """The kernel in a text. Raises: ValueError for a line that is not understood."""
    name = _found(r"\.entry (\w+)\(", text)
    threads = int(_found(r"\.reqntid (\d+)", text))
    header = text[text.index(".entry") : text.index(".reqntid")]
    declared = re.findall(r"\.param \.[a-z](\d+)( \.ptr)?[^,\n]*?(\w+),?\n", header)
    parameters = {parameter: (int(bits) // 8, bool(pointer)) for bits, pointer, parameter in declared}
    names = re.findall(r"\.reg \.(\w+)\s+([%\w, ]+)[<;]", text)
    widths = {name: WIDTHS[kind.lstrip("busf")] for kind, several in names for name in several.split(", ")}
    return Kernel(name, threads, parameters, widths, _blocks(list(_statements(text))))


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"PTX: expected {pattern}")
    return match[1]


def _statements(text: str) -> Iterator[str | Instruction]:
    """Labels and instructions of the one function."""
    inside = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("}"):
            return
        inside = inside or line.startswith("{")
        *statements, rest = (part.lstrip("{} \t").rstrip() for part in line.split("//")[0].split(";"))
        if not inside:
            continue
        if label := re.fullmatch(r"(\$\w+):", rest):
            yield label[1]
        elif rest and rest[0] != ".":
            raise ValueError(f"PTX: line {number} does not end with a statement: {rest}")
        for statement in statements:
            if statement[0] == ".":
                continue
            parsed = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement)
            if parsed is None:
                raise ValueError(f"PTX: line {number} is not understood: {statement}")
            inverted, guard, opcode, operands = parsed.groups()
            yield Instruction(number, statement, guard, bool(inverted), opcode.split("."), _operands(operands))


def _operands(text: str) -> list[str]:
    """Operands without spaces, of which braces and brackets hold together what is in them."""
    return re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", re.sub(r"\s", "", text))


def _blocks(statements: list[str | Instruction]) -> list[Block]:
    blocks, places = [Block()], {}
    for statement in statements:
        if isinstance(statement, str):
            if blocks[-1].instructions:
                blocks.append(Block())
            places[statement] = len(blocks) - 1
        elif statement.parts[0] in ENDS and statement.parts[:2] != ["bar", "warp"]:
            blocks[-1].end = statement
            blocks.append(Block())
        else:
            blocks[-1].instructions.append(statement)
    for block in blocks:
        if block.end and block.end.parts[0] == "bra":
            block.target = places[block.end.operands[0]]
    return blocks
