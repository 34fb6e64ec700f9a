"""Formats a plan as lines of text."""

from typing import Any

from densenet_jax.plan.costs import Bounds, Costs
from densenet_jax.plan.fitting import Attempt
from densenet_jax.plan.topology import Topology

_SHOWN = 6  # collectives printed; the smaller ones are summed up


def format_size(amount: float) -> str:
    """Formats bytes in decimal units with three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def format_attempt(attempt: Attempt, batch: int) -> str:
    """Formats the result of compiling for a batch."""
    memory = attempt.memory_bytes
    needs = (
        "" if memory is None else f": {format_size(memory)} of {format_size(attempt.limit_bytes)} available on a chip"
    )
    return f"a batch of {batch} {'fits' if attempt.fits else 'does not fit'}{needs}"


def format_limit(fitting: int, failing: int, unit: int, topology: Topology) -> str:
    """Formats the largest batch seen to fit and the smallest seen not to; batches grow by `unit` images."""
    if not fitting:
        return f"even the smallest batch, {failing}, does not fit {topology.name}"
    more = "the next larger" if failing <= fitting + unit else f"{failing / fitting - 1:.1%} more"
    return f"the largest batch found to fit {topology.name} is {fitting}; {failing}, {more}, does not fit"


def format_plan(figures: dict[str, Any], topology: Topology, costs: Costs | None, bounds: Bounds | None) -> list[str]:
    """Formats the figures of a plan with their sources."""
    chip, batch = topology.chip, figures["global_batch_size"]
    memory, capacity = figures["memory_bytes_per_chip"], figures["capacity_bytes_per_chip"]
    there = f"{format_size(capacity)} a chip"
    needs = f"more than {there}" if memory is None else f"{format_size(memory)} of {there}, {memory / capacity:.0%}"
    lines = [
        f"{topology.name}: {_count(topology.chips, 'chip')} in {_count(topology.hosts, 'host')}",
        f"batch         {batch} images, {batch / topology.chips:.10g} a chip",
        f"memory        {needs}{'' if figures['fits'] else ': DOES NOT FIT'}",
    ]
    if costs is None or bounds is None:
        return lines
    flops = figures["flops_per_image"]
    moved, through_memory = (format_size(figures[key]) for key in ("bytes_per_image", "memory_bytes_per_image"))
    lines += [
        f"temporaries   {format_size(costs.temp_bytes)} a chip",
        f"arithmetic    {'not reported' if flops is None else f'{flops / 1e9:.3g} GFLOP an image'}",
        f"traffic       {moved} an image, {through_memory} between a chip and its memory",
    ]
    shown, rest = costs.collectives[:_SHOWN], costs.collectives[_SHOWN:]
    lines += [f"collective    {one.op}: {one.count} of {format_size(one.bytes)}" for one in shown]
    if rest:
        total = sum(one.bytes * one.count for one in rest)
        lines.append(f"              {sum(one.count for one in rest)} smaller ones, {format_size(total)} in total")
    lines += [f"lower bounds on a step, from the published peaks of {chip.name}", f"  ({chip.source}):"]
    for name, secs in (
        (f"arithmetic at {chip.flops / 1e12:g} TFLOP/s", bounds.arithmetic),
        (f"memory at {chip.memory_bytes_per_sec / 1e9:g} GB/s", bounds.memory),
        (f"links at {chip.link_bytes_per_sec / 1e9:g} GB/s", bounds.interconnect),
    ):
        lines.append(f"  {name:32}{'unknown' if secs is None else f'{1000 * secs:.3g} ms'}")
    most, least = f"{figures['images_per_sec_bound']:,.0f} images/s", f"{figures['hours_bound']:.3g} h"
    lines.append(f"bound by {bounds.binding}: at most {most}, at least {least} a run")
    lines.append("These are bounds, not predictions: a real run is slower.")
    return lines
