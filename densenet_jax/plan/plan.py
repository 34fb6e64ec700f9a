"""`--mode plan`: what the settings' training step would cost on chips that are not there."""

import dataclasses
from typing import Any

from densenet_jax.config import to_dict
from densenet_jax.errors import UserError
from densenet_jax.experiment import Experiment
from densenet_jax.plan.bounds import Bounds, bounds_of
from densenet_jax.plan.compilers import check_installed
from densenet_jax.plan.costs import Costs, DoesNotFitError
from densenet_jax.plan.fitting import RESOLUTION, Attempt, Found, largest_that_fits
from densenet_jax.plan.table import line_of_attempt, line_of_found, lines_of
from densenet_jax.plan.topology import Topology, parse_topology
from densenet_jax.plan.worker import costs_of_step
from densenet_jax.system.console import print_status, spinner
from densenet_jax.training.sharding import check_divides


def plan(config: Any, topology_name: str) -> dict[str, Any]:
    """Compiles the step of `config` for a topology, says what it costs and returns the figures.

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
    without_chips.num_classes  # noqa: B018 - a data set of which too little is known is told before the long work
    with spinner(f"compiling for {topology.name}"):
        attempt, costs = planned.compile(planned.units)
    found = None if attempt.fits else planned.look_for_what_fits(attempt)
    figures = planned.figures(attempt, costs, found)
    bounds = None if costs is None else planned.bounds(costs)
    for line in lines_of(figures, topology, costs, bounds):
        print_status(line)
    if found is not None:
        print_status(
            line_of_found(planned.images(found.fitting), planned.images(found.failing), planned.unit, topology)
        )
    return figures


@dataclasses.dataclass(frozen=True)
class Planned:
    """One configuration on one topology; the recipe takes `total_steps` steps."""

    config: Any
    topology: Topology
    total_steps: int

    @property
    def unit(self) -> int:
        """Images that a batch can grow or shrink by."""
        return self.topology.chips * self.config.train.microbatches * self.config.augment.repeats

    @property
    def units(self) -> int:
        """The size of the batch that is planned for."""
        return -(-self.config.train.global_batch_size // self.unit)

    def images(self, units: int) -> int:
        """The batch of so many units; the planned one need not be a multiple."""
        return min(units * self.unit, self.config.train.global_batch_size)

    def compile(self, units: int) -> tuple[Attempt, Costs | None]:
        """Compiles for a batch of so many units: whether it fits, and its costs, None where the compiler gave up."""
        settings, capacity_bytes = to_dict(self.config), self.topology.chip.memory_bytes
        settings["train"]["global_batch_size"] = self.images(units)
        try:
            costs = costs_of_step(settings, self.topology)
        except DoesNotFitError as full:
            return Attempt(units, False, full.needed_bytes, full.limit_bytes or capacity_bytes), None
        return Attempt(units, costs.memory_bytes <= capacity_bytes, costs.memory_bytes, capacity_bytes), costs

    def bounds(self, costs: Costs) -> Bounds:
        """The bounds on the time of such a step."""
        return bounds_of(costs, self.topology.chip, self.topology.chips)

    def figures(self, attempt: Attempt, costs: Costs | None, found: Found | None) -> dict[str, Any]:
        """The last line's figures; None where the compiler gave up or does not tell."""
        topology, batch = self.topology, self.config.train.global_batch_size
        figures: dict[str, Any] = {
            "topology": topology.name,
            "chips": topology.chips,
            "hosts": topology.hosts,
            "global_batch_size": batch,
            "memory_bytes_per_chip": attempt.memory_bytes,
            "capacity_bytes_per_chip": topology.chip.memory_bytes,
            "fits": attempt.fits,
            "largest_global_batch_that_fits": None if found is None else self.images(found.fitting),
        }
        if costs is None:
            names = "flops_per_image bytes_per_image memory_bytes_per_image collectives"
            return figures | dict.fromkeys([*names.split(), "bound", "images_per_sec_bound", "hours_bound"])
        bounds, per_image = self.bounds(costs), topology.chips / batch
        return figures | {
            "flops_per_image": None if costs.flops is None else costs.flops * per_image,
            "bytes_per_image": costs.traffic_bytes * per_image,
            "memory_bytes_per_image": costs.memory_traffic_bytes * per_image,
            "collectives": [dataclasses.asdict(one) for one in costs.collectives],
            "bound": bounds.binding,
            "images_per_sec_bound": batch / bounds.secs,
            "hours_bound": bounds.secs * self.total_steps / 3600,
        }

    def look_for_what_fits(self, first: Attempt) -> Found:
        """Compiles for smaller batches until the limit is known well enough, and tells each."""

        def attempted(units: int) -> Attempt:
            with spinner(f"compiling for a batch of {self.images(units)}"):
                attempt, _ = self.compile(units)
            print_status(line_of_attempt(attempt, self.images(units)))
            return attempt

        print_status(line_of_attempt(first, self.images(first.units)))
        print_status(
            f"looking for the largest batch that does fit, to within {RESOLUTION:.0%} and no finer than {self.unit}"
        )
        return largest_that_fits(attempted, first)
