"""Makes the golden files in proofs/ from the sources that timm has no network for, or beside timm.

    KERAS_BACKEND=torch python tests/golden/make_proofs.py [NAME ...]

needs torch 2.13, timm 1.0.31, MONAI 1.6, pytorchcv 0.0.74 and Keras 3.15 (any CPU build). Run it again only when a case
is added or the drawing in drawn.py changes; review the difference, since the files say what the references compute.
"""

import hashlib
import re
import sys
from pathlib import Path

import numpy as np
import torch
from drawn import draw, draw_images, key_lines, summarize
from references import timm  # noqa: F401 - lets a CPU build of torch import what follows

HERE = Path(__file__).parent / "proofs"
CASES = ((1, 161), (2, 65))  # (batch, side in pixels)
CIFAR_CASES = ((2, 32),)
DUAL_PATH = ("dpn68", "dpn68b", "dpn98", "dpn107", "dpn131")
KERAS_EPSILON, EPSILON = 1.001e-5, 1e-5

# Other programs' names of modules, and torchvision's.
PYTORCHCV = (
    (r"^features\.init_block\.", "features.conv0."),
    (r"^features\.post_activ\.bn\.", "features.norm5."),
    (r"^output\.", "classifier."),
    (r"^features\.stage\d\.trans2\.", "features.transition1."),
    (r"^features\.stage\d\.trans3\.", "features.transition2."),
    (r"^features\.stage(\d)\.unit(\d+)\.conv\.", r"features.denseblock\1.denselayer\2.conv1."),
    (r"^features\.stage(\d)\.unit(\d+)\.", r"features.denseblock\1.denselayer\2."),
    (r"\.conv([12])\.bn\.", r".norm\1."),
    (r"\.conv([12])\.conv\.", r".conv\1."),
    (r"(transition\d)\.conv\.bn\.", r"\1.norm."),
    (r"(transition\d)\.conv\.conv\.", r"\1.conv."),
)
PYTORCHCV_DPN = (
    (r"^features\.init_block\.", "features.conv1_1."),
    (r"^features\.final_block\.activ\.", "features.conv5_bn_ac."),
    (r"^output\.", ""),
    *((rf"^features\.stage{i}\.unit", f"features.conv{i + 1}_") for i in (1, 2, 3, 4)),
    (r"(conv2_1)\.conv_proj\.", r"\1.c1x1_w_s1."),
    (r"(conv[345]_1)\.conv_proj\.", r"\1.c1x1_w_s2."),
    (r"(conv[2-5]_\d+)\.conv1\.", r"\1.c1x1_a."),
    (r"(conv[2-5]_\d+)\.conv2\.", r"\1.c3x3_b."),
    (r"(conv[2-5]_\d+)\.(conv3|preactiv)\.", r"\1.c1x1_c."),
    (r"(conv[2-5]_\d+)\.conv3a\.", r"\1.c1x1_c1."),
    (r"(conv[2-5]_\d+)\.conv3b\.", r"\1.c1x1_c2."),
)
MONAI = ((r"\.layers\.", "."), (r"^class_layers\.out\.", "classifier."))
KERAS = (
    (r"^conv1_conv$", "features.conv0"),
    (r"^conv1_bn$", "features.norm0"),
    (r"^bn$", "features.norm5"),
    (r"^predictions$", "classifier"),
    *((rf"^pool{i + 1}_bn$", f"features.transition{i}.norm") for i in (1, 2, 3)),
    *((rf"^pool{i + 1}_conv$", f"features.transition{i}.conv") for i in (1, 2, 3)),
    *((rf"^conv{i + 1}_block(\d+)_0_bn$", rf"features.denseblock{i}.denselayer\1.norm1") for i in (1, 2, 3, 4)),
    *((rf"^conv{i + 1}_block(\d+)_1_conv$", rf"features.denseblock{i}.denselayer\1.conv1") for i in (1, 2, 3, 4)),
    *((rf"^conv{i + 1}_block(\d+)_1_bn$", rf"features.denseblock{i}.denselayer\1.norm2") for i in (1, 2, 3, 4)),
    *((rf"^conv{i + 1}_block(\d+)_2_conv$", rf"features.denseblock{i}.denselayer\1.conv2") for i in (1, 2, 3, 4)),
)


def renamed(name, rules):
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def joined(output):
    """The output of a block, or both paths of a dual path network's."""
    return torch.cat(output, dim=1).numpy() if isinstance(output, tuple) else output.numpy()


def from_torch(make, rules=(), cases=CASES):
    """Logits and every block's output of a PyTorch network with drawn weights."""
    model = make().double().eval()
    state = model.state_dict()
    names = {key: renamed(key, rules) for key in state}
    for key, value in state.items():
        if value.dtype.is_floating_point:
            value.copy_(torch.from_numpy(draw(names[key], tuple(value.shape))))
    model.load_state_dict(state)
    shapes = {names[key]: tuple(value.shape) for key, value in state.items()}
    arrays = {"keys_sha256": np.array(hashlib.sha256(key_lines(shapes).encode()).hexdigest())}
    blocks = {name: part for name, part in model.features.named_children() if name.startswith("denseblock")}
    if rules == PYTORCHCV_DPN:  # the last unit of each stage
        stages = {name: part for name, part in model.features.named_children() if name.startswith("stage")}
        blocks = {f"conv{number}_{len(part)}": part[-1] for number, part in enumerate(stages.values(), 2)}
    for batch, side_px in cases:
        for name, part in blocks.items():
            part.register_forward_hook(
                lambda _, __, output, key=f"{side_px}/{name}": arrays.update({key: summarize(joined(output))})
            )
        with torch.no_grad():
            arrays[f"{side_px}/logits"] = model(torch.from_numpy(draw_images(batch, side_px)).double()).numpy()
        for part in blocks.values():
            part._forward_hooks.clear()
    return arrays


def monai(growth_rate=32, block_sizes=(6, 12, 64, 48)):
    from monai.networks.nets import DenseNet

    return from_torch(
        lambda: DenseNet(
            spatial_dims=2,
            in_channels=3,
            out_channels=1000,
            init_features=2 * growth_rate,
            growth_rate=growth_rate,
            block_config=block_sizes,
        ),
        MONAI,
    )


def timm_class():
    from timm.models.densenet import DenseNet

    return from_torch(lambda: DenseNet(growth_rate=32, block_config=(6, 12, 24, 16), stem_type="deep"))


def pytorchcv(name):
    from pytorchcv.models import densenet_cifar

    return from_torch(getattr(densenet_cifar, name), PYTORCHCV, CIFAR_CASES)


def pytorchcv_dual_path(name):
    from pytorchcv.models import dpn

    return from_torch(lambda: getattr(dpn, name)(for_training=True), PYTORCHCV_DPN)


def pytorchcv_dpn92():
    """pytorchcv's class with the numbers of the paper's table 1; it has no such name."""
    from pytorchcv.models.dpn import DPN

    widths, increments, sizes = (256, 512, 1024, 2048), (16, 32, 24, 128), (3, 4, 20, 3)
    shape = {"init_block_channels": 64, "init_block_kernel_size": 7, "init_block_padding": 3, "groups": 32}
    channels = [
        [width + (unit + 3) * increment for unit in range(size)]
        for width, increment, size in zip(widths, increments, sizes, strict=True)
    ]
    shape |= {"b_case": False, "for_training": True, "test_time_pool": False}
    return from_torch(
        lambda: DPN(channels, rs=[96, 192, 384, 768], bws=[*widths], incs=[*increments], **shape), PYTORCHCV_DPN
    )


def keras(name):
    """Logits of Keras's network; its epsilon's difference is taken from the drawn variances, the same function."""
    import keras as library

    library.config.set_floatx("float64")
    arrays = {}
    for batch, side_px in CASES:
        model = getattr(library.applications, name)(
            weights=None, input_shape=(side_px, side_px, 3), classes=1000, classifier_activation=None
        )
        for layer in model.layers:
            for variable in layer.variables:
                leaf = {
                    **{"kernel": "weight", "gamma": "weight", "beta": "bias", "bias": "bias"},
                    **{"moving_mean": "running_mean", "moving_variance": "running_var"},
                }[variable.name]
                order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[len(variable.shape)]
                shape = tuple(variable.shape[axis] for axis in order)
                value = draw(f"{renamed(layer.name, KERAS)}.{leaf}", shape).astype(np.float64)
                if leaf == "running_var":
                    value = value - (KERAS_EPSILON - EPSILON)
                variable.assign(value.transpose(np.argsort(order)))
        images = draw_images(batch, side_px).transpose(0, 2, 3, 1).astype(np.float64)
        arrays[f"{side_px}/logits"] = library.ops.convert_to_numpy(model(images, training=False))
    return arrays


PROOFS = {
    "densenet264": monai,
    "densenet264_k48": lambda: monai(growth_rate=48),
    "densenet232": lambda: monai(growth_rate=48, block_sizes=(6, 32, 48, 48)),
    "densenet121d": timm_class,
    "densenet_40_12": lambda: pytorchcv("densenet40_k12_cifar10"),
    "densenet_100_12": lambda: pytorchcv("densenet100_k12_cifar10"),
    "densenet_100_24": lambda: pytorchcv("densenet100_k24_cifar10"),
    "densenet_bc_100_12": lambda: pytorchcv("densenet100_k12_bc_cifar10"),
    "densenet_bc_250_24": lambda: pytorchcv("densenet250_k24_bc_cifar10"),
    "densenet_bc_190_40": lambda: pytorchcv("densenet190_k40_bc_cifar10"),
    **{f"pytorchcv_{name}": lambda name=name: pytorchcv_dual_path(name) for name in DUAL_PATH},
    "pytorchcv_dpn92": pytorchcv_dpn92,
    "keras_densenet121": lambda: keras("DenseNet121"),
    "keras_densenet169": lambda: keras("DenseNet169"),
    "keras_densenet201": lambda: keras("DenseNet201"),
}


def main():
    for name in sys.argv[1:] or PROOFS:
        arrays = PROOFS[name]()
        path = HERE / f"{name}.npz"
        np.savez_compressed(path, **arrays)
        print(f"{name}: {len(arrays)} arrays, {path.stat().st_size} bytes", flush=True)


if __name__ == "__main__":
    main()
