"""What a compiled program does to memory and between chips, read from its optimised HLO text."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "bf16": 16}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# They name memory that others have written, or run what is counted by itself.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_CONTROL = {"while", "call", "conditional"}
_SLICES = {"slice", "dynamic-slice", "gather"}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `size` is its result's in bytes, `sizes` those of the arrays in it."""

    name: str
    opcode: str
    sizes: tuple[int, ...]
    operands: tuple[str, ...]
    called: tuple[str, ...]
    trips: int
    is_root: bool
    number: int  # of a parameter

    @property
    def size(self) -> int:
        """Bytes of all arrays of the result."""
        return sum(self.sizes)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Equal transfers between chips: the operation, bytes of the larger side of one, how often a step makes it."""

    op: str
    bytes: int
    count: int


def _array_sizes(text: str) -> tuple[int, ...]:
    sizes = []
    for kind, dimensions in _SHAPE.findall(text):
        digits = re.sub(r"^[a-z]+|e\d.*$", "", kind)
        bits = _BITS.get(kind, int(digits) if digits.isdigit() else 8)
        elements = math.prod(int(side) for side in dimensions.split(",")) if dimensions else 1
        sizes.append(math.ceil(elements * bits / 8))
    return tuple(sizes)


def _arguments(rest: str) -> tuple[str, str]:
    """What follows an opening parenthesis, split at its closing one."""
    depth = 1
    for place, sign in enumerate(rest):
        depth += (sign == "(") - (sign == ")")
        if depth == 0:
            return rest[:place], rest[place:]
    return rest, ""


def _parse_line(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    root, name, shape, opcode, rest = match.groups()
    arguments, attributes = _arguments(rest)
    called = tuple(_CALLED.findall(attributes))
    if branches := _BRANCHES.search(attributes):
        called += tuple(part.strip().lstrip("%") for part in branches.group(1).split(","))
    trips = _TRIPS.search(attributes)
    return Instruction(
        name,
        opcode,
        _array_sizes(shape),
        tuple(re.findall(r"%([\w.\-]+)", arguments)),
        called,
        int(trips.group(1)) if trips else 1,
        bool(root),
        int(arguments) if opcode == "parameter" else -1,
    )


class Program:
    """A compiled module."""

    def __init__(self, text: str) -> None:
        """Reads the HLO text of `compiled.as_text()`."""
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._entry, current = "", {}
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self._computations[header.group(2)] = {}
                if header.group(1):
                    self._entry = header.group(2)
            elif instruction := _parse_line(line):
                current[instruction.name] = instruction

    def collectives(self) -> list[Collective]:
        """The transfers between chips, the largest operation first."""
        counts: dict[tuple[str, int], int] = {}
        for scope, instruction, times in self._executed():
            op = instruction.opcode.removesuffix("-start")
            if op in _COLLECTIVES:
                operands = sum(scope[name].size for name in instruction.operands if name in scope)
                result = instruction.size
                if instruction.opcode.endswith("-start"):  # its result holds the operands as well
                    result = max(result - operands, max(instruction.sizes, default=0))
                key = (op, max(operands, result))
                counts[key] = counts.get(key, 0) + times
        found = [Collective(op, size, count) for (op, size), count in counts.items()]
        return sorted(found, key=lambda one: (-one.bytes * one.count, one.op))

    def traffic(self, *, once: bool = False) -> int:
        """Bytes that instructions read and write: each its operands and results, slices as slices.

        A loop's body counts as often as it is known to run; with `once` a single time, as XLA's own analysis does.
        """
        return sum(
            (1 if once else times) * self._moved(scope, instruction) for scope, instruction, times in self._executed()
        )

    def _executed(self) -> Iterator[tuple[dict[str, Instruction], Instruction, int]]:
        """Every instruction that runs by itself, the computation that it is in, and how often."""
        pending = [(self._entry, 1)]
        while pending:
            name, times = pending.pop()
            scope = self._computations.get(name, {})
            for instruction in scope.values():
                yield scope, instruction, times
                if instruction.opcode in _CONTROL:
                    pending += [(called, times * instruction.trips) for called in instruction.called]
                elif instruction.opcode == "async-start":
                    pending += [(called, times) for called in instruction.called]

    def _moved(self, scope: dict[str, Instruction], instruction: Instruction) -> int:
        op = instruction.opcode
        if op in _FREE | _CONTROL or op.startswith("async-") or op.endswith("-done"):
            return 0
        operands = [scope[name].size if name in scope else 0 for name in instruction.operands]
        if op == "fusion" and instruction.called:
            read, written = self._fusion(instruction.called[0])
            shares = (read.get(number, size) for number, size in enumerate(operands))
            return sum(shares) + (instruction.size if written is None else written)
        if op in _SLICES:
            return 2 * instruction.size
        if op == "dynamic-update-slice":
            return 2 * operands[1]
        return sum(operands) + instruction.size

    @functools.cache  # noqa: B019 - a program lives as long as what is read from it
    def _fusion(self, name: str) -> tuple[dict[int, int], int | None]:
        """Bytes read of parameters that are only sliced, and bytes written where the result is updated in place."""
        body = self._computations.get(name, {})
        users: dict[str, list[Instruction]] = {}
        for instruction in body.values():
            for operand in instruction.operands:
                users.setdefault(operand, []).append(instruction)
        read: dict[int, int] = {}
        for instruction in body.values():
            if instruction.opcode == "parameter":
                shares = [self._share(body, users, instruction.name, user) for user in users.get(instruction.name, [])]
                known = [share for share in shares if share is not None]
                if len(known) == len(shares):
                    read[instruction.number] = min(sum(known), instruction.size)
        root = next((instruction for instruction in body.values() if instruction.is_root), None)
        while root is not None and root.opcode == "bitcast":
            root = body.get(root.operands[0])
        if root is not None and root.opcode == "dynamic-update-slice":
            return read, body[root.operands[1]].size
        return read, None

    def _share(
        self, body: dict[str, Instruction], users: dict[str, list[Instruction]], name: str, user: Instruction
    ) -> int | None:
        """Bytes that `user` reads of the array `name`, None for all of them."""
        if user.opcode in _SLICES and user.operands[0] == name:
            return user.size
        if user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            return 0
        if user.opcode == "bitcast":
            shares = [self._share(body, users, user.name, further) for further in users.get(user.name, [])]
            return None if None in shares or not shares else sum(share or 0 for share in shares)
        return None
