"""`--mode plan`: estimates the training step of the settings on chips that are not here."""

import dataclasses
from typing import Any

from densenet_jax.config import to_dict
from densenet_jax.errors import UserError
from densenet_jax.experiment import Experiment
from densenet_jax.plan.compilers import check_installed
from densenet_jax.plan.costs import Bounds, Costs, DoesNotFitError, compute_bounds
from densenet_jax.plan.fitting import RESOLUTION, Attempt, Limit, largest_that_fits
from densenet_jax.plan.table import format_attempt, format_limit, format_plan
from densenet_jax.plan.topology import Topology, parse_topology
from densenet_jax.plan.worker import compute_step_costs
from densenet_jax.system.console import print_status, spinner
from densenet_jax.training.sharding import check_divides


def plan(config: Any, topology_name: str) -> dict[str, Any]:
    """Compiles the step of `config` for a topology, prints its costs and returns the figures.

    Raises:
        UserError: the topology does not exist, its compiler is not installed, or its chips don't divide the batch.
    """
    if not topology_name:
        raise UserError("--mode plan needs the chips to plan for: --topology v5e:2x2, for instance, or h200:1x1x8.")
    topology = parse_topology(topology_name)
    check_divides("config.train.global_batch_size", config.train.global_batch_size, topology.chips)
    check_installed(topology.chip.compiler)
    without_chips = Experiment(config, absent_devices=())
    planned = Planned(config, topology, without_chips.timeline.total_steps)
    without_chips.num_classes  # noqa: B018 - reports an unknown data set before the long work
    with spinner(f"compiling for {topology.name}"):
        attempt, costs = planned.compile(planned.units)
    limit = None if attempt.fits else planned.find_largest_batch(attempt)
    bounds = None if costs is None else compute_bounds(costs, topology.chip, topology.chips)
    figures = planned.figures(attempt, costs, bounds, limit)
    for line in format_plan(figures, topology, costs, bounds):
        print_status(line)
    if limit is not None:
        print_status(format_limit(planned.images(limit.fitting), planned.images(limit.failing), planned.unit, topology))
    return figures


@dataclasses.dataclass(frozen=True)
class Planned:
    """A configuration on a topology, for a recipe of `total_steps` steps."""

    config: Any
    topology: Topology
    total_steps: int

    @property
    def unit(self) -> int:
        """Smallest number of images that a batch can change by."""
        return self.topology.chips * self.config.train.microbatches * self.config.augment.repeats

    @property
    def units(self) -> int:
        """Size of the planned batch, in units."""
        return -(-self.config.train.global_batch_size // self.unit)

    def images(self, units: int) -> int:
        """Returns the batch size of a number of units; the planned batch may end in a fraction of a unit."""
        return min(units * self.unit, self.config.train.global_batch_size)

    def compile(self, units: int) -> tuple[Attempt, Costs | None]:
        """Compiles for a number of units; the costs are None if the compiler failed."""
        settings, capacity_bytes = to_dict(self.config), self.topology.chip.memory_bytes
        settings["train"]["global_batch_size"] = self.images(units)
        try:
            costs = compute_step_costs(settings, self.topology)
        except DoesNotFitError as full:
            return Attempt(units, False, full.needed_bytes, full.limit_bytes or capacity_bytes), None
        return Attempt(units, costs.memory_bytes <= capacity_bytes, costs.memory_bytes, capacity_bytes), costs

    def figures(
        self, attempt: Attempt, costs: Costs | None, bounds: Bounds | None, limit: Limit | None
    ) -> dict[str, Any]:
        """Returns the figures of the last line; those that the compiler does not report are None."""
        topology, batch = self.topology, self.config.train.global_batch_size
        figures: dict[str, Any] = {
            "topology": topology.name,
            "chips": topology.chips,
            "hosts": topology.hosts,
            "global_batch_size": batch,
            "memory_bytes_per_chip": attempt.memory_bytes,
            "capacity_bytes_per_chip": topology.chip.memory_bytes,
            "fits": attempt.fits,
            "largest_global_batch_that_fits": None if limit is None else self.images(limit.fitting),
        }
        if costs is None or bounds is None:
            names = "flops_per_image bytes_per_image memory_bytes_per_image collectives"
            return figures | dict.fromkeys([*names.split(), "bound", "images_per_sec_bound", "hours_bound"])
        per_image = topology.chips / batch
        return figures | {
            "flops_per_image": None if costs.flops is None else costs.flops * per_image,
            "bytes_per_image": costs.traffic_bytes * per_image,
            "memory_bytes_per_image": costs.memory_traffic_bytes * per_image,
            "collectives": [dataclasses.asdict(one) for one in costs.collectives],
            "bound": bounds.binding,
            "images_per_sec_bound": batch / bounds.secs,
            "hours_bound": bounds.secs * self.total_steps / 3600,
        }

    def find_largest_batch(self, first: Attempt) -> Limit:
        """Compiles for smaller batches until the limit is known, printing each attempt."""

        def attempted(units: int) -> Attempt:
            with spinner(f"compiling for a batch of {self.images(units)}"):
                attempt, _ = self.compile(units)
            print_status(format_attempt(attempt, self.images(units)))
            return attempt

        print_status(format_attempt(first, self.images(first.units)))
        print_status(f"looking for the largest batch that fits, to within {RESOLUTION:.0%}, in steps of {self.unit}")
        return largest_that_fits(attempted, first)
