"""Translates names and layouts of PyTorch checkpoints (timm and torchvision), both ways.

Our parameter names mirror theirs, so the mapping is a rename and a transpose: `denseblock1/denselayer1/norm1/scale` is
`features.denseblock1.denselayer1.norm1.weight`. Only an RDNet's modules have other names there, mostly numbers:
`stage2/layer1/conv2/kernel` is `dense_stages.1.2.dense_block0.layers.layers.4.weight`. Everything here works on arrays
in memory; pretrained.py reads files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from densenet_jax.errors import UserError
from densenet_jax.models.dialects import COUNTER, PREFIXES, common_prefix, modern_names

Path = tuple[str, ...]  # collection first: ("params", "denseblock1", "denselayer1", "norm1", "scale")
Shape = tuple[int, ...]

_LEAVES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("params", "gamma"): "gamma",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}
_RDNET_PARTS = {"depthwise": "0", "norm": "1", "conv1": "2", "conv2": "4", "gate": "5.fc"}
_LISTED = 10
_DTYPES = ("float16", "bfloat16", "float32", "float64")


def torch_name(path: Path) -> str:
    """Returns the state-dict key of one leaf of {"params", "batch_stats"}; every family's head is "classifier"."""
    collection, *modules, leaf = path
    if modules[0] in ("stem", "norm") or modules[0].startswith("stage"):
        return ".".join([*_rdnet_modules(modules), _LEAVES[collection, leaf]])
    prefix = [] if modules[0] == "classifier" else ["features"]
    return ".".join([*prefix, *modules, _LEAVES[collection, leaf]])


def _rdnet_modules(modules: list[str]) -> list[str]:
    """Returns timm's names of the modules of an RDNet that lead to a leaf, such as ["stage1", "layer2", "norm"]."""
    stage, *rest = modules
    if stage == "norm":
        return ["head", "norm"]
    if stage == "stem":
        return ["stem", {"conv": "0", "norm": "1"}[rest[0]]]
    number = int(stage.removeprefix("stage")) - 1
    if not rest[0].startswith("layer"):
        return ["dense_stages", str(number), {"norm": "0", "conv": "1"}[rest[0]]]
    block = f"dense_block{int(rest[0].removeprefix('layer')) - 1}"
    parts = ["layers", "layers", _RDNET_PARTS[rest[1]]] if rest[1:] else []
    return ["dense_stages", str(number), "2" if number else "0", block, *parts]


def is_dual_path(paths: Mapping[Path, Any]) -> bool:
    """Whether the leaves are a Dual Path Network's, whose classifier is a 1x1 convolution in PyTorch."""
    return any(path[1] == "conv1_1" for path in paths)


def flatten(variables: Mapping[str, Any]) -> dict[Path, Any]:
    """Flattens {"params", "batch_stats"} into one dict; leaves other collections out, and statistics may be missing."""
    collections = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    return traverse_util.flatten_dict(collections)


def torch_shape(path: Path, shape: Shape, dual_path: bool) -> Shape:
    """Returns the shape that a leaf has in PyTorch."""
    if path[-1] != "kernel":
        return shape
    if len(shape) == 4:
        return (shape[3], shape[2], shape[0], shape[1])
    return (shape[1], shape[0], 1, 1) if dual_path else (shape[1], shape[0])


def to_torch_array(path: Path, value: Any, dual_path: bool) -> np.ndarray:
    """Lays out one leaf as PyTorch does: convolutions [out, in, h, w], classifiers [classes, features(, 1, 1)]."""
    array = np.asarray(value)
    if array.dtype.name == "bfloat16":  # numpy's safetensors has no such type
        array = array.astype(np.float32)
    if path[-1] == "kernel":
        array = array.transpose((3, 2, 0, 1) if array.ndim == 4 else (1, 0))
    return np.ascontiguousarray(array.reshape(torch_shape(path, np.shape(value), dual_path)))


def from_torch_array(path: Path, array: np.ndarray) -> np.ndarray:
    """Lays out one state-dict entry as ours: convolutions [h, w, in, out], classifiers [features, classes]."""
    if path[-1] != "kernel":
        return array
    if path[1] == "classifier":
        return array.reshape(array.shape[:2]).T
    return array.transpose(2, 3, 1, 0)


def to_torch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Makes a state dict that timm and torchvision load strictly, `num_batches_tracked` (zero) included.

    Raises:
        UserError: the variables are not those of one of our networks.
    """
    try:
        leaves = flatten(variables)
        dual_path = is_dual_path(leaves)
        state = {torch_name(path): to_torch_array(path, value, dual_path) for path, value in leaves.items()}
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"these variables do not become a PyTorch state dict ({error!r}): expected "
            '{"params", "batch_stats"} of a model made by create_model'
        ) from error
    for key in [key for key in state if key.endswith(".running_mean")]:
        state[key.removesuffix("running_mean") + COUNTER] = np.zeros((), np.int64)
    return with_own_head(state)


def with_own_head(state: Mapping[str, Any]) -> dict[str, Any]:
    """Renames an RDNet's classifier to timm's name for it; other state dicts stay as they are."""
    if "head.norm.weight" not in state:
        return dict(state)
    return {re.sub(r"^classifier\.", "head.fc.", key): value for key, value in state.items()}


def _shape_fits(name: str, shape: Shape, expected: Shape) -> bool:
    if name == "classifier.weight":  # a linear layer or a 1x1 convolution
        return shape[:2] == expected[:2] and set(shape[2:]) <= {1} and len(shape) in (2, 4)
    return shape == expected


def mismatches(shapes: Mapping[str, Shape], template: Mapping[str, Any]) -> list[str]:
    """Lists every difference between a state dict's shapes (today's names, no counters) and a model's, a line each."""
    leaves = flatten(template)
    dual_path = is_dual_path(leaves)
    expected = {torch_name(path): torch_shape(path, tuple(leaf.shape), dual_path) for path, leaf in leaves.items()}
    lines = [
        f"{name} is {list(shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and not _shape_fits(name, shapes[name], shape)
    ]
    lines += [f"missing {name}, expected {list(shape)}" for name, shape in expected.items() if name not in shapes]
    lines += [
        f"left over {name} {list(shape)}, expected none" for name, shape in shapes.items() if name not in expected
    ]
    return lines


def from_torch(state: Mapping[str, np.ndarray], template: Mapping[str, Any], origin: str = "the state dict") -> dict:
    """Makes {"params", "batch_stats"} from a state dict, in the template's shapes and dtypes; all of it or nothing.

    Raises:
        UserError: keys are missing, left over or of another shape (ten are listed, with both shapes), or values are not
            finite floating point numbers.
    """
    state = modern_names(state)
    _check_dtypes(state, origin)
    if lines := mismatches({name: tuple(array.shape) for name, array in state.items()}, template):
        prefix = common_prefix(list(state))
        if prefix:
            known = ", ".join(PREFIXES)
            lines[:0] = [f"all {len(state)} names begin with {prefix!r}, which is no known prefix ({known}); remove it"]
        raise UserError(f"{origin} does not fit the model: {join_lines(lines)}")
    bad = [name for name, array in state.items() if not np.isfinite(array.astype(np.float32)).all()]
    if bad:
        raise UserError(f"{origin} has values that are not finite: {join_lines(bad)}")
    leaves = {
        path: np.ascontiguousarray(from_torch_array(path, state[torch_name(path)]).astype(leaf.dtype))
        for path, leaf in flatten(template).items()
    }
    return {"batch_stats": {}, **traverse_util.unflatten_dict(leaves)}


def _check_dtypes(state: Mapping[str, np.ndarray], origin: str) -> None:
    volumes = [name for name, array in state.items() if array.ndim == 5]
    if volumes:
        raise UserError(f"{origin}: {volumes[0]} is a kernel for volumes (3-D), expected images (2-D)")
    others = [name for name, array in state.items() if array.dtype.name not in _DTYPES]
    if others:
        name, dtype = others[0], state[others[0]].dtype
        raise UserError(
            f"{origin}: {name} holds {dtype}, expected floats ({len(others)} arrays do): save the weights as float32"
        )


def join_lines(lines: list[str]) -> str:
    """Joins at most ten lines into one, with the count of those left out."""
    rest = len(lines) - _LISTED
    listed = "; ".join(lines[:_LISTED]).encode("unicode_escape").decode()  # names may hold anything
    return listed + (f"; and {rest} more" if rest > 0 else "")
