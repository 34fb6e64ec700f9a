"""The TPU's kernels give what their plain references give: interpreted here, compiled for TPUs that are not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from densenet_jax.kernels.tpu.conv1x1_gradients import conv1x1_gradients
from densenet_jax.kernels.tpu.conv3x3_gradients import conv3x3_gradients
from tests.extras import needs
from tests.kernels.comparing import assert_close, make_draw, run_kernel, run_reference
from tests.main_processes import parse_last_line, run_for_absent_chips

# examples, height, width, columns of the buffers, columns read, bottleneck channels, channels made, rows at a time
SHAPES = {
    "a row at a time": (3, 4, 5, 20, 12, 6, 4, 1),
    "all rows at a time": (2, 4, 3, 24, 16, 8, 8, 4),
    "parts of two rows, examples in two parts": (256, 4, 2, 6, 4, 2, 2, 2),
    "one position": (2, 1, 1, 6, 4, 3, 2, 1),
}
# Rounding of sums in another order, and to bfloat16 of what is near the middle between two of its values.
TOLERANCES = {jnp.float32: 1e-5, jnp.bfloat16: 2**-7}
QUICK = [("a row at a time", jnp.float32), ("all rows at a time", jnp.bfloat16)]
CASES = [
    pytest.param(shape, dtype, marks=[] if (shape, dtype) in QUICK else pytest.mark.slow)
    for shape in SHAPES
    for dtype in TOLERANCES
]


def drawing(dtype):
    """A function of sides that draws normal numbers, other ones each time; wide in float32 or wider."""
    draw = make_draw(dtype)

    def draw_wide(*sides):
        return draw(*sides, kind=jnp.promote_types(dtype, jnp.float32))

    return draw, draw_wide


def conv3x3_operands(shape, dtype, groups=1):
    examples, height, width, columns, _, bottleneck, made, _ = shape
    draw, wide = drawing(dtype)
    maps = [draw(examples, height, width, columns) for _ in range(2)]
    norm = (wide(groups, bottleneck), np.abs(wide(groups, bottleneck)) + 0.1, wide(bottleneck), wide(bottleneck))
    return (
        *maps,
        wide(groups, 3, made),
        draw(examples, height, width, bottleneck),
        *norm,
        wide(3, 3, bottleneck, made),
    )


def conv1x1_operands(shape, dtype, groups=1):
    examples, height, width, columns, channels, bottleneck, _, _ = shape
    draw, wide = drawing(dtype)
    maps = [draw(examples, height, width, columns) for _ in range(2)]
    masked = draw(examples, height, width, bottleneck)
    return (*maps, wide(channels), wide(channels), wide(channels, bottleneck), masked, wide(groups, 3, bottleneck))


def at(values):
    """A number for each channel, at every position of a map."""
    return values[None, None, None, :]


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_the_3x3_convolution_s_derivative_is_its_reference(shape, dtype):
    *_, made, rows = SHAPES[shape]
    operands, start = conv3x3_operands(SHAPES[shape], dtype), 2 * made
    computed = run_kernel(conv3x3_gradients, *operands, start=start, most_rows=rows)
    assert_close(computed, run_reference(conv3x3_gradients, *operands, start=start), TOLERANCES[dtype])


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_the_1x1_convolution_s_derivative_is_its_reference(shape, dtype):
    *_, channels, _, _, rows = SHAPES[shape]
    operands = conv1x1_operands(SHAPES[shape], dtype)
    computed = run_kernel(conv1x1_gradients, *operands, most_positions=2 * rows)
    assert_close(computed, run_reference(conv1x1_gradients, *operands), TOLERANCES[dtype])
    np.testing.assert_array_equal(*(np.asarray(maps)[..., channels:] for maps in (computed[0], operands[0])))


def test_the_3x3_convolution_s_derivative_is_autodiff_s():
    with jax.enable_x64(True):
        shape = SHAPES["a row at a time"]
        operands = jax.device_get(conv3x3_operands(shape, jnp.float64))
        total, x, coefficients, bottleneck, mean, rstd, scale, bias, kernel = operands
        start, new = 8, shape[6]
        parts = [at(values) for values in coefficients[0]]
        raw = parts[0] * total[..., start : start + new] + parts[1] * x[..., start : start + new] + parts[2]
        normalized = (bottleneck - at(mean[0])) * at(rstd[0])

        def layer(before, scale, bias, kernel):
            activation = jax.nn.relu(before + at(scale) * normalized + at(bias))
            dimensions = ("NHWC", "HWIO", "NHWC")
            return lax.conv_general_dilated(activation, kernel, (1, 1), "SAME", dimension_numbers=dimensions)

        _, pullback = jax.vjp(jax.jit(layer), np.zeros_like(bottleneck), scale, bias, kernel)
        of_before, of_scale, of_bias, of_kernel = pullback(raw)
        computed = run_kernel(conv3x3_gradients, *operands, start=start)
        assert_close(computed, (of_before, np.array([of_scale]), np.array([of_bias]), of_kernel), 1e-13)


def test_the_1x1_convolution_s_derivative_is_autodiff_s():
    with jax.enable_x64(True):
        operands = jax.device_get(conv1x1_operands(SHAPES["a row at a time"], jnp.float64))
        total, x, scale, bias, kernel, masked, coefficients = operands
        channels = scale.shape[0]

        def layer(x, scale, bias, kernel):
            return jax.nn.relu(at(scale) * x[..., :channels] + at(bias)) @ kernel

        bottleneck, pullback = jax.vjp(jax.jit(layer), x, scale, bias, kernel)
        parts = [at(values) for values in coefficients[0]]
        of_x, of_scale, of_bias, of_kernel = pullback(parts[0] * masked + parts[1] * np.asarray(bottleneck) + parts[2])
        added, *computed = run_kernel(conv1x1_gradients, *operands)
        expected = (of_x, np.array([of_scale]), np.array([of_bias]), of_kernel)
        assert_close((np.asarray(added) - total, *computed), expected, 1e-13)


@pytest.mark.parametrize(
    ("reference", "operands", "divided"),
    [
        (jax.jit(functools.partial(conv3x3_gradients.reference, start=8)), conv3x3_operands, (0, 1, 2, 3, 4, 5)),
        (jax.jit(conv1x1_gradients.reference), conv1x1_operands, (0, 1, 5, 6)),
    ],
    ids=["3x3", "1x1"],
)
def test_the_references_take_groups_apart(reference, operands, divided):
    operands = jax.device_get(operands((4, *SHAPES["a row at a time"][1:]), jnp.float32, groups=2))

    def half(number):
        def own(place, value):
            return value.reshape(2, -1, *value.shape[1:])[number] if place in divided else value

        return jax.device_get(reference(*(own(place, value) for place, value in enumerate(operands))))

    first, second = half(0), half(1)
    joined = [np.concatenate(parts) for parts in zip(first[:3], second[:3], strict=True)]
    assert_close(reference(*operands), (*joined, first[3] + second[3]), 1e-5)


def test_on_a_cpu_the_references_are_compiled():
    shape = SHAPES["a row at a time"]
    for function, operands, static in [
        (conv3x3_gradients, conv3x3_operands(shape, jnp.float32), {"start": 8}),
        (conv1x1_gradients, conv1x1_operands(shape, jnp.float32), {}),
    ]:
        compiled = jax.jit(lambda *operands, f=function, s=static: f(*operands, **s)).lower(*operands).compile()
        assert "custom-call" not in compiled.as_text()
        assert_close(compiled(*operands), run_reference(function, *operands, **static), 1e-5)


COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from densenet_jax.models.densenet import BlockOptions, DenseBlock
from densenet_jax.models.fused import Fused
from densenet_jax.plan.compilers import absent_devices
from densenet_jax.plan.costs import compile_costs
from densenet_jax.plan.hlo import Program
from densenet_jax.plan.topology import parse_topology
from densenet_jax.training import sharding

def block(kernels, topology, examples, side, channels, layers, growth, searches=False):
    mesh = sharding.make_mesh(absent_devices(parse_topology(topology)))
    implementation = Fused("tpu", kernels, mesh)
    module = DenseBlock(layers, growth, options=BlockOptions(dtype=jnp.bfloat16), implementation=implementation)
    x = jax.ShapeDtypeStruct((examples, side, side, channels), jnp.bfloat16, sharding=sharding.over_data(mesh))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(x.shape, x.dtype), False))
    variables = sharding.with_sharding(shapes, sharding.replicated(mesh))
    def step(variables, x):
        def loss(params, x):
            features, new = module.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
            return jnp.square(features.values.astype(jnp.float32)).sum(), new
        return jax.grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], x)
    # XLA's search for fast programs takes six to ten times as long as all else.
    effort = {} if searches else {"exec_time_optimization_effort": -1.0}
    compiled = jax.jit(step).lower(variables, x).compile(effort)
    text = compiled.as_text()
    costs = compiled.cost_analysis()
    costs = costs[0] if isinstance(costs, list) else costs
    return {"calls": text.count("tpu_custom_call"), "gathers": "all-gather" in text, "bytes": costs["bytes accessed"],
            "temporaries": compiled.memory_analysis().temp_size_in_bytes}

print(json.dumps({
    "kernels": block("pallas", "v5e:1x1", 128, 56, 64, 3, 32),
    "xla": block("auto", "v5e:1x1", 128, 56, 64, 3, 32),
    "eight chips": block("pallas", "v5e:2x4", 8 * 256, 28, 128, 2, 32, searches=True),
    "v5p": block("pallas", "v5p:2x2x1", 4 * 256, 28, 128, 2, 32),
    "v6e": block("pallas", "v6e:1x1", 256, 28, 192, 1, 48),
}))
"""


@pytest.mark.slow
@needs("libtpu")
def test_for_tpus_that_are_not_there_they_compile_and_move_fewer_bytes():
    computed = parse_last_line(run_for_absent_chips(COMPILE).stdout)
    assert computed["xla"]["calls"] == 0
    assert computed["kernels"]["bytes"] < 0.85 * computed["xla"]["bytes"]
    assert computed["kernels"]["temporaries"] < 1.1 * computed["xla"]["temporaries"]
    assert [computed[name]["calls"] for name in ("kernels", "eight chips", "v6e", "v5p")] == [2 * 3, 2 * 2, 2, 2 * 2]
    assert not any(one["gathers"] for one in computed.values())
    # Memory that begins unwritten is each chip's own: the buffer of all eight would be 8 * 77 MB.
    assert computed["eight chips"]["temporaries"] < 4 * 77e6
