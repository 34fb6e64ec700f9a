"""Translates the names that other programs give a DenseNet's weights into torchvision's, which ours mirror.

Read: torchvision and timm, today's spelling and the old one; the prefixes of wrappers (`module.`, `_orig_mod.`, ...);
torchxrayvision; MONAI's 2-D networks; Keras's applications; PaddleClas. A name that no rule knows stays, and is
reported as left over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from densenet_jax.errors import UserError

COUNTER = "num_batches_tracked"
PREFIXES = ("_orig_mod.", "module.", "model.", "net.", "backbone.", "encoder.", "densenet121.")
MAX_CHANNELS = 64

_WRAPPERS = re.compile(r"^(?:(?:_orig_mod|module|model|net|backbone|encoder|densenet\d*)\.)+")
_SPELLINGS = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.\w+)$"), r"\1\2"),  # torchvision before 0.4
    (re.compile(r"(denselayer\d+\.)layers\."), r"\1"),  # MONAI
    (re.compile(r"^class_layers\.out\."), "classifier."),
    (re.compile(r"^classifier\.\d+\.(weight|bias)$"), r"classifier.\1"),  # a head that is an nn.Sequential
    (re.compile(r"^head\.fc\."), "classifier."),  # RDNet
    (re.compile(r"^stem\.stem\."), "stem."),  # its authors' own files
)
_THRESHOLDS = "op_threshs"  # torchxrayvision's operating points
_UNUSED = ("n_averaged", _THRESHOLDS)  # the first is of torch's AveragedModel
_STEMS = ("features.conv0.weight", "features.conv1_1.conv.weight", "stem.0.weight")

_KERAS_EPSILON, _EPSILON = 1.001e-5, 1e-5
_KERAS_VARIABLES = {1: ("weight",), 2: ("weight", "bias"), 4: ("weight", "bias", "running_mean", "running_var")}
_KERAS_PARTS = {"0_bn": "norm1", "1_conv": "conv1", "1_bn": "norm2", "2_conv": "conv2"}
_KERAS_LAYER = re.compile(r"^conv(\d+)_block(\d+)_(0_bn|1_conv|1_bn|2_conv)$")
_KERAS_TRANSITION = re.compile(r"^pool(\d+)_(bn|conv)$")

_PADDLE_LEAVES = {"_mean": "running_mean", "_variance": "running_var"}
_PADDLE_PARTS = {"_conv": "conv", "_batch_norm": "norm"}
_PADDLE_LAYER = re.compile(r"^db_conv_(\d+)\.conv\d+_(\d+)\.bn_ac_func([12])\.(_conv|_batch_norm)\.(\w+)$")
_PADDLE_TRANSITION = re.compile(r"^tr_conv(\d+)_blk\.conv_ac_func\.(_conv|_batch_norm)\.(\w+)$")
_PADDLE_STEM = re.compile(r"^conv1_func\.(_conv|_batch_norm)\.(\w+)$")


def modern_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """Renames a state dict's keys to the current names of torchvision and timm, and drops counters of batches.

    Raises:
        UserError: two keys are spellings of the same parameter.
    """
    renamed: dict[str, Any] = {}
    for key, value in state.items():
        name = _WRAPPERS.sub("", key)
        for pattern, replacement in _SPELLINGS:
            name = pattern.sub(replacement, name)
        if name.endswith(COUNTER) or name in _UNUSED:
            continue
        if name in renamed:
            raise UserError(f"the weights have {name} twice, in two spellings; remove one")
        renamed[name] = value
    return renamed


def translate(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renames and transposes the arrays of any program listed above to PyTorch's names and layout.

    Raises:
        UserError: two names are spellings of the same parameter.
    """
    if any(name.startswith("conv1_func.") for name in state):
        return _from_paddle(state)
    return modern_names(state)


def thresholds_of(state: Mapping[str, Any]) -> tuple[float, ...]:
    """Returns torchxrayvision's operating points (`op_threshs`): a probability a label, NaN for none; () without."""
    values = [value for key, value in state.items() if _WRAPPERS.sub("", key) == _THRESHOLDS]
    return tuple(np.asarray(values[0], np.float64).ravel().tolist()) if values else ()


def common_prefix(names: list[str]) -> str:
    """Returns the dotted prefix that all names share, such as `student.`; "" without one."""
    parts = [name.split(".")[:-1] for name in names]
    count = 0
    while parts and all(len(part) > count and part[count] == parts[0][count] != "features" for part in parts):
        count += 1
    return "".join(f"{part}." for part in parts[0][:count]) if parts else ""


def stem_of(state: Mapping[str, Any]) -> str:
    """Returns the name of the first convolution's kernel; "" without one."""
    return next((name for name in _STEMS if name in state and np.ndim(state[name]) == 4), "")


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Makes a first convolution take another number of channels, as timm does.

    Args:
        kernel: [out, in, h, w].
        channels: 1 gives the sum over the inputs; another count repeats them and scales by in / channels, so that
            equal channels give what they gave.
    """
    width = kernel.shape[1]
    wide = kernel.astype(np.promote_types(kernel.dtype, np.float32) if kernel.dtype.kind == "f" else np.float32)
    if channels == 1:
        return wide.sum(axis=1, keepdims=True)
    repeated = np.tile(wide, (1, -(-channels // width), 1, 1))[:, :channels]
    return repeated * wide.dtype.type(width / channels)


def from_keras(layers: Mapping[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    """Makes a state dict of the variables of each layer of Keras's DenseNet.

    Keras's epsilon is 1.001e-5; the difference is added to the variances, which gives the same function.
    """
    state: dict[str, np.ndarray] = {}
    for layer, values in layers.items():
        name = _keras_name(layer, values)
        for leaf, value in zip(_KERAS_VARIABLES.get(len(values), ()), values, strict=False):
            if leaf == "running_var":
                value = value + value.dtype.type(_KERAS_EPSILON - _EPSILON)
            if f"{name}.{leaf}" in state:
                raise UserError(f"the weights have {name}.{leaf} twice, once in {layer!r}: expected one dense layer")
            state[f"{name}.{leaf}"] = value.transpose({4: (3, 2, 0, 1), 2: (1, 0)}.get(value.ndim, range(value.ndim)))
    return state


def to_keras(state: Mapping[str, np.ndarray]) -> dict[str, tuple[str, list[np.ndarray]]]:
    """Lays out a state dict as Keras's .weights.h5 file of its DenseNet.

    Returns each layer's group ("layers/conv2d_1/vars"), with its name and its variables in order.
    """
    modules: dict[str, dict[str, np.ndarray]] = {}
    for key, value in state.items():
        module, _, leaf = key.removeprefix("features.").rpartition(".")
        modules.setdefault(module, {})[leaf] = value
    groups: dict[str, tuple[str, list[np.ndarray]]] = {}
    counts: dict[str, int] = {}
    for module in sorted(modules, key=_forward_order):
        leaves = modules[module]
        kind = "batch_normalization" if "running_var" in leaves else "conv2d" if "conv" in module else "dense"
        values = [leaves[leaf] for leaf in _KERAS_VARIABLES[4] if leaf in leaves]
        values = [value.transpose({4: (2, 3, 1, 0), 2: (1, 0)}.get(value.ndim, range(value.ndim))) for value in values]
        if kind == "batch_normalization":
            values[-1] = np.maximum(values[-1] - values[-1].dtype.type(_KERAS_EPSILON - _EPSILON), 0)
        number = counts.get(kind, 0)
        counts[kind] = number + 1
        groups[f"layers/{kind}{f'_{number}' if number else ''}/vars"] = (_to_keras_name(module), values)
    return groups


def _forward_order(module: str) -> tuple[int, ...]:
    """Sorts modules of a DenseNet in the order in which they are called."""
    numbers = [int(number) for number in re.findall(r"\d+", module)]
    if match := re.match(r"denseblock(\d+)\.denselayer(\d+)\.(norm|conv)(\d)$", module):
        return int(match[1]), 0, int(match[2]), int(match[4]), match[3] == "conv"
    if module.startswith("transition"):
        return numbers[0], 1, module.endswith("conv")
    return {"conv0": (0, 0), "norm0": (0, 1), "norm5": (1000, 0), "classifier": (1000, 1)}.get(module, (2000,))


def _to_keras_name(module: str) -> str:
    if match := re.match(r"denseblock(\d+)\.denselayer(\d+)\.(\w+)$", module):
        part = next(keras for keras, ours in _KERAS_PARTS.items() if ours == match[3])
        return f"conv{int(match[1]) + 1}_block{match[2]}_{part}"
    if match := re.match(r"transition(\d+)\.(norm|conv)$", module):
        return f"pool{int(match[1]) + 1}_{'bn' if match[2] == 'norm' else 'conv'}"
    return {"conv0": "conv1_conv", "norm0": "conv1_bn", "norm5": "bn", "classifier": "predictions"}.get(module, module)


def to_monai(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renames a state dict to the names of MONAI's 2-D DenseNets."""
    renamed = {re.sub(r"(denselayer\d+\.)", r"\1layers.", key): value for key, value in state.items()}
    return {re.sub(r"^classifier\.", "class_layers.out.", key): value for key, value in renamed.items()}


def _keras_name(layer: str, values: list[np.ndarray]) -> str:
    layer = layer.replace("/", "_")
    if match := _KERAS_LAYER.match(layer):
        block, number, part = match.groups()
        return f"features.denseblock{int(block) - 1}.denselayer{number}.{_KERAS_PARTS[part]}"
    if match := _KERAS_TRANSITION.match(layer):
        return f"features.transition{int(match[1]) - 1}.{'norm' if match[2] == 'bn' else 'conv'}"
    if values[0].ndim == 2:
        return "classifier"
    return {"conv1_conv": "features.conv0", "conv1_bn": "features.norm0", "bn": "features.norm5"}.get(layer, layer)


def _from_paddle(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    renamed = {_paddle_name(name): value for name, value in state.items()}
    if "classifier.weight" in renamed:
        renamed["classifier.weight"] = renamed["classifier.weight"].T
    return renamed


def _paddle_name(name: str) -> str:
    if match := _PADDLE_LAYER.match(name):
        block, layer, number, part, leaf = match.groups()
        place = f"features.denseblock{int(block) - 1}.denselayer{layer}.{_PADDLE_PARTS[part]}{number}"
    elif match := _PADDLE_TRANSITION.match(name):
        place, leaf = f"features.transition{int(match[1]) - 1}.{_PADDLE_PARTS[match[2]]}", match[3]
    elif match := _PADDLE_STEM.match(name):
        place, leaf = f"features.{_PADDLE_PARTS[match[1]]}0", match[2]
    else:
        module, _, leaf = name.rpartition(".")
        place = {"batch_norm": "features.norm5", "out": "classifier"}.get(module, module)
    return f"{place}.{_PADDLE_LEAVES.get(leaf, leaf)}"
