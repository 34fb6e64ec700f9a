"""Compiles a step for absent chips, counts its costs, and bounds its time by the published peaks of the chips."""

import contextlib
import dataclasses
import re
from typing import Any

import jax

from densenet_jax.plan.chips import Chip
from densenet_jax.plan.hlo import Collective, Program


class DoesNotFitError(Exception):
    """The compiler could not fit the program into a chip's memory."""

    def __init__(self, needed_bytes: int | None, limit_bytes: int | None = None) -> None:
        """Takes the memory needed and what is available beside the compiler's own; None where it is not reported."""
        super().__init__(f"needs {needed_bytes} bytes of {limit_bytes}")
        self.needed_bytes, self.limit_bytes = needed_bytes, limit_bytes


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of one run of a compiled program for one chip."""

    memory_bytes: int  # peak memory of arguments, results, temporaries and program; donated memory counts once
    temp_bytes: int
    flops: float | None  # operations; None if the compiler does not report them
    traffic_bytes: float  # bytes that instructions read and write, including memory on the chip
    memory_traffic_bytes: float  # bytes moved between the chip and its main memory
    collectives: tuple[Collective, ...]


def compile_costs(lowered: jax.stages.Lowered) -> Costs:
    """Compiles a lowered program and counts its costs.

    Raises:
        DoesNotFitError: a chip's memory is too small for it.
    """
    return count_costs(compile_program(lowered))


def compile_program(lowered: jax.stages.Lowered) -> Any:
    """Compiles a lowered program.

    Raises:
        DoesNotFitError: a chip's memory is too small for it.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFitError(*parse_memory_error(str(error))) from error


def count_costs(compiled: Any) -> Costs:
    """Counts the costs of a compiled program.

    Traffic is the compiler's own count of accessed bytes if it has one (TPU), else the operands and results of the
    optimized program's instructions (GPU); loop bodies count as often as they run. Traffic of main memory is counted
    in the program's text, which for a TPU marks the arrays that lie on the chip.
    """
    memory = compiled.memory_analysis()
    program = Program(compiled.as_text())
    own: dict[str, float] = {}
    with contextlib.suppress(NotImplementedError, jax.errors.JaxRuntimeError):  # the compiler has no cost analysis
        own = dict(compiled.cost_analysis() or {})
    repeats = program.traffic() / max(1, program.traffic(once=True))
    inputs_and_outputs = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Costs(
        memory_bytes=inputs_and_outputs + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        flops=own.get("flops") if repeats == 1 else None,
        traffic_bytes=own["bytes accessed"] * repeats if "bytes accessed" in own else program.traffic(),
        memory_traffic_bytes=program.traffic(off_chip=True),
        collectives=tuple(program.collectives()),
    )


def parse_memory_error(message: str) -> tuple[int | None, int | None]:
    """Parses needed and available bytes from a compiler's error message; None for what it does not report.

    Examples: "... for HLO temporaries (19.5G) exceeds available HBM (15.75G)", "Used 20.5G of 15.75G hbm".
    """
    size = r"([\d.]+[KMGT])"
    match = re.search(rf"\({size}\) exceeds(?:[^(]*\({size}\))?", message)
    match = match or re.search(rf"[Uu]sed {size} of(?: {size})?", message)
    if match is None:
        return None, None
    return _parse_size(match[1]), _parse_size(match[2])


def _parse_size(text: str | None) -> int | None:
    """Parses "19.5G" to bytes; None stays None."""
    return None if text is None else round(float(text[:-1]) * 1024 ** ("KMGT".index(text[-1]) + 1))


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
