"""Dense blocks by the GPU's kernels, interpreted, are the plain blocks: outputs, statistics and every gradient."""

import jax
import jax.numpy as jnp
import pytest

from densenet_jax.errors import UserError
from densenet_jax.kernels.select import BlockShape
from densenet_jax.models.create import create_model
from densenet_jax.models.densenet import PLAIN, BlockOptions, DenseBlock
from densenet_jax.models.fused import Fused, backend_gpu
from densenet_jax.models.fused.backend_gpu import GpuBackend, GpuKernelBackend
from densenet_jax.training.sharding import make_mesh
from tests.models.block_cases import CASES, largest_error_over_eight_devices, results
from tests.models.comparing import drawn, largest_error

INTERPRETED = Fused("gpu", "interpret")
QUICK = ("as it is", "groups, every convolution dropped from")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_a_block_is_the_plain_block(case):
    with jax.enable_x64(True):
        actual = results(INTERPRETED, jnp.float64, CASES[case])
        assert largest_error(actual, results(PLAIN, jnp.float64, CASES[case])) < 1e-9


def test_evaluation_by_the_kernels_is_the_plain_block_s():
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (4, 3, 3, 8), jnp.float64)
        actual = []
        options = BlockOptions(dtype=jnp.float64, param_dtype=jnp.float64)
        for implementation in (INTERPRETED, PLAIN):
            module = DenseBlock(2, 4, options=options, implementation=implementation)
            shapes = jax.eval_shape(lambda module=module: module.init(jax.random.key(0), x, False))
            variables = drawn(shapes, 1, jnp.float64)
            features = jax.jit(module.apply, static_argnums=2)(variables, x, False)
            assert features.stats is None
            actual.append(features.values)
        assert largest_error(*actual) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [0, 2, 4], ids=["one group", "a group each", "groups over devices"])
def test_over_eight_devices_it_is_the_same(group_size):
    assert largest_error_over_eight_devices(INTERPRETED, group_size) < 1e-9


def test_indivisible_batches_are_left_to_xla():
    mesh, shape = make_mesh(), BlockShape(16, 3, 3, 8, 1, 16, 4)
    backend = GpuBackend(mesh, "interpret")
    for group_size in (0, 2):
        assert backend.for_block(shape, jnp.float32, group_size) == GpuKernelBackend(mesh, "interpret")
    for other, group_size in [(shape, 4), (shape._replace(examples=12), 0), (shape._replace(examples=4), 0)]:
        assert backend.for_block(other, jnp.float32, group_size) is backend


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dpn68", {}, "dpn68 has no dense blocks"),
        ("densenet121", {"block_form": "plain"}, "is for block_form='normalize_once', not 'plain'"),
        ("densenet121", {"block_form": "normalize_once_cpu"}, "not 'normalize_once_cpu'"),
    ],
)
def test_models_without_such_kernels_say_so(name, settings, message):
    with pytest.raises(UserError, match=message):
        create_model(name, kernels="pallas", **settings)


def test_a_model_for_other_devices_takes_what_is_best_there(monkeypatch):
    seen = []
    monkeypatch.setattr(backend_gpu, "choose", lambda *given: seen.append(given[3:]) or "xla")
    images = jax.ShapeDtypeStruct((8, 8, 8, 3), jnp.float32)
    mesh = make_mesh()
    for settings in ({}, {"kernels": "xla"}, {"mesh": mesh}):
        model = create_model(
            "densenet_bc_22_12", num_classes=3, dtype=jnp.bfloat16, block_form="normalize_once_gpu", **settings
        )
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        seen.clear()
        jax.eval_shape(model.apply, variables, images)
        wanted = (settings.get("kernels", "auto"), tuple(mesh.devices.flat) if "mesh" in settings else None)
        assert set(seen) == {wanted}


def test_on_a_cpu_training_with_kernels_is_refused_and_evaluation_is_not():
    model = create_model("densenet_bc_22_12", num_classes=3, kernels="pallas", dtype=jnp.bfloat16)
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    jax.eval_shape(model.apply, variables, images)
    with pytest.raises(UserError, match="these kernels are for GPUs and TPUs and this is a CPU"):
        jax.eval_shape(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]), variables, images)
