"""What the tests of products of bfloat16 values and of integers share."""

import jax
import jax.numpy as jnp
import numpy as np

import densenet_jax

PRODUCTS = {"plainly": 0, "by_avx512": 1, "by_amx": 2}


def read_inputs(x, scale, bias, stride, pooled):
    """Returns relu(scale * x + bias) at the stride, or its means over 2x2 pixels."""
    activation = np.maximum(x * scale + bias, 0)
    batch, height, width, channels = activation.shape
    if not pooled:
        return activation[:, ::stride, ::stride]
    activation = activation[:, : height // 2 * 2, : width // 2 * 2]
    return activation.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def convolve(inputs, kernel):
    """Convolves at stride 1 with a border of zeros, tap by tap."""
    size, (height, width) = len(kernel), inputs.shape[1:3]
    border = size // 2
    padded = np.pad(inputs, ((0, 0), (border, border), (border, border), (0, 0)))
    taps = [(i, j) for i in range(size) for j in range(size)]
    return sum(padded[:, i : i + height, j : j + width] @ kernel[i, j] for i, j in taps)


def make_networks(name, dtype, batch, **sizes):
    """Makes a network in a dtype, the same in float32, variables with norms that do something, and images."""
    networks = [densenet_jax.create_model(name, **sizes, num_classes=3, dtype=kind) for kind in (dtype, jnp.float32)]
    random = np.random.default_rng(1)
    images = jnp.asarray(random.standard_normal((batch, 40, 40, 3)), jnp.float32)
    shapes = jax.eval_shape(networks[0].init, jax.random.key(0), images)

    def draw(leaf):
        values = random.standard_normal(leaf.shape)
        is_kernel = leaf.ndim > 1
        values = values / np.sqrt(np.prod(leaf.shape[:-1])) if is_kernel else 1 + 0.3 * np.abs(values)
        return jnp.asarray(values.astype(np.float32))

    return *networks, jax.tree.map(draw, shapes), images
