"""`--mode plan`: what the settings' training step would cost on chips that are not there."""

import dataclasses
from typing import Any

from densenet_jax.config import to_dict
from densenet_jax.errors import UserError
from densenet_jax.experiment import Experiment
from densenet_jax.plan.bounds import Bounds, bounds_of
from densenet_jax.plan.compilers import check_installed
from densenet_jax.plan.costs import Costs, DoesNotFitError
from densenet_jax.plan.fitting import largest_that_fits
from densenet_jax.plan.table import lines_of
from densenet_jax.plan.topology import Topology, parse_topology
from densenet_jax.plan.worker import costs_of_step
from densenet_jax.progress import say, working
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
    try:
        with working(f"compiling for {topology.name}"):
            costs = planned.costs(config.train.global_batch_size)
        needed: int | None = costs.memory_bytes
    except DoesNotFitError as full:
        costs, needed = None, full.needed_bytes
    if costs is None or costs.memory_bytes > topology.chip.memory_bytes:
        planned.say_what_fits(needed)
    figures = planned.figures(costs, needed)
    bounds = None if costs is None else planned.bounds(costs)
    for line in lines_of(figures, topology, costs, bounds):
        say(line)
    return figures


@dataclasses.dataclass(frozen=True)
class Planned:
    """One configuration on one topology; the recipe takes `total_steps` steps."""

    config: Any
    topology: Topology
    total_steps: int

    def costs(self, global_batch_size: int) -> Costs:
        """What a step with a batch of that size costs a chip."""
        settings = to_dict(self.config)
        settings["train"]["global_batch_size"] = global_batch_size
        return costs_of_step(settings, self.topology)

    def bounds(self, costs: Costs) -> Bounds:
        """The bounds on the time of such a step."""
        return bounds_of(costs, self.topology.chip, self.topology.chips)

    def figures(self, costs: Costs | None, needed_bytes: int | None) -> dict[str, Any]:
        """The last line's figures; None where the compiler gave up or does not tell."""
        topology, batch = self.topology, self.config.train.global_batch_size
        figures: dict[str, Any] = {
            "topology": topology.name,
            "chips": topology.chips,
            "hosts": topology.hosts,
            "global_batch_size": batch,
            "memory_bytes_per_chip": needed_bytes,
            "capacity_bytes_per_chip": topology.chip.memory_bytes,
            "fits": costs is not None and costs.memory_bytes <= topology.chip.memory_bytes,
        }
        if costs is None:
            names = "flops_per_image bytes_per_image collectives bound images_per_sec_bound hours_bound"
            return figures | dict.fromkeys(names.split())
        bounds, per_image = self.bounds(costs), topology.chips / batch
        return figures | {
            "flops_per_image": None if costs.flops is None else costs.flops * per_image,
            "bytes_per_image": costs.traffic_bytes * per_image,
            "collectives": [dataclasses.asdict(one) for one in costs.collectives],
            "bound": bounds.binding,
            "images_per_sec_bound": batch / bounds.secs,
            "hours_bound": bounds.secs * self.total_steps / 3600,
        }

    def say_what_fits(self, needed_bytes: int | None) -> None:
        """Tells the largest batch that fits, compiling for smaller ones until it is known."""
        batch, capacity = self.config.train.global_batch_size, self.topology.chip.memory_bytes
        unit = self.topology.chips * self.config.train.microbatches * self.config.augment.repeats
        say(f"a batch of {batch} does not fit; looking for the largest that does")

        def fits(units: int) -> bool:
            with working(f"compiling for a batch of {units * unit}"):
                try:
                    return self.costs(units * unit).memory_bytes <= capacity
                except DoesNotFitError:
                    return False

        share = capacity / needed_bytes if needed_bytes else 0.5
        largest = unit * largest_that_fits(fits, -(-batch // unit), int(share * batch / unit))
        if largest:
            say(f"the largest global batch that fits {self.topology.name} is {largest}; {batch} does not")
        else:
            say(f"not even a batch of {unit} fits {self.topology.name}")
