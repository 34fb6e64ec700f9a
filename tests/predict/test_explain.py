"""Class activation maps: exact, of every family, and drawn where the evidence is."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from densenet_jax.augment.basic import normalize
from densenet_jax.data.transforms import eval_transform
from densenet_jax.errors import UserError
from densenet_jax.export.samples import generate_images
from densenet_jax.models.create import create_model
from densenet_jax.models.layers import FeatureMap
from densenet_jax.predict.batch import PredictOptions, predict
from densenet_jax.predict.explain import activation_maps, draw_overlay, layer_names, to_rgb, weigh_by_gradients
from densenet_jax.predict.predictor import Predictor
from tests.export.exporting import images, small_model
from tests.models.test_fold import MODELS, drawn


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


def grad_cam_by_hand(module, variables, x, classes, inner):
    """Grad-CAM before its ReLU: takes the output of the submodule `inner` and puts another in its place."""

    def run(replace):
        def interceptor(call, args, kwargs, context):
            output = call(*args, **kwargs)
            is_wanted = (context.module.name, context.method_name) == (inner, "__call__")
            return replace(output) if is_wanted else output

        with nn.intercept_methods(interceptor):
            return module.apply(variables, x, train=False)

    seen = []
    run(lambda output: seen.append(output) or output)
    wrap = FeatureMap if isinstance(seen[0], FeatureMap) else lambda values: values
    features = getattr(seen[0], "values", seen[0])
    gradient = jax.grad(lambda a: jnp.sum(run(lambda _: wrap(a))[jnp.arange(len(x)), classes]))(features)
    return jnp.sum(features * gradient.mean(axis=(1, 2), keepdims=True), axis=-1)


@pytest.mark.parametrize(
    ("name", "layers", "layer", "inner"),
    [
        ("small_densenet", [4, 8], "stride_4", "denseblock1"),
        ("small_dpn_b", [4, 8], "stride_4", "conv2_2"),
        ("small_rdnet", [4, 8], "stride_4", "stage1"),
    ],
)
def test_grad_cam_weighs_a_layer_by_the_mean_gradient_of_the_logit(name, layers, layer, inner):
    module, variables = drawn(name, np.float32)
    variables = jax.device_put(variables)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, 64, 3)), jnp.float32)
    classes = jnp.array([6, 2])
    assert layer_names(module, variables, (64, 64, 3)) == [f"stride_{stride}" for stride in layers]
    maps = jax.jit(functools.partial(weigh_by_gradients, module, layer=layer))(variables, x, classes)
    base, architecture = MODELS[name]
    plain = create_model(base, num_classes=7, block_form="plain", **architecture)
    expected = np.asarray(jax.jit(functools.partial(grad_cam_by_hand, plain, inner=inner))(variables, x, classes))
    np.testing.assert_allclose(maps, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected).max() > 0 > expected.min()
    if name != "small_rdnet":  # whose norm behind the pooling is not linear
        last_map = functools.partial(weigh_by_gradients, module, layer=f"stride_{layers[-1]}")
        last = jax.jit(last_map)(variables, x, classes)
        exact = np.asarray(jax.jit(functools.partial(activation_maps, module))(variables, x, classes))
        np.testing.assert_allclose(last, exact / exact[0].size, rtol=0, atol=1e-5 * np.abs(exact).max())


def test_grad_cam_is_the_positive_part_and_unknown_layers_are_refused():
    predictor = Predictor(small_model(), batch_sizes=(2,))
    *_, before_last, last = layer_names(predictor.model.module, predictor.model.variables, predictor.image_shape)
    exact, inner, same = (predictor.explain(images(3), [1, 2, 3], layer=layer) for layer in ("", before_last, last))
    for one, two, three in zip(exact, inner, same, strict=True):
        positive = np.maximum(one.activation_map, 0) / one.activation_map.size
        np.testing.assert_allclose(three.activation_map, positive, rtol=1e-4, atol=1e-7)
        assert two[:3] == one[:3]
        assert two.activation_map.shape == tuple(2 * side for side in one.activation_map.shape)
        assert two.activation_map.min() >= 0
    assert predictor.explain([], layer=last) == []
    with pytest.raises(UserError, match=f"layer is 'stride_5'; expected one of small_cifar's .*{last}"):
        predictor.explain(images(1), layer="stride_5")
    with pytest.raises(UserError, match="--explain_layer stride_8 needs --explain and a directory"):
        PredictOptions(("photos",), "out.csv", explain_layer="stride_8").check()


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
    predict(small_model, PredictOptions(("photos",), "inner.csv", explain="inner", explain_layer="stride_1"))
    assert np.load("inner/a.png.npy").shape == (32, 32)
    with pytest.raises(UserError, match="layer is 'norm5'; expected one of small_cifar's stride_1, "):
        predict(small_model, PredictOptions(("photos",), "new.csv", explain="new", explain_layer="norm5"))
    assert not any(pathlib.Path(name).exists() for name in ("new", "new.csv", "new.csv.partial"))
