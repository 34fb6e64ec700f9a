"""Counts bytes moved and temporaries of a training step on chips that are not there, as their compilers see them.

    python benchmarks/traffic.py --models densenet121 --batch_sizes 128 --target v5e --output traffic_v5e.json

Each row compiles forward, backward and an update of SGD with momentum for one chip: the fused dense block, and the
plain one (concatenate, batch norm, ReLU, convolution, autodiff). It reports all bytes that instructions read and write,
those of them that go between the chip and its main memory (a TPU's program keeps feature maps on the chip where they
fit), and the floor: the bytes that must be moved, by counting. `--target h200` needs requirements-plan-gpu.txt, the
TPUs need requirements-plan.txt. Growth with depth: --models densenet121 densenet169 densenet201 densenet264; with
resolution: --image_size_px 160 224 320. Compiling densenet121 for a TPU takes minutes. Rows are written to --output as
they come; --resume goes on with those that are missing. --by_stage compiles each stage of an RDNet as a network of its
own, behind a stem that gives it the width it has in the whole: a TPU's compiler takes too long for that. --largest 20
also says which operations of the traced program move most, by our own count of the compiled program's text; TPU
compilers count copies between memories twice.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

from versus import report
from versus.cases import all_models
from versus.turns import say

FORMS = ("densenet_jax", "plain")
KERNELS = {"without_kernels": "xla", "with_kernels": "pallas"}
COLUMNS = {
    "model": "model",
    "stage": "stage",
    "batch_size": "batch",
    "image_size_px": "px",
    "target": "target",
    "form": "form",
    "megabytes_per_image": "MB/image",
    "memory_megabytes_per_image": "of these in memory",
    "temp_mib": "temporaries MiB",
    "floor_megabytes": "floor MB/image",
    "times_floor": "times floor",
    "error": "error",
}
LARGEST = {"moved": "MB/image", "off_chip": "of these in memory", "number": "number", "kind": "kind", "path": "from"}


def one_stage(model: str, stage: int) -> dict[str, Any]:
    """Returns the overrides of `create_model` that leave one stage of an RDNet, counted from 0."""
    from densenet_jax.models.rdnet import round_width
    from densenet_jax.models.variants import RDNetArchitecture, get_variant

    whole = get_variant(model).architecture
    if not isinstance(whole, RDNetArchitecture):
        raise SystemExit(f"error: --by_stage is for RDNets, not {model}")
    features = whole.stem_width
    for size, growth_rate in zip(whole.block_sizes[:stage], whole.growth_rate, strict=False):
        features = round_width((features + size * growth_rate) * whole.compression)
    halvings = sum(index <= stage for index in whole.halved_stages)
    return {
        "block_sizes": (whole.block_sizes[stage],),
        "growth_rate": (whole.growth_rate[stage],),
        "halved_stages": (),
        "squeeze_excite_from": int(stage < whole.squeeze_excite_from),
        "stem_width": features,
        "patch_px": whole.patch_px * 2**halvings,
    }


def make_step(network: Any, optimizer: Any) -> Callable[..., Any]:
    """Makes a training step: (variables, momentum, images, labels) to new variables and momentum."""
    import jax
    import optax

    def step(variables: Any, momentum: Any, images: Any, labels: Any) -> Any:
        def loss_of(params: Any) -> Any:
            arrays = {**variables, "params": params}
            logits, new = network.apply(arrays, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

        gradients, new = jax.grad(loss_of, has_aux=True)(variables["params"])
        updates, momentum = optimizer.update(gradients, momentum, variables["params"])
        return {**new, "params": optax.apply_updates(variables["params"], updates)}, momentum

    return step


def measure(
    model: str,
    batch_size: int,
    image_size_px: int,
    dtype: str,
    form: str,
    target: str,
    largest: int = 0,
    stage: int | None = None,
) -> dict[str, Any]:
    """Compiles one training step in this process, which must have `compilers.ENVIRONMENT`."""
    import jax
    import jax.numpy as jnp
    import optax

    import densenet_jax
    from densenet_jax.errors import UserError
    from densenet_jax.plan.compilers import one_chip_mesh
    from densenet_jax.plan.costs import DoesNotFitError, compile_program, count_costs
    from densenet_jax.plan.hlo import Program
    from densenet_jax.plan.topology import find_chip
    from densenet_jax.training import sharding

    platform = "tpu" if find_chip(target).compiler == "tpu" else "gpu"  # JAX itself runs on this machine's CPU
    block_form = "plain" if form == "plain" else f"normalize_once_{platform}"
    optimizer = optax.sgd(0.01, momentum=0.9)
    try:
        mesh = one_chip_mesh(target)
        everywhere = sharding.replicated(mesh)
        network = densenet_jax.create_model(
            model,
            dtype=jnp.dtype(dtype),
            block_form=block_form,
            kernels=KERNELS.get(form, "auto"),
            mesh=mesh,
            **({} if stage is None else one_stage(model, stage)),
        )
        image = jnp.zeros((1, image_size_px, image_size_px, 3))
        variables = jax.eval_shape(lambda: network.init(jax.random.key(0), image))
        momentum = jax.eval_shape(optimizer.init, variables["params"])
        images = jax.ShapeDtypeStruct((batch_size, *image.shape[1:]), jnp.dtype(dtype))
        labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
        shapes = sharding.with_sharding((variables, momentum, images, labels), everywhere)
        compiled = compile_program(jax.jit(make_step(network, optimizer), donate_argnums=(0, 1)).lower(*shapes))
    except DoesNotFitError as full:
        return nothing("does not fit") | {"temp_bytes": full.needed_bytes}
    except UserError as mistake:
        return {"mistake": str(mistake)}
    costs = count_costs(compiled)
    moves = Program(compiled.as_text()).moves()[:largest] if largest else None
    return ({"largest": moves} if moves else {}) | {
        "bytes_per_image": round(costs.traffic_bytes / batch_size),
        "memory_bytes_per_image": round(costs.memory_traffic_bytes / batch_size),
        "temp_bytes": costs.temp_bytes,
    }


def nothing(error: str) -> dict[str, Any]:
    """Makes the row of a case that failed."""
    return {"bytes_per_image": None, "memory_bytes_per_image": None, "temp_bytes": None, "error": error}


def run_child(case: dict[str, Any]) -> dict[str, Any]:
    """Runs one measurement in a process of its own: compilers print, and may crash."""
    from densenet_jax.plan.compilers import ENVIRONMENT

    root = str(pathlib.Path(__file__).resolve().parent.parent)
    search = {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, __file__, "--measure", json.dumps(case)]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT | search, capture_output=True, text=True, check=False)
    if done.returncode:
        return nothing((done.stderr.strip().splitlines() or ["?"])[-1])
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "mistake" in row:
        raise SystemExit(f"error: {row['mistake']}")
    return row


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Formats a row for the table."""
    moved, in_memory, floor = row["bytes_per_image"], row["memory_bytes_per_image"], row["floor_bytes_per_image"]
    return row | {
        "megabytes_per_image": moved and moved / 1e6,
        "memory_megabytes_per_image": in_memory and in_memory / 1e6,
        "temp_mib": row["temp_bytes"] and row["temp_bytes"] // 2**20,
        "floor_megabytes": floor and floor / 1e6,
        "times_floor": moved / floor if moved and floor else None,
    }


def largest(batch_size: int, kind: str, path: str, number: int, moved: int, off_chip: int) -> dict[str, Any]:
    """Formats a sum of instructions for the table."""
    moved_mb, off_chip_mb = (size / batch_size / 1e6 for size in (moved, off_chip))
    return {"moved": moved_mb, "off_chip": off_chip_mb, "number": number, "kind": kind, "path": path}


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["densenet121"], help="names of the variants table, or 'all'")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[128])
    parser.add_argument("--image_size_px", type=int, nargs="+", default=[224])
    parser.add_argument("--target", nargs="+", default=["v5e"], help="chips: v4, v5e, v5p, v6e, h100, h200")
    parser.add_argument(
        "--forms",
        nargs="+",
        choices=(*FORMS, *KERNELS),
        default=list(FORMS),
        help="without_kernels, with_kernels: this project's form with config.model.kernels=xla and =pallas",
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--output", help="write the rows to this JSON file")
    parser.add_argument("--resume", action="store_true", help="keep the rows of --output and compile the others")
    parser.add_argument("--by_stage", action="store_true", help="compile the stages of an RDNet apart")
    parser.add_argument("--largest", type=int, default=0, help="also print this many sums of instructions of each row")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Compiles every case and prints the table."""
    arguments = parse()
    if arguments.measure:
        print(json.dumps(measure(**json.loads(arguments.measure))), flush=True)
        return
    from versus.floor import floor_elements

    from densenet_jax.errors import UserError
    from densenet_jax.models.variants import get_variant
    from densenet_jax.plan.compilers import check_installed
    from densenet_jax.plan.topology import find_chip

    models = all_models(arguments.models)
    try:
        for model in models:
            get_variant(model)
            if arguments.by_stage:
                one_stage(model, 0)
        for target in arguments.target:
            check_installed(find_chip(target).compiler)
    except UserError as mistake:
        raise SystemExit(f"error: {mistake}") from None

    def parts(model: str) -> list[dict[str, int]]:
        sizes = get_variant(model).architecture.block_sizes
        return [{"stage": index} for index in range(len(sizes))] if arguments.by_stage else [{}]

    cases = [
        {
            "model": model,
            **part,
            "batch_size": batch_size,
            "image_size_px": px,
            "dtype": arguments.dtype,
            "target": target,
        }
        for target in arguments.target
        for model in models
        for part in parts(model)
        for px in arguments.image_size_px
        for batch_size in arguments.batch_sizes
    ]
    rows = report.Rows(arguments.output, arguments.resume)
    device = f"compiled for {', '.join(arguments.target)} without one"
    element = 2 if arguments.dtype == "bfloat16" else 4
    for case in cases:
        floor = None if arguments.by_stage else floor_elements(case["model"], case["image_size_px"])
        for form in arguments.forms:
            if rows.has(**case, form=form):
                continue
            name = f"{case['model']}, stage {case['stage']}" if "stage" in case else case["model"]
            say(f"{name}, {case['image_size_px']} px, batch {case['batch_size']}, {case['target']}, {form}")
            measured = run_child({**case, "form": form, "largest": arguments.largest})
            row = {**case, "form": form, **measured, "floor_bytes_per_image": floor and floor * element}
            rows.add([row], versions(), device)
    print(report.table([shown(row) for row in rows.rows], COLUMNS))
    for row in rows.rows:
        if row.get("largest"):
            print(f"\n{row['model']}, batch {row['batch_size']}, {row['target']}, {row['form']}:")
            print(report.table([largest(row["batch_size"], *sums) for sums in row["largest"]], LARGEST))


def versions() -> dict[str, str]:
    """Returns the versions of the compilers."""
    names = ("jax", "jaxlib", "flax", "libtpu", "jax-cuda12-plugin")
    installed = {distribution.name: distribution.version for distribution in metadata.distributions()}
    return {name: installed[name] for name in names if name in installed}


if __name__ == "__main__":
    main()
