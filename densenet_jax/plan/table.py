"""A plan as lines for a person."""

from typing import Any

from densenet_jax.plan.bounds import Bounds
from densenet_jax.plan.costs import Costs
from densenet_jax.plan.fitting import Attempt
from densenet_jax.plan.topology import Topology

_SHOWN = 6  # collectives; the smaller ones are summed up


def size(amount: float) -> str:
    """Bytes in decimal units, with three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 1000 or unit == "TB":
            return f"{amount:.3g} {unit}"
        amount /= 1000
    raise AssertionError("unreachable")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def line_of_attempt(attempt: Attempt, batch: int) -> str:
    """What came of compiling for a batch."""
    memory = attempt.memory_bytes
    needs = "" if memory is None else f": {size(memory)} of the {size(attempt.limit_bytes)} that a chip has for it"
    return f"a batch of {batch} {'fits' if attempt.fits else 'does not fit'}{needs}"


def line_of_found(fitting: int, failing: int, unit: int, topology: Topology) -> str:
    """What fits and what does not, as far as it was tried: two batches; a batch can grow by `unit` images."""
    if not fitting:
        return f"not even a batch of {failing}, the smallest there is, fits {topology.name}"
    more = "the next larger" if failing <= fitting + unit else f"{failing / fitting - 1:.1%} more"
    fits = f"the largest global batch that was seen to fit {topology.name} is {fitting}"
    return f"{fits}; {failing}, {more}, was seen not to fit"


def lines_of(figures: dict[str, Any], topology: Topology, costs: Costs | None, bounds: Bounds | None) -> list[str]:
    """The figures of a plan, and where they come from."""
    chip, batch = topology.chip, figures["global_batch_size"]
    memory, capacity = figures["memory_bytes_per_chip"], figures["capacity_bytes_per_chip"]
    needs = "more than there is" if memory is None else f"{size(memory)}, {memory / capacity:.0%} of it"
    lines = [
        f"{topology.name}: {_count(topology.chips, 'chip')} in {_count(topology.hosts, 'host')}",
        f"batch         {batch} images, {batch / topology.chips:.10g} a chip",
        f"memory        {needs} ({size(capacity)} a chip){'' if figures['fits'] else ': DOES NOT FIT'}",
    ]
    if costs is None or bounds is None:
        return lines
    flops, moved = figures["flops_per_image"], size(figures["bytes_per_image"])
    lines += [
        f"temporaries   {size(costs.temp_bytes)} a chip",
        f"arithmetic    {'not told' if flops is None else f'{flops / 1e9:.3g} GFLOP an image'}",
        f"traffic       {moved} an image, {size(figures['memory_bytes_per_image'])} between a chip and its memory",
    ]
    shown, rest = costs.collectives[:_SHOWN], costs.collectives[_SHOWN:]
    lines += [f"collective    {one.op}: {one.count} of {size(one.bytes)}" for one in shown]
    if rest:
        total = sum(one.bytes * one.count for one in rest)
        lines.append(f"              {sum(one.count for one in rest)} smaller ones, {size(total)} together")
    lines.append(f"lower bounds on a step, from the published peaks of {chip.name} ({chip.source}):")
    for name, secs in (
        (f"arithmetic at {chip.flops / 1e12:g} TFLOP/s", bounds.arithmetic),
        (f"memory at {chip.memory_bytes_per_sec / 1e9:g} GB/s", bounds.memory),
        (f"links at {chip.link_bytes_per_sec / 1e9:g} GB/s", bounds.interconnect),
    ):
        lines.append(f"  {name:32}{'not known' if secs is None else f'{1000 * secs:.3g} ms'}")
    lines.append(
        f"bound by {bounds.binding}: at most {figures['images_per_sec_bound']:,.0f} images/s, at least "
        f"{figures['hours_bound']:.3g} h for the recipe. These are bounds, not predictions: a real run is slower."
    )
    return lines
