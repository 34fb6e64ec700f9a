"""Who gets kernels, and what is said to who can't have them."""

import types

import jax.numpy as jnp
import pytest

from densenet_jax.errors import UserError
from densenet_jax.kernels.select import BlockShape, choose, choose_layer_gradients, should_remat_bottleneck

SHAPE = (100_352, 256, 128)


HOPPER = types.SimpleNamespace(compute_capability="9.0")
AMPERE = types.SimpleNamespace(compute_capability="8.0")
TPU = types.SimpleNamespace()


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.float16])
def test_chips_of_the_kind_they_were_measured_on_get_them_unasked(dtype):
    assert choose("gpu", dtype, SHAPE, devices=(HOPPER,)) == "pallas"
    assert choose("gpu", dtype, SHAPE, devices=(HOPPER, HOPPER)) == "pallas"
    assert choose("gpu", dtype, SHAPE, "xla", devices=(HOPPER,)) == "xla"


@pytest.mark.parametrize(
    ("platform", "dtype", "shape", "devices"),
    [
        ("gpu", "bfloat16", SHAPE, (AMPERE,)),
        ("gpu", "bfloat16", SHAPE, (HOPPER, AMPERE)),
        ("gpu", "float32", SHAPE, (HOPPER,)),
        ("gpu", "bfloat16", (100_352, 256, 192), (HOPPER,)),
        ("tpu", "bfloat16", SHAPE, (TPU,)),
        ("gpu", "bfloat16", SHAPE, None),  # a form for GPUs, and this process has CPUs
    ],
)
def test_nobody_else_gets_them_unasked(platform, dtype, shape, devices):
    assert choose(platform, dtype, shape, devices=devices) == "xla"


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.float16])
def test_kernels_are_taken_on_a_gpu_on_request(dtype):
    assert choose("gpu", dtype, SHAPE, "pallas") == "pallas"


@pytest.mark.parametrize("shape", [(100_352, 256, 513), (2**23, 256, 128), (2**24, 64, 128), (0, 256, 128)], ids=str)
def test_shapes_that_do_not_fit_a_program_are_left_to_xla(shape):
    assert choose("gpu", jnp.bfloat16, shape, "pallas") == "xla"


@pytest.mark.parametrize(
    ("platform", "dtype", "wanted", "message"),
    [
        ("cpu", jnp.bfloat16, "pallas", r"'pallas', but these kernels are for GPUs and TPUs and this is a CPU"),
        ("tpu", jnp.float16, "pallas", r"are for bfloat16 on a TPU, but config\.model\.dtype is float16"),
        ("gpu", jnp.float32, "pallas", r"config\.model\.dtype is float32; set config\.model\.dtype=bfloat16"),
        ("gpu", jnp.bfloat16, "triton", r"kernels='triton': expected one of auto, xla, pallas"),
    ],
)
def test_absent_kernels_are_refused(platform, dtype, wanted, message):
    with pytest.raises(UserError, match=message):
        choose(platform, dtype, SHAPE, wanted)


FIRST_BLOCK = BlockShape(examples=128, height=56, width=56, channels=64, layers=6, bottleneck=128, growth=32)
V4, V5E, V5P, V6E, V7 = (
    types.SimpleNamespace(device_kind=f"TPU{kind}") for kind in (" v4", " v5 lite", " v5", " v6 lite", "7x")
)


@pytest.mark.parametrize("device", [V5E, V5P, V6E, V7], ids=lambda device: device.device_kind)
def test_kernels_are_taken_on_a_tpu_on_request(device):
    assert choose_layer_gradients(jnp.bfloat16, FIRST_BLOCK, "pallas", (device,)) == "pallas"
    assert choose_layer_gradients(jnp.bfloat16, FIRST_BLOCK._replace(examples=256), "pallas", [device] * 8) == "pallas"


@pytest.mark.parametrize(("wanted", "devices"), [("auto", (V5E,)), ("xla", (V5E,)), ("pallas", None)])
def test_nobody_else_does_on_a_tpu(wanted, devices):
    assert choose_layer_gradients(jnp.bfloat16, FIRST_BLOCK, wanted, devices) == "xla"


@pytest.mark.parametrize(
    "unfit",
    [
        {"height": 14, "width": 14},  # stays on the chip
        {"width": 224},  # a row does not
        {"growth": 24},
        {"channels": 80},  # what a layer makes does not begin at a multiple of what it has
        {"bottleneck": 0},
        {"bottleneck": 56},
    ],
    ids=str,
)
def test_blocks_that_the_tpu_s_kernels_are_not_for_are_left_to_xla(unfit):
    assert choose_layer_gradients(jnp.bfloat16, FIRST_BLOCK._replace(**unfit), "pallas", (V5E,)) == "xla"


@pytest.mark.parametrize(
    ("block", "devices", "message"),
    [
        (FIRST_BLOCK, (V5E, V4), r"from v5 on, and this is a TPU v4; set it to 'auto'"),
        (FIRST_BLOCK._replace(examples=64), (V5E,), r"a multiple of 128 images on each TPU, but there are 64: change"),
    ],
    ids=["an older chip", "half of a vector"],
)
def test_absent_kernels_are_refused_on_a_tpu(block, devices, message):
    with pytest.raises(UserError, match=message):
        choose_layer_gradients(jnp.bfloat16, block, "pallas", devices)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (BlockShape(128, 56, 56, 64, 6, 128, 32), True),  # densenet121's first
        (BlockShape(128, 56, 56, 96, 6, 192, 48), True),  # densenet161's
        (BlockShape(16, 56, 56, 64, 6, 128, 32), False),  # stays on the chip
        (BlockShape(128, 28, 28, 128, 12, 128, 32), False),  # reads more than it keeps
        (BlockShape(4096, 32, 32, 16, 12, 0, 12), False),  # has no bottlenecks
    ],
)
def test_bottlenecks_are_recomputed_on_a_tpu_where_keeping_them_moves_more(block, expected):
    assert should_remat_bottleneck("bfloat16", block) is expected
