"""Loads published and local weights into a model's variables, and saves a file that PyTorch loads."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from densenet_jax.dtypes import DType
from densenet_jax.errors import UserError, first_line
from densenet_jax.models.create import create_model
from densenet_jax.models.dialects import MAX_CHANNELS, adapt_channels, modern_names, stem_of, to_monai, translate
from densenet_jax.models.head import Classifier
from densenet_jax.models.torch_weights import from_torch, join_lines, mismatches, to_torch
from densenet_jax.models.variants import get_variant
from densenet_jax.models.weight_files import check_source, read_arrays, write_keras

log = logging.getLogger(__name__)

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_TORCH_ENDINGS = (".pth", ".pt", ".bin", ".pth.tar")
_KERAS_ENDING = ".weights.h5"
_CLASS_NAMES = "class_names"  # of a file's metadata
_HEAD = ("classifier.weight", "classifier.bias")


def load_pretrained(
    name: str,
    source: str | os.PathLike[str],
    num_classes: int | None = None,
    *,
    param_dtype: DType = jnp.float32,
    channels: int | None = None,
    head_seed: int = 0,
    average: str = "auto",
    state: Mapping[str, np.ndarray] | None = None,
    **architecture: Any,
) -> dict[str, Any]:
    """Loads published or local weights into a variant's variables.

    Args:
        name: one of list_models().
        source: a Hugging Face hub id ("timm/densenet121.ra_in1k", a revision may follow an "@"), or a file of
            safetensors, PyTorch, Keras (needs h5py) or Paddle; its content decides, not its ending. The hub's cache and
            HF_HUB_OFFLINE work as always. Nothing in a file is executed.
        num_classes: None keeps the file's head; any other count than the file's keeps the body and starts a new head as
            create_model draws it, and logs that it did.
        channels: of the images, 1 to 64; None is the file's own. Weights for another number are adapted as timm does,
            which is logged.
        average: "auto", "raw" or "average": which weights of a training checkpoint that holds raw and averaged ones;
            "auto" takes the averaged, which is logged.
        state: what `read_state_dict` read from the source, where that was done already.
        **architecture: the overrides that create_model was given, if any.

    Returns:
        {"params", "batch_stats"} for `create_model(name, num_classes=...).apply`.

    Raises:
        UserError: the source is not found or unreadable, or does not fit the variant; ten of the keys that are missing,
            left over or of another shape are listed with both shapes. Nothing is loaded in part.
    """
    row = get_variant(name)
    state = translate(read_state_dict(source, average) if state is None else state)
    state, channels = _with_channels(state, channels or None, row.channels, source)
    own_count = _class_count(state)
    wanted = num_classes or own_count or row.num_classes
    model = create_model(name, num_classes=wanted, param_dtype=param_dtype, **architecture)
    template = dict(_make_template(model, row.preprocessing.input_px, channels))
    if num_classes is None or wanted == own_count:
        # `jnp.asarray` would compile a program for every shape.
        return jax.device_put(from_torch(state, template, str(source)), may_alias=False)
    width, count = template["params"]["classifier"]["kernel"].shape
    template["params"] = {key: value for key, value in template["params"].items() if key != "classifier"}
    body = {key: value for key, value in state.items() if key not in _HEAD}
    variables = jax.device_put(from_torch(body, template, str(source)), may_alias=False)
    head = Classifier(count, param_dtype=param_dtype)
    variables["params"]["classifier"] = head.init(jax.random.key(head_seed), jnp.zeros((1, width)))["params"]
    log.warning(
        "%s has %s classes, not %d: its body is kept, the classifier starts anew", source, own_count or "no", wanted
    )
    return variables


def _with_channels(
    state: dict[str, np.ndarray], wanted: int | None, usual: int, source: Any
) -> tuple[dict[str, np.ndarray], int]:
    """Adapts the first convolution to `wanted` channels; returns the weights and their channels."""
    if wanted is not None and not 1 <= wanted <= MAX_CHANNELS:
        raise UserError(f"channels={wanted}: expected 1 to {MAX_CHANNELS}")
    stem = stem_of(state)
    own = state[stem].shape[1] if stem else 0
    if not 1 <= own <= MAX_CHANNELS or wanted in (None, own):
        return state, wanted or own or usual
    log.warning(
        "%s has a first convolution of %d channels, not %d: %s",
        *(source, own, wanted),
        "their kernels are added up" if wanted == 1 else f"their kernels are repeated and scaled by {own}/{wanted}",
    )
    return state | {stem: adapt_channels(state[stem], wanted)}, wanted


def _class_count(state: Mapping[str, np.ndarray]) -> int | None:
    bias = state.get("classifier.bias", state.get("head.fc.bias"))
    return bias.shape[0] if bias is not None and bias.ndim == 1 else None


def _make_template(model: nn.Module, side_px: int, channels: int) -> Mapping[str, Any]:
    images = jax.ShapeDtypeStruct((1, side_px, side_px, channels), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def save_torch_state_dict(
    variables: Mapping[str, Any],
    path: str | os.PathLike[str],
    name: str | None = None,
    class_names: Sequence[str] = (),
    dialect: str = "torchvision",
) -> None:
    """Writes a file that timm (and torchvision, for its four DenseNets), MONAI or Keras loads strictly.

    Args:
        variables: {"params", "batch_stats"} of a model made by create_model.
        path: the file; .safetensors, or .pth, .pt, .bin or .pth.tar, for which torch must be installed, or .weights.h5
            for Keras's DenseNets. It is replaced in one step, never half-written.
        name: check the variables against this variant first, whatever the class count and channels.
        class_names: of the classes in order, kept in a .safetensors file and compared when it is used on a data set.
        dialect: "torchvision", whose names timm shares, or "monai" for the names of its 2-D DenseNets.

    Raises:
        UserError: another ending, torch is missing, the variables are not a model's, do not fit the named variant, have
            another number of classes than names, or the file cannot be written.
    """
    save = _make_writer(os.fspath(path), class_names)
    state = to_torch(variables)
    if class_names and len(class_names) != (count := _class_count(state)):
        raise UserError(f"class_names has {len(class_names)} names, but the model has {count} classes; give one each")
    if name is not None:
        _check_fits(state, name)
    if dialect not in ("torchvision", "monai"):
        raise UserError(f"dialect={dialect!r}: expected torchvision or monai; a .weights.h5 file is Keras's")
    if "features.conv0.weight" not in state and (dialect == "monai" or os.fspath(path).endswith(_KERAS_ENDING)):
        raise UserError(f"cannot write {os.fspath(path)}: MONAI and Keras have DenseNets only; save for timm instead")
    if dialect == "monai":
        state = to_monai(state)
    temporary = Path(f"{os.fspath(path)}.{os.getpid()}.partial")
    try:
        save(state, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch raises a RuntimeError for a missing folder
        raise UserError(
            f"cannot write {os.fspath(path)}: {first_line(error)}; give a file in a folder you may write to"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_class_names(source: str | os.PathLike[str]) -> tuple[str, ...]:
    """Reads the class names that `save_torch_state_dict` kept in a local .safetensors file; () where there are none."""
    try:
        with safe_open(source, "numpy") as file:
            names = json.loads((file.metadata() or {})[_CLASS_NAMES])
        json.dumps(names, ensure_ascii=False).encode()  # a lone surrogate is no text
    except (OSError, ValueError, LookupError, SafetensorError):
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _make_writer(path: str, class_names: Sequence[str] = ()) -> Callable[[Mapping[str, np.ndarray], Path], None]:
    if path.endswith(".safetensors"):
        metadata = {"format": "pt"} | ({_CLASS_NAMES: json.dumps(list(class_names))} if class_names else {})
        return lambda state, file: save_file(dict(state), file, metadata=metadata)
    if path.endswith(_KERAS_ENDING):
        return write_keras
    if not path.endswith(_TORCH_ENDINGS):
        endings = ", ".join((*_TORCH_ENDINGS, _KERAS_ENDING))
        raise UserError(f"cannot write {path}: expected an ending of .safetensors, {endings}")
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"cannot write {path}: a file of that ending is PyTorch's and torch is not installed; install torch, or "
            "give a .safetensors file, which timm and torchvision load as well"
        ) from error

    def save(state: Mapping[str, np.ndarray], file: Path) -> None:
        torch.save({key: torch.from_numpy(np.array(value)) for key, value in state.items()}, file)

    return save


def _check_fits(state: Mapping[str, np.ndarray], name: str) -> None:
    row = get_variant(name)
    shapes = {key: array.shape for key, array in modern_names(state).items()}
    channels = shapes[stem][1] if (stem := stem_of(state)) else row.channels
    model = create_model(name, num_classes=shapes.get("classifier.bias", (row.num_classes,))[0])
    lines = mismatches(shapes, _make_template(model, row.preprocessing.input_px, channels))
    if lines:
        raise UserError(f"the variables do not fit {name}: {join_lines(lines)}")


def read_state_dict(source: str | os.PathLike[str], average: str = "auto") -> dict[str, np.ndarray]:
    """Reads the arrays of a hub id or a file, by the names that they have there; arguments as for `load_pretrained`.

    Raises:
        UserError: no such source, no network, or the file is damaged or of another kind.
    """
    is_file = check_source(source)
    return read_arrays(Path(source) if is_file else Path(_download(os.fspath(source))), average)


def _download(hub_id: str) -> str:
    import huggingface_hub
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    repository, _, revision = hub_id.partition("@")
    for filename in _HUB_FILES:
        try:
            return huggingface_hub.hf_hub_download(repository, filename, revision=revision or None)
        except LocalEntryNotFoundError as error:
            if filename == _HUB_FILES[-1] or not is_offline_mode():
                raise UserError(
                    f"{hub_id} is not in the hub's cache and the hub cannot be reached: connect once without "
                    "HF_HUB_OFFLINE, or give a local .safetensors file"
                ) from error
        except EntryNotFoundError:
            continue
        except RepositoryNotFoundError as error:
            raise UserError(f"the hub has no public repository {repository!r}: check the spelling") from error
        except Exception as error:  # the hub's client lets its HTTP library's exceptions through
            if not _is_network_error(error):
                raise
            message = f"cannot fetch {hub_id} from the hub: {first_line(error)}; try again or give a local file"
            raise UserError(message) from error
    raise UserError(f"the hub's {repository!r} has none of {', '.join(_HUB_FILES)}; give a local file")


def _is_network_error(error: Exception) -> bool:
    origin = type(error).__module__.split(".")[0]
    return isinstance(error, (OSError, ValueError)) or origin in ("httpx", "httpcore", "requests", "huggingface_hub")
