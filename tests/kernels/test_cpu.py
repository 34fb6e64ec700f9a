"""The CPU's compiled kernels give what their plain references give. Skipped where there is no compiler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import densenet_jax
from densenet_jax.kernels.cpu import block, convolution, forked, joined, library, norm_relu_conv, pooling, primitive
from densenet_jax.models.fused.backend_cpu import CpuBackend
from densenet_jax.models.fused.inference import pack_kernels, prepare_inference
from densenet_jax.models.variants import VARIANTS

# batch, height, width, channels, output channels, kernel, stride, padding
CONVOLUTIONS = [
    (2, 9, 11, 5, 7, 3, 1, 1),
    (3, 14, 14, 128, 32, 3, 1, 1),
    (2, 7, 6, 24, 48, 3, 1, 0),
    (1, 15, 16, 3, 64, 7, 2, 3),
    (4, 13, 5, 33, 20, 1, 1, 0),
    (5, 29, 31, 256, 40, 1, 1, 0),
    (2, 6, 6, 24, 12, 3, 2, 1),
    (2, 5, 6, 40, 36, 1, 2, 0),
    (1, 1, 1, 3, 2, 3, 1, 1),
    (2, 48, 47, 5, 32, 3, 1, 1),  # more pixels than read weights where they lie
    (3, 40, 40, 7, 40, 1, 1, 0),
    (3, 7, 7, 83, 150, 1, 1, 0),  # threads share the columns of a kernel's gradient, not its sums
    (2, 6, 6, 5, 70, 3, 1, 1),
]
# batch, height, width, channels of the map, channels read, output channels, kernel
NORM_RELU_CONVS = [
    (2, 9, 11, 9, 5, 7, 3),
    (3, 14, 14, 128, 128, 32, 3),
    (4, 13, 5, 33, 33, 20, 1),
    (5, 30, 31, 300, 256, 64, 1),
]


pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def draw(*shape, seed=0):
    return jnp.asarray(draw_numpy(*shape, seed=seed))


def draw_numpy(*shape, seed=0):
    """Draws what is still to be changed, which NumPy does without compiling a program for every shape."""
    return np.random.default_rng(seed).standard_normal(shape)


def assert_same(computed, expected, bound=1e-10):
    for one, other in zip(jax.tree.leaves(computed), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=0, atol=bound)


def uses_kernels(function, *arguments, **lowering):
    return "@densenet_" in jax.jit(function).trace(*arguments).lower(**lowering).as_text()


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution_and_its_gradients(case):
    b, h, w, c, o, k, stride, padding = case
    x, kernel = draw(b, h, w, c), draw(k, k, c, o, seed=1)

    def of(function):
        return lambda x, kernel: jnp.sum(jnp.sin(function(x, kernel, stride=stride, padding=padding)))

    ours, reference = of(convolution.convolve), of(convolution.plain_convolve)
    assert uses_kernels(ours, x, kernel)
    (value, computed), (expected, gradients) = (
        jax.jit(jax.value_and_grad(function, (0, 1)))(x, kernel) for function in (ours, reference)
    )
    assert_same(value, expected, 1e-9)  # a sum of many sines
    assert_same(computed, gradients)
    again = jax.grad(ours, (0, 1)) if case in CONVOLUTIONS[:3] else jax.jit(jax.grad(ours, (0, 1)))
    assert_same(again(x, kernel), computed, 0)  # not jitted as well, and the same every time


# channels, outputs, groups, stride, kernel's side, padding
GROUPED = [
    (12, 12, 4, 1, 3, 1),
    (6, 12, 3, 2, 3, 1),
    (96, 96, 32, 1, 3, 1),
    (64, 64, 2, 1, 3, 1),
    (40, 40, 5, 2, 3, 1),
    (96, 96, 8, 2, 3, 0),
    (64, 32, 4, 2, 1, 0),
    (64, 48, 4, 1, 1, 0),
]


@pytest.mark.parametrize("case", GROUPED)
def test_grouped_convolution_and_its_gradients(case):
    """With groups that fill a vector together, that don't, and that are wider than one."""
    c, o, groups, stride, side, padding = case
    x, kernel = draw(2, 7, 6, c), draw(side, side, c // groups, o, seed=1)

    def of(function):
        return lambda x, kernel: jnp.sum(jnp.sin(function(x, kernel, stride=stride, padding=padding, groups=groups)))

    ours, reference = of(convolution.convolve), of(convolution.plain_convolve)
    assert uses_kernels(ours, x, kernel)
    (value, computed), (expected, gradients) = (
        jax.jit(jax.value_and_grad(function, (0, 1)))(x, kernel) for function in (ours, reference)
    )
    assert_same(value, expected, 1e-9)
    assert_same(computed, gradients)
    exported = jax.export.export(jax.jit(ours))(x, kernel).mlir_module()
    assert "feature_group_count = " + str(groups) in exported
    assert exported.count("stablehlo.convolution") == 1


@pytest.mark.parametrize(("side", "padding"), [(7, 3), (3, 0)])
def test_depthwise_convolution_and_its_gradients(side, padding):
    x, kernel = draw(2, 9, 8, 21), draw(side, side, 1, 21, seed=1)

    def of(function):
        return lambda x, kernel: jnp.sum(jnp.sin(function(x, kernel, stride=1, padding=padding, groups=21)))

    ours, reference = of(convolution.convolve), of(convolution.plain_convolve)
    assert "convolution" not in jax.jit(ours).lower(x, kernel).as_text()  # shifted products instead
    (value, computed), (expected, gradients) = (
        jax.jit(jax.value_and_grad(function, (0, 1)))(x, kernel) for function in (ours, reference)
    )
    assert_same(value, expected, 1e-9)
    assert_same(computed, gradients)


def test_second_derivatives_vmap_and_remat():
    x, kernel = draw(3, 2, 6, 6, 4), draw(3, 3, 4, 5, seed=1)

    def of(function):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(function(x, kernel, stride=1, padding=1)))

        def squared(x, kernel):
            return sum(jnp.sum(g**2) for g in jax.grad(jax.checkpoint(loss), (0, 1))(x, kernel))

        return squared

    ours, reference = (
        jax.jit(jax.vmap(jax.grad(of(function), (0, 1)), in_axes=(0, None)))(x, kernel)
        for function in (convolution.convolve, convolution.plain_convolve)
    )
    assert_same(ours, reference, 1e-9)
    ours, reference = (
        jax.jit(jax.grad(of(function), (0, 1)))(x[0], kernel)
        for function in (convolution.convolve, convolution.plain_convolve)
    )
    assert_same(ours, reference, 1e-9)


# a map's channels, outputs, groups, stride, kernel's side
IN_GROUPS = [
    (12, 12, 4, 1, 3),
    (6, 12, 3, 2, 3),
    (96, 96, 32, 1, 3),
    (64, 64, 2, 2, 3),
    (64, 48, 4, 1, 1),
]


def drawn_operands(c, o, k, normalizes, groups=1):
    norms = (draw(c, seed=5), jnp.asarray(np.abs(draw(c, seed=6)) + 0.5)) if normalizes else (jnp.zeros((0,)),) * 2
    return norm_relu_conv.Operands(*norms, draw(c, seed=1), draw(c, seed=2), draw(k, k, c // groups, o, seed=3))


@functools.partial(jax.jit, static_argnames=("groups", "stride"))
def differentiated(x, conv, g, **options):
    """The gradients of the map's x^, and of scale, bias and kernel, by the reference."""
    c = conv.scale.size
    normalized = norm_relu_conv.normalize(x, conv.mean, conv.rstd, c)
    plain = conv._replace(mean=jnp.zeros((0,)), rstd=jnp.zeros((0,)))

    def function(normalized, *others):
        return norm_relu_conv.plain_norm_relu_conv(normalized, *plain[:2], *others, **options)

    return jax.vjp(function, normalized, *plain[2:])[1](g)


@pytest.mark.parametrize("normalizes", [False, True])
@pytest.mark.parametrize("case", NORM_RELU_CONVS)
def test_norm_relu_conv_and_its_gradients(case, normalizes):
    b, h, w, width, c, o, k = case
    x, conv = draw(b, h, w, width), drawn_operands(c, o, k, normalizes)
    assert norm_relu_conv.is_usable(x, conv.kernel)
    assert uses_kernels(norm_relu_conv.norm_relu_conv, x, conv)
    expected = jax.jit(norm_relu_conv.plain_norm_relu_conv)(x, *conv)
    assert_same(jax.jit(norm_relu_conv.norm_relu_conv)(x, conv), expected)
    g = draw(*expected.shape, seed=4)
    assert uses_kernels(norm_relu_conv.gradients, x, conv, g)
    assert_same(jax.jit(norm_relu_conv.gradients)(x, conv, g), differentiated(x, conv, g))


@pytest.mark.parametrize("normalizes", [False, True])
@pytest.mark.parametrize("case", IN_GROUPS)
def test_norm_relu_conv_in_groups_and_its_gradients(case, normalizes):
    c, o, groups, stride, k = case
    x, conv, options = draw(2, 7, 6, c), drawn_operands(c, o, k, normalizes, groups), {"groups": groups}
    function = functools.partial(norm_relu_conv.norm_relu_conv, **options, stride=stride)
    gradients = functools.partial(norm_relu_conv.gradients, **options, stride=stride)
    reference = functools.partial(norm_relu_conv.plain_norm_relu_conv, **options, stride=stride)
    expected = jax.jit(reference)(x, *conv)
    assert uses_kernels(function, x, conv)
    assert_same(jax.jit(function)(x, conv), expected)
    g = draw(*expected.shape, seed=4)
    assert uses_kernels(gradients, x, conv, g)
    assert_same(jax.jit(gradients)(x, conv, g), differentiated(x, conv, g, **options, stride=stride))


@pytest.mark.parametrize(
    "case", [(*one[:6], 1, 1, one[6]) for one in NORM_RELU_CONVS] + [(2, 7, 6, c, c, *r) for c, *r in IN_GROUPS]
)
def test_sums_come_with_its_output(case):
    b, h, w, width, c, o, groups, stride, k = case
    x, conv, shift = draw(b, h, w, width), drawn_operands(c, o, k, True, groups), draw(o, seed=7)
    options = {"groups": groups, "stride": stride}
    function = functools.partial(norm_relu_conv.norm_relu_conv_with_sums, **options)
    y = jax.jit(functools.partial(norm_relu_conv.plain_norm_relu_conv, **options))(x, *conv)
    assert uses_kernels(function, x, conv, shift)

    @jax.jit
    def with_sums(y):
        centered = y - shift[None, None, None, :]
        return y, centered.sum(axis=(0, 1, 2)), jnp.square(centered).sum(axis=(0, 1, 2))

    assert_same(jax.jit(function)(x, conv, shift), with_sums(y), 1e-8)
    with primitive.plain_kernels():
        assert_same(
            jax.jit(functools.partial(norm_relu_conv.plain_norm_relu_conv_sums, **options))(x, *conv, shift),
            with_sums(y),
            1e-8,
        )


@pytest.mark.parametrize("normalizes", [False, True])
@pytest.mark.parametrize("case", NORM_RELU_CONVS)
def test_a_gradient_is_added_in_place(case, normalizes):
    b, h, w, width, c, o, k = case
    operands = draw(b, h, w, width), drawn_operands(c, o, k, normalizes), draw(b, h, w, o, seed=4)
    total = draw(b, h, w, width, seed=9)
    of_x, *others = jax.jit(norm_relu_conv.gradients)(*operands)
    expected = (total + np.pad(of_x, [(0, 0)] * 3 + [(0, width - c)]), *others)
    assert uses_kernels(norm_relu_conv.add_gradients, total, *operands)
    assert_same(jax.jit(norm_relu_conv.add_gradients)(total, *operands), expected, 1e-12)
    assert_same(total, draw(b, h, w, width, seed=9), 0)  # which others may read
    x, conv, g = operands
    reference = functools.partial(norm_relu_conv._plain_add_gradient, groups=1)
    assert_same(jax.jit(reference)(total, x, *conv, g), expected[:3])


@pytest.mark.parametrize("normalizes", [False, True])
@pytest.mark.parametrize("case", [(2, 9, 11, 5, 7, 4, 6), (3, 14, 14, 64, 33, 17, 40), (1, 5, 4, 300, 64, 64, 96)])
def test_two_maps_are_convolved_as_one(case, normalizes):
    """The channels of the second map behind those that are read, and of the sum of gradients, have no effect."""
    b, h, w, c, width, read, o = case
    first, second, conv = draw(b, h, w, c), draw(b, h, w, width, seed=1), drawn_operands(c + read, o, 1, False)
    x_hat = first
    if normalizes:
        mean, rstd = draw(c, seed=5), jnp.abs(draw(c, seed=6)) + 0.5
        conv, x_hat = conv._replace(mean=mean, rstd=rstd), norm_relu_conv.normalize(first, mean, rstd, c)
    x = jnp.asarray(np.concatenate([x_hat, second], axis=-1)[..., : c + read])
    shift, g = draw(o, seed=7), draw(b, h, w, o, seed=4)
    whole = drawn_operands(c + read, o, 1, False)
    expected = jax.jit(norm_relu_conv.norm_relu_conv_with_sums)(x, whole, shift)
    assert joined.is_usable(first, second, conv.kernel)
    assert uses_kernels(joined.conv_with_sums, first, second, conv, shift)
    assert_same(jax.jit(joined.conv_with_sums)(first, second, conv, shift), expected, 1e-8)
    of_x, *others = jax.device_get(jax.jit(norm_relu_conv.gradients)(x, whole, g))
    total = draw(b, h, w, width + 3, seed=9)
    of_second = np.pad(of_x[..., c:], [(0, 0)] * 3 + [(0, width + 3 - read)])
    expected_gradients = (total + of_second, of_x[..., :c], *others)
    assert_same(jax.jit(joined.add_gradients)(total, first, second, conv, g), expected_gradients)
    assert_same(total, draw(b, h, w, width + 3, seed=9), 0)  # which others may read
    with primitive.plain_kernels():
        plain = jax.jit(lambda: joined._plain_sums(first, second, *conv, shift))()
        assert_same(plain, expected, 1e-8)
        gradients = jax.jit(lambda: joined._plain_gradient(total, first, second, *conv, g))()
        kernel = jax.jit(lambda: joined._plain_kernel_gradient(first, second, *conv[:4], g))()
        assert_same((*gradients, kernel), expected_gradients)


@pytest.mark.parametrize("normalizes", [False, True])
@pytest.mark.parametrize("case", [(2, 9, 11, 7, 5, 32, 3), (3, 14, 14, 40, 40, 96, 17), (1, 5, 4, 64, 64, 64, 300)])
def test_a_product_goes_to_two_maps(case, normalizes):
    b, h, w, width, c, first, second = case
    x, conv = draw(b, h, w, width), drawn_operands(c, first + second, 1, normalizes)
    total, shift = draw(b, h, w, first, seed=8), draw(first + second, seed=7)
    y = np.array(jax.jit(norm_relu_conv.plain_norm_relu_conv)(x, *conv))
    y[..., :first] += total
    centered = y - np.asarray(shift)
    expected = y[..., :first], y[..., first:], centered.sum(axis=(0, 1, 2)), np.square(centered).sum(axis=(0, 1, 2))
    assert forked.is_usable(x, total, conv.kernel)
    assert uses_kernels(forked.conv_with_sums, total, x, conv, shift)
    assert_same(jax.jit(forked.conv_with_sums)(total, x, conv, shift), expected, 1e-8)
    gradients = draw(b, h, w, first, seed=4), draw(b, h, w, second, seed=10)
    expected_gradients = differentiated(x, conv, jnp.concatenate(gradients, axis=-1))
    assert uses_kernels(forked.gradients, x, conv, *gradients)
    assert_same(jax.jit(forked.gradients)(x, conv, *gradients), expected_gradients)
    with primitive.plain_kernels():
        assert_same(jax.jit(lambda: forked._plain_sums(total, x, *conv, shift))(), expected, 1e-8)
        plain = jax.jit(lambda: forked._plain_gradient(x, *conv, *gradients))()
        kernel = jax.jit(lambda: forked._plain_kernel_gradient(x, *conv[:4], *gradients))()
        assert_same((*plain, kernel), expected_gradients)


def test_a_map_of_other_widths_is_not_written_beside_another():
    x, kernel = draw(1, 4, 4, 8), draw(1, 1, 8, 40)
    assert forked.is_usable(x, draw(1, 4, 4, 32), kernel)
    for first in (16, 33, 64):
        assert not forked.is_usable(x, draw(1, 4, 4, first), kernel)


@pytest.mark.parametrize("case", [(2, 9, 11, 5, 2), (3, 14, 14, 33, 1), (1, 4, 5, 64, 2)])
def test_pooling_gradient(case):
    *shape, stride = case
    x = jnp.asarray(np.round(2 * draw_numpy(*shape)))  # with many equal values
    expected, pullback = jax.vjp(jax.jit(lambda x: pooling.plain_max_pool(x, window=3, stride=stride)), x)
    computed, ours = jax.vjp(jax.jit(lambda x: pooling.max_pool(x, 3, stride)), x)
    g = draw(*expected.shape, seed=1)
    assert uses_kernels(ours, g)
    assert_same((computed, ours(g)), (expected, pullback(g)), 1e-14)


def test_float32_to_rounding():
    x, kernel = draw_numpy(3, 14, 14, 128), draw_numpy(3, 3, 128, 32, seed=1)
    exact = np.asarray(convolution.plain_convolve(jnp.asarray(x), jnp.asarray(kernel), padding=1))
    narrow = jnp.asarray(x.astype(np.float32)), jnp.asarray(kernel.astype(np.float32))
    computed = convolution.convolve(*narrow, stride=1, padding=1)
    assert computed.dtype == jnp.float32
    assert np.abs(computed - exact).max() < 1e-5 * np.abs(exact).max()
    exact = convolution.plain_input_gradient(jnp.asarray(exact), kernel, sizes=(14, 14), stride=1, padding=1)
    pullback = jax.vjp(lambda x: convolution.convolve(x, narrow[1], stride=1, padding=1), narrow[0])[1]
    assert np.abs(pullback(computed)[0] - np.asarray(exact)).max() < 1e-5 * np.abs(exact).max()


def test_the_library_is_for_programs_of_one_cpu_device():
    x, kernel = draw(8, 8, 8, 4), draw(3, 3, 4, 4, seed=1)

    def gradients(x, kernel):
        return jax.grad(lambda *operands: jnp.sum(jnp.sin(CpuBackend().convolve(*operands, padding=1))), (0, 1))(
            x, kernel
        )

    assert uses_kernels(gradients, x, kernel)
    for platform in ("tpu", "cuda"):
        assert not uses_kernels(gradients, x, kernel, lowering_platforms=(platform,))
    exported = jax.export.export(jax.jit(gradients), platforms=("cpu", "tpu"))(x, kernel)
    assert "@densenet_" not in exported.mlir_module()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    everywhere = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec()))
    assert not uses_kernels(gradients, spread, everywhere)
    assert_same(jax.jit(gradients)(spread, everywhere), jax.jit(gradients)(x, kernel))


@pytest.mark.parametrize(
    ("width", "dtype", "message"),
    [(0, np.float32, "shapes of a convolution's gradient"), (4, np.float64, "operands of different types")],
)
def test_the_library_itself_refuses_operands_that_do_not_fit(width, dtype, message):
    call = jax.ffi.ffi_call(library.target_names()["kernel_gradient"], jax.ShapeDtypeStruct((1, 1, 3, 2), np.float32))
    sizes = {name: np.int64(value) for name, value in (("stride", 1), ("padding", 0), ("groups", 1), ("together", 1))}
    x, g = jnp.ones((1, 4, width, 3), np.float32), jnp.ones((1, 4, width, 2), dtype)
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(call(x, g, **sizes))


def test_unsupported_convolutions_are_left_to_xla(monkeypatch):
    x, kernel = draw(2, 8, 8, 4), draw(3, 3, 4, 4, seed=1)
    assert convolution.is_usable(x, kernel)
    assert not convolution.is_usable(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    assert not convolution.is_usable(x[:0], kernel)
    with primitive.plain_kernels():
        assert not convolution.is_usable(x, kernel)
        assert "densenet_" not in str(jax.make_jaxpr(CpuBackend().convolve)(x, kernel))
    assert "densenet_" in str(jax.make_jaxpr(CpuBackend().convolve)(x, kernel))
    library.target_names.cache_clear()
    monkeypatch.setenv("DENSENET_JAX_NATIVE", "0")
    assert not convolution.is_usable(x, kernel)
    monkeypatch.undo()
    library.target_names.cache_clear()


# batch, side, stride, groups, width of the grouped convolution, residual width, new channels, packed, folded
BLOCKS = [
    (2, 14, 1, 32, 128, 64, 16, True, False),  # groups that fill a vector
    (1, 15, 2, 32, 96, 64, 16, False, True),  # and that do not
    (3, 10, 2, 2, 80, 40, 24, False, False),  # groups of more channels than a vector; and a pooled step
    (1, 28, 1, 1, 32, 32, 48, True, True),
    (2, 15, 2, 32, 128, 32, 16, True, False),
    (1, 7, 1, 2, 96, 32, 16, True, False),  # groups of several vectors
]


def drawn_step(c, o, size=1, groups=1, folded=False, packed=False):
    """Operands of a step; a folded norm has no statistics, and here no scale."""
    kernel = draw_numpy(size, size, c // groups, o, seed=c + o) / (size * (c / groups) ** 0.5)
    empty, bias, others = np.zeros(0), draw_numpy(c, seed=o), [draw_numpy(c, seed=i) for i in range(2)]
    norm = (empty, bias, empty, empty) if folded else (others[0], bias, others[1], np.abs(others[1]))
    return block.Arrays(*map(jnp.asarray, (*norm, block.pack(kernel) if packed else kernel)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("case", BLOCKS)
def test_a_block_in_one_call(case, dtype):
    """Outputs are added to the first channels and written behind them; borders, bands and odd sizes included."""
    b, side, stride, groups, width, residual, new, packed, folded = case
    after, end = (side - 1) // stride + 1, residual + 2 * new
    inner = drawn_step(width, width, 3, groups, folded)
    packs_inner = packed and block.is_packable(inner.kernel.astype(dtype), groups)
    steps = [
        block.Step(0, 1, stride=stride),
        block.Step(0, 2, packed=packed),
        block.Step(2, 3, stride=stride, groups=groups, packed=packs_inner),
        block.Step(3, 1, offset=residual + new, added=residual),
        block.Step(1, 1, offset=end),
        block.Step(0, 1, offset=end + 12, stride=2, pooled=True),
    ][: 6 if stride == 2 and side % 2 == 0 else 5]
    arrays = [
        drawn_step(24, residual + new),
        drawn_step(24, width, folded=folded, packed=packed),
        inner,
        drawn_step(width, residual + new),
        drawn_step(end, 12, 3),
        drawn_step(40, 32, folded=folded),
    ][: len(steps)]
    drawn = draw_numpy(b, side, side, 40), *(a for own in arrays for a in own)
    x, *operands = (jnp.asarray(np.asarray(array).astype(dtype)) for array in drawn)
    arrays = [block.Arrays(*operands[i : i + 6]) for i in range(0, len(operands), 6)]
    shapes = ((b, after, after, end + 12 + 32 * (len(steps) - 5)), (b, side, side, width), (b, after, after, width))
    options = {"steps": tuple(steps), "shapes": shapes, "epsilon": 1e-3}
    computed = functools.partial(block.run_block, **options)
    assert block.is_usable(x, arrays)
    assert uses_kernels(computed, x, arrays)
    expected = jax.jit(functools.partial(block.plain_run_block, **options, copied=0))(x, *operands)[0]
    bound = (1e-5 if dtype == jnp.float32 else 1e-13) * np.abs(expected).max()
    assert_same(jax.jit(computed)(x, arrays), expected, bound)


@pytest.mark.parametrize(("side", "channels", "outputs"), [(13, 1200, 200), (15, 700, 200)])
def test_a_convolution_of_many_weights(side, channels, outputs):
    """Shares the outputs and adds the products of some inputs at a time; or shares the pixels."""
    own, x, to = drawn_step(channels, outputs), draw(1, side, side, channels), outputs + 5
    first = drawn_step(channels, to, folded=True)
    options = {"steps": (block.Step(0, 1), block.Step(0, 1, offset=42, added=37)), "epsilon": 1e-3}
    options |= {"shapes": ((1, side, side, to),)}
    [expected] = jax.jit(functools.partial(block.plain_run_block, **options, copied=0))(x, *first, *own)
    found = jax.jit(functools.partial(block.run_block, **options))(x, [first, own])
    assert_same(found, expected, 2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("side", "outputs", "added"), [(5, 24, 0), (15, 40, 37)])
def test_a_window_of_many_weights(side, outputs, added):
    """One row of the window after another, for all output rows of a band; some outputs are added to what is there."""
    own, x = drawn_step(620, outputs, 3), draw(2, side, side, 620)
    first = drawn_step(620, 50, folded=True)
    steps = (block.Step(0, 1), block.Step(0, 1, offset=50, added=added))
    options = {"steps": steps, "epsilon": 1e-3, "shapes": ((2, side, side, 50 + outputs - added),)}
    [expected] = jax.jit(functools.partial(block.plain_run_block, **options, copied=0))(x, *first, *own)
    computed = jax.jit(functools.partial(block.run_block, **options))(x, [first, own])
    assert_same(computed, expected, 2e-5 * np.abs(expected).max())


def test_a_block_of_shapes_that_do_not_fit_is_refused():
    arrays = [drawn_step(8, 4)]
    run = jax.jit(
        functools.partial(block.run_block, steps=[block.Step(0, 1, offset=3)], shapes=[(1, 2, 2, 6)], epsilon=1.0)
    )
    with pytest.raises(Exception, match="step do not fit"):
        jax.block_until_ready(run(draw(1, 2, 2, 8), arrays))


def test_kernels_that_are_packed_and_unpacked():
    """Groups that fill no whole vectors are left as they are."""
    for size, inputs, outputs, groups in [(3, 4, 128, 32), (3, 8, 64, 8), (3, 32, 64, 2), (1, 24, 80, 1)]:
        kernel = draw_numpy(size, size, inputs, outputs).astype(np.float32)
        assert block.is_packable(kernel, groups)
        packed = block.pack(kernel, groups)
        assert not np.array_equal(packed, kernel)
        assert_same(jax.jit(block.unpack, static_argnums=1)(packed, groups), kernel, 0)
    assert not block.is_packable(draw_numpy(3, 3, 3, 96).astype(np.float32), 32)
    assert not block.is_packable(draw_numpy(3, 3, 12, 96).astype(np.float32), 8)


@pytest.mark.parametrize("bottleneck_width", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_a_network_evaluated(bottleneck_width):
    """By one call a block, without a concatenation; the answers and their gradient are the plain form's."""
    options = {"block_sizes": (1, 2), "num_classes": 3, "bottleneck_width": bottleneck_width, "dtype": jnp.float64}
    model, reference = (
        densenet_jax.create_model("densenet121", **options, block_form=form) for form in ("normalize_once", "plain")
    )
    images = draw(2, 32, 32, 3)
    leaves, tree = jax.tree.flatten(jax.device_get(jax.jit(model.init)(jax.random.key(0), images)))
    moved = [leaf + 0.5 * np.abs(draw_numpy(*leaf.shape, seed=i)) * (leaf.ndim == 1) for i, leaf in enumerate(leaves)]
    variables = jax.device_put(jax.tree.unflatten(tree, moved))  # norms that do something

    def answers(which):
        return lambda images: jnp.sin(which.apply(variables, images, train=False))

    program = jax.jit(answers(model)).lower(images).compile().as_text()
    assert program.count('custom_call_target="densenet_block') == 3  # and the transition
    assert 'custom_call_target="densenet_norm_relu_conv_' not in program
    assert "concatenate(" not in program
    computed, pullback = jax.vjp(jax.jit(answers(model)), images)
    expected, other = jax.vjp(jax.jit(answers(reference)), images)
    assert_same((computed, pullback(computed)), (expected, other(expected)), 1e-12)
    assert jnp.abs(pullback(computed)[0]).max() > 1e-3


@pytest.mark.parametrize("name", ["dpn68", "dpn68b"])
def test_a_dual_path_network_evaluated(name):
    """By one call a stage; the answers are the plain implementation's, and its own with packed kernels."""
    options = {"reduction_width": 8, "groups": 2, "block_sizes": (1, 2), "dense_increments": (8, 16), "num_classes": 3}
    types = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    model, reference = (
        densenet_jax.create_model(name, **options, **types, block_form=form) for form in ("normalize_once", "plain")
    )
    images = draw(2, 16, 16, 3)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda leaf: jnp.asarray(np.abs(draw_numpy(*leaf.shape)) + 0.1), variables)
    answer = jax.jit(model.apply)
    assert answer.lower(variables, images).as_text().count("@densenet_block") == 2
    expected = jax.jit(reference.apply)(variables, images)
    assert_same(answer(variables, images), expected, 1e-12 * jnp.abs(expected).max())
    packed, laid_out = pack_kernels(model, variables)
    kernels = [[leaf for leaf in jax.tree.leaves(arrays) if leaf.ndim == 4] for arrays in (variables, laid_out)]
    assert sum(not np.array_equal(a, b) for a, b in zip(*kernels, strict=True)) >= 4  # the widest are in another order
    gradients = [
        jax.jit(jax.grad(lambda x, m=m, v=v: m.apply(v, x).sum()))(images)
        for m, v in ((model, variables), (packed, laid_out))
    ]
    assert_same(gradients[1], gradients[0], 1e-12 * jnp.abs(gradients[0]).max())
    assert_same(jax.jit(packed.apply)(laid_out, images), answer(variables, images), 0)
    assert pack_kernels(reference, variables) == (reference, variables)


QUICK = ("densenet121", "densenet264d", "densenet_40_12", "dpn68b", "dpn92", "dpn107")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in VARIANTS
        if not name.startswith("rdnet")
    ],
)
def test_packed_kernels_are_read_by_the_blocks_alone(name):
    """Stems differ in size: one that is packed by mistake shows in a variant with whole vectors of outputs only."""
    stages = len(VARIANTS[name].architecture.block_sizes)
    model = densenet_jax.create_model(name, num_classes=3, block_sizes=(1,) * stages)
    images = draw(1, 32, 32, 3).astype(jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda leaf: (np.abs(draw_numpy(*leaf.shape)) + 0.1).astype(leaf.dtype), shapes)
    packed, laid_out = pack_kernels(model, variables)
    assert packed != model
    np.testing.assert_array_equal(jax.jit(packed.apply)(laid_out, images), jax.jit(model.apply)(variables, images))


@pytest.mark.parametrize(("name", "leaves"), [("densenet121", 35), ("dpn68b", 50), ("densenet_bc_40_12", 26)])
def test_a_network_prepared_for_many_calls_takes_fewer_arrays(name, leaves):
    """The norms' statistics, and the scales that kernels hold, are none of them; the outputs are the same."""
    stages = len(VARIANTS[name].architecture.block_sizes)
    model = densenet_jax.create_model(name, num_classes=3, block_sizes=(1,) * stages)
    images = draw(1, 32, 32, 3).astype(jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda leaf: (np.abs(draw_numpy(*leaf.shape)) + 0.1).astype(leaf.dtype), shapes)
    prepared, arrays = prepare_inference(model, variables)
    assert prepared.implementation.is_packed
    assert len(jax.tree.leaves(arrays)) == leaves
    expected = jax.jit(model.apply)(variables, images)
    assert_same(jax.jit(prepared.apply)(arrays, images), expected, 1e-5 * jnp.abs(expected).max())
    assert prepare_inference(model, variables, devices=2) == (model, variables)


@pytest.mark.slow
def test_a_network_and_its_gradients():
    model = densenet_jax.create_model("densenet121", dtype=jnp.float64, block_sizes=(2, 2), num_classes=3)
    images = draw(2, 32, 32, 3)
    variables = jax.jit(model.init)(jax.random.key(0), images)

    def loss(params):
        logits, mutated = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(logits)), mutated

    def run():
        return jax.jit(jax.value_and_grad(lambda params: loss(params), has_aux=True))(variables["params"])

    program = str(jax.make_jaxpr(jax.grad(loss, has_aux=True))(variables["params"]))
    assert "densenet_norm_relu_conv_gradient" in program
    ours = run()
    with primitive.plain_kernels():
        reference = run()
    assert_same(ours, reference)
    assert not all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True))


def test_given_shapes_are_taken_without_tracing_the_reference():
    shapes = {"shapes": lambda x, y: [(*x.shape, 2), y.shape]}
    made = primitive.define("shaped", lambda x, y: 1 / 0, lambda *_: None, multiple_results=True, **shapes)
    x, y = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3,), (4, 5)))
    assert [(one.shape, one.dtype) for one in jax.eval_shape(made.bind, x, y)] == [((3, 2), x.dtype), ((4, 5), x.dtype)]
