"""Reads the arrays of a file of weights, whatever program wrote it; the content decides, not the name's ending."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from densenet_jax.errors import UserError, first_line
from densenet_jax.models.dialects import COUNTER, from_keras, to_keras
from densenet_jax.models.pickle_objects import Array, Stranger, Tensor
from densenet_jax.models.pickles import read_pickle

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]

AVERAGES = ("auto", "raw", "average")
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")  # timm looks for the first two, in this order
_RAW = ("state_dict", "model", "model_state_dict", "model_state", "net", "network")
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")
_FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt", ".h5", ".keras", ".pdparams", ".json")
_MAX_GROWTH = 16  # arrays may be this many times larger than the file: HDF5 compresses, and tensors can share numbers
_MAX_DEPTH = 8
_MAX_SAFETENSORS_HEADER = 100_000_000  # the format's own limit
_HDF5 = b"\x89HDF\r\n\x1a\n"
_NOT_WEIGHTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: fetch it with git lfs pull",
    b"<": "a web page: fetch the file itself, not the page that shows it",
}


def check_source(source: str | os.PathLike[str]) -> bool:
    """Returns whether the weights are a file here, rather than named by a hub id.

    Raises:
        UserError: they can't be either.
    """
    path, text = Path(source), os.fspath(source)
    if path.is_dir():
        raise UserError(f"{text} is a folder: name the file of weights in it")
    if not path.is_file() and (not _HUB_ID.match(text) or path.suffix in _FILE_SUFFIXES):
        raise UserError(
            f"no weights at {text!r}: expected an existing file of weights (.safetensors, .pth, .weights.h5, ...), or "
            "a hub id such as timm/densenet121.ra_in1k"
        )
    return path.is_file()


def read_arrays(path: Path, average: str = "auto") -> Arrays:
    """Reads the arrays of a .safetensors, PyTorch, Keras or Paddle file by the names in it.

    Args:
        average: for a training checkpoint with raw and averaged weights: "auto" takes the averaged ones where there
            are some, as timm does; "raw" or "average" insists.

    Raises:
        UserError: the file is damaged, of an unknown kind, or does not hold what `average` asks for.
    """
    if average not in AVERAGES:
        raise UserError(f"average={average!r}: expected one of {', '.join(AVERAGES)}")
    arrays = _reader_for(path)(path, average)
    if not arrays:
        raise UserError(f"{path} holds no arrays: expected a state dict")
    return arrays


def _reader_for(path: Path) -> Callable[[Path, str], Arrays]:
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    # First of all: a length, which may begin as any other kind of file does, and JSON.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_SAFETENSORS_HEADER:
        return _read_safetensors
    if head.startswith(_HDF5) or (head.startswith(b"PK") and _is_keras(path)):
        return _read_keras
    if head.startswith((b"PK\x03\x04", b"\x80")):  # a zip archive; any pickle from protocol 2 on
        return _read_pickled
    if head.startswith(b"{"):
        raise UserError(f"{path} is an index of shards, which are not read: save the weights as one .safetensors file")
    for start, what in _NOT_WEIGHTS.items():
        if head.startswith(start):
            raise UserError(f"{path} is {what}")
    return _read_safetensors


def _is_keras(path: Path) -> bool:
    try:
        return "model.weights.h5" in zipfile.ZipFile(path).namelist()
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def _import_h5py(what: str) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"{what} and h5py is not installed: pip install h5py") from error
    return h5py


def _read_keras(path: Path, average: str) -> Arrays:
    h5py = _import_h5py(f"{path} is a Keras (HDF5) file")
    try:
        with contextlib.ExitStack() as stack:
            source: Any = path
            if zipfile.is_zipfile(path):
                source = stack.enter_context(zipfile.ZipFile(path).open("model.weights.h5"))
            layers = _keras_layers(stack.enter_context(h5py.File(source, "r")), _MAX_GROWTH * path.stat().st_size)
    except Exception as error:  # a damaged file can raise anything in h5py
        raise UserError(f"{path} is not a readable Keras file ({first_line(error)}): fetch it again") from error
    if not layers:
        raise UserError(
            f"{path} has no named layers with weights: save them again with model.save_weights of Keras 3.6 or newer"
        )
    return from_keras(layers)


def write_keras(state: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes a state dict as a .weights.h5 file that Keras's DenseNet of the same layers loads.

    Raises:
        UserError: h5py is not installed.
    """
    h5py = _import_h5py(f"cannot write {path}: it is a Keras (HDF5) file")
    with h5py.File(path, "w") as file:
        for place, (name, values) in to_keras({k: v for k, v in state.items() if not k.endswith(COUNTER)}).items():
            group = file.create_group(place)
            group.attrs["name"] = name
            for number, value in enumerate(values):
                group[str(number)] = value


def _keras_layers(file: Any, max_bytes: int) -> dict[str, list[np.ndarray]]:
    """Collects each layer's variables under its own name, which Keras 3 keeps as an attribute."""
    layers: dict[str, list[np.ndarray]] = {}
    sizes: list[int] = []

    def read(dataset: Any) -> np.ndarray:
        if dataset.file != file or dataset.external or dataset.is_virtual:
            raise ValueError(f"{dataset.name} lies in another file")
        sizes.append(dataset.nbytes)
        if sum(sizes) > max_bytes:
            raise ValueError(f"{dataset.name} is larger than the file")
        return dataset[()]

    root = file.get("model_weights", file)
    if "layer_names" in root.attrs:  # Keras 2
        for name in map(_to_text, root.attrs["layer_names"]):
            if arrays := [read(root[name][_to_text(key)]) for key in root[name].attrs["weight_names"]]:
                layers[name] = arrays
        return layers

    def visit(path: str, group: Any) -> None:
        if path.startswith("layers/") and path.endswith("/vars") and "name" in group.attrs and len(group):
            layers[_to_text(group.attrs["name"])] = [read(group[str(number)]) for number in range(len(group))]

    file.visititems(visit)
    return layers


def _to_text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _read_safetensors(path: Path, average: str) -> Arrays:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                if (dtype := file.get_slice(key).get_dtype()).startswith(("F8", "F4", "F6_", "C")):
                    raise UserError(f"{path} holds {dtype} numbers ({key}): save the weights as float32 first")
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a file of weights that is read here (as safetensors: {first_line(error)}): expected "
            "safetensors, PyTorch, Keras or Paddle; if it is one of these, fetch it again"
        ) from error
    if average == "average":
        raise UserError(f"{path} holds no averaged weights: set config.model.pretrained_average to auto")
    return arrays


def _read_pickled(path: Path, average: str) -> Arrays:
    content, strangers = read_pickle(path)
    weights = _choose_weights(path, content, average)
    if isinstance(weights, Stranger):
        raise UserError(
            f"{path} holds a whole pickled {weights.origin}, which only its own program can open: save "
            "model.state_dict() there instead; nothing in it was executed"
        )
    if not isinstance(weights, Mapping):
        raise UserError(f"{path} holds a {type(weights).__name__}: expected a state dict")
    if strangers:
        raise UserError(
            f"{path} holds {', '.join(strangers[:3])} beside the weights, which is not read; nothing in it was "
            "executed.\nWhere the file comes from, save the weights alone:\n"
            "    torch.save({'state_dict': model.state_dict()}, 'weights.pth')"
        )
    arrays: Arrays = {}
    left = _MAX_GROWTH * path.stat().st_size
    for key, value in weights.items():
        if isinstance(value, tuple) and len(value) == 2:  # Paddle's pairs of name and array
            value = value[1]
        if isinstance(value, Tensor | Array):
            try:
                array = arrays[str(key)] = value.value
                left -= array.nbytes
                if left < 0:
                    raise ValueError("the tensors are larger than the file")
            except Exception as error:  # a damaged archive can raise anything
                raise UserError(f"{path} is damaged: {key} can't be read ({first_line(error)})") from error
        elif key not in ("StructuredToParameterName@@",) and not (value is None or key == "_metadata"):
            what = value.origin if isinstance(value, Stranger) else type(value).__name__
            raise UserError(f"{path} holds {str(key)!r}, a {what} and no tensor: expected a state dict")
    return arrays


def _choose_weights(path: Path, content: Any, average: str) -> Any:
    """Picks the averaged or the raw state dict of a checkpoint; reports which, where there are both."""
    has_average = False
    for _ in range(_MAX_DEPTH):
        if not isinstance(content, Mapping):
            break
        averaged, raw = (next((key for key in keys if _is_content(content.get(key))), "") for keys in (_AVERAGED, _RAW))
        if average == "raw" and averaged and not raw:
            raise UserError(f"{path} holds averaged weights only: set config.model.pretrained_average to auto")
        taken = raw if average == "raw" else averaged or raw
        if not taken:
            break
        if averaged and raw:
            other, setting = (averaged, "average") if average == "raw" else (raw, "raw")
            log.warning(
                "%s holds %s and %s: took %s; config.model.pretrained_average=%s takes %s",
                *(path, raw, averaged, taken, setting, other),
            )
        has_average |= bool(averaged)
        content = content[taken]
    else:
        raise UserError(f"{path} is damaged: more than {_MAX_DEPTH} checkpoints lie in each other")
    if average == "average" and not has_average:
        raise UserError(f"{path} holds no averaged weights: set config.model.pretrained_average to auto")
    return content


def _is_content(value: Any) -> bool:
    return isinstance(value, Stranger) or (isinstance(value, Mapping) and len(value) > 0)
