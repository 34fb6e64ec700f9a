"""How long a small batch takes: this project's networks by JAX and onnxruntime beside PyTorch's, in turns.

    python benchmarks/latency.py --models densenet121 densenet169 --output latency.json

Milliseconds from asking to having the logits, half of all calls (p50) and 99 of 100 (p99) being no slower; a call
begins when the one before has ended. On a GPU: JAX and torch.compile in bfloat16. On a CPU: JAX, PyTorch eager and,
where --onnx_dir holds MODEL.onnx for a model and --onnx_python has onnxruntime, onnxruntime, all in float32.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import subprocess
import sys
from typing import Any

from versus import cases, report
from versus.turns import Contestant, Worker, compete, say

RUNTIMES = {"jax": "densenet_jax", "onnxruntime": None, "torch_eager": "torch_eager", "torch_compile": "torch_compile"}


def contestant(runtime: str, arguments: argparse.Namespace, model: str, batch_size: int) -> Contestant | None:
    """One runtime on one model; None where there is no file for it."""
    if runtime != "onnxruntime":
        found = cases.contestant(RUNTIMES[runtime] or "", arguments, model, batch_size, "infer")
        found.name = runtime
        return found
    path = pathlib.Path(arguments.onnx_dir) / f"{model}.onnx"
    if not arguments.onnx_dir or not path.is_file():
        return None
    like = cases.contestant("densenet_jax", arguments, model, batch_size, "infer").case
    case = {key: like[key] for key in ("batch_size", "image_size_px", "channels")} | {"path": str(path)}
    return Contestant(runtime, functools.partial(Worker, "onnx_worker.py", arguments.onnx_python), case)


def row(contestant: Contestant, model: str, batch_size: int, dtype: str) -> dict[str, Any]:
    """One row; times in milliseconds."""
    found: dict[str, Any] = {"model": model, "batch_size": batch_size, "runtime": contestant.name}
    found |= {"dtype": "float32" if contestant.name == "onnxruntime" else dtype, "p50": None, "p99": None}
    if contestant.error:
        return found | {"error": contestant.error}
    calls = [1000 * secs for turn in contestant.secs for secs in turn]
    p50, p99 = (round(report.percentile(calls, share), 3) for share in (0.5, 0.99))
    low, _, high = report.quartiles([report.percentile(turn, 0.5) * 1000 for turn in contestant.secs])
    spread = [round(low, 3), round(high, 3)]
    return found | {"p50": p50, "p99": p99, "p50_quartiles_over_turns": spread, "calls": len(calls)}


def layout(rows: list[dict[str, Any]], runtimes: list[str]) -> str:
    """A line for each model and batch, a column for each runtime: p50 / p99 in milliseconds."""
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for one in rows:
        line = lines.setdefault((one["model"], one["batch_size"]), {})
        line |= {"model": one["model"], "batch_size": one["batch_size"]}
        line[one["runtime"]] = f"{one['p50']:.2f} / {one['p99']:.2f}" if one["p50"] is not None else one["error"]
    columns = {"model": "model", "batch_size": "batch"} | {name: f"{name}, ms p50 / p99" for name in runtimes}
    return report.table(list(lines.values()), columns)


def importable(interpreter: str, module: str) -> bool:
    """Whether an interpreter has a module."""
    return subprocess.run([interpreter, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["all"], help="names of the variants table, or 'all'")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, help="default: those that belong to the device")
    parser.add_argument(
        "--onnx_dir", default="", help="where MODEL.onnx lie, as --mode export --format onnx writes them"
    )
    parser.add_argument("--onnx_python", default=sys.executable, help="an interpreter that has onnxruntime")
    parser.add_argument("--turns", type=int, default=5, help="turns of each runtime")
    parser.add_argument("--turn_secs", type=float, default=2.0, help="least length of a turn")
    cases.add_arguments(parser)
    arguments = parser.parse_args()
    on_gpu = cases.has_gpu()
    arguments.dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
    usual = ["jax", "torch_compile"] if on_gpu else ["jax", "onnxruntime", "torch_eager"]
    arguments.runtimes = arguments.runtimes or usual
    if "onnxruntime" in arguments.runtimes and not importable(arguments.onnx_python, "onnxruntime"):
        say(f"{arguments.onnx_python} has no onnxruntime: it is left out")
        arguments.runtimes.remove("onnxruntime")
    arguments.models = cases.all_models(arguments.models)
    return arguments


def main() -> None:
    """Measures and prints."""
    arguments = parse()
    rows: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    device = ""
    for model in arguments.models:
        for batch_size in arguments.batch_sizes:
            say(f"{model}, batch {batch_size}")
            found = [one for name in arguments.runtimes if (one := contestant(name, arguments, model, batch_size))]
            compete(found, arguments.turns, arguments.turn_secs)
            rows += [row(one, model, batch_size, arguments.dtype) for one in found]
            versions |= cases.versions_of(found)
            device = device or next((one.prepared["device"] for one in found if one.prepared), "")
    print(layout(rows, arguments.runtimes))
    if arguments.output:
        report.write(arguments.output, report.device_name(device), versions, rows)


if __name__ == "__main__":
    main()
