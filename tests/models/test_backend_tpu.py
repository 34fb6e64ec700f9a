"""Dense blocks whose backward pass the TPU's kernels take, interpreted, are the plain blocks."""

import jax
import jax.numpy as jnp
import pytest

from densenet_jax.kernels.select import BlockShape
from densenet_jax.models.create import create_model
from densenet_jax.models.densenet import PLAIN
from densenet_jax.models.fused import Fused, backend_tpu
from densenet_jax.models.fused.backend_tpu import TpuBackend
from densenet_jax.training.sharding import make_mesh, over_data, replicated
from tests.models.block_cases import CASES, largest_error_over_eight_devices, results
from tests.models.comparing import largest_error

INTERPRETED = Fused("tpu", "interpret")
BY_KERNELS = ("as it is", "remat", "frozen", "second norms frozen")
QUICK = ("as it is", "groups, every convolution dropped from")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_a_block_is_the_plain_block(case, monkeypatch):
    layers = []
    for operation in (backend_tpu.conv3x3_gradients, backend_tpu.conv1x1_gradients):
        monkeypatch.setattr(operation, "kernel", _noting(operation.kernel, layers))
    with jax.enable_x64(True):
        actual = results(INTERPRETED, jnp.float64, CASES[case])
        assert largest_error(actual, results(PLAIN, jnp.float64, CASES[case])) < 1e-9
    assert len(layers) == (4 if case in BY_KERNELS else 0)  # dropout and several groups are left to XLA


def _noting(kernel, calls):
    def noted(*operands, **options):
        calls.append(kernel)
        return kernel(*operands, **options)

    return noted


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [0, 2], ids=["one group", "a group each"])
def test_over_eight_devices_it_is_the_same(group_size):
    assert largest_error_over_eight_devices(INTERPRETED, group_size) < 1e-9


def test_memory_is_left_unwritten_only_where_each_device_has_its_own():
    mesh, shape = make_mesh(), BlockShape(16, 3, 3, 8, 1, 16, 4)

    def is_unwritten(mesh, shape):
        return TpuBackend(mesh).for_block(shape, jnp.bfloat16, 0).unwritten_buffers

    assert is_unwritten(mesh, shape)
    assert not is_unwritten(None, shape)  # this process has eight devices
    assert not is_unwritten(mesh, shape._replace(examples=12))


@pytest.mark.parametrize(("wanted", "expected"), [("auto", False), ("xla", False), ("pallas", True)])
def test_layers_are_finished_one_by_one_in_every_block_of_a_network_with_kernels(wanted, expected):
    third = BlockShape(128, 14, 14, 256, 24, 128, 32)  # of densenet121, which kernels don't take
    backend = TpuBackend(None, wanted).for_block(third, jnp.bfloat16, 0)
    assert (backend.layer_kernels, backend.barrier_after_layer) == (False, expected)


def test_several_groups_on_a_device_are_left_to_xla():
    shape, mesh = BlockShape(16, 3, 3, 8, 1, 16, 4), make_mesh()
    backend = TpuBackend(mesh, "interpret")
    for group_size, expected in ((2, True), (1, False), (4, False)):  # 4: groups over devices
        assert backend.for_block(shape, jnp.bfloat16, group_size).layer_kernels is expected


def test_a_model_over_several_devices_trains_in_memory_that_begins_unwritten():
    mesh = make_mesh()
    images = jnp.sin(jnp.arange(16 * 8 * 8 * 3.0)).reshape(16, 8, 8, 3)
    actual, variables = [], None
    for settings in ({"block_form": "plain"}, {"block_form": "normalize_once_tpu", "mesh": mesh}):
        model = create_model("densenet_bc_22_12", num_classes=3, block_sizes=(2, 2), **settings)
        variables = variables or jax.jit(model.init)(jax.random.key(0), images[:1])
        shardings = (replicated(mesh), over_data(mesh))
        step = jax.jit(lambda v, x, m=model: m.apply(v, x, train=True, mutable=["batch_stats"]), in_shardings=shardings)
        actual.append(step(variables, images))
    assert largest_error(*actual) < 1e-4
