"""Training steps and inference of this project's networks beside PyTorch's on the same device, in turns.

    python benchmarks/train_step.py --models densenet121 --batch_sizes 16 --output train_step.json

Every implementation is a process of its own; they take turns, and all do the same: forward, backward and an update of
SGD with momentum on one batch that lies on the device (train), or logits of it (infer). PyTorch runs channels last, on
a GPU under bfloat16 autocast. PyTorch may live elsewhere than JAX: --torch_python names its interpreter. A batch that
does not fit is told as such. peak_bytes is the device allocator's, on a CPU the process's. Images a second of processor
time are told as well: on a CPU they hold while the machine has other work.
"""

from __future__ import annotations

import argparse
from typing import Any

from versus import cases, report
from versus.turns import Contestant, compete, say

COLUMNS = {
    "model": "model",
    "batch_size": "batch",
    "dtype": "dtype",
    "mode": "mode",
    "implementation": "implementation",
    "images_per_sec": "images/s",
    "quartiles_text": "quartiles",
    "images_per_cpu_sec": "images/cpu-s",
    "peak_mib": "peak MiB",
    "compile_secs": "compile s",
    "error": "error",
}


def row(contestant: Contestant) -> dict[str, Any]:
    """One row of the table."""
    case = contestant.case
    found: dict[str, Any] = {key: case[key] for key in ("model", "batch_size", "dtype")}
    found |= {"implementation": contestant.name, "mode": case["mode"], "image_size_px": case["image_size_px"]}
    found |= {"images_per_sec": None, "peak_bytes": None, "compile_secs": None}
    if contestant.error:
        return found | {"error": contestant.error}
    rates = [case["batch_size"] * len(turn) / sum(turn) for turn in contestant.secs]
    steps = [len(turn) for turn in contestant.secs]
    processor = [case["batch_size"] * n / secs for n, secs in zip(steps, contestant.processor_secs, strict=True)]
    low, middle, high = report.quartiles(rates)
    return found | {
        "images_per_sec": round(middle, 3),
        "quartiles": [round(low, 3), round(high, 3)],
        "images_per_cpu_sec": round(report.quartiles(processor)[1], 3),
        "turns": len(rates),
        "interleaved": contestant.interleaved,
        "peak_bytes": contestant.peak_bytes,
        "compile_secs": round(contestant.prepared["compile_secs"], 2),
    }


def shown(one: dict[str, Any]) -> dict[str, Any]:
    """A row as the table tells it."""
    spread = one.get("quartiles")
    return one | {
        "quartiles_text": f"{spread[0]:,.1f}-{spread[1]:,.1f}" if spread else None,
        "peak_mib": one["peak_bytes"] and one["peak_bytes"] // 2**20,
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["densenet121"], help="names of the variants table, or 'all'")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[16])
    parser.add_argument("--modes", nargs="+", choices=("train", "infer"), default=["train", "infer"])
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=cases.SCRIPTS,
        help="default: all but kernels (training on a GPU in bfloat16); on a CPU without torch_compile, which takes "
        "minutes and wants a C++ compiler there",
    )
    parser.add_argument("--turns", type=int, default=10, help="turns of each implementation")
    parser.add_argument("--turn_secs", type=float, default=1.0, help="least length of a turn")
    cases.add_arguments(parser)
    arguments = parser.parse_args()
    on_gpu = cases.has_gpu()
    arguments.dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
    left_out = {"kernels"} if on_gpu else {"kernels", "torch_compile"}
    usual = [name for name in cases.SCRIPTS if name not in left_out]
    arguments.implementations = arguments.implementations or usual
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
            for mode in arguments.modes:
                say(f"{model}, batch {batch_size}, {mode}")
                found = [
                    cases.contestant(name, arguments, model, batch_size, mode) for name in arguments.implementations
                ]
                compete(found, arguments.turns, arguments.turn_secs)
                cases.check_platforms(found)
                rows += [row(one) for one in found]
                versions |= cases.versions_of(found)
                device = device or next((one.prepared["device"] for one in found if one.prepared), "")
    print(report.table([shown(one) for one in rows], COLUMNS))
    if arguments.output:
        report.write(arguments.output, report.device_name(device), versions, rows)


if __name__ == "__main__":
    main()
