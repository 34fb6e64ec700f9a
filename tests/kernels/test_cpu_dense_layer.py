"""The CPU's kernels for an RDNet's dense layer beside plain JAX in float64. Skipped where there is no compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax.kernels.cpu import dense_layer
from densenet_jax.kernels.cpu.primitive import plain_kernels
from tests.kernels.comparing import assert_close

pytestmark = pytest.mark.usefixtures("compiled")
# batch, height, width, channels: whole and broken vectors, images narrower than the window, rows of several tiles
IMAGES = [(2, 9, 31, 40), (1, 4, 5, 16), (5, 14, 14, 21)]
# batch, height, width, channels, bottleneck, outputs: few pixels share the columns, many are divided into blocks
BOTTLENECKS = [(1, 7, 7, 24, 88, 40), (2, 3, 3, 5, 17, 3), (9, 24, 23, 20, 80, 36)]


def draw(*shapes):
    normal = np.random.default_rng(0).standard_normal
    return [normal(shape).astype(np.float32) for shape in shapes]


def compare(ours, plain, operands):
    """Values and gradients, the same bits every time, beside the plain function's in float64."""

    def with_gradients(function, operands):
        def loss(*operands):
            y = function(*operands)
            return jnp.sum(jnp.sin(y)), y

        gradients, y = jax.jit(jax.grad(loss, tuple(range(len(operands))), has_aux=True))(*operands)
        return [y, jax.jit(function)(*operands), *gradients]

    assert "@densenet_" in jax.jit(ours).lower(*operands).as_text()
    results, again = with_gradients(ours, operands), with_gradients(ours, operands)
    jax.tree.map(np.testing.assert_array_equal, results, again)
    with jax.enable_x64(True):
        expected = with_gradients(plain, [jnp.asarray(operand, jnp.float64) for operand in operands])
    assert_close([np.asarray(part, np.float64) for part in results], expected, 3e-6)


@pytest.mark.parametrize("sizes", IMAGES)
def test_depthwise_norm_and_its_gradients(sizes):
    channels = sizes[3]
    operands = draw(sizes, (7, 7, 1, channels), *[(channels,)] * 3)
    compare(
        lambda *operands: dense_layer.depthwise_norm(*operands, 1e-3),
        lambda *operands: dense_layer.plain_depthwise_norm(*operands, epsilon=1e-3)[0],
        operands,
    )


@pytest.mark.parametrize("sizes", BOTTLENECKS)
def test_bottleneck_and_its_gradients(sizes):
    *image, channels, width, outputs = sizes
    operands = draw((*image, channels), (channels, width), (width,), (width, outputs), (outputs,))
    operands[3] *= 0.1  # so that the sines' arguments are small
    compare(dense_layer.bottleneck, lambda *operands: dense_layer.plain_bottleneck(*operands)[0], operands)


def test_gelu_to_its_tails():
    """Its value and derivative for inputs of all sizes: the products are by one."""
    z = np.concatenate([np.linspace(-12, 12, 4001), [0, 1e-30, -1e-30, 60, -60]]).astype(np.float32)
    one, zero = jnp.ones((1, 1)), jnp.zeros(1)

    def gelu(z):
        return dense_layer.bottleneck(z[:, None, None, None], one, zero, one, zero)[:, 0, 0, 0]

    value, pullback = jax.vjp(gelu, z)
    (slope,) = pullback(jnp.ones_like(z))
    with jax.enable_x64(True):
        exact = jax.vmap(jax.value_and_grad(lambda z: jax.nn.gelu(z, approximate=False)))(z.astype(np.float64))
    for ours, theirs in zip((value, slope), exact, strict=True):
        assert np.all(np.abs(np.float64(ours) - np.asarray(theirs)) <= 2e-7 * (1 + np.abs(z)))


def test_other_operands_and_readers_of_programs_get_plain_jax():
    (x,) = draw((1, 2, 2, 3))
    assert dense_layer.is_usable(x, x)
    assert not dense_layer.is_usable(x, x.astype(np.float16))
    assert not dense_layer.is_usable(x.astype(np.float64))
    assert not dense_layer.is_usable(x[:0])
    with plain_kernels():
        assert not dense_layer.is_usable(x)


@pytest.mark.parametrize(
    ("channels", "function"),
    [
        (5, lambda x, wide: dense_layer._depthwise_norm_p.bind(x, jnp.ones((7, 7, 1, 4)), *[wide] * 3, epsilon=1e-6)),
        (5, lambda x, wide: dense_layer._bottleneck_p.bind(x, jnp.ones((5, 4)), wide, jnp.ones((4, 2)), wide)),
    ],
    ids=("depthwise_norm", "bottleneck"),
)
def test_the_library_refuses_operands_that_do_not_fit(channels, function):
    with pytest.raises(Exception, match="do not fit"):
        jax.block_until_ready(jax.jit(function)(jnp.ones((1, 2, 2, channels)), jnp.ones(4)))
