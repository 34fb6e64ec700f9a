"""Products of integers of 8 bits on a CPU give what NumPy gives from operands that are rounded in the same way."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import densenet_jax
from densenet_jax.errors import UserError
from densenet_jax.kernels.cpu import block, int8, library
from densenet_jax.models.fused import inference
from densenet_jax.models.fused.inference import PackedInCall, pack_kernels
from tests.kernels.rounding import PRODUCTS, convolve, make_networks, read_inputs

pytestmark = pytest.mark.usefixtures("compiled")

# batch, side, inputs, outputs, kernel, stride, pooled, added
STEPS = [
    (2, 14, 64, 32, 1, 1, False, 0),  # whole tiles
    (3, 7, 36, 20, 1, 1, False, 18),  # of pixels, inputs and outputs some are left
    (1, 9, 100, 50, 3, 1, False, 4),
    (2, 12, 32, 12, 3, 1, False, 0),
    (1, 15, 48, 40, 1, 2, False, 0),
    (2, 9, 68, 24, 1, 2, True, 0),
    (1, 1, 4, 2, 3, 1, False, 0),
]


def draw_step(case):
    """Draws x, scale, bias and kernel; activations are exact in float32, in bfloat16 they are rounded."""
    b, side, c, o, size, *_ = case
    random = np.random.default_rng(0)
    x = (random.integers(-512, 512, (b, side, side, c + 3)) / 64).astype(np.float32)
    scale, bias = np.float32(2.0 ** random.integers(-1, 2, c)), np.float32(random.integers(-8, 9, c) / 16)
    kernel = random.standard_normal((size, size, c, o)).astype(np.float32)
    kernel[..., 0] = 0  # has no scale
    x[0, 0, 0] = -100  # all of a pixel's activations are 0
    return x, scale, bias, kernel


def expected(x, scale, bias, kernel, stride, pooled):
    """Convolves relu(scale * x + bias), rounded to bytes, with rounded weights, in whole numbers."""
    activation, size = read_inputs(x, scale, bias, stride, pooled), len(kernel)
    if size > 1:
        activation = activation.astype(jnp.bfloat16).astype(np.float32)
    most = activation.max(axis=3 if size == 1 else (1, 2, 3), keepdims=True)
    whole = np.rint(activation * (255 / np.where(most > 0, most, 1))).astype(int)
    largest = np.abs(kernel).max(axis=(0, 1, 2))
    weights = np.rint(kernel * (127 / np.where(largest > 0, largest, 1))).astype(int)
    return convolve(whole, weights) * (most / 255).astype(np.float64) * (largest / 127)


def run_step(x, scale, bias, kernel, case, plainly=False):
    side, _, o, _, stride, pooled, added = case[1:]
    own = block.Arrays(*map(jnp.asarray, (scale, bias, np.zeros(0), np.zeros(0), *int8.pack(kernel))))
    assert block.is_usable(x, [own])
    after = side // 2 if pooled else (side - 1) // stride + 1
    steps = (block.Step(0, 1, added, added, stride, pooled=pooled),)
    options = {"steps": steps, "shapes": ((len(x), after, after, o),), "epsilon": 1.0, "copied": added}
    run = jax.jit(functools.partial(block.plain_run_block if plainly else block.run_block, **options))
    return np.asarray(run(x, *own)[0] if plainly else run(x, [own]))


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("case", STEPS)
def test_a_step(case, products, monkeypatch):
    if library.int8_products() < PRODUCTS[products]:
        pytest.skip(f"this processor multiplies no integers {products.replace('_', ' ')}")
    x, scale, bias, kernel = draw_step(case)
    channels, added = case[2], case[-1]
    wanted = expected(x[..., :channels], scale, bias, kernel, *case[5:7])
    if added:
        wanted[..., :added] += x[..., :added]
    monkeypatch.setattr(block, "int8_products", lambda: PRODUCTS[products])
    result = run_step(x, scale, bias, kernel, case)
    np.testing.assert_allclose(result, wanted, rtol=2e-6, atol=1e-6 * np.abs(wanted).max())
    plain = run_step(x, scale, bias, kernel, case, plainly=True)
    np.testing.assert_allclose(plain, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    monkeypatch.setattr(block, "int8_products", lambda: 0)
    np.testing.assert_array_equal(run_step(x, scale, bias, kernel, case), result)


def test_weights_are_nearest_multiples_of_their_output_s_scale():
    kernel = draw_step(STEPS[2])[-1]
    packed, scales = int8.pack(kernel)
    assert packed.dtype == np.int8
    assert packed.shape == kernel.shape
    assert np.abs(packed.astype(int)).max() == 127
    unpacked = int8.unpack(jnp.asarray(packed), jnp.asarray(scales))
    assert (np.abs(unpacked - kernel) <= 0.5001 * scales).all()
    np.testing.assert_allclose(scales, np.abs(kernel).max(axis=(0, 1, 2)) / 127, rtol=1e-6)


SMALL = {
    "densenet121": {"block_sizes": (2, 2), "growth_rate": 12},
    "densenet_40_12": {"block_sizes": (2, 2), "growth_rate": 12},  # without bottlenecks
    "dpn68": {"reduction_width": 8, "groups": 2, "block_sizes": (1, 2), "dense_increments": (8, 16)},
}


@functools.cache
def networks_of(name):
    return make_networks(name, jnp.int8, 3, **SMALL[name])


@pytest.mark.parametrize(("name", "count"), [("densenet121", 9), ("densenet_40_12", 5), ("dpn68", 6)])
def test_a_network_in_int8(name, count):
    """Kernels are rounded and laid out once; logits are near those of float32, and so are gradients."""
    ours, exact, variables, images = networks_of(name)
    packed, arrays = pack_kernels(ours, variables)
    kernels = [leaf for leaf in jax.tree.leaves(arrays) if leaf.dtype == jnp.int8]
    assert len(kernels) == (count if library.int8_products() else 0)  # without groups, of fours of inputs
    assert jax.tree.map(jnp.shape, arrays["params"]) == jax.tree.map(jnp.shape, variables["params"])
    answer, pullback = jax.vjp(jax.jit(lambda images: packed.apply(arrays, images, train=False)), images)
    wanted, other = jax.vjp(jax.jit(lambda images: exact.apply(variables, images, train=False)), images)
    if kernels:
        assert 0 < np.abs(answer - wanted).max() < 0.03 * np.abs(wanted).max()
    in_call = jax.jit(functools.partial(PackedInCall(ours).apply, train=False))(variables, images)
    in_one = jax.jit(functools.partial(packed.apply, train=False))
    np.testing.assert_allclose(in_call, in_one(arrays, images), rtol=1e-3)  # where a weight is rounded the other way
    gradient, exact_gradient = pullback(wanted)[0], other(wanted)[0]
    assert jnp.linalg.norm(gradient - exact_gradient) < 0.3 * jnp.linalg.norm(exact_gradient)


def test_an_image_does_not_depend_on_the_others_or_on_the_number_of_threads():
    ours, _, variables, images = networks_of("densenet121")
    packed, arrays = pack_kernels(ours, variables)
    apply = jax.jit(functools.partial(packed.clone(output="map").apply, train=False))
    together = apply(arrays, images * jnp.array([1, 30, 0.1])[:, None, None, None])
    alone = [apply(arrays, one[None]) for one in (images[0], images[1] * 30, images[2] * 0.1)]
    np.testing.assert_array_equal(together, jnp.concatenate(alone))
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        np.testing.assert_array_equal(apply(arrays, images[:1]), together[:1])
    finally:
        os.sched_setaffinity(0, cores)


def test_without_the_instructions_it_is_float32(monkeypatch, caplog):
    monkeypatch.setattr(inference, "int8_products", lambda: 0)
    ours, exact, variables, images = networks_of("densenet121")
    (packed, arrays), (other, others) = (pack_kernels(one, variables) for one in (ours, exact))
    assert "config.model.dtype=int8: this processor multiplies no integers of 8 bits" in caplog.text
    assert jax.tree.all(jax.tree.map(np.array_equal, arrays, others))
    np.testing.assert_array_equal(jax.jit(packed.apply)(arrays, images), jax.jit(other.apply)(others, images))


def test_several_devices_and_other_families_have_none(caplog):
    ours, _, variables, _ = networks_of("densenet121")
    assert pack_kernels(ours, variables, devices=2) == (ours, variables)
    assert "config.model.dtype=int8: only the CPU kernels have it, on one device" in caplog.text
    with pytest.raises(UserError, match="dtype=int8: rdnet_tiny is an RDNet, which has no products of int8"):
        densenet_jax.create_model("rdnet_tiny", dtype=jnp.int8)
