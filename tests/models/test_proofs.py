"""Rows that timm has no network for equal MONAI's, pytorchcv's or Keras's, with every weight drawn at random.

The expected values are tests/golden/proofs/*.npz, made by tests/golden/make_proofs.py in float64.
"""

import hashlib

import jax
import numpy as np
import pytest

from tests.golden.drawn import key_lines
from tests.models import golden

NAMES = sorted(path.stem for path in (golden.GOLDEN / "proofs").glob("*.npz"))
# pytorchcv's networks without bottleneck have this stem and halving transitions, unlike the paper's.
AS_PYTORCHCV = {
    "densenet_40_12": {"stem_width": 24, "compression": 0.5},
    "densenet_100_12": {"stem_width": 24, "compression": 0.5},
    "densenet_100_24": {"stem_width": 48, "compression": 0.5},
}
QUICK = ("densenet_40_12",)
# At 161 px as well as at 65: one of each source and stem, which is enough for how sizes are rounded.
AT_EVERY_SIZE = ("densenet121d", "keras_densenet121", "pytorchcv_dpn68b", "pytorchcv_dpn92")


def _row(name):
    return name.removeprefix("keras_").removeprefix("pytorchcv_")


# Rows that timm has as well; what is computed for them is compared with its values, too.
BY_TIMM = {_row(name) for name in NAMES if name not in AS_PYTORCHCV and (golden.GOLDEN / f"{_row(name)}.npz").exists()}


def _largest_errors(name, dtype):
    """The errors of the logits and of every block's output that the source shows; from the source and from timm."""
    expected = golden.golden(f"proofs/{name}")
    row, architecture = _row(name), AS_PYTORCHCV.get(name, {})
    sides_px = sorted(int(key.split("/")[0]) for key in expected if key.endswith("logits"))
    with jax.enable_x64(dtype is np.float64):
        model = golden.make(row, dtype=dtype, param_dtype=dtype, **architecture)
        if "keys_sha256" in expected:
            keys = golden.torch_shapes(golden.abstract_variables(row, **architecture))
            assert hashlib.sha256(key_lines(keys).encode()).hexdigest() == str(expected["keys_sha256"])
        variables = golden.drawn_variables(row, dtype, **architecture)
        run, errors, timm_errors = jax.jit(lambda v, x: golden.run_with_taps(model, v, x)), [], [0.0]
        for side_px in sides_px if name in AT_EVERY_SIZE else sides_px[:1]:
            batch = expected[f"{side_px}/logits"].shape[0]
            actual = jax.device_get(run(variables, golden.images(batch, side_px, dtype)))
            errors += golden.stage_errors(actual, expected, side_px).values()
            if row in BY_TIMM:
                timm_errors += golden.stage_errors(actual, golden.golden(row), side_px).values()
    return max(errors), max(timm_errors)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NAMES]
)
def test_logits_and_every_block_equal_the_source(name):
    error, from_timm = _largest_errors(name, np.float64)
    # Keras rounds to float32 on the way, whatever its floatx.
    assert error < (2e-6 if name.startswith("keras_") else 1e-9)
    assert from_timm < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["densenet232", "densenet_bc_190_40"])
def test_they_do_in_float32(name):
    assert _largest_errors(name, np.float32)[0] < 1e-5
