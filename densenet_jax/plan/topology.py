"""Parses topologies: "v5e:16x16" is a slice of 256 chips, "h200:1x1x8" one host with eight."""

import dataclasses
import difflib
import itertools
import math
import re
from collections.abc import Sequence

from densenet_jax.errors import UserError
from densenet_jax.plan.chips import CHIPS, Chip

_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))  # all slices with two axes
_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # slices with three axes that are smaller than the cube of 64
_CUBE, _LARGEST_SIDE = 4, 24
_MOST_HOSTS = 1024


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
    shapes = _list_shapes(chip)
    if shape not in shapes:
        wanted = math.prod(shape) if shape else chip.chips_per_host
        usual = [one for one in shapes if chip.compiler == "tpu" or one[1] == 1 or one[2] == chip.chips_per_host]
        nearest = min(usual, key=lambda one: abs(math.prod(one) - wanted))
        raise UserError(
            f"--topology is {name!r}, not a shape of {kind}: {_describe_shapes(chip)}; for example "
            f"{kind}:{_join(nearest)}."
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


def _list_shapes(chip: Chip) -> Sequence[tuple[int, ...]]:
    if chip.compiler == "cuda":
        return [(1, hosts, gpus) for hosts in range(1, _MOST_HOSTS + 1) for gpus in range(1, chip.chips_per_host + 1)]
    sides = range(_CUBE, _LARGEST_SIDE + 1, _CUBE)
    return _FLAT if chip.axes == 2 else [*_SMALL, *itertools.combinations_with_replacement(sides, 3)]


def _describe_shapes(chip: Chip) -> str:
    if chip.compiler == "cuda":
        return f"1xHOSTSxGPUS with at most {chip.chips_per_host} GPUs in a host"
    listed = ", ".join(map(_join, _FLAT if chip.axes == 2 else _SMALL))
    cubes = f", or three multiples of {_CUBE} in rising order up to {_LARGEST_SIDE}" if chip.axes == 3 else ""
    return listed + cubes


def _join(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
