"""Lower bounds on a step's time: what no program that costs so much can go below on chips with such peaks."""

import dataclasses

from densenet_jax.plan.chips import Chip
from densenet_jax.plan.costs import Costs
from densenet_jax.plan.hlo import Collective


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Seconds a step takes at least, by each resource at its published peak with nothing else in the way.

    Attributes:
        arithmetic: operations over the bfloat16 peak; None where the operations are not known.
        memory: bytes that go through it over its bandwidth.
        interconnect: bytes that a chip has to send over all its links' bandwidth; no latency, no slower network.
    """

    arithmetic: float | None
    memory: float
    interconnect: float

    @property
    def binding(self) -> str:
        """The resource that takes longest."""
        return max(self._known(), key=self._known().__getitem__)

    @property
    def secs(self) -> float:
        """The longest of them: all could work at the same time, at best."""
        return max(self._known().values())

    def _known(self) -> dict[str, float]:
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def bounds_of(costs: Costs, chip: Chip, chips: int) -> Bounds:
    """The bounds of a program with these costs on `chips` chips."""
    return Bounds(
        arithmetic=None if costs.flops is None else costs.flops / chip.flops,
        memory=costs.memory_traffic_bytes / chip.memory_bytes_per_sec,
        interconnect=sum(sent_bytes(one, chips) for one in costs.collectives) / chip.link_bytes_per_sec,
    )


def sent_bytes(collective: Collective, chips: int) -> float:
    """Bytes a chip has to send at least: twice the others' share of what is summed everywhere, else once."""
    share = (chips - 1) / chips
    times = {"all-reduce": 2 * share, "collective-permute": 1.0 if chips > 1 else 0.0}.get(collective.op, share)
    return times * collective.bytes * collective.count
