"""Class activation maps: exact, of every family, and drawn where the evidence is."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from densenet_jax.augment.basic import normalize
from densenet_jax.data.transforms import eval_transform
from densenet_jax.errors import UserError
from densenet_jax.export.samples import generate_images
from densenet_jax.predict.batch import PredictOptions, predict
from densenet_jax.predict.explain import draw_overlay, to_rgb
from densenet_jax.predict.predictor import Predictor
from tests.export.exporting import images, small_model


@pytest.mark.parametrize("name", ["small_cifar", "small_dpn_b"])
def test_the_mean_of_the_map_and_the_bias_are_the_logit(name):
    seen = eval_transform(image_size_px=64, resize_px=64, channels=3)
    model, pixels = dataclasses.replace(small_model(name), transform=seen), generate_images(5, seen.shape)
    predictor = Predictor(model, batch_sizes=(2,))
    inputs = normalize(jnp.asarray(pixels), model.mean, model.std)
    logits = np.asarray(jax.jit(lambda x: model.module.apply(model.variables, x, train=False))(inputs))
    probabilities = np.asarray(jax.nn.softmax(logits))
    for classes in (None, [0, 3, 6, 1, 1]):
        expected = np.argmax(logits, axis=1) if classes is None else classes
        answers = predictor.explain(pixels, classes)
        assert [answer.class_id for answer in answers] == list(expected)
        assert [answer.label for answer in answers] == ["abcdefg"[number] for number in expected]
        assert min(answers[0].activation_map.shape) > 1
        means = [answer.activation_map.mean() + answer.bias for answer in answers]
        np.testing.assert_allclose(means, logits[np.arange(5), expected], atol=1e-5)
        given = [answer.probability for answer in answers]
        np.testing.assert_allclose(given, probabilities[np.arange(5), expected], rtol=1e-4)
    assert predictor.explain([]) == []


def test_wrong_classes_are_refused():
    predictor = Predictor(small_model(), batch_sizes=(2,))
    with pytest.raises(UserError, match="expected one class for each of 3 images"):
        predictor.explain(images(3), [1])
    with pytest.raises(UserError, match="expected numbers from 0 to 6"):
        predictor.explain(images(1), [7])


def test_the_overlay_is_where_the_evidence_is():
    evidence = np.zeros((4, 4), np.float32)
    evidence[0, 3], evidence[3, 0] = 2.0, -2.0
    picture = np.asarray(draw_overlay(np.full((32, 32, 3), 128, np.uint8), evidence)).astype(int)
    assert picture.shape == (320, 320, 3)
    changed = np.abs(picture - 128).sum(axis=2)
    assert changed[:60, -60:].min() > 60
    assert changed[-100:, :100].max() == 0
    assert np.all(np.asarray(draw_overlay(np.full((8, 8, 1), 7, np.uint8), -evidence * 0)) == 7)


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (3, np.uint8), (13, np.uint8), (2, np.uint16)])
def test_images_of_any_channels_become_colors(channels, dtype):
    white = np.full((5, 4, channels), np.iinfo(dtype).max, dtype)
    assert np.asarray(to_rgb(white)).tolist() == np.full((5, 4, 3), 255).tolist()


def test_explanations_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, shade in (("a.png", 0), ("sub/b.bmp", 255)):
        pathlib.Path("photos", name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 6), (shade,) * 3).save(pathlib.Path("photos", name))
    pathlib.Path("photos/broken.png").write_bytes(b"")
    figures = predict(small_model, PredictOptions(("photos",), "out.csv", explain="why", features="pooled"))
    assert (figures["images"], figures["refused"]) == (2, 1)
    files = sorted(str(path.relative_to("why")) for path in pathlib.Path("why").rglob("*.*"))
    assert files == ["a.png", "a.png.npy", "sub/b.bmp.npy", "sub/b.bmp.png"]
    [answer] = Predictor(small_model(), batch_sizes=(8,)).explain(["photos/sub/b.bmp"])
    np.testing.assert_allclose(np.load("why/sub/b.bmp.npy"), answer.activation_map, rtol=1e-5, atol=1e-6)
    with Image.open("why/sub/b.bmp.png") as picture:
        assert min(picture.size) >= 320
