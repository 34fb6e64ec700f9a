"""Rows that timm has no network for equal MONAI's, pytorchcv's or Keras's, with every weight drawn at random.

The expected values are tests/golden/proofs/*.npz, made by tests/golden/make_proofs.py in float64.
"""

import hashlib

import jax
import numpy as np
import pytest

from densenet_jax.models.create import create_model
from densenet_jax.models.torch_weights import from_torch_array
from tests.golden.drawn import draw, key_lines
from tests.models import golden

NAMES = sorted(path.stem for path in (golden.GOLDEN / "proofs").glob("*.npz"))
# pytorchcv's networks without bottleneck have this stem and halving transitions, unlike the paper's.
AS_PYTORCHCV = {
    "densenet_40_12": {"stem_width": 24, "compression": 0.5},
    "densenet_100_12": {"stem_width": 24, "compression": 0.5},
    "densenet_100_24": {"stem_width": 48, "compression": 0.5},
}
QUICK = ("densenet_40_12", "pytorchcv_dpn68")


def _largest_error(name, dtype):
    """Of the logits and of every block's output that the source shows, at every size."""
    expected = golden.golden(f"proofs/{name}")
    with jax.enable_x64(dtype is np.float64):
        row, sides = (
            name.removeprefix("keras_").removeprefix("pytorchcv_"),
            {key.split("/")[0] for key in expected if key.endswith("logits")},
        )
        model = create_model(row, dtype=dtype, param_dtype=dtype, **AS_PYTORCHCV.get(name, {}))
        shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 65, 65, 3), dtype))
        keys = golden.torch_shapes(shapes)
        if "keys_sha256" in expected:
            assert hashlib.sha256(key_lines(keys).encode()).hexdigest() == str(expected["keys_sha256"])
        paths, tree = jax.tree_util.tree_flatten_with_path(shapes)
        names = {tuple(entry.key for entry in path): None for path, _ in paths}
        leaves = golden.flatten(shapes)
        drawn = {path: from_torch_array(path, draw(*key)) for path, key in zip(leaves, keys.items(), strict=True)}
        variables = jax.tree.unflatten(tree, [drawn[name].astype(dtype) for name in names])
        run, errors = jax.jit(lambda v, x: golden.run_with_taps(model, v, x)), {}
        for side_px in map(int, sides):
            batch = expected[f"{side_px}/logits"].shape[0]
            found = jax.device_get(run(variables, golden.images(batch, side_px, dtype)))
            errors |= {
                f"{side_px}/{stage}": error for stage, error in golden.stage_errors(found, expected, side_px).items()
            }
    return max(errors.values())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NAMES]
)
def test_logits_and_every_block_equal_the_source(name):
    # Keras rounds to float32 on the way, whatever its floatx.
    assert _largest_error(name, np.float64) < (2e-6 if name.startswith("keras_") else 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["densenet232", "keras_densenet121", "densenet_bc_190_40"])
def test_they_do_in_float32(name):
    assert _largest_error(name, np.float32) < 1e-5
