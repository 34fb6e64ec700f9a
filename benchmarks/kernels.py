"""Compares the GPU's kernels with their references on the chip: differences of results, and times by turns.

    python benchmarks/kernels.py --output kernels.json

The shapes are those of densenet121's dense layers at batch 256. `difference` is the largest over all results of the
norm of the difference by the norm of the reference's result; it is bfloat16's rounding where all is right. On a CPU
the kernels are interpreted, with tiny shapes, which tries this program and no speed.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from versus import report
from versus.turns import say

SHAPES = ((802_816, 160), (200_704, 320), (50_176, 640), (12_544, 768))  # rows, channels read
TINY = ((64, 32), (33, 19))
OUTPUTS = 128
COLUMNS = {"operation": "operation", "rows": "rows", "channels": "channels", "implementation": "implementation",
           "microseconds": "us", "difference": "difference", "error": "error"}  # fmt: skip


def draw_operands(rows: int, channels: int, outputs: int) -> tuple[Any, ...]:
    """Draws (x, scale, bias, kernel), shift and (total, gradient) on the device."""
    import jax
    import jax.numpy as jnp

    keys = iter(jax.random.split(jax.random.key(0), 7))

    def draw(*sizes: int, kind: Any = jnp.bfloat16) -> Any:
        return jax.random.normal(next(keys), sizes, jnp.float32).astype(kind)

    wide = jnp.float32
    read = draw(rows, channels), draw(channels, kind=wide), draw(channels, kind=wide), draw(channels, outputs)
    return read, draw(outputs, kind=wide), (draw(rows, channels), draw(rows, outputs))


def difference(kernel: Any, reference: Any) -> float:
    """Returns the largest relative norm of the difference over all results."""
    import jax
    import jax.numpy as jnp

    def one(a: Any, b: Any) -> float:
        a, b = (jnp.asarray(array, jnp.float32) for array in (a, b))
        return float(jnp.linalg.norm(a - b) / jnp.maximum(jnp.linalg.norm(b), 1e-30))

    return max(map(one, jax.tree.leaves(kernel), jax.tree.leaves(reference)))


def measure(operation: str, rows: int, channels: int, turns: int, tiny: bool) -> list[dict[str, Any]]:
    """Runs kernel and reference on one shape by turns and returns a row of each."""
    import jax

    from densenet_jax.kernels.gpu.norm_relu_matmul import norm_relu_matmul
    from densenet_jax.kernels.gpu.norm_relu_matmul_gradients import add_gradients

    read, shift, (total, gradient) = draw_operands(rows, channels, 16 if tiny else OUTPUTS)
    chosen = norm_relu_matmul if operation == "forward" else add_gradients
    arrays = (*read, shift) if operation == "forward" else (total, *read, gradient)
    options = {"interpret": True} if tiny else {}
    programs = {"kernel": jax.jit(functools.partial(chosen.kernel, **options)), "reference": jax.jit(chosen.reference)}
    results = {name: jax.block_until_ready(program(*arrays)) for name, program in programs.items()}
    times: dict[str, list[float]] = {name: [] for name in programs}
    calls = 1 if tiny else 20
    for _ in range(turns):
        for name, program in programs.items():
            began = time.perf_counter()
            for _ in range(calls):
                result = program(*arrays)
            jax.block_until_ready(result)
            times[name].append(1e6 * (time.perf_counter() - began) / calls)
    apart = difference(results["kernel"], results["reference"])
    made = []
    for name, secs in times.items():
        low, middle, high = report.quartiles(secs)
        row = {"operation": operation, "rows": rows, "channels": channels, "implementation": name}
        row |= {"microseconds": round(middle, 1), "quartiles": [round(low, 1), round(high, 1)]}
        made.append(row | ({"difference": float(f"{apart:.3g}")} if name == "kernel" else {}))
    return made


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--output", help="write the rows to this JSON file")
    parser.add_argument("--resume", action="store_true", help="keep the rows of --output and measure the others")
    return parser.parse_args()


def main() -> None:
    """Measures and prints; a kernel that fails is a row with its error."""
    import jax

    arguments = parse()
    tiny = jax.default_backend() != "gpu"
    rows = report.Rows(arguments.output, arguments.resume)
    for operation in ("forward", "backward"):
        for size, channels in TINY if tiny else SHAPES:
            case = {"operation": operation, "rows": size, "channels": channels}
            if rows.has(**case):
                continue
            say(f"{operation}, {size} rows, {channels} channels")
            try:
                measured = measure(operation, size, channels, arguments.turns, tiny)
            except Exception as error:  # the others are worth their time on the chip
                measured = [{**case, "implementation": "kernel", "error": f"{type(error).__name__}: {error}"[:300]}]
            rows.add(measured, {"jax": jax.__version__}, jax.devices()[0].device_kind)
    print(report.table([row | {"difference": str(row.get("difference", "-"))} for row in rows.rows], COLUMNS))


if __name__ == "__main__":
    main()
