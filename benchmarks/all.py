"""Measures all that this machine can measure, and draws one page of all results.

    python benchmarks/all.py --torch_python PYTHON_WITH_TIMM

The tasks below run one after the other; each is one of the other benchmarks, in which the compared programs take turns.
What a task lacks is printed and the task left out. Results lie in --results, a file for each task and kind of machine.
A task that was stopped goes on where it was, and a whole file is not measured again; with --again it is, and the old
file is kept under its date, to compare with. A ratio that fell by more than its spread since the last result of the
same kind of machine is printed; with --fail_on_fall the exit status is then 4. --page_only measures nothing.

On a GPU the tasks stand in the order in which they are worth their time: --minutes 12 begins none later, and ends the
last one there. --dry_run prints the commands alone, with --platform gpu those of a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import time
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from versus import cases, charts, report, results  # noqa: E402
from versus.turns import say  # noqa: E402

FELL, FAILED = 4, 1  # exit statuses
DEPTHS = ("densenet121", "densenet169", "densenet201", "densenet264")


@dataclass(frozen=True)
class Task:
    """One command.

    Attributes:
        name: of its result file, which begins with its program's.
        needs: modules that this interpreter must have.
        resumes: whether its program goes on with the rows of a stopped run.
    """

    name: str
    script: str
    flags: tuple[str, ...]
    needs: tuple[str, ...] = ()
    resumes: bool = True


def _train(name: str, models: tuple[str, ...], *flags: str) -> Task:
    return Task(f"train_step_{name}", "train_step", ("--models", *models, *flags))


_GROWTH = ("--modes", "train", "--turns", "6", "--implementations", "densenet_jax", "torch_eager")
_TRAFFIC = ("--models", *DEPTHS, "--forms", "densenet_jax", "plain")
_COMPILED = ("--together", "--turns", "6")
TASKS = {
    "cpu": (
        Task("latency", "latency", ("--models", "densenet121", "dpn68", "rdnet_tiny")),
        _train("few", ("densenet121", "dpn68"), "--batch_sizes", "4"),
        Task("serving", "serving", ("--model", "densenet_bc_22_12", "--image_size_px", "8", "--channels", "1"),
             ("aiohttp", "grpc", "tritonclient"), resumes=False),
        Task("input_pipeline", "input_pipeline", (), ("skimage",), resumes=False),
        _train("depth", DEPTHS, "--batch_sizes", "4", *_GROWTH),
        _train("size", ("densenet121",), "--batch_sizes", "4", "--image_size_px", "160", "224", "320", *_GROWTH),
        _train("batch", ("densenet121",), "--batch_sizes", "1", "2", "4", "8", "16", *_GROWTH),
        Task("traffic_h200", "traffic", ("--target", "h200", *_TRAFFIC), ("jax_plugins.xla_cuda12",)),
        Task("traffic_v5e", "traffic", ("--target", "v5e", "--models", "densenet121"), ("libtpu",)),
    ),
    "gpu": (
        Task("kernels", "kernels", ()),
        _train("densenet121", ("densenet121",), "--batch_sizes", "256", *_COMPILED),
        Task("kernels_candidates", "kernels", ("--candidates",)),
        _train("others", ("densenet161", "densenet201", "dpn68", "rdnet_tiny"), "--batch_sizes", "128", *_COMPILED,
               "--modes", "train", "--implementations", "densenet_jax", "torch_compile"),
        _train("limit", ("densenet121",), "--batch_sizes", "512", "--to_the_limit", *_COMPILED, "--modes", "train",
               "--implementations", "densenet_jax", "torch_eager"),
        _train("batch", ("densenet121",), "--batch_sizes", "4", "8", "32", *_COMPILED, "--implementations",
               "densenet_jax", "torch_eager"),
    ),
}  # fmt: skip


def path_of(task: Task, device: str, directory: pathlib.Path) -> pathlib.Path:
    """Returns a task's result file for a kind of machine."""
    kind = re.sub(r"\((r|tm)\)|[^a-z0-9]+", "_", device.lower())
    return directory / f"{task.name}_{re.sub('__+', '_', kind).strip('_')}.json"


def command_of(task: Task, arguments: argparse.Namespace, output: pathlib.Path) -> list[str]:
    """Returns the command that measures a task into a file."""
    interpreters = {
        "train_step": ("torch_python",),
        "latency": ("torch_python", "onnx_python", "openvino_python"),
        "input_pipeline": ("tensorflow_python",),
    }
    flags = [*task.flags, *(("--resume",) if task.resumes else ()), "--output", str(output)]
    for name in interpreters.get(task.script, ()):
        if path := getattr(arguments, name):
            flags += [f"--{name}", path]
    return [sys.executable, str(ROOT / "benchmarks" / f"{task.script}.py"), *flags]


def lacking(task: Task) -> list[str]:
    """Lists the modules that a task needs and this interpreter lacks."""

    def is_there(module: str) -> bool:
        try:
            return importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # of its package
            return False

    return [module for module in task.needs if not is_there(module)]


def measure(task: Task, arguments: argparse.Namespace, device: str, secs: float | None) -> bool:
    """Runs a task unless its result is there; returns whether it did not fail.

    The file gets its name when it is whole: until then it ends in .part.
    """
    whole = path_of(task, device, arguments.results)
    partial = whole.with_suffix(".json.part")
    if whole.exists() and not arguments.again and not partial.exists():
        say(f"{task.name}: {whole.name} is there")
        return True
    if missing := lacking(task):
        say(f"{task.name} is left out: this interpreter has no {' and no '.join(missing)}")
        return True
    command = command_of(task, arguments, partial)
    say(f"{task.name}: {' '.join(command[1:])}")
    if arguments.dry_run:
        return True
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    try:
        status = subprocess.run(command, env=environment, timeout=secs, check=False).returncode
    except subprocess.TimeoutExpired:
        say(f"{task.name} was stopped: its time is up; what it has measured is in {partial.name}")
        return True
    if status or not partial.exists():
        say(f"{task.name} failed with exit status {status}")
        return False
    if whole.exists():
        date = next(one.date for one in results.read_results(whole.parent)[0] if one.path == whole)
        whole.rename(whole.with_name(f"{whole.stem}_{re.sub('[^0-9T]', '', date)[:15]}.json"))
    partial.rename(whole)
    return True


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", metavar="TASK", help="measure these tasks alone; a task's name or its start"
    )
    parser.add_argument("--again", action="store_true", help="measure what is there as well")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing later, and end there")
    parser.add_argument("--platform", choices=tuple(TASKS), help="default: what JAX finds")
    parser.add_argument("--dry_run", action="store_true", help="print the commands alone")
    parser.add_argument("--page_only", action="store_true", help="draw the page and compare; measure nothing")
    parser.add_argument("--fail_on_fall", action="store_true", help=f"exit with {FELL} if a ratio fell")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "benchmarks" / "results", help="directory")
    parser.add_argument(
        "--workdir", default="runs/benchmarks", help="writes the page to WORKDIR/report/benchmarks.html"
    )
    parser.add_argument("--docs", type=pathlib.Path, help="also write the pictures of docs/performance.md here")
    for name in ("torch", "onnx", "openvino", "tensorflow"):
        parser.add_argument(f"--{name}_python", default="", help=f"an interpreter that has {name}")
    return parser.parse_args()


def draw(arguments: argparse.Namespace) -> int:
    """Writes the page, and the documents' pictures where asked; returns how many ratios fell."""
    from densenet_jax.report.page import write_page

    read, faults = results.read_results(arguments.results)
    for fault in faults:
        say(fault)
    content, pictures = charts.build_page(read)
    print(write_page(arguments.workdir, "benchmarks.html", content, pictures))
    if arguments.docs:
        for name, picture in charts.document_figures(read).items():
            (arguments.docs / name).write_bytes(picture)
    fallen = results.falls(results.ratios(read))
    for pair in fallen:
        print(f"fell: {charts.describe_fall(*pair)}")
    return len(fallen)


def main() -> int:
    """Measures, draws and compares; returns the exit status."""
    arguments = parse()
    arguments.results.mkdir(parents=True, exist_ok=True)
    failed = False
    if not arguments.page_only:
        own, name = cases.device()
        platform = arguments.platform or own
        tasks = [
            task
            for task in TASKS.get(platform, ())
            if not arguments.only or task.name.startswith(tuple(arguments.only))
        ]
        if not tasks and platform not in TASKS:
            raise SystemExit(f"error: there are tasks for {' and '.join(TASKS)} alone, not for {platform}")
        if not tasks:
            names = ", ".join(task.name for task in TASKS.get(platform, ()))
            raise SystemExit(
                f"error: no task for {platform} is called {' or '.join(arguments.only)}; there are {names}"
            )
        end = time.monotonic() + 60 * arguments.minutes
        for task in tasks:
            if (left := end - time.monotonic()) <= 0:
                say(f"{task.name} is left out: the time is up")
                continue
            ok = measure(task, arguments, report.device_name(name), None if left == float("inf") else left)
            failed = failed or not ok
    if arguments.dry_run:
        return 0
    fallen = draw(arguments)
    return FAILED if failed else FELL if fallen and arguments.fail_on_fall else 0


if __name__ == "__main__":
    raise SystemExit(main())
