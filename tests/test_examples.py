"""The examples for segmentation and search do what docs/features.md says of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import densenet_jax
from examples.embeddings import search
from examples.segmentation import photographs, unet


@pytest.fixture(scope="module")
def halves():
    return photographs.load_halves()


def test_masks_cover_the_flower_and_the_tower_and_halves_share_no_pixel(halves):
    (pixels, masks), (others, other_masks) = halves
    assert pixels.shape == masks.shape == others.shape == other_masks.shape == (2, 427, 320)
    assert masks[0, 213, 240], "the middle of the flower"
    assert not masks[0, 20, 20], "leaves"
    assert masks[1, 350, 200], "the tower"
    assert not masks[1, 30, 20], "the sky"
    assert not np.array_equal(pixels, others)


def test_a_short_training_learns_and_its_encoder_has_the_models_parameters(halves, monkeypatch):
    thin = functools.partial(densenet_jax.create_model, growth_rate=4, block_sizes=(1, 1, 1, 1))
    monkeypatch.setattr(unet.densenet_jax, "create_model", lambda name, output, **_: thin(name, output=output))
    one_crop = tuple(part[:1, 100:196, 120:216] for part in halves[0])
    assert 0.2 < one_crop[1].mean() < 0.9
    network, variables, losses = unet.fit(one_crop, steps=6, batch_size=2)
    assert losses[-1] < losses[0] - 0.1
    images = jnp.zeros((1, 64, 64, 1))
    own = jax.eval_shape(network.encoder.init, jax.random.key(0), images)
    assert jax.tree.structure(variables["params"]["encoder"]) == jax.tree.structure(own["params"])
    assert jax.eval_shape(network.apply, variables, images).shape == (1, 64, 64)


def test_iou_and_the_gray_levels_prediction():
    masks = np.array([[1, 1, 0, 0]], bool)
    assert unet.intersection_over_union(np.array([[1, 0, 1, 0]], bool), masks) == pytest.approx(1 / 3)
    levels = np.array([[1.0, 1.0, 1.0, 0.5]], np.float32)
    predicted = unet.predict_by_gray_level((levels, np.array([[1, 1, 0, 0]], bool)), np.array([[1.0, 0.5, 0.25]]))
    np.testing.assert_array_equal(predicted, [[True, False, False]])


@pytest.mark.slow
def test_the_unet_beats_gray_levels_on_the_held_out_halves(capsys):
    ours, baseline = unet.main(steps=60)
    assert ours > baseline + 0.3
    assert "24 held-out crops" in capsys.readouterr().out


def test_search_compares_features_with_pixels(served_run, capsys):
    results = search.main(served_run)
    assert results.keys() == search.MOVES.keys()
    features, pixels = results["as they are"]
    assert pixels == pytest.approx(0.986, abs=0.01)
    assert features > 0.3, "drawn weights keep some likeness"
    assert all(moved[1] < pixels for name, moved in results.items() if name != "as they are")
    assert "1437 digits" in capsys.readouterr().out


def test_moving_loses_what_leaves():
    image = np.arange(1, 10).reshape(1, 3, 3)
    np.testing.assert_array_equal(search.move(image, 0, 1)[0], [[0, 1, 2], [0, 4, 5], [0, 7, 8]])
    np.testing.assert_array_equal(search.move(image, -1, 0)[0], [[4, 5, 6], [7, 8, 9], [0, 0, 0]])
