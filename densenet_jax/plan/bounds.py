"""Lower bounds on the time of a step, from its costs and the published peaks of the chips."""

import dataclasses

from densenet_jax.plan.chips import Chip
from densenet_jax.plan.costs import Costs
from densenet_jax.plan.hlo import Collective


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Least seconds for a step with each resource at its published peak."""

    arithmetic: float | None  # operations over the bfloat16 peak; None if the operations are unknown
    memory: float  # bytes of memory traffic over the bandwidth
    # Bytes that a chip sends over the bandwidth of all its links, ignoring latency and slower networks.
    interconnect: float

    @property
    def binding(self) -> str:
        """Resource that takes longest."""
        return max(self._known(), key=self._known().__getitem__)

    @property
    def secs(self) -> float:
        """Longest of the times, as if all resources worked at the same time."""
        return max(self._known().values())

    def _known(self) -> dict[str, float]:
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def compute_bounds(costs: Costs, chip: Chip, chips: int) -> Bounds:
    """Computes the bounds of a program with these costs on `chips` chips."""
    return Bounds(
        arithmetic=None if costs.flops is None else costs.flops / chip.flops,
        memory=costs.memory_traffic_bytes / chip.memory_bytes_per_sec,
        interconnect=sum(count_sent_bytes(one, chips) for one in costs.collectives) / chip.link_bytes_per_sec,
    )


def count_sent_bytes(collective: Collective, chips: int) -> float:
    """Returns the least bytes a chip sends: (n - 1) / n of the data, twice for an all-reduce."""
    share = (chips - 1) / chips
    times = {"all-reduce": 2 * share, "collective-permute": 1.0 if chips > 1 else 0.0}.get(collective.op, share)
    return times * collective.bytes * collective.count
