"""Both ways to count values; the operations themselves are held against Pillow in test_randaugment.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax.augment import photometric as tones


@pytest.mark.parametrize("form", [tones._histogram_by_product, tones._histogram_by_scatter])
def test_histogram_counts_exactly(form):
    values = np.random.default_rng(0).integers(0, 256, (2, 5000, 3))
    values[1] = 255  # more of one value than bfloat16 could count
    counts = np.asarray(jax.jit(form)(jnp.asarray(values)))
    for image in range(2):
        for channel in range(3):
            np.testing.assert_array_equal(counts[image, channel], np.bincount(values[image, :, channel], minlength=256))


def test_histogram_of_images():
    images = jnp.asarray([[[[3.0], [3.0]], [[250.0], [0.0]]]])
    counts = tones.histogram(images)[0, 0]
    assert {value: int(counts[value]) for value in (0, 3, 250)} == {0: 1, 3: 2, 250: 1}
    assert int(counts.sum()) == 4
