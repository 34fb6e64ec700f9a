"""Flags that the comparisons share, and from them and a variant's name the case that each worker prepares."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import subprocess
import sys
from typing import Any

from versus.turns import Contestant, Worker

SCRIPTS = {
    "densenet_jax": ("jax_worker.py", "default"),
    "plain": ("jax_worker.py", "plain"),
    "without_kernels": ("jax_worker.py", "without_kernels"),
    "torch_eager": ("torch_worker.py", "eager"),
    "torch_compile": ("torch_worker.py", "compile"),
}


def contestant(name: str, arguments: argparse.Namespace, model: str, batch_size: int, mode: str) -> Contestant:
    """Makes one of SCRIPTS a contestant on one case; arguments are those of `add_arguments` and dtype."""
    from densenet_jax.models.variants import get_variant

    variant = get_variant(model)
    overrides = {"block_sizes": arguments.block_sizes} if arguments.block_sizes else {}
    network = dataclasses.asdict(variant.architecture) | overrides
    channels = arguments.channels or variant.channels
    network |= {"channels": channels, "num_classes": variant.num_classes, "changed": bool(overrides)}
    script, form = SCRIPTS[name]
    ours = script == "jax_worker.py"
    case = {
        "model": model,
        "mode": mode,
        "batch_size": batch_size,
        "image_size_px": arguments.image_size_px or variant.preprocessing.input_px,
        "dtype": arguments.dtype,
        "form": form,
        **({"channels": channels, "overrides": overrides} if ours else {"architecture": network}),
    }
    interpreter = sys.executable if ours else arguments.torch_python
    # The plain implementation has none of our kernels.
    environment = {"DENSENET_JAX_NATIVE": "0"} if form == "plain" else {}
    return Contestant(name, functools.partial(Worker, script, interpreter, **environment), case)


def add_arguments(parser: argparse.ArgumentParser, *, many_sizes: bool = False) -> None:
    """Adds the flags that say what is compared; with many_sizes, --image_size_px is a list."""
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    many: dict[str, Any] = {"nargs": "+", "default": [0]} if many_sizes else {"default": 0}
    parser.add_argument("--image_size_px", type=int, **many, help="default: what the variant is trained on")
    parser.add_argument("--channels", type=int, default=0, help="of the images; default: the variant's")
    parser.add_argument("--block_sizes", type=int, nargs="+", help="layers of each block, in place of the variant's")
    parser.add_argument("--torch_python", default=sys.executable, help="an interpreter that has torch and timm")
    parser.add_argument("--output", help="write the rows to this JSON file")


def all_models(names: list[str]) -> list[str]:
    """Returns the given names, or every variant's for "all"."""
    if names != ["all"]:
        return names
    from densenet_jax import list_models

    return list_models()


@functools.cache
def device() -> tuple[str, str]:
    """Asks a process of its own for JAX's platform and device name, as this one would hold device memory."""
    code = "import jax; print(jax.default_backend()); print(jax.devices()[0].device_kind)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    platform, name = result.stdout.strip().splitlines()[-2:]
    return platform, name


def has_gpu() -> bool:
    """Whether JAX has a GPU."""
    return device()[0] == "gpu"


def check_platforms(contestants: list[Contestant]) -> None:
    """Exits if the contestants did not run on the same kind of device."""
    platforms = {one.prepared["platform"] for one in contestants if one.prepared}
    if len(platforms) > 1:
        raise SystemExit(f"error: the implementations ran on different platforms: {', '.join(sorted(platforms))}")


def versions_of(contestants: list[Contestant]) -> dict[str, str]:
    """Returns the library's version for each contestant that could be prepared."""
    libraries = {"torch_eager": "torch", "torch_compile": "torch", "onnxruntime": "onnxruntime", "openvino": "openvino"}
    prepared = {
        one.name.removesuffix("_bfloat16").removesuffix("_int8"): one.prepared["version"]
        for one in contestants
        if one.prepared
    }
    return {libraries.get(name, "jax"): version for name, version in prepared.items()}


def comparison_parser(
    description: str,
    *,
    models: list[str],
    batch_sizes: list[int],
    turns: int,
    turn_secs: float,
    many_sizes: bool = False,
) -> argparse.ArgumentParser:
    """Makes a parser with every shared flag and these defaults; with many_sizes, --image_size_px is a list."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=models, help="names of the variants table, or 'all'")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=batch_sizes)
    parser.add_argument("--turns", type=int, default=turns, help="turns of each implementation")
    parser.add_argument("--turn_secs", type=float, default=turn_secs, help="least length of a turn")
    parser.add_argument("--resume", action="store_true", help="keep the rows of --output and measure the others")
    add_arguments(parser, many_sizes=many_sizes)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the command line; adds the models' names, the device's dtype and `on_gpu`."""
    arguments = parser.parse_args()
    arguments.on_gpu = has_gpu()
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.on_gpu else "float32")
    arguments.models = all_models(arguments.models)
    return arguments
