"""Our networks equal timm's, stage by stage, with every weight and statistic drawn at random.

The expected values are tests/golden/*.npz, made by tests/golden/make_golden.py in float64.
"""

import os

import jax
import numpy as np
import pytest

from densenet_jax.kernels.cpu.primitive import is_available
from densenet_jax.models import layers
from densenet_jax.models.fused.inference import pack_kernels
from densenet_jax.models.rdnet import RDNet
from densenet_jax.models.torch_weights import to_torch
from tests.golden.drawn import draw, relative_error, summarize
from tests.models import golden
from tests.models.test_proofs import BY_TIMM

NAMES = (
    *("densenet121", "densenet161", "densenet169", "densenet201", "densenet264d", "densenetblur121d"),
    *("dpn48b", "dpn68", "dpn68b", "dpn92", "dpn98", "dpn107", "dpn131"),
)
# What test_proofs.py computes for other sources is compared with timm there. XLA's convolutions in float64 take half a
# minute for the smallest RDNet at 65 px, 8 minutes for the largest at 161; DENSENET_JAX_LARGEST=1 compares them, too.
LARGEST = ("rdnet_small", "rdnet_base", "rdnet_large")
# At 65 px a float64 network takes a third of the time that it takes at 161; sizes are rounded in the stem, in blurs and
# at strides, which the other networks show at 161.
SMALLER = ("densenet161", "densenet264d")
FULL_SIZE = [
    *((name, 65 if name in SMALLER else 161, np.float64) for name in NAMES if name not in BY_TIMM),
    ("rdnet_tiny", 65, np.float64),
    *((name, 224, np.float32) for name in ("densenet121", "densenetblur121d", "dpn68b", "rdnet_tiny")),
    *(("rdnet_tiny", 161, np.float32), ("rdnet_small", 65, np.float32)),
    *((name, 161, np.float64) for name in LARGEST if os.environ.get("DENSENET_JAX_LARGEST")),
]
# float64 tells rounding, which depth amplifies, from a fault that happens to be small.
TOLERANCES = {np.float32: 1e-5, np.float64: 1e-9}


def _largest_error(name, side_px, batch, dtype):
    with jax.enable_x64(dtype is np.float64):
        model = golden.make(name, dtype=dtype, param_dtype=dtype)
        # An RDNet's stages are watched in the fast implementation: XLA's depthwise convolutions take minutes in
        # float64, and test_faults.py compares those of small_rdnet.
        watch = golden.run_own_with_taps if isinstance(model, RDNet) else golden.run_with_taps
        run = jax.jit(lambda v, x: watch(model, v, x))
        actual = run(golden.drawn_variables(name, dtype), golden.images(batch, side_px, dtype))
        assert actual["logits"].dtype == dtype
        return golden.stage_errors(jax.device_get(actual), golden.golden(name), side_px)


def test_every_stage_equals_the_reference():
    """For one full network; training below compares the small ones, of every family."""
    errors = _largest_error("densenet121", 65, 2, np.float64)
    assert max(errors.values()) < TOLERANCES[np.float64], errors


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side_px", "dtype"), FULL_SIZE)
def test_every_stage_equals_the_reference_at_full_size(name, side_px, dtype):
    errors = _largest_error(name, side_px, 2 if side_px == 65 else 1, dtype)
    assert max(errors.values()) < TOLERANCES[dtype], errors


@pytest.mark.parametrize("name", ["small_densenet_blur", "small_dpn"])
def test_test_time_pooling_equals_the_reference(name):
    with jax.enable_x64(True):
        model = golden.make(name, dtype=np.float64, param_dtype=np.float64, test_time_pool_px=2)
        run = jax.jit(model.apply)
        logits = jax.device_get(run(golden.drawn_variables(name, np.float64), golden.images(4, 67, np.float64)))
    expected = golden.golden(name)["windows/logits"]
    assert np.abs(logits - expected).max() < 1e-9 * np.abs(expected).max()


@pytest.mark.parametrize("form", ["normalize_once", "plain"])
@pytest.mark.parametrize("name", [name for name in golden.SMALL_MODELS if name != "small_rdnet"])
def test_every_level_of_the_pyramid_equals_the_reference(name, form):
    file, prefix = golden.golden(name), "pyramid/"
    expected = {int(key.removeprefix(prefix)): value for key, value in file.items() if key.startswith(prefix)}
    model = golden.make(name, output=tuple(expected), block_form=form)
    assert tuple(expected) == model.strides
    packed, variables = pack_kernels(model, golden.drawn_variables(name))
    if form == "normalize_once" and is_available():  # so that this is another path than below
        assert packed.implementation.is_packed
    images = golden.images(4, 67)
    for network, arrays in ((model, golden.drawn_variables(name)), (packed, variables)):
        actual = jax.device_get(jax.jit(network.apply)(arrays, images))
        if "dpn" in name:
            del actual[max(actual)]  # here behind the last norm, as the classifier's input is; timm's is the raw output
        for stride, level in actual.items():
            error = relative_error(summarize(golden.torch_layout(level)), expected[stride])
            assert error < TOLERANCES[np.float32], (stride, error)


def _train_once(name, **options):
    """Logits, updated statistics and gradients of the golden files' linear loss, in float64."""
    model = golden.make(name, dtype=np.float64, param_dtype=np.float64, **options)
    variables = golden.drawn_variables(name, np.float64)
    weights = draw("loss.weight", (4, 10)).astype(np.float64)

    def loss(params, x, statistics):
        everything = {"params": params, "batch_stats": statistics}
        logits, state = model.apply(everything, x, train=True, mutable=["batch_stats"])
        return (logits * weights).sum(), (logits, state.get("batch_stats", {}))

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    x = golden.images(4, 67, np.float64)
    (_, (logits, statistics)), gradients = run(variables["params"], x, variables["batch_stats"])
    return jax.device_get((logits, statistics, gradients))


def _training_errors(name, **options):
    """The largest relative errors of training output, statistics and gradients."""
    expected = golden.golden(name)
    with jax.enable_x64(True):
        logits, statistics, (gradients, image_gradient) = _train_once(name, **options)
    state = to_torch({"params": {}, "batch_stats": statistics})
    after = {f"after/{key}": value for key, value in state.items() if "num_batches" not in key}
    leaves = golden.gradient_leaves(gradients) | {"images": golden.torch_layout(image_gradient)}
    actual = after | {f"gradient/{key}": value for key, value in leaves.items()}
    assert set(actual) == {key for key in expected if key.startswith(("after/", "gradient/"))}
    errors = {key: relative_error(summarize(value), expected[key]) for key, value in actual.items()}
    return {
        "output": np.abs(logits - expected["train/logits"]).max() / np.abs(expected["train/logits"]).max(),
        "statistics": max((error for key, error in errors.items() if key.startswith("after/")), default=0),
        "gradients": max(error for key, error in errors.items() if key.startswith("gradient/")),
    }


# One of each family. What the others add (stem, blur, activation, projection) the quick tests of evaluation compare.
TRAINED = ("small_densenet", "small_dpn", "small_rdnet")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in TRAINED else pytest.mark.slow) for name in golden.SMALL_MODELS]
)
def test_training_output_statistics_and_every_gradient_equal_the_reference(name):
    errors = _training_errors(name)
    assert max(errors.values()) < 1e-9, errors


@pytest.mark.slow
def test_faults_in_training_are_caught(monkeypatch):
    name = "small_densenet_blur"
    assert _training_errors(name, unbiased_running_variance=False)["statistics"] > 1e-4
    assert _training_errors(name, batch_norm_momentum=0.99)["statistics"] > 1e-4
    assert _training_errors(name, batch_norm_group_size=2)["output"] > 1e-4
    exact = layers.compute_stats
    monkeypatch.setattr(layers, "compute_stats", lambda *args: jax.lax.stop_gradient(exact(*args)))
    errors = _training_errors(name)
    assert errors["output"] < 1e-9
    assert errors["gradients"] > 1e-4
