"""A step compiled for absent chips, and what it costs each of them."""

import dataclasses
import re
from typing import Any

import jax

from densenet_jax.plan.hlo import Collective, Program


class DoesNotFitError(Exception):
    """The compiler found no way to run the program in a chip's memory.

    Attributes:
        needed_bytes: what it would take; None where the compiler does not tell.
        limit_bytes: what there is by the compiler's account, which keeps a part of the memory; None as above.
    """

    def __init__(self, needed_bytes: int | None, limit_bytes: int | None = None) -> None:
        super().__init__(f"needs {needed_bytes} bytes of {limit_bytes}")
        self.needed_bytes, self.limit_bytes = needed_bytes, limit_bytes


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one run of a compiled program costs one chip.

    Attributes:
        memory_bytes: at the fullest: arguments, results, temporaries and the program; donated memory counts once.
        temp_bytes: of temporaries alone.
        flops: operations; None where the compiler does not tell.
        traffic_bytes: that instructions read and write, in memory on the chip itself as well.
        memory_traffic_bytes: of these, what goes between the chip and its main memory.
        collectives: transfers between chips.
    """

    memory_bytes: int
    temp_bytes: int
    flops: float | None
    traffic_bytes: float
    memory_traffic_bytes: float
    collectives: tuple[Collective, ...]


def compile_costs(lowered: jax.stages.Lowered) -> Costs:
    """Compiles a lowered program and counts.

    Bytes are the compiler's own count of what it accesses where it tells (TPU), else the operands and results of the
    optimised program's instructions (GPU); the bodies of loops count as often as they run. Those of main memory are
    counted in the program's text, where a TPU's tells what lies on the chip.

    Raises:
        DoesNotFitError: a chip's memory is too small for it.
    """
    try:
        compiled: Any = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFitError(*told_bytes(str(error))) from error
    memory = compiled.memory_analysis()
    program = Program(compiled.as_text())
    own = _own_analysis(compiled)
    repeats = program.traffic() / max(1, program.traffic(once=True))
    return Costs(
        memory_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        flops=own.get("flops") if repeats == 1 else None,
        traffic_bytes=own["bytes accessed"] * repeats if "bytes accessed" in own else program.traffic(),
        memory_traffic_bytes=program.traffic(off_chip=True),
        collectives=tuple(program.collectives()),
    )


def _own_analysis(compiled: Any) -> dict[str, float]:
    """XLA's cost analysis, empty where the compiler has none."""
    try:
        return dict(compiled.cost_analysis() or {})
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return {}


def told_bytes(message: str) -> tuple[int | None, int | None]:
    """The needed and the available bytes in a compiler's complaint; None for what it does not tell.

    It may be "... for HLO temporaries (19.5G) exceeds available HBM (15.75G)" or "Used 20.5G of 15.75G hbm".
    """
    size = r"([\d.]+[KMGT])"
    found = re.search(rf"\({size}\) exceeds(?:[^(]*\({size}\))?", message)
    found = found or re.search(rf"[Uu]sed {size} of(?: {size})?", message)
    if found is None:
        return None, None
    return _bytes_of(found[1]), _bytes_of(found[2])


def _bytes_of(text: str | None) -> int | None:
    """The bytes of "19.5G"; None of None."""
    return None if text is None else round(float(text[:-1]) * 1024 ** ("KMGT".index(text[-1]) + 1))
