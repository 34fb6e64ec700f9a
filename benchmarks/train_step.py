"""Measures training steps and inference of this project's networks beside PyTorch's on the same device, in turns.

    python benchmarks/train_step.py --models densenet121 --batch_sizes 16 --output train_step.json

Every implementation is a process of its own; they take turns, and all do the same: forward, backward and an update of
SGD with momentum on one batch that lies on the device (train), or logits of it (infer). PyTorch runs channels last, on
a GPU under bfloat16 autocast. PyTorch may live elsewhere than JAX: --torch_python names its interpreter. peak_bytes is
the device allocator's, on a CPU the process's. Images a second of processor time are reported as well: on a CPU they
hold while the machine has other work.

Every model is measured at every size, batch and mode that is given: growth with depth is --models densenet121
densenet169 densenet201 densenet264, growth with resolution --image_size_px 160 224 320. A batch that does not fit is
reported as such, and that implementation is not given a larger one; on a GPU, --to_the_limit goes on doubling the last
batch until none fits. Rows are written to --output as they come, so a run that is stopped keeps what it has measured
and --resume goes on with it. --row_secs bounds what one row of a slow machine may take.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

from versus import cases, report
from versus.turns import OUT_OF_MEMORY, Contestant, compete, say

STEPS_A_WAIT = 10  # on a GPU, which works behind the program that feeds it, in training as in a training loop
COLUMNS = {
    "model": "model",
    "image_size_px": "px",
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


def row_of(contestant: Contestant) -> dict[str, Any]:
    """Returns the key that identifies a row."""
    keys = ("model", "batch_size", "dtype", "mode", "image_size_px")
    return {key: contestant.case[key] for key in keys} | {"implementation": contestant.name}


def row(contestant: Contestant) -> dict[str, Any]:
    """Makes one row of the table."""
    case, fields = contestant.case, row_of(contestant)
    fields |= {"images_per_sec": None, "peak_bytes": None, "compile_secs": None}
    if contestant.error:
        return fields | {"error": contestant.error}
    rates = [case["batch_size"] * len(turn) / sum(turn) for turn in contestant.secs]
    steps = [len(turn) for turn in contestant.secs]
    processor = [case["batch_size"] * n / secs for n, secs in zip(steps, contestant.processor_secs, strict=True)]
    low, middle, high = report.quartiles(rates)
    return fields | {
        "images_per_sec": round(middle, 3),
        "quartiles": [round(low, 3), round(high, 3)],
        "images_per_cpu_sec": round(report.quartiles(processor)[1], 3),
        "turns": len(rates),
        "interleaved": contestant.interleaved,
        "peak_bytes": contestant.peak_bytes,
        "compile_secs": round(contestant.prepared["compile_secs"], 2),
    }


def shown(one: dict[str, Any]) -> dict[str, Any]:
    """Formats a row for the table."""
    spread = one.get("quartiles")
    return one | {
        "quartiles_text": f"{spread[0]:,.1f}-{spread[1]:,.1f}" if spread else None,
        "peak_mib": one["peak_bytes"] and one["peak_bytes"] // 2**20,
    }


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = cases.comparison_parser(
        __doc__, models=["densenet121"], batch_sizes=[16], turns=10, turn_secs=1.0, many_sizes=True
    )
    parser.add_argument("--modes", nargs="+", choices=("train", "infer"), default=["train", "infer"])
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=cases.SCRIPTS,
        help="default: all but without_kernels (this project's form in XLA's own operations); on a CPU without "
        "torch_compile as well, which takes minutes and wants a C++ compiler there",
    )
    parser.add_argument(
        "--row_secs",
        type=float,
        default=3600.0,
        help="no round of turns begins later than this after the first, and an implementation that takes longer to be "
        "ready is given up",
    )
    parser.add_argument(
        "--to_the_limit", action="store_true", help="on a GPU: double the last batch until it fits nobody any more"
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="let all compile at the same time; there are no compile times then (PyTorch takes minutes to compile)",
    )
    arguments = cases.parse(parser)
    if arguments.to_the_limit and not arguments.on_gpu:
        raise SystemExit("error: --to_the_limit is for a GPU: a CPU's memory ends by stopping other programs")
    left_out = {"without_kernels"} if arguments.on_gpu else {"without_kernels", "torch_compile"}
    usual = [name for name in cases.SCRIPTS if name not in left_out]
    arguments.implementations = arguments.implementations or usual
    return arguments


def batch_sizes(arguments: argparse.Namespace) -> Iterator[int]:
    """Yields rising batch sizes, without end if memory's limit is looked for."""
    rising = sorted(set(arguments.batch_sizes))
    yield from rising
    if arguments.to_the_limit:
        yield from (rising[-1] * 2**power for power in itertools.count(1))


def measure(arguments: argparse.Namespace, rows: report.Rows, model: str, image_size_px: int, mode: str) -> None:
    """Measures all batch sizes of one model in one mode; a contestant that ran out of memory is left out."""
    sized = argparse.Namespace(**{**vars(arguments), "image_size_px": image_size_px})
    fitting = list(arguments.implementations)
    for batch_size in batch_sizes(arguments):
        everyone = [cases.contestant(name, sized, model, batch_size, mode) for name in fitting]
        missing = [one for one in everyone if not known(rows, one)]
        if missing:
            say(f"{model}, {missing[0].case['image_size_px']} px, batch {batch_size}, {mode}")
            for one in missing:
                one.limit_secs = arguments.row_secs
                one.steps_a_wait = STEPS_A_WAIT if arguments.on_gpu and mode == "train" else 1
            compete(missing, arguments.turns, arguments.turn_secs, arguments.row_secs, arguments.together)
            cases.check_platforms(missing)
            measured = [row(one) for one in missing]
            if arguments.together:
                measured = [one | {"compile_secs": None} for one in measured]
            say(report.table([shown(one) for one in measured], COLUMNS))
            rows.add(measured, cases.versions_of(missing), cases.device()[1])
        fitting = [one.name for one in everyone if not is_full(rows, one)]
        if arguments.to_the_limit:  # any other error would occur with a larger batch as well
            fitting = [one.name for one in everyone if one.name in fitting and not known(rows, one, failed=True)]
        if not fitting:
            say(f"no larger batch of {model} is tried")
            return


def known(rows: report.Rows, contestant: Contestant, *, failed: bool = False) -> bool:
    """Whether there is a row of this case, or one without figures."""
    same = row_of(contestant)
    return any(same.items() <= one.items() and (not failed or "error" in one) for one in rows.rows)


def is_full(rows: report.Rows, contestant: Contestant) -> bool:
    """Whether this case did not fit into memory."""
    return rows.has(**row_of(contestant), error=OUT_OF_MEMORY)


def main() -> None:
    """Measures and prints."""
    arguments = parse()
    rows = report.Rows(arguments.output, arguments.resume)
    try:
        for model in arguments.models:
            for image_size_px in arguments.image_size_px:
                for mode in arguments.modes:
                    measure(arguments, rows, model, image_size_px, mode)
    except KeyboardInterrupt:
        say("stopped")
    print(report.table([shown(one) for one in rows.rows], COLUMNS))


if __name__ == "__main__":
    main()
