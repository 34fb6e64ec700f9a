"""Measures latency of small batches: this project's networks by JAX, onnxruntime and OpenVINO, and PyTorch's, in turns.

    python benchmarks/latency.py --torch_python PYTHON_WITH_TIMM --onnx_python PYTHON_WITH_THE_EXPORT_EXTRA

Milliseconds from call to logits, at the median (p50) and the 99th percentile (p99); a call begins when the one before
has ended. On a GPU: JAX and torch.compile in bfloat16. On a CPU: JAX, PyTorch eager, onnxruntime and OpenVINO, all in
float32; what an interpreter lacks is left out. jax_bfloat16 and openvino_bfloat16 multiply bfloat16 values, where the
processor can, jax_int8 and onnxruntime_int8 integers. onnxruntime and OpenVINO read MODEL.onnx (MODEL_int8.onnx) of
--onnx_dir, or one that is written for them there, with batch norm folded (calibrated with noise). JAX has the same
weights and images, so that logits are compared: `difference` is the largest relative one to the first of these, and one
above 0.001 is printed.

Without --models all variants are measured, a quarter of a minute to two minutes each on two cores, and as much again to
write an ONNX file. A row is in the file as soon as it is measured, and --resume goes on with the file. A turn lasts
--turn_secs and holds at least one call: slow networks have few calls, which is reported, and the p99 of fewer than
a hundred calls is the slowest of them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from versus import cases, report
from versus.turns import Contestant, KeptWorkers, Worker, compete, say

RUNTIMES = {
    "jax": "densenet_jax",
    "onnxruntime": None,
    "openvino": None,
    "torch_eager": "torch_eager",
    "torch_compile": "torch_compile",
    "jax_bfloat16": "densenet_jax",
    "openvino_bfloat16": None,
    "jax_int8": "densenet_jax",
    "onnxruntime_int8": None,
}
ROUNDED = ("_bfloat16", "_int8")  # ends of names
LARGEST_DIFFERENCE = 1e-3  # of float32 logits from one file to another program
EXPORT_SECS = 600  # in which a file must be written


def contestant(
    runtime: str, arguments: argparse.Namespace, model: str, batch_size: int, workers: KeptWorkers
) -> Contestant:
    """Makes the contestant of one runtime on one model."""
    made = cases.contestant(RUNTIMES[runtime] or "densenet_jax", arguments, model, batch_size, "infer")
    precision = runtime.partition("_")[2] if runtime.endswith(ROUNDED) else "float32"
    if RUNTIMES[runtime] is None:
        python = arguments.openvino_python if runtime.startswith("openvino") else arguments.onnx_python
        made.start = functools.partial(Worker, "onnx_worker.py", python)
        case = {key: made.case[key] for key in ("batch_size", "image_size_px", "channels")}
        path = str(onnx_file(arguments, model, case["image_size_px"], case["channels"], precision == "int8"))
        made.case = case | {"path": path, "runtime": runtime.partition("_")[0], "dtype": "float32"}
    made.case |= {"dtype": precision} if precision != "float32" else {}
    made.name = runtime
    made.start = functools.partial(workers.start, runtime, made.start)
    return made


def onnx_file(
    arguments: argparse.Namespace, model: str, image_size_px: int, channels: int, by_int8: bool = False
) -> pathlib.Path:
    """Returns MODEL.onnx, written first if it is missing; the worker reports one that can't be written."""
    path = pathlib.Path(arguments.onnx_dir) / f"{model}{'_int8' if by_int8 else ''}.onnx"
    if path.exists() or path in arguments.onnx_given_up:
        return path
    say(f"writing {path.name}")
    script = pathlib.Path(__file__).parent / "versus" / "onnx_export.py"
    command = [arguments.onnx_python, str(script), model, str(path)]
    command += ["--image_size_px", str(image_size_px), "--channels", str(channels)]
    command += ["--precision", "int8"] if by_int8 else []
    command += ["--block_sizes", *map(str, arguments.block_sizes)] if arguments.block_sizes else []
    environment = os.environ | {"PYTHONPATH": str(script.parent.parent.parent)}
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=EXPORT_SECS, env=environment, check=True)
    except subprocess.TimeoutExpired:
        say(f"{path.name} was not written within {EXPORT_SECS} seconds")
    except subprocess.CalledProcessError as error:
        say(f"{path.name} can't be written: {error.stderr.strip().rpartition(chr(10))[2]}")
    if not path.exists():
        arguments.onnx_given_up.add(path)
    return path


def row(contestant: Contestant, model: str, batch_size: int) -> dict[str, Any]:
    """Makes one row; times in milliseconds."""
    fields: dict[str, Any] = {"model": model, "batch_size": batch_size, "runtime": contestant.name}
    fields |= {"image_size_px": contestant.case["image_size_px"]}
    fields |= {"dtype": contestant.case["dtype"], "p50": None, "p99": None}
    if contestant.error:
        return fields | {"error": contestant.error}
    calls = [1000 * secs for turn in contestant.secs for secs in turn]
    p50, p99 = (round(report.percentile(calls, share), 3) for share in (0.5, 0.99))
    low, _, high = report.quartiles([report.percentile(turn, 0.5) * 1000 for turn in contestant.secs])
    spread = [round(low, 3), round(high, 3)]
    processor = 1000 * sum(contestant.processor_secs) / len(calls)
    return fields | {
        "p50": p50,
        "p99": p99,
        "p50_quartiles_over_turns": spread,
        "processor_milliseconds": round(processor, 3),
        "calls": len(calls),
        "turns": len(contestant.secs),
    }


def differences(contestants: list[Contestant]) -> dict[str, float]:
    """Returns how much logits differ from those of the first that gives some, relative to the largest of these."""
    samples = {one.name: one.prepared["sample"] for one in contestants if one.prepared.get("sample")}
    if not samples:
        return {}
    first, reference = next(iter(samples.items()))
    scale = max(map(abs, reference))
    return {
        name: max(abs(a - b) for a, b in zip(sample, reference, strict=True)) / scale
        for name, sample in samples.items()
        if name != first
    }


def layout(rows: list[dict[str, Any]]) -> str:
    """Formats the published Markdown table: a line a model, a column for each batch and runtime, p50 in ms."""
    columns = list(dict.fromkeys((row["batch_size"], row["runtime"]) for row in rows))
    columns.sort(key=lambda column: column[0])
    lines = ["| p50, ms | " + " | ".join(f"batch {batch}, {runtime}" for batch, runtime in columns) + " |"]
    lines.append("|" + "---|" * (len(columns) + 1))
    for model in dict.fromkeys(row["model"] for row in rows):
        by_column = {(row["batch_size"], row["runtime"]): row for row in rows if row["model"] == model}
        lines.append("| " + " | ".join([model, *(_cell(by_column.get(column)) for column in columns)]) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or row["p50"] is None:
        return "-"
    return f"{row['p50']:.2f}" if row["p50"] < 100 else f"{row['p50']:.0f}"


def importable(interpreter: str, *modules: str) -> bool:
    """Whether an interpreter can import all modules."""
    code = f"import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, {modules})))"
    return subprocess.run([interpreter, "-c", code], capture_output=True, check=False).returncode == 0


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = cases.comparison_parser(__doc__, models=["all"], batch_sizes=[1, 4, 8], turns=5, turn_secs=0.5)
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, help="default: those that belong to the device")
    parser.add_argument("--onnx_dir", default="", help="where MODEL.onnx lie or are written; default: a temporary one")
    parser.add_argument("--onnx_python", default=sys.executable, help="an interpreter that has the export extra")
    parser.add_argument("--openvino_python", help="an interpreter that has openvino; default: --onnx_python")
    arguments = cases.parse(parser)
    arguments.openvino_python = arguments.openvino_python or arguments.onnx_python
    usual = ["jax", "torch_compile"] if arguments.on_gpu else ["jax", "onnxruntime", "openvino", "torch_eager"]
    arguments.runtimes = arguments.runtimes or usual
    needs = {"onnxruntime": (arguments.onnx_python, "onnxruntime")}
    needs |= {"onnxruntime_int8": needs["onnxruntime"]}
    needs |= dict.fromkeys(("openvino", "openvino_bfloat16"), (arguments.openvino_python, "openvino"))
    needs |= dict.fromkeys(("torch_eager", "torch_compile"), (arguments.torch_python, "torch", "timm", "torchvision"))
    for name in [name for name in arguments.runtimes if name in needs and not importable(*needs[name])]:
        say(f"{needs[name][0]} has no {' and '.join(needs[name][1:])}: {name} is left out")
        arguments.runtimes.remove(name)
    arguments.onnx_given_up = set()
    return arguments


def cpu_library() -> str:
    """Returns the hash that names the CPU kernels behind JAX's rows."""
    code = (
        "from densenet_jax.kernels.cpu.library import target_names as names; "
        "print(next((name.rpartition('_')[2] for name in names().values()), 'none'))"
    )
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.strip()


def main() -> None:
    """Measures and prints."""
    arguments = parse()
    rows, wrong = report.Rows(arguments.output, arguments.resume), list[str]()
    versions = {} if arguments.on_gpu else {"densenet_jax_cpu_library": cpu_library()}
    with contextlib.ExitStack() as stack:
        arguments.onnx_dir = arguments.onnx_dir or stack.enter_context(tempfile.TemporaryDirectory())
        os.makedirs(arguments.onnx_dir, exist_ok=True)
        for model in arguments.models:
            with KeptWorkers() as workers:
                for batch_size in arguments.batch_sizes:
                    case = {"model": model, "batch_size": batch_size}
                    wanted = [name for name in arguments.runtimes if not rows.has(**case, runtime=name)]
                    if not wanted:
                        continue
                    say(f"{model}, batch {batch_size}")
                    contestants = [contestant(name, arguments, model, batch_size, workers) for name in wanted]
                    compete(contestants, arguments.turns, arguments.turn_secs)
                    device = next((one.prepared["device"] for one in contestants if one.prepared), "")
                    apart = differences(contestants) if arguments.dtype == "float32" else {}
                    for name, difference in apart.items():
                        if difference > LARGEST_DIFFERENCE and not name.endswith(ROUNDED):
                            wrong.append(f"{model}, batch {batch_size}: {name}'s logits differ by {difference:.2g}")
                            say(wrong[-1])
                    measured = [row(one, model, batch_size) for one in contestants]
                    for one in measured:
                        one |= {"difference": float(f"{apart[one['runtime']]:.3g}")} if one["runtime"] in apart else {}
                    rows.add(measured, versions | cases.versions_of(contestants), device)
    print(layout(rows.rows))
    if wrong:
        raise SystemExit(f"error: a runtime computes something else than {arguments.runtimes[0]}: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
