"""The GPU's kernels give what their plain references give: interpreted here, compiled for a GPU that is not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax.kernels.gpu.norm_relu_matmul import norm_relu_matmul
from densenet_jax.kernels.gpu.norm_relu_matmul_gradients import add_gradients
from densenet_jax.kernels.gpu.tiles import LARGEST_OPERAND, MOST_OUTPUTS, Tile, fits, split_rows
from tests.extras import needs
from tests.kernels.comparing import assert_close, make_draw, run_kernel, run_reference
from tests.main_processes import parse_last_line, run_for_absent_chips

TILE = Tile(rows=16, channels=16, outputs=16)
# rows, columns of the buffer, channels read, outputs, groups
SHAPES = {
    "edges everywhere": (37, 29, 19, 21, 1),
    "whole tiles": (32, 32, 32, 16, 1),
    "smaller than a tile": (5, 8, 3, 4, 1),
    "groups with edges": (57, 24, 24, 9, 3),
    "one row": (1, 40, 40, 48, 1),
}


def operands(shape, dtype, seed=0):
    """(x, scale, bias, kernel), shift, (total, gradient); scales of both signs, so that ReLUs close."""
    rows, columns, channels, outputs, _ = shape
    draw, wide = make_draw(dtype, seed), jnp.promote_types(dtype, jnp.float32)
    read = (draw(rows, columns), draw(channels, kind=wide), draw(channels, kind=wide), draw(channels, outputs))
    return read, draw(outputs, kind=wide), (draw(rows, columns), draw(rows, outputs))


# Rounding of sums in another order, and to bfloat16 of what is near the middle between two of its values.
TOLERANCES = {jnp.float32: 2e-6, jnp.bfloat16: 2**-7}
QUICK = [("edges everywhere", jnp.float32), ("groups with edges", jnp.bfloat16)]
CASES = [
    pytest.param(shape, dtype, marks=[] if (shape, dtype) in QUICK else pytest.mark.slow)
    for shape in SHAPES
    for dtype in TOLERANCES
]


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_the_product_is_its_reference(shape, dtype):
    groups = SHAPES[shape][-1]
    read, shift, _ = operands(SHAPES[shape], dtype)
    computed = run_kernel(norm_relu_matmul, *read, shift, groups=groups, tile=TILE)
    assert_close(computed, run_reference(norm_relu_matmul, *read, shift, groups=groups), TOLERANCES[dtype])


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_its_derivative_is_its_reference(shape, dtype):
    groups, outputs = SHAPES[shape][-1], 32 if SHAPES[shape][3] <= 32 else 64
    read, _, (total, gradient) = operands(SHAPES[shape], dtype)
    tile = Tile(rows=16, channels=16, outputs=outputs)
    computed = run_kernel(add_gradients, total, *read, gradient, groups=groups, tile=tile, most_ranges=2 * groups)
    assert_close(computed, run_reference(add_gradients, total, *read, gradient, groups=groups), TOLERANCES[dtype])
    left = slice(SHAPES[shape][2], None)
    np.testing.assert_array_equal(np.asarray(computed[0])[:, left], np.asarray(total)[:, left])


@pytest.mark.slow
@pytest.mark.parametrize("outputs", [48, 128, 192])
def test_own_tiles_are_right_for_the_widths_of_the_variants(outputs):
    shape = (70, 100, 96, outputs, 1)
    read, shift, (total, gradient) = operands(shape, jnp.float32)
    computed = run_kernel(norm_relu_matmul, *read, shift, groups=1)
    assert_close(computed, run_reference(norm_relu_matmul, *read, shift, groups=1), 2e-6)
    computed = run_kernel(add_gradients, total, *read, gradient, groups=1)
    assert_close(computed, run_reference(add_gradients, total, *read, gradient, groups=1), 2e-6)


def test_the_derivative_is_autodiff_s():
    with jax.enable_x64(True):
        read, shift, (total, gradient) = operands((24, 10, 7, 5, 1), jnp.float64)
        y, pullback = jax.vjp(lambda *read: run_reference(norm_relu_matmul, *read, shift, groups=1)[0], *read)
        of_x, *expected = pullback(gradient)
        computed, of_scale, of_bias, of_kernel = jax.device_get(
            run_kernel(add_gradients, total, *read, gradient, groups=1, tile=TILE)
        )
        assert y.dtype == jnp.float64
        assert_close((computed - np.asarray(total), of_scale[0], of_bias[0], of_kernel), (of_x, *expected), 1e-13)


def test_values_of_zero_and_infinities_outside_what_is_read_do_no_harm():
    read, shift, (total, gradient) = operands((20, 40, 17, 8, 1), jnp.float32)
    x = np.array(read[0])
    x[:, 17:] = np.inf
    x[3] = 0
    computed = run_kernel(norm_relu_matmul, x, *read[1:], shift, groups=1, tile=TILE)
    assert_close(computed, run_reference(norm_relu_matmul, x, *read[1:], shift, groups=1), 2e-6)
    computed = run_kernel(add_gradients, total, x, *read[1:], gradient, groups=1, tile=TILE)
    assert_close(computed, run_reference(add_gradients, total, x, *read[1:], gradient, groups=1), 2e-6)


def test_on_a_cpu_the_reference_is_compiled():
    read, shift, (total, gradient) = operands((12, 8, 8, 4, 2), jnp.bfloat16)
    assert_close(
        jax.jit(functools.partial(norm_relu_matmul, groups=2))(*read, shift),
        run_reference(norm_relu_matmul, *read, shift, groups=2),
        0,
    )
    assert_close(
        jax.jit(functools.partial(add_gradients, groups=2))(total, *read, gradient),
        run_reference(add_gradients, total, *read, gradient, groups=2),
        0,
    )


def test_the_kernels_take_neither_empty_operands_nor_too_large_ones():
    assert fits((LARGEST_OPERAND // 64, 64), 64)
    for shape, outputs in [((0, 8), 4), ((LARGEST_OPERAND // 64 + 1, 64), 8), ((8, 64), MOST_OUTPUTS + 1)]:
        assert not fits(shape, outputs)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 100, 129])
@pytest.mark.parametrize("most", [None, 1, 3, 7])
def test_every_row_is_in_one_range(rows, most):
    ranges = split_rows(3 * rows, 3, 16, most)
    seen = []
    for number in range(3 * ranges.ranges):
        start, end = ranges.bounds(number)
        seen += range(start, min(start + ranges.range_rows, end))
    assert seen == list(range(3 * rows))


COMPILE = """
import functools, json, re, sys
import jax, jax.numpy as jnp
from densenet_jax.kernels.gpu.norm_relu_matmul import norm_relu_matmul
from densenet_jax.kernels.gpu.norm_relu_matmul_gradients import add_gradients
from densenet_jax.models.densenet import BlockOptions, DenseBlock
from densenet_jax.models.fused import Fused
from densenet_jax.plan.compilers import absent_devices
from densenet_jax.plan.costs import compile_costs
from densenet_jax.plan.topology import parse_topology
from densenet_jax.training import sharding

mesh = sharding.make_mesh(absent_devices(parse_topology("h200:1x1x8")))
one = sharding.make_mesh(absent_devices(parse_topology("h200:1x1x1")))
computed = {}

def compile_both(name, rows, columns, channels, outputs, groups=1, mesh=one, kind=jnp.bfloat16):
    def shape(*sizes, dtype=kind):
        where = sharding.over_data(mesh) if sizes[0] == rows else sharding.replicated(mesh)
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=where)
    vector, kernel = shape(channels, dtype=jnp.float32), shape(channels, outputs, dtype=jnp.float32)
    read = (shape(rows, columns), vector, vector, kernel)
    programs = [
        jax.jit(functools.partial(norm_relu_matmul, groups=groups)).lower(*read, shape(outputs, dtype=jnp.float32)),
        jax.jit(functools.partial(add_gradients, groups=groups), donate_argnums=0).lower(
            read[0], *read, shape(rows, outputs)
        ),
    ]
    texts = [program.compile().as_text() for program in programs]
    computed[name] = [len(re.findall("xla.gpu.triton", text)) for text in texts]
    computed[name + " copies"] = [len(re.findall(rf"f16.{rows},{columns}[^ ]* copy", text)) for text in texts]

compile_both("whole tiles", 6272, 1024, 992, 128)
compile_both("edges", 1001, 144, 96, 192)
compile_both("groups", 4 * 98, 112, 80, 48, groups=4)
compile_both("float16", 98, 96, 64, 64, kind=jnp.float16)
compile_both("widest", 200, 64, 48, 512)
compile_both("eight chips", 8 * 98, 128, 96, 64, mesh=mesh)

def block(implementation):
    module = DenseBlock(3, 32, options=BlockOptions(dtype=jnp.bfloat16), implementation=implementation)
    x = jax.ShapeDtypeStruct((32, 14, 14, 256), jnp.bfloat16)
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(x.shape, x.dtype), False))
    def step(variables, x):
        def loss(params, x):
            features, new = module.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
            return jnp.square(features.values.astype(jnp.float32)).sum(), new
        return jax.grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], x)
    lowered = jax.jit(step).lower(*sharding.with_sharding((variables, x), sharding.replicated(one)))
    return compile_costs(lowered).traffic_bytes

def over_eight(implementation):
    module = DenseBlock(2, 32, options=BlockOptions(dtype=jnp.bfloat16), implementation=implementation)
    x = jax.ShapeDtypeStruct((32, 14, 14, 64), jnp.bfloat16, sharding=sharding.over_data(mesh))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(x.shape, x.dtype), False))
    variables = sharding.with_sharding(shapes, sharding.replicated(mesh))
    def step(variables, x):
        def loss(params):
            features, new = module.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
            return jnp.square(features.values.astype(jnp.float32)).sum(), new
        return jax.grad(loss, has_aux=True)(variables["params"])
    text = jax.jit(step).lower(variables, x).compile().as_text()
    return [len(re.findall(r'custom_call_target="__gpu.xla.gpu.triton"', text)), "all-gather" in text]

computed["each of eight chips"] = over_eight(Fused("gpu", mesh=mesh))
computed["traffic"] = [block(Fused("gpu", "pallas")), block(Fused("gpu"))]
print(json.dumps(computed))
"""


@needs("jax_plugins.xla_cuda12")
def test_for_a_gpu_that_is_not_there_they_compile_without_copies_and_move_fewer_bytes():
    computed = parse_last_line(run_for_absent_chips(COMPILE).stdout)
    with_kernels, without = computed.pop("traffic")
    # An operand whose front alone is read is counted whole, so this is more than the kernels read.
    assert with_kernels < 0.8 * without
    assert computed.pop("eight chips") == [0, 0]
    # Two layers of three calls, without the gradient of the block's input, which nobody asks for.
    assert computed.pop("each of eight chips") == [2 * 3 - 1, False]
    assert {name for name, counts in computed.items() if "copies" not in name and counts != [1, 2]} == set()
    assert {name for name, counts in computed.items() if "copies" in name and counts != [0, 0]} == set()
