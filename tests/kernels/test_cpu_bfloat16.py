"""Products of bfloat16 values on a CPU, summed in float32, give what NumPy gives from rounded operands."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax.kernels.cpu import bfloat16, block, library
from densenet_jax.models.fused import inference
from densenet_jax.models.fused.inference import PackedInCall, pack_kernels
from tests.kernels.rounding import PRODUCTS, convolve, make_networks, read_inputs

pytestmark = pytest.mark.usefixtures("compiled")

# batch, side, inputs, outputs, kernel, stride, pooled, added
STEPS = [
    (2, 14, 64, 32, 1, 1, False, 0),  # whole tiles
    (3, 7, 34, 20, 1, 1, False, 18),  # of pixels, inputs and outputs some are left
    (1, 9, 98, 50, 3, 1, False, 4),
    (2, 12, 32, 12, 3, 1, False, 0),
    (1, 15, 48, 40, 1, 2, False, 0),
    (2, 9, 66, 24, 1, 2, True, 0),
    (1, 1, 2, 2, 3, 1, False, 0),
    (1, 40, 6, 33, 3, 1, False, 0),
]


@pytest.fixture(params=PRODUCTS)
def products(request, monkeypatch):
    """Computes so, if this processor can."""
    if library.bfloat16_products() < PRODUCTS[request.param]:
        pytest.skip(f"this processor multiplies no bfloat16 values {request.param.replace('_', ' ')}")
    monkeypatch.setattr(block, "bfloat16_products", lambda: PRODUCTS[request.param])


def rounded(values):
    return np.asarray(values, np.float32).astype(jnp.bfloat16).astype(np.float64)


def expected(x, scale, bias, kernel, stride, pooled):
    """Convolves relu(scale * x + bias) in float64; operands are exact in float32, so that they round alike."""
    return convolve(rounded(read_inputs(x.astype(np.float64), scale, bias, stride, pooled)), rounded(kernel))


@pytest.mark.parametrize("case", STEPS)
def test_a_step(case, products):
    b, side, c, o, size, stride, pooled, added = case
    random = np.random.default_rng(0)
    x = (random.integers(-512, 512, (b, side, side, c + 3)) / 64).astype(np.float32)
    scale, bias = 2.0 ** random.integers(-1, 2, c), random.integers(-8, 9, c) / 16
    kernel = random.standard_normal((size, size, c, o)).astype(np.float32)
    wanted = expected(x[..., :c], scale, bias, kernel, stride, pooled)
    if added:
        wanted[..., :added] += x[..., :added]

    def run(packed):
        norm = scale.astype(np.float32), bias.astype(np.float32), np.zeros(0, np.float32), np.zeros(0, np.float32)
        own = block.Arrays(*map(jnp.asarray, (*norm, packed)))
        assert block.is_usable(x, [own])
        steps = (block.Step(0, 1, added, added, stride, pooled=pooled),)
        options = {"steps": steps, "shapes": (wanted.shape,), "epsilon": 1.0, "copied": added}
        computed = jax.jit(functools.partial(block.run_block, **options))(x, [own])
        return computed, lambda: jax.jit(functools.partial(block.plain_run_block, **options))(x, *own)[0]

    bound = 2e-6 * np.abs(wanted).max() * np.sqrt(c * size)
    packed = bfloat16.pack(kernel)
    np.testing.assert_array_equal(np.asarray(jax.jit(bfloat16.unpack)(packed), np.float32), rounded(kernel))
    computed, run_plainly = run(packed)
    np.testing.assert_allclose(computed, wanted, rtol=0, atol=bound)
    np.testing.assert_allclose(run_plainly(), wanted, rtol=0, atol=bound)
    swapped, _ = run(packed.reshape(-1, 2)[:, ::-1].reshape(packed.shape))  # both inputs of every pair
    assert np.abs(swapped - wanted).max() > 100 * bound


@pytest.mark.parametrize("case", [(2, 33, 3, 24, 7, 2), (1, 20, 1, 64, 7, 2), (2, 9, 3, 10, 3, 1)])
def test_a_stem(case, products):
    """The windows at the right end of a line are not mixed with the next line's."""
    b, side, c, o, size, stride = case
    random = np.random.default_rng(0)
    x = random.standard_normal((b, side, side + 3, c)).astype(np.float32)
    kernel = random.standard_normal((size, size, c, o)).astype(np.float32)
    scale, bias = random.standard_normal((2, o)).astype(np.float32)  # of both signs
    border = size // 2
    padded = np.pad(rounded(x), ((0, 0), (border, border), (border, border), (0, 0)))
    taps = [(i, j) for i in range(size) for j in range(size)]
    wide = side + 3
    y = sum((padded[:, i : i + side, j : j + wide] @ rounded(kernel[i, j]))[:, ::stride, ::stride] for i, j in taps)
    y = np.pad(np.maximum(y * scale + bias, 0), ((0, 0), (1, 2), (1, 2), (0, 0)))
    rows, columns = ((length - 2) // 2 * 2 - 1 for length in y.shape[1:3])
    corners = [y[:, i : i + rows : 2, j : j + columns : 2] for i in range(3) for j in range(3)]
    wanted = functools.reduce(np.maximum, corners)
    assert bfloat16.is_stem(jnp.asarray(x), jnp.asarray(kernel))
    computed = jax.jit(functools.partial(bfloat16.stem, stride))(x, kernel, scale, bias)
    assert computed.shape == wanted.shape
    np.testing.assert_allclose(computed, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    plain = jax.jit(functools.partial(bfloat16.plain_stem, stride=stride))(x, kernel, scale, bias)
    np.testing.assert_allclose(plain, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


SMALL = {
    "densenet121": {"block_sizes": (1, 2), "growth_rate": 12},
    "dpn68": {"reduction_width": 8, "groups": 2, "block_sizes": (1, 2), "dense_increments": (8, 16)},
}


@functools.cache
def networks_of(name):
    return make_networks(name, jnp.bfloat16, 2, **SMALL[name])


@pytest.mark.parametrize(("name", "count"), [("densenet121", 7), ("dpn68", 8)])
def test_a_network_in_bfloat16(name, count):
    """Kernels are rounded and laid out once; feature maps and logits are float32, and near those of float32."""
    ours, exact, variables, images = networks_of(name)
    packed, arrays = pack_kernels(ours, variables)
    kernels = [leaf for leaf in jax.tree.leaves(arrays) if leaf.dtype == jnp.bfloat16]
    assert len(kernels) == (count if library.bfloat16_products() else 0)  # those of blocks without groups
    assert jax.tree.map(jnp.shape, arrays) == jax.tree.map(jnp.shape, variables)
    answer, pullback = jax.vjp(jax.jit(lambda images: packed.apply(arrays, images, train=False)), images)
    wanted, other = jax.vjp(jax.jit(lambda images: exact.apply(variables, images, train=False)), images)
    if kernels:
        assert 0 < np.abs(answer - wanted).max() < 0.01 * np.abs(wanted).max()
    in_call = jax.jit(functools.partial(PackedInCall(ours).apply, train=False))(variables, images)
    np.testing.assert_array_equal(in_call, jax.jit(functools.partial(packed.apply, train=False))(arrays, images))
    gradient, exact_gradient = pullback(wanted)[0], other(wanted)[0]
    assert jnp.linalg.norm(gradient - exact_gradient) < 0.25 * jnp.linalg.norm(exact_gradient)


def test_without_the_instructions_it_is_float32(monkeypatch, caplog):
    monkeypatch.setattr(inference, "bfloat16_products", lambda: 0)
    ours, exact, variables, images = networks_of("densenet121")
    (packed, arrays), (other, others) = (pack_kernels(one, variables) for one in (ours, exact))
    assert packed == other
    assert "config.model.dtype=bfloat16: this processor multiplies no bfloat16 values" in caplog.text
    assert jax.tree.all(jax.tree.map(np.array_equal, arrays, others))
    np.testing.assert_array_equal(jax.jit(packed.apply)(arrays, images), jax.jit(other.apply)(others, images))
