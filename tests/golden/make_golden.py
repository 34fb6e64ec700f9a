"""Makes the golden files beside this script from timm.

    python tests/golden/make_golden.py [NAME ...]

needs torch 2.13, torchvision and timm 1.0.31 (any CPU build). Run it again only when a case is added or the drawing in
drawn.py changes; review the difference, since the files say what the references compute.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
from drawn import draw, draw_images, key_lines, summarize
from references import timm, torchvision
from timm.layers import EffectiveSEModule
from timm.layers.test_time_pool import TestTimePoolHead
from timm.models._features import FeatureListNet
from timm.models.densenet import DenseNet
from timm.models.dpn import DPN
from timm.models.rdnet import RDNet

HERE = Path(__file__).parent
NAMES = (
    *("densenet121", "densenet161", "densenet169", "densenet201", "densenet264d", "densenetblur121d"),
    *("dpn48b", "dpn68", "dpn68b", "dpn92", "dpn98", "dpn107", "dpn131"),
    *("rdnet_tiny", "rdnet_small", "rdnet_base", "rdnet_large"),
)
CASES = ((1, 224), (1, 161), (2, 65))  # (batch, side in pixels)
TORCHVISION = ("densenet121", "densenet161", "densenet169", "densenet201")

SMALL = {
    "small_densenet": lambda: DenseNet(growth_rate=8, block_config=(2, 3, 2, 2), num_classes=10),
    "small_densenet_blur": lambda: DenseNet(
        growth_rate=8,
        block_config=(2, 2),
        num_classes=10,
        stem_type="deep_tiered",
        aa_layer=timm.layers.BlurPool2d,
        aa_stem_only=False,
    ),
    "small_dpn": lambda: DPN(
        small=True, num_init_features=10, k_r=16, groups=4, k_sec=(1, 2, 1, 2), inc_sec=(4, 6, 8, 4), num_classes=10
    ),
    "small_dpn_b": lambda: DPN(
        small=True,
        num_init_features=6,
        k_r=16,
        groups=4,
        k_sec=(2, 1, 1, 1),
        inc_sec=(4, 6, 8, 4),
        b=True,
        act_layer="silu",
        num_classes=10,
    ),
    "small_rdnet": lambda: RDNet(
        num_init_features=20,
        growth_rates=(8, 12, 16, 24),
        num_blocks_list=(2, 1, 3, 1),
        is_downsample_block=(None, True, False, True),
        block_type=("Block", "Block", "BlockESE", "BlockESE"),
        num_classes=10,
    ),
}
SMALL_BATCH, SMALL_TRAIN_PX, SMALL_EVAL_PX = 4, 67, (67, 64)  # odd and even sides show different padding faults
WINDOW_PX = 2


def fill(model):
    """Every parameter and statistic drawn at random."""
    state = model.state_dict()
    for key, value in state.items():
        if value.dtype.is_floating_point:
            value.copy_(torch.from_numpy(draw(key, tuple(value.shape))))
    model.load_state_dict(state)
    return model


def exact_gates(model):
    """torch's gradient of the hard sigmoid has 1/6 in float32 whatever the dtype, 3e-8 off; this one is exact."""
    for module in model.modules():
        if isinstance(module, EffectiveSEModule):
            module.gate = type("Gate", (torch.nn.Module,), {"forward": lambda _, x: (x + 3).clamp(0, 6) / 6})()
    return model


def taps(model):
    """The modules whose outputs are compared, by their name in the state dict."""
    if isinstance(model, RDNet):
        return {"stem": model.stem, **{f"stage{i}": stage for i, stage in enumerate(model.dense_stages, 1)}}
    modules = dict(model.features.named_children())
    if "conv5_bn_ac" not in modules:
        wanted = [name for name in modules if name.startswith(("norm", "denseblock", "transition"))]
        return {name: modules[name] for name in wanted}
    last = {name.split("_")[0]: name for name in modules if name not in ("conv1_pool", "conv5_bn_ac")}
    return {name: modules[name] for name in (*last.values(), "conv5_bn_ac")}


def summaries(model, images):
    """Summaries of every tap, and all the logits."""
    outputs, handles = {}, []
    for name, module in taps(model).items():
        hook = lambda _, __, output, name=name: outputs.__setitem__(name, summarize(output.detach().numpy()))  # noqa: E731
        handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        outputs["logits"] = model(images).numpy()
    for handle in handles:
        handle.remove()
    return outputs


def same_as_torchvision(name, model):
    """torchvision's network has the same keys and gives the same logits."""
    other = torchvision.models.get_model(name, weights=None)
    assert set(other.state_dict()) == set(model.state_dict())
    other.load_state_dict(model.state_dict(), strict=True)
    images = torch.from_numpy(draw_images(2, 97)).double()
    with torch.no_grad():
        torch.testing.assert_close(other.double().eval()(images), model(images), rtol=1e-12, atol=1e-12)


def evaluation(name):
    model = fill(timm.create_model(name, pretrained=False)).double().eval()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    arrays = {
        "keys_sha256": np.array(hashlib.sha256(key_lines(shapes).encode()).hexdigest()),
        "key_count": np.array(len(shapes)),
    }
    for batch, side_px in CASES:
        outputs = summaries(model, torch.from_numpy(draw_images(batch, side_px)).double())
        arrays |= {f"{side_px}/{key}": value for key, value in outputs.items()}
    if name in TORCHVISION:
        same_as_torchvision(name, model)
    return arrays


def pyramid(name, images):
    """Summaries of what timm's features_only=True gives, by stride."""
    model = fill(SMALL[name]()).double().eval()
    strides = [info["reduction"] for info in model.feature_info]
    features = FeatureListNet(model, out_indices=tuple(range(len(strides))), flatten_sequential=True)
    with torch.no_grad():
        outputs = zip(strides, features(images), strict=True)
        return {f"pyramid/{stride}": summarize(output.numpy()) for stride, output in outputs}


def training(name):
    """Training-mode logits, running statistics after one step, and every gradient of a random linear loss."""
    model = exact_gates(fill(SMALL[name]()).double().train())
    images = torch.from_numpy(draw_images(SMALL_BATCH, SMALL_TRAIN_PX)).double().requires_grad_()
    logits = model(images)
    weights = torch.from_numpy(draw("loss.weight", (SMALL_BATCH, 10))).double()
    (logits * weights).sum().backward()
    arrays = {"train/logits": logits.detach().numpy(), "gradient/images": summarize(images.grad.numpy())}
    arrays |= {f"gradient/{key}": summarize(value.grad.numpy()) for key, value in model.named_parameters()}
    statistics = {key: value for key, value in model.state_dict().items() if "running" in key}
    arrays |= {f"after/{key}": summarize(value.numpy()) for key, value in statistics.items()}
    evaluating = fill(SMALL[name]()).double().eval()
    for side_px in SMALL_EVAL_PX:
        outputs = summaries(evaluating, torch.from_numpy(draw_images(SMALL_BATCH, side_px)).double())
        arrays |= {f"{side_px}/{key}": value for key, value in outputs.items()}
    if isinstance(evaluating, RDNet):
        return arrays
    arrays |= pyramid(name, images.detach())
    windows = TestTimePoolHead(evaluating, original_pool=WINDOW_PX).double()  # takes the model apart, so it comes last
    with torch.no_grad():
        arrays["windows/logits"] = windows(images.detach()).numpy()
    return arrays


def main():
    assert timm.__version__ == "1.0.31", timm.__version__
    for name in sys.argv[1:] or (*NAMES, *SMALL):
        arrays = training(name) if name in SMALL else evaluation(name)
        path = HERE / f"{name}.npz"
        np.savez_compressed(path, **arrays)
        print(f"{name}: {len(arrays)} arrays, {path.stat().st_size} bytes", flush=True)


if __name__ == "__main__":
    main()
