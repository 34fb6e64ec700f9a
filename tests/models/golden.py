"""Runs our models on the golden files' weights and images, and measures how far they are from the references."""

import functools
from pathlib import Path
from unittest import mock

import flax.core.scope
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from densenet_jax.models import densenet, dual_path, layers, rdnet
from densenet_jax.models.create import create_model
from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.layers import FeatureMap
from densenet_jax.models.torch_weights import (
    flatten,
    from_torch_array,
    is_dual_path,
    to_torch_array,
    torch_name,
    torch_shape,
    with_own_head,
)
from densenet_jax.models.variants import get_variant
from tests.golden.drawn import SEED, draw, draw_images, relative_error, summarize

GOLDEN = Path(__file__).parent.parent / "golden"

SMALL_MODELS = {
    "small_densenet": ("densenet121", {"growth_rate": 8, "block_sizes": (2, 3, 2, 2)}),
    "small_densenet_blur": (
        "densenet121",
        {"growth_rate": 8, "block_sizes": (2, 2), "stem": "deep_tiered", "blur": "all"},
    ),
    "small_dpn": (
        "dpn68",
        {"reduction_width": 16, "groups": 4, "block_sizes": (1, 2, 1, 2), "dense_increments": (4, 6, 8, 4)},
    ),
    "small_dpn_b": (
        "dpn48b",
        {
            "stem_width": 6,
            "reduction_width": 16,
            "groups": 4,
            "block_sizes": (2, 1, 1, 1),
            "dense_increments": (4, 6, 8, 4),
        },
    ),
    "small_rdnet": (
        "rdnet_tiny",
        {"stem_width": 20, "growth_rate": (8, 12, 16, 24), "block_sizes": (2, 1, 3, 1), "halved_stages": (1, 3)},
    ),
}


def golden(name):
    """The arrays of one golden file."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def make(name, **options):
    """The model that a golden file is about."""
    if name in SMALL_MODELS:
        base, architecture = SMALL_MODELS[name]
        return create_model(base, num_classes=10, **architecture, **options)
    return create_model(name, **options)


class ShapesOnly(densenet.Plain):
    """Dense blocks without their arithmetic, which takes half the tracing."""

    def dense_block(self, layers, x, train, key, options):
        for layer in layers:
            _ = layer.norm1.arrays(), layer.conv1.kernel  # which declares all of the layer's parameters
            if layer.bottleneck_width:
                _ = layer.norm2.arrays(), layer.conv2.kernel
        width = x.shape[3] + len(layers) * layers[0].growth_rate
        return FeatureMap(jnp.zeros((*x.shape[:3], width), x.dtype))


class DualPathShapesOnly(dual_path.Plain):
    """Dual path blocks without their arithmetic, likewise."""

    def stage(self, blocks, x, train, remat):
        for block in blocks:
            parts = [block.c1x1_a, block.c3x3_b, block.c1x1_c, *filter(None, [block.projection()])]
            _ = [part.bn.arrays() for part in parts]
            if block.split_projection:
                parts.remove(block.c1x1_c)
                _ = block.c1x1_c1.kernel, block.c1x1_c2.kernel
            _ = [part.conv.kernel for part in parts]
        # A stage begins with twice the increment, and every block adds one.
        width = blocks[0].residual_width + (len(blocks) + 2) * blocks[0].dense_increment
        return FeatureMap(jnp.zeros((*x.values.shape[:3], width), x.values.dtype))


@functools.cache
def abstract_variables(name, **architecture):
    """Shapes of a model's variables, traced once a test run."""
    side_px = 65 if name in SMALL_MODELS else get_variant(name).preprocessing.input_px
    return trace_variables(make(name, **architecture), side_px)


def trace_variables(model, side_px):
    """Shapes of a model's variables, which depend neither on arithmetic nor on initializers: both are left out."""
    if isinstance(model, DenseNet):
        model = model.clone(implementation=ShapesOnly())
    elif isinstance(model, dual_path.DualPathNetwork):
        model = model.clone(implementation=DualPathShapesOnly())
    images = jax.ShapeDtypeStruct((1, side_px, side_px, 3), jnp.float32)
    with (
        mock.patch.object(flax.core.scope, "_fold_in_static", lambda key, _: key),  # a key for each variable
        mock.patch.object(layers, "he_normal", return_value=jax.nn.initializers.zeros),
        mock.patch.object(rdnet, "he_normal", return_value=jax.nn.initializers.zeros),
        mock.patch.object(rdnet, "normalize_channels", lambda x, *_: x),
        mock.patch.object(jax.nn, "gelu", lambda x, approximate: x),
        mock.patch.object(jax.random, "uniform", lambda key, shape, dtype, *_: jnp.zeros(shape, dtype)),
    ):
        return jax.eval_shape(model.init, jax.random.key(0), images)


def torch_shapes(template):
    """The shapes of a model's variables by state-dict key."""
    leaves = flatten(template)
    dual_path = is_dual_path(leaves)
    return with_own_head({torch_name(path): torch_shape(path, leaf.shape, dual_path) for path, leaf in leaves.items()})


def drawn_variables(name, dtype=np.float32, seed=SEED, **architecture):
    """A model's variables with the golden files' weights."""
    leaves = flatten(abstract_variables(name, **architecture))
    shapes = torch_shapes(abstract_variables(name, **architecture)).items()  # in the order of the leaves
    drawn = {path: from_torch_array(path, draw(*entry, seed)) for path, entry in zip(leaves, shapes, strict=True)}
    arrays = {path: array.astype(dtype) for path, array in drawn.items()}
    return {"batch_stats": {}, **traverse_util.unflatten_dict(arrays)}


def images(batch, side_px, dtype=np.float32):
    """The golden files' images, float[b, h, w, 3]."""
    return draw_images(batch, side_px).transpose(0, 2, 3, 1).astype(dtype)


def _is_tap(module, method):
    name = module.name or ""
    return method == "__call__" and name.startswith(("norm", "bn", "denseblock", "transition", "conv", "st"))


def run_with_taps(model, variables, x):
    """Logits and stages of the plain implementation, and as "own logits" those of the fast one."""
    return {**run_plain_with_taps(model, variables, x), "own logits": model.apply(variables, x)}


def run_plain_with_taps(model, variables, x):
    """Logits and every stage's output of the plain implementation, by the references' module names."""
    return run_own_with_taps(model.clone(implementation=type(model).implementation), variables, x)


def run_own_with_taps(model, variables, x):
    """Logits and every stage's output of the model as it is, by the references' module names."""
    logits, state = model.apply(variables, x, capture_intermediates=_is_tap, mutable=["intermediates"])
    outputs = {"logits": logits}
    for name, captured in state["intermediates"].items():
        if isinstance(captured, dict) and "__call__" in captured:
            value = captured["__call__"][0]
            value = value.raw(model.norm_options.epsilon) if hasattr(value, "raw") else value
            # The references' norms in stem and head include the ReLU.
            outputs[name] = jax.nn.relu(value) if name.startswith("norm") else value
    if "conv1_1" in state["intermediates"]:
        value = state["intermediates"]["conv1_1"]["bn"]["__call__"][0]
        outputs["conv1_1"] = dual_path.ACTIVATIONS[model.architecture.activation](value)
    return outputs


def torch_layout(array):
    """[b, h, w, c] as [b, c, h, w]; other ranks as they are."""
    return np.asarray(array).transpose(0, 3, 1, 2) if np.ndim(array) == 4 else np.asarray(array)


def stage_errors(outputs, expected, side_px):
    """The relative error of each stage and of the logits that a golden file has for this size."""
    prefix = f"{side_px}/"
    names = [key.removeprefix(prefix) for key in expected if key.startswith(prefix)]
    assert "logits" in names
    errors = {}
    for name in names:
        if name != "logits":
            errors[name] = float(relative_error(summarize(torch_layout(outputs[name])), expected[prefix + name]))
    for name in {"logits", "own logits"} & set(outputs):
        errors[name] = _logits_error(np.asarray(outputs[name]), expected[f"{prefix}logits"])
    return errors


def _logits_error(ours, theirs):
    assert ours.shape == theirs.shape
    error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    return error if np.isfinite(error) else np.inf


def gradient_leaves(gradients):
    """Gradients by state-dict key, in PyTorch's layout."""
    leaves = flatten({"params": gradients, "batch_stats": {}})
    dual_path = is_dual_path(leaves)
    return with_own_head({torch_name(path): to_torch_array(path, value, dual_path) for path, value in leaves.items()})
