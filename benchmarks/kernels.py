"""Compares the GPU's kernels with their references on the chip: differences of results, and times by turns.

    python benchmarks/kernels.py --output kernels.json
    python benchmarks/kernels.py --candidates --output kernels.json

With --candidates it is the kernels of versus/gpu_candidates.py, and the forward kernel with other tiles, beside the
package's: all are compiled at the same time, and each is timed in a program of ten calls, one after another.

The shapes are those of densenet121's dense layers at batch 256. `difference` is the largest over all results of the
norm of the difference by the norm of the reference's result; it is bfloat16's rounding where all is right. On a CPU
the kernels are interpreted, with tiny shapes, which tries this program and no speed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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


def candidates(tiny: bool) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """Yields operation, what is tried, and a function of (what is written into, x, scale, bias, kernel, ...).

    The operations are forward, backward, and "norm": backward with the norm and ReLU behind, whose gradient XLA
    computes before the package's kernels. "package" is what the others are compared with.
    """
    import jax
    from versus import gpu_candidates as tried

    from densenet_jax.kernels.gpu.norm_relu_matmul import norm_relu_matmul
    from densenet_jax.kernels.gpu.norm_relu_matmul_gradients import add_gradients
    from densenet_jax.kernels.gpu.tiles import Tile

    options: dict[str, Any] = {"interpret": True} if tiny else {}
    backward = functools.partial(add_gradients.kernel, **options)

    def forward(_: Any, *operands: Any, tile: Tile | None = None) -> Any:
        return norm_relu_matmul.kernel(*operands, tile=tile, **options)

    def norm(*operands: Any) -> Any:
        *others, gradient, bottleneck, arrays = operands
        return backward(*others, jax.lax.optimization_barrier(tried.grad_before_norm(gradient, bottleneck, arrays)))

    yield from (("forward", "package", forward), ("backward", "package", backward), ("norm", "package", norm))
    for sides in () if tiny else tried.FORWARD_CHOICES:
        name = "tile {}x{}, {} warps, {} stages".format(*sides[:2], *sides[3:])
        yield "forward", name, functools.partial(forward, tile=Tile(*sides))
    for operation, choices in (("backward", tried.CHOICES), ("norm", tried.NORM_CHOICES)):
        for choice in ((16, 16, 4, 2, 1),) if tiny else choices:
            for form in tried.FORMS:
                name = "{}, tile {}x{}, {} warps, {} stages, {} programs".format(form, *choice)
                yield operation, name, functools.partial(tried.add_gradients, form=form, choice=choice, **options)


def repeat(function: Callable[..., Any], calls: int) -> Any:
    """Makes a program of many calls of a candidate, each of which waits for the results of the one before."""
    import jax
    import jax.numpy as jnp

    def run(written: Any, x: Any, scale: Any, *others: Any) -> Any:
        def call(_: Any, carry: Any) -> Any:
            written, waits = carry
            written, *results = function(written, x, scale + waits, *others)
            return written, 1e-30 * sum(jnp.sum(result) for result in results)

        return jax.lax.fori_loop(0, calls, call, (written, jnp.float32(0)))

    return jax.jit(run)


def measure_candidates(rows: int, channels: int, turns: int, tiny: bool) -> list[dict[str, Any]]:
    """Compiles all candidates for one shape at the same time, times each and compares it with the reference."""
    import jax
    from versus import gpu_candidates as tried

    from densenet_jax.kernels.gpu.norm_relu_matmul import norm_relu_matmul
    from densenet_jax.kernels.gpu.norm_relu_matmul_gradients import add_gradients

    outputs, calls = (16, 2) if tiny else (OUTPUTS, 10)
    read, shift, (total, gradient) = draw_operands(rows, channels, outputs)
    norm = (gradient, gradient[::-1], tried.draw_norm(outputs))
    operands = {
        "forward": (gradient, *read, shift),
        "backward": (total, *read, gradient),
        "norm": (total, *read, *norm),
    }
    backward = jax.jit(add_gradients.reference)
    references = {
        "forward": jax.jit(norm_relu_matmul.reference)(*read, shift),
        "backward": backward(total, *read, gradient),
        "norm": backward(total, *read, tried.grad_before_norm(*norm)),
    }

    def compile_both(candidate: tuple[str, str, Callable[..., Any]]) -> Any:
        operation, _, function = candidate
        try:
            programs = repeat(function, calls), jax.jit(function)
            return [program.lower(*operands[operation]).compile() for program in programs]
        except Exception as error:  # another tile may fit
            return error

    everyone = list(candidates(tiny))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = list(pool.map(compile_both, everyone))
    made = []
    for (operation, name, _), compiled in zip(everyone, programs, strict=True):
        row = {"operation": operation, "rows": rows, "channels": channels, "implementation": name}
        try:
            if isinstance(compiled, Exception):
                raise compiled
            repeated, once = compiled
            apart = difference(once(*operands[operation]), references[operation])
            times = []
            for _ in range(turns + 1):  # the first is not counted
                began = time.perf_counter()
                jax.block_until_ready(repeated(*operands[operation]))
                times.append(1e6 * (time.perf_counter() - began) / calls)
            low, middle, high = report.quartiles(times[1:])
            row |= {"microseconds": round(middle, 1), "quartiles": [round(low, 1), round(high, 1)]}
            row |= {"difference": float(f"{apart:.3g}")}
        except Exception as error:
            row |= {"error": f"{type(error).__name__}: {error}"[:300]}
        made.append(row)
    return sorted(made, key=lambda one: (one["operation"], one.get("microseconds", float("inf"))))


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--candidates", action="store_true", help="measure kernels and tiles that might be faster")
    parser.add_argument("--output", help="write the rows to this JSON file")
    parser.add_argument("--resume", action="store_true", help="keep the rows of --output and measure the others")
    return parser.parse_args()


def main() -> None:
    """Measures and prints; a kernel that fails is a row with its error."""
    import jax

    arguments = parse()
    tiny = jax.default_backend() != "gpu"
    rows = report.Rows(arguments.output, arguments.resume)
    shapes = TINY if tiny else SHAPES
    operations = ("candidates",) if arguments.candidates else ("forward", "backward")
    for operation, (size, channels) in itertools.product(operations, shapes):
        case = {"operation": "norm" if arguments.candidates else operation, "rows": size, "channels": channels}
        if rows.has(**case):
            continue
        say(f"{operation}, {size} rows, {channels} channels")
        try:
            if arguments.candidates:
                measured = measure_candidates(size, channels, arguments.turns, tiny)
            else:
                measured = measure(operation, size, channels, arguments.turns, tiny)
        except Exception as error:  # the others are worth their time on the chip
            measured = [{**case, "implementation": "kernel", "error": f"{type(error).__name__}: {error}"[:300]}]
        rows.add(measured, {"jax": jax.__version__}, jax.devices()[0].device_kind)
    print(report.table([row | {"difference": str(row.get("difference", "-"))} for row in rows.rows], COLUMNS))


if __name__ == "__main__":
    main()
