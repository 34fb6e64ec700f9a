"""Makes what is in dialects/ beside this script: names, shapes and logits of other programs' DenseNets.

    KERAS_BACKEND=jax python tests/golden/make_dialects.py

needs torch 2.13, timm 1.0.31, monai 1.6, torchxrayvision 1.5, keras 3.15, h5py, paddlepaddle 3.3 and
paddleclas 2.6 (without what it depends on). Run it again only when a case is
added or the drawing in drawn.py changes; review the difference, since the files say what the references compute.
"""

import argparse
import importlib.util
import re
import tempfile
import types
from pathlib import Path

import h5py
import jax
import keras
import numpy as np
import paddle
import torch
from drawn import draw, draw_images
from keras.src.applications.densenet import DenseNet as KerasDenseNet
from monai.networks.nets import DenseNet as MonaiDenseNet
from references import timm  # noqa: F401
from timm.models._manipulate import adapt_input_conv
from torchxrayvision.models import DenseNet as XrayDenseNet

HERE = Path(__file__).parent / "dialects"
SIDE_PX, BATCH = 64, 2


def save(name, shapes, logits, **more):
    lines = [f"{key} {'x'.join(map(str, shape))}" for key, shape in shapes.items()]
    np.savez_compressed(HERE / f"{name}.npz", names=np.array(lines), logits=logits, **more)


def torch_case(name, model, channels=3):
    """Every weight drawn by its name, in float64."""
    state = {key: value for key, value in model.state_dict().items() if "num_batches" not in key}
    for key, value in state.items():
        value.copy_(torch.from_numpy(draw(key, tuple(value.shape))))
    model.load_state_dict(state, strict=False)
    model.double().eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(draw_images(BATCH, SIDE_PX)[:, :channels]).double()).numpy()
    save(name, {key: tuple(value.shape) for key, value in state.items()}, logits)


def xray(**architecture):
    model = XrayDenseNet(num_classes=18, in_channels=1, apply_sigmoid=False, **architecture)
    model.op_threshs = None
    model.upsample = torch.nn.Identity()  # it resizes to 224 px otherwise
    return model


def keras_case():
    jax.config.update("jax_enable_x64", True)
    keras.config.set_floatx("float64")
    model = KerasDenseNet(
        [1, 2, 1, 1], weights=None, classes=5, input_shape=(SIDE_PX, SIDE_PX, 3), classifier_activation=None
    )
    shapes = {}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/x.weights.h5"
        model.save_weights(path)
        with h5py.File(path, "r+") as file:

            def visit(place, group):
                if place.endswith("/vars") and len(group):
                    for number in range(len(group)):
                        name = f"{group.attrs['name']}/{number}"
                        shapes[f"{place} {name}"] = group[str(number)].shape
                        group[str(number)][...] = draw(keras_key(name, len(group)), group[str(number)].shape)

            file.visititems(visit)
        model.load_weights(path)
    save("keras", shapes, np.asarray(model(draw_images(BATCH, SIDE_PX).transpose(0, 2, 3, 1).astype(np.float64))))


def keras_key(name, count):
    """A name by which drawn.py draws variances that are positive."""
    return name + {("2", 4): ".running_mean", ("3", 4): ".running_var", ("1", 4): ".bias"}.get((name[-1], count), "")


def paddle_network():
    """PaddleClas's DenseNet with fewer layers: its file alone, whose table of layers is cut, without its package."""
    source = Path(importlib.util.find_spec("paddleclas").submodule_search_locations[0])
    text = (source / "ppcls" / "arch" / "backbone" / "model_zoo" / "densenet.py").read_text()
    text = re.sub(r"from \S+save_load import .*", "", text)
    text, count = re.subn(r"121: \(64, 32, \[6, 12, 24, 16\]\)", "121: (8, 4, [2, 1])", text)
    assert count == 1
    module = types.ModuleType("densenet")
    exec(text, module.__dict__)
    return module.DenseNet(121, class_num=5)


def paddle_case():
    model = paddle_network()
    state = model.state_dict()
    for key, value in state.items():
        name = key.replace("_variance", "running_var").replace("_mean", "running_mean")
        value.set_value(draw(name, tuple(value.shape)))
    paddle.save(state, str(HERE / "paddle.pdparams"))
    model.to(dtype="float64")
    model.eval()
    logits = model(paddle.to_tensor(draw_images(BATCH, SIDE_PX).astype(np.float64))).numpy()
    save("paddle", {}, logits)


def first_convolutions():
    kernel = draw("conv0.weight", (4, 3, 3, 3))
    arrays = {str(n): adapt_input_conv(n, torch.from_numpy(kernel)).numpy() for n in (1, 2, 4, 6, 64)}
    np.savez_compressed(HERE / "first_convolutions.npz", **arrays)


def torch_files():
    """Containers that torch.save writes, with the same few tensors."""
    raw = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.arange(10, dtype=torch.bfloat16)[3:7]}
    averaged = {f"module.{key}": 2 * value for key, value in raw.items()}
    checkpoint = {
        "state_dict": raw,
        "state_dict_ema": averaged,
        "args": argparse.Namespace(lr=0.1),
        "acc": np.float64(1),
    }
    torch.save(checkpoint, HERE / "checkpoint.pth.tar")
    torch.save(checkpoint, HERE / "legacy.ckpt", _use_new_zipfile_serialization=False)
    torch.save(torch.nn.Linear(1, 1), HERE / "whole.pth")
    torch.save({"state_dict": raw, "loss": torch.nn.Linear(1, 1)}, HERE / "beside.pth")
    torch.save({"a": torch.ones(2, dtype=torch.float8_e4m3fn)}, HERE / "fp8.pth")


def main():
    HERE.mkdir(exist_ok=True)
    small = {"growth_rate": 4, "block_config": (2, 1), "bn_size": 4}
    torch_case("monai", MonaiDenseNet(spatial_dims=2, in_channels=3, out_channels=5, init_features=8, **small))
    torch_case("torchxrayvision", xray(num_init_features=8, **small), channels=1)
    keras_case()
    paddle_case()
    first_convolutions()
    torch_files()


if __name__ == "__main__":
    main()
