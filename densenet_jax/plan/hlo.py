"""Counts memory traffic and transfers between chips in the optimized HLO text of a program."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "bf16": 16}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_ON_CHIP = "S(1)"  # in a layout: the memory on a TPU's own chip
_REPORTED_BYTES = re.compile(r'"bytes_accessed":"(\d+)"')
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_PATH = re.compile(r'op_name="([^"]*)"')
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
_NAMES_MEMORY = ('custom_call_target="ConcatBitcast"', 'custom_call_target="AllocateBuffer"')
# They only name memory, or run computations that are counted separately.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_CONTROL = {"while", "call", "conditional"}
_SLICES = {"slice", "dynamic-slice", "gather"}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    sizes: tuple[int, ...]  # bytes of the arrays in its result
    on_chip: tuple[bool, ...]  # whether each of these arrays lies in memory on the chip
    operands: tuple[str, ...]
    called: tuple[str, ...]  # names of the computations it runs
    trips: int  # how often it runs them
    is_root: bool  # whether its result is that of the computation
    number: int  # number of a parameter, else -1
    reported: int  # bytes that a kernel reports it moves, 0 if it does not
    path: str  # of the operation that it was traced from

    @property
    def size(self) -> int:
        """Bytes of the result."""
        return sum(self.sizes)

    @property
    def off_chip_share(self) -> float:
        """Share of the result in main memory."""
        off = sum(size for size, on_chip in zip(self.sizes, self.on_chip, strict=True) if not on_chip)
        return off / self.size if self.size else 0.0


@dataclasses.dataclass(frozen=True)
class Collective:
    """Equal transfers between chips: operation, bytes of the larger side of one, and count in a step."""

    op: str
    bytes: int
    count: int


def _parse_arrays(text: str) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Returns the bytes of each array in a result type, and whether it lies on the chip."""
    sizes, on_chip = [], []
    for kind, dimensions, layout in _SHAPE.findall(text):
        digits = re.sub(r"^[a-z]+|e\d.*$", "", kind)
        bits = _BITS.get(kind, int(digits) if digits.isdigit() else 8)
        elements = math.prod(int(side) for side in dimensions.split(",")) if dimensions else 1
        sizes.append(math.ceil(elements * bits / 8))
        on_chip.append(_ON_CHIP in layout)
    return tuple(sizes), tuple(on_chip)


def _split_arguments(rest: str) -> tuple[str, str]:
    """Splits the text after an opening parenthesis at the closing one."""
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
    arguments, attributes = _split_arguments(rest)
    called = tuple(_CALLED.findall(attributes))
    if branches := _BRANCHES.search(attributes):
        called += tuple(part.strip().lstrip("%") for part in branches.group(1).split(","))
    trips, reported, path = (pattern.search(attributes) for pattern in (_TRIPS, _REPORTED_BYTES, _PATH))
    if opcode == "custom-call" and any(target in attributes for target in _NAMES_MEMORY):
        opcode = "bitcast"
    operands, times = tuple(re.findall(r"%([\w.\-]+)", arguments)), int(trips.group(1)) if trips else 1
    number = int(arguments) if opcode == "parameter" else -1
    moved = int(reported.group(1)) if reported and opcode == "custom-call" else 0
    traced_from = path.group(1) if path else ""
    arrays = _parse_arrays(shape)
    return Instruction(name, opcode, *arrays, operands, called, times, bool(root), number, moved, traced_from)


class Program:
    """A compiled program, parsed from its HLO text."""

    def __init__(self, text: str) -> None:
        """Parses the result of `compiled.as_text()`."""
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
        """Returns the transfers between chips, those with most bytes first."""
        counts: dict[tuple[str, int], int] = {}
        for scope, instruction, times in self._walk():
            op = instruction.opcode.removesuffix("-start")
            if op in _COLLECTIVES:
                operands = sum(scope[name].size for name in instruction.operands if name in scope)
                result = instruction.size
                if instruction.opcode.endswith("-start"):  # its result includes the operands
                    result = max(result - operands, max(instruction.sizes, default=0))
                key = (op, max(operands, result))
                counts[key] = counts.get(key, 0) + times
        transfers = [Collective(op, size, count) for (op, size), count in counts.items()]
        return sorted(transfers, key=lambda one: (-one.bytes * one.count, one.op))

    def traffic(self, *, once: bool = False, off_chip: bool = False) -> int:
        """Counts the bytes of operands and results of all instructions; of sliced arrays, only the slices.

        A loop body counts as often as it runs, or with `once` a single time, as in XLA's own analysis. `off_chip`
        leaves out memory on the chip.
        """
        moved = ((times, self._count_moved(scope, one, off_chip)) for scope, one, times in self._walk())
        return round(sum(size if once else times * size for times, size in moved))

    def moves(self) -> list[tuple[str, str, int, int, int]]:
        """Sums instructions of one kind and path: both, their number, bytes moved, and those off the chip.

        The kind is the opcode, of a fusion around a convolution that; the sums with most bytes come first.
        """
        sums: dict[tuple[str, str], tuple[int, int, int]] = {}
        for scope, instruction, times in self._walk():
            if moved := times * self._count_moved(scope, instruction, False):
                kind = "convolution" if self._convolves(instruction) else instruction.opcode
                number, whole, part = sums.get((kind, instruction.path), (0, 0, 0))
                off_chip = times * self._count_moved(scope, instruction, True)
                sums[kind, instruction.path] = (number + times, whole + round(moved), part + round(off_chip))
        rows = [(kind, path, *own) for (kind, path), own in sums.items()]
        return sorted(rows, key=lambda row: (-row[3], row))

    def _convolves(self, instruction: Instruction) -> bool:
        bodies = (self._computations.get(name, {}) for name in instruction.called if instruction.opcode == "fusion")
        return instruction.opcode == "convolution" or any(
            self._convolves(part) for body in bodies for part in body.values()
        )

    def _walk(self) -> Iterator[tuple[dict[str, Instruction], Instruction, int]]:
        """Yields the scope, the instruction and its number of runs, for every instruction outside of fusions."""
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

    def _count_moved(self, scope: dict[str, Instruction], instruction: Instruction, off_chip: bool) -> float:
        op = instruction.opcode
        if op in _FREE | _CONTROL or op.startswith("async-") or op.endswith("-done"):
            return 0
        known = [scope.get(name) for name in instruction.operands]
        operands = [0 if one is None else one.size for one in known]
        shares = [one.off_chip_share if one is not None and off_chip else 1.0 for one in known]
        own_share = instruction.off_chip_share if off_chip else 1.0
        if op in ("copy-start", "slice-start"):  # its result includes the operand and a flag
            place = 0 if op == "copy-start" else len(operands)
            copied = instruction.sizes[place]
            return copied * (shares[0] + (not (off_chip and instruction.on_chip[place])))
        if op == "fusion" and instruction.called:
            read, written = self._count_fusion(instruction.called[0])
            taken = sum(share * read.get(number, operands[number]) for number, share in enumerate(shares))
            return taken + own_share * (instruction.size if written is None else written)
        if op in _SLICES:
            return instruction.size * (shares[0] + own_share)
        if op == "dynamic-update-slice":
            return operands[1] * (shares[1] + own_share)
        moved = sum(share * size for share, size in zip(shares, operands, strict=True)) + own_share * instruction.size
        if instruction.reported:  # it may read its operands in part
            return instruction.reported * moved / (sum(operands) + instruction.size)
        return moved

    @functools.cache  # noqa: B019 - the cache may live as long as the program
    def _count_fusion(self, name: str) -> tuple[dict[int, int], int | None]:
        """Returns the bytes read of each parameter that is only sliced, and the bytes written by an in-place update."""
        body = self._computations.get(name, {})
        users: dict[str, list[Instruction]] = {}
        for instruction in body.values():
            for operand in instruction.operands:
                users.setdefault(operand, []).append(instruction)
        read: dict[int, int] = {}
        for instruction in body.values():
            if instruction.opcode == "parameter":
                shares = [
                    self._count_read(body, users, instruction.name, user) for user in users.get(instruction.name, [])
                ]
                known = [share for share in shares if share is not None]
                if len(known) == len(shares):
                    read[instruction.number] = min(sum(known), instruction.size)
        root = next((instruction for instruction in body.values() if instruction.is_root), None)
        while root is not None and root.opcode == "bitcast":
            root = body.get(root.operands[0])
        if root is not None and root.opcode == "dynamic-update-slice":
            return read, body[root.operands[1]].size
        return read, None

    def _count_read(
        self, body: dict[str, Instruction], users: dict[str, list[Instruction]], name: str, user: Instruction
    ) -> int | None:
        """Returns the bytes that `user` reads of the array `name`, or None for all."""
        if user.opcode in _SLICES and user.operands[0] == name:
            return user.size
        if user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            return 0
        if user.opcode == "bitcast":
            shares = [self._count_read(body, users, user.name, further) for further in users.get(user.name, [])]
            return None if None in shares or not shares else sum(share or 0 for share in shares)
        if user.opcode == "fusion" and user.called:  # a TPU's convolutions hold fusions of their operands
            inner = self._count_fusion(user.called[0])[0]
            numbers = [number for number, operand in enumerate(user.operands) if operand == name]
            return sum(inner[number] for number in numbers) if all(number in inner for number in numbers) else None
        return None
