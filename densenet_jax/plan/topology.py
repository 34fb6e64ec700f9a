"""Parses topologies: "v5e:16x16" is a slice of 256 chips, "h200:1x1x8" one host with eight."""

import dataclasses
import difflib
import math
import re

from densenet_jax.errors import UserError
from densenet_jax.plan.chips import CHIPS, Chip

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # all slices with two axes
_SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # slices with three axes that are smaller than the cube of 64
_CUBE, _LARGEST_SIDE = 4, 24


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips to plan for."""

    name: str  # as given, such as "v5e:16x16"
    chip: Chip
    shape: tuple[int, ...]  # chips along each axis; for GPUs: slices, hosts in a slice, GPUs in a host

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    @property
    def hosts(self) -> int:
        """Number of hosts, each with one process."""
        if self.chip.compiler == "cuda":
            return math.prod(self.shape[:-1])
        return math.ceil(self.chips / self.chip.chips_per_host)


def parse_topology(name: str) -> Topology:
    """Parses a topology.

    Raises:
        UserError: there is no such chip, or it has no topology of that shape.
    """
    kind, _, given = name.partition(":")
    chip = find_chip(kind)
    shape = tuple(map(int, given.split("x"))) if re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})*", given) else ()
    if not _has_shape(chip, shape):
        raise UserError(
            f"--topology is {name!r}, not a shape of {kind}: {_describe_shapes(chip)}; for example "
            f"{_find_nearest(chip, shape)}."
        )
    return Topology(name, chip, shape)


def find_chip(name: str) -> Chip:
    """Looks up a chip.

    Raises:
        UserError: there is no such chip; the message names the nearest.
    """
    if name not in CHIPS:
        near = max(CHIPS, key=lambda known: difflib.SequenceMatcher(None, name.lower(), known).ratio())
        raise UserError(
            f"{name!r} is not a known chip; did you mean {near} ({make_example(CHIPS[near])})? "
            f"Known are {', '.join(CHIPS)}."
        )
    return CHIPS[name]


def make_example(chip: Chip) -> str:
    """Returns the topology of the smallest whole host of a chip."""
    return f"{chip.name}:{'1x1x8' if chip.compiler == 'cuda' else '2x2' if chip.axes == 2 else '2x2x1'}"


def _has_shape(chip: Chip, shape: tuple[int, ...]) -> bool:
    written = "x".join(map(str, shape))
    if len(shape) != chip.axes:
        return False
    if chip.compiler == "cuda":
        return shape[0] == 1 and shape[1] <= 1024 and shape[2] <= chip.chips_per_host
    if chip.axes == 2:
        return written in _FLAT
    whole_cubes = all(side % _CUBE == 0 and side <= _LARGEST_SIDE for side in shape)
    return written in _SMALL or (whole_cubes and list(shape) == sorted(shape))


def _describe_shapes(chip: Chip) -> str:
    if chip.compiler == "cuda":
        return f"1xHOSTSxGPUS with at most {chip.chips_per_host} GPUs in a host"
    if chip.axes == 2:
        return ", ".join(_FLAT)
    return f"{', '.join(_SMALL)}, or three multiples of {_CUBE} in rising order up to {_LARGEST_SIDE}"


def _find_nearest(chip: Chip, shape: tuple[int, ...]) -> str:
    """Returns the existing topology with the nearest number of chips."""
    wanted = math.prod(shape) if shape else chip.chips_per_host
    if chip.compiler == "cuda":
        per_host = chip.chips_per_host
        return (
            f"{chip.name}:1x1x{wanted}"
            if wanted <= per_host
            else f"{chip.name}:1x{round(wanted / per_host)}x{per_host}"
        )
    sides = range(_CUBE, _LARGEST_SIDE + 1, _CUBE)
    cubes = [f"{a}x{b}x{c}" for a in sides for b in sides for c in sides if a <= b <= c]
    names = _FLAT if chip.axes == 2 else [*_SMALL, *cubes]
    return f"{chip.name}:{min(names, key=lambda n: abs(math.prod(map(int, n.split('x'))) - wanted))}"
