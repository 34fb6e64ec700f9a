"""Predictions are what evaluation counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from densenet_jax.training.eval_step import make_eval_step
from densenet_jax.training.predict_step import make_predict_step

BATCH, CLASSES, SHAPE = 16, 7, (4, 4, 1)


class Linear(nn.Module):
    """One product with all pixels, so that mirroring and each crop change the logits."""

    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(CLASSES, dtype=jnp.bfloat16)(images.reshape(images.shape[0], -1))


def scale(images):
    return images.astype(jnp.float32) / 64.0


@pytest.mark.parametrize(("crops", "classes"), [((), None), ((5,), None), ((), (1, 4, 6))])
def test_answers_are_those_that_evaluation_counts(crops, classes):
    chance = np.random.default_rng(0)
    batch = {
        "image": chance.integers(0, 256, (BATCH, *crops, *SHAPE), np.uint8),
        "label": chance.choice(classes or CLASSES, BATCH).astype(np.int32),
        "mask": chance.uniform(size=BATCH) < 0.8,
    }
    model = Linear()
    variables = model.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), train=False)
    answers = jax.device_get(jax.jit(make_predict_step(model, scale, classes=classes))(variables, batch))
    counts = jax.jit(make_eval_step(model, scale, classes=classes, confusion=True))(variables, batch)

    assert set(answers) == {"probability", "label", "mask"}
    probabilities = answers["probability"]
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    allowed = np.isin(np.arange(CLASSES), classes or np.arange(CLASSES))
    assert (probabilities[:, ~allowed] == 0).all()
    confusion = np.zeros((CLASSES, CLASSES), int)
    np.add.at(confusion, (batch["label"][batch["mask"]], probabilities.argmax(axis=1)[batch["mask"]]), 1)
    np.testing.assert_array_equal(counts.confusion, confusion)
    own = probabilities[np.arange(BATCH), batch["label"]][batch["mask"]]
    assert -np.log(own).sum() == pytest.approx(float(counts.sums.loss), rel=2e-3)
