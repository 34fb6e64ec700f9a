"""Published and local weights into a model's variables, and back into a file that PyTorch loads."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from densenet_jax.errors import UserError, first_line
from densenet_jax.models.create import create_model
from densenet_jax.models.head import Classifier
from densenet_jax.models.layers import DType
from densenet_jax.models.torch_weights import from_torch, listed, mismatches, modern_names, to_torch
from densenet_jax.models.variants import get_variant

log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_PICKLES = (".pth", ".pt", ".bin")
_HEAD = ("classifier.weight", "classifier.bias")


def load_pretrained(
    name: str,
    source: str | os.PathLike[str],
    num_classes: int | None = None,
    *,
    param_dtype: DType = jnp.float32,
    channels: int | None = None,
    head_seed: int = 0,
    **architecture: Any,
) -> dict[str, Any]:
    """Variables of a variant with the weights of a PyTorch checkpoint.

    Args:
      name: one of list_models().
      source: a Hugging Face hub id ("timm/densenet121.ra_in1k", a revision may follow an "@"), or a local .safetensors,
        .pth, .pt or .bin file. The hub's cache and HF_HUB_OFFLINE work as always. PyTorch files need torch, and are
        read as weights only: nothing in them is executed.
      num_classes: None keeps the checkpoint's head; any other count than the checkpoint's keeps the body and starts a
        new head as create_model draws it, and logs that it did.
      param_dtype: of the parameters.
      channels: of the images; None is the variant's own.
      head_seed: seed of a new head.
      **architecture: the overrides that create_model was given, if any.

    Returns:
      {"params", "batch_stats"} for `create_model(name, num_classes=...).apply`.

    Raises:
      UserError: the source is not found or unreadable, or does not fit the variant; every key that is missing, left
        over or of another shape is listed with both shapes. Nothing is loaded in part.
    """
    row = get_variant(name)
    state = modern_names(read_state_dict(source))
    found = _class_count(state)
    wanted = num_classes or found or row.num_classes
    model = create_model(name, num_classes=wanted, param_dtype=param_dtype, **architecture)
    template = dict(_template(model, row.preprocessing.input_px, channels or row.channels))
    if num_classes is None or wanted == found:
        return jax.tree.map(jnp.asarray, from_torch(state, template, str(source)))
    head = template["params"]["classifier"]
    template["params"] = {key: value for key, value in template["params"].items() if key != "classifier"}
    body = {key: value for key, value in state.items() if key not in _HEAD}
    variables = jax.tree.map(jnp.asarray, from_torch(body, template, str(source)))
    variables["params"]["classifier"] = _new_head(head["kernel"].shape, param_dtype, head_seed)
    log.warning(
        "%s has %s classes, not %d: its body is kept, the classifier starts anew", source, found or "no", wanted
    )
    return variables


def _class_count(state: Mapping[str, np.ndarray]) -> int | None:
    bias = state.get("classifier.bias")
    return bias.shape[0] if bias is not None and bias.ndim == 1 else None


def _template(model: nn.Module, side_px: int, channels: int) -> Mapping[str, Any]:
    images = jax.ShapeDtypeStruct((1, side_px, side_px, channels), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def _new_head(shape: tuple[int, ...], param_dtype: DType, seed: int) -> dict[str, Any]:
    head = Classifier(shape[1], param_dtype=param_dtype)
    return dict(head.init(jax.random.key(seed), jnp.zeros((1, shape[0])))["params"])


def save_torch_state_dict(variables: Mapping[str, Any], path: str | os.PathLike[str], name: str | None = None) -> None:
    """Writes a .safetensors file that timm (and torchvision, for its four DenseNets) loads strictly.

    Args:
      variables: {"params", "batch_stats"} of a model made by create_model.
      path: the file; it is replaced in one step, never half-written.
      name: check the variables against this variant first, whatever the class count and channels.

    Raises:
      UserError: the variables are not a model's, do not fit the named variant, or the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    state = to_torch(variables)
    if name is not None:
        _check_fits(state, name)
    temporary = Path(f"{os.fspath(path)}.{os.getpid()}.partial")
    try:
        save_file(state, temporary, metadata={"format": "pt"})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {os.fspath(path)}: {error}; give a file in a folder you may write to") from error
    finally:
        temporary.unlink(missing_ok=True)


def _check_fits(state: Mapping[str, np.ndarray], name: str) -> None:
    row = get_variant(name)
    shapes = {key: array.shape for key, array in modern_names(state).items()}
    stem = shapes.get("features.conv0.weight") or shapes.get("features.conv1_1.conv.weight") or (0, row.channels)
    model = create_model(name, num_classes=shapes.get("classifier.bias", (row.num_classes,))[0])
    lines = mismatches(shapes, _template(model, row.preprocessing.input_px, stem[1]))
    if lines:
        raise UserError(f"the variables do not fit {name}: {listed(lines)}")


def read_state_dict(source: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a hub id, a .safetensors file or a PyTorch file.

    Raises:
      UserError: no such source, no network, torch not installed for a PyTorch file, or the file is damaged.
    """
    path = Path(source)
    if path.is_file():
        return _read_pickle(path) if path.suffix in _PICKLES else _read_safetensors(path)
    text = os.fspath(source)
    if _HUB_ID.match(text) and path.suffix not in (".safetensors", *_PICKLES):
        return read_state_dict(_download(text))
    raise UserError(
        f"no weights at {text!r}: expected an existing .safetensors or .pth file, or a hub id such as "
        "timm/densenet121.ra_in1k"
    )


def _download(hub_id: str) -> str:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    repository, _, revision = hub_id.partition("@")
    for filename in _HUB_FILES:
        try:
            return huggingface_hub.hf_hub_download(repository, filename, revision=revision or None)
        except LocalEntryNotFoundError as error:
            if filename == _HUB_FILES[-1] or not _offline():
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


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.is_offline_mode()


def _is_network_error(error: Exception) -> bool:
    return isinstance(error, (OSError, ValueError)) or type(error).__module__.split(".")[0] in (
        "httpx",
        "httpcore",
        "requests",
        "huggingface_hub",
    )


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file ({first_line(error)}): fetch it again, or, if it is a PyTorch "
            "file, let its name end in .pth"
        ) from error


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} is a PyTorch file and torch is not installed: install torch, or give the .safetensors file instead"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever a damaged or hostile pickle leads it to
        raise UserError(
            f"{path} is not a PyTorch file of weights only ({first_line(error)}): it is damaged or holds code; "
            "nothing in it was executed"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}: expected a state dict")
    strangers = [key for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if strangers:
        raise UserError(f"{path} holds {strangers[0]!r}, which is no tensor: expected a state dict")
    return {key: _to_numpy(value, torch) for key, value in content.items()}


def _to_numpy(tensor: Any, torch: Any) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
