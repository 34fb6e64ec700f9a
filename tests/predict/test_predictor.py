"""The predictor answers what evaluation counts, whatever form the images come in and however they are batched."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import densenet_jax
from densenet_jax.data.class_names import read_labels
from densenet_jax.data.transforms import eval_transform
from densenet_jax.errors import UserError
from densenet_jax.kernels.cpu.library import bfloat16_products, int8_products
from densenet_jax.kernels.cpu.primitive import is_available
from densenet_jax.models.pretrained import save_torch_state_dict
from densenet_jax.predict.compiled import cover
from densenet_jax.predict.images import ImageError, ImageLimits
from densenet_jax.predict.model import imagenet_labels, make_deployed
from densenet_jax.predict.predictor import Predictor
from densenet_jax.workdir import write_labels
from tests.predict.files import encoded, gradient


@pytest.fixture(scope="module")
def predictor(digits):
    return Predictor.from_workdir(digits[0], batch_sizes=(8, 32))


def records_of(experiment, count):
    return [experiment.data.eval_source[index].image for index in range(count)]


def test_answers_are_those_of_evaluation(digits, predictor):
    workdir, experiment = digits
    _, variables = experiment.saved_variables(str(workdir))
    with experiment.data.eval_batches() as batches:
        batch = next(batches)
    want = experiment.compile_predict_step()(variables, batch)["probability"]
    images = records_of(experiment, len(batch["label"]))
    np.testing.assert_array_equal(np.stack([predictor.preprocess(image) for image in images]), batch["image"])
    np.testing.assert_allclose(predictor.probabilities(batch["image"]), want, rtol=1e-5, atol=1e-6)
    best = [answers[0].class_id for answers in predictor(images)]
    assert best == np.argmax(want, axis=1).tolist()
    assert len(set(best)) > 1


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_run_of_float32_predicts_in_another_dtype_on_request(digits, predictor, dtype, monkeypatch):
    pixels = np.stack([predictor.preprocess(image) for image in records_of(digits[1], 8)])
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    rounded = Predictor.from_workdir(digits[0], batch_sizes=(8,), dtype=dtype).probabilities(pixels)
    wanted = predictor.probabilities(pixels)
    np.testing.assert_allclose(rounded, wanted, rtol=0, atol=0.02)
    # Without the CPU kernels a network in bfloat16 is XLA's, and one in int8 stays in float32.
    is_rounded = int8_products() > 0 if dtype == "int8" else not is_available() or bfloat16_products() > 0
    assert (np.abs(rounded - wanted).max() > 1e-5) == is_rounded
    with pytest.raises(UserError, match=r"dtype.*'bfloat17'.*bfloat16"):
        Predictor.from_workdir(digits[0], dtype="bfloat17")


def test_paths_bytes_and_arrays_are_alike(predictor, tmp_path):
    picture = gradient(13, 9)
    (tmp_path / "picture.png").write_bytes(encoded(picture))
    sources = [tmp_path / "picture.png", str(tmp_path / "picture.png"), encoded(picture), np.asarray(picture)]
    pixels = [predictor.preprocess(source) for source in sources]
    assert {array.shape for array in pixels} == {predictor.image_shape} == {(8, 8, 1)}
    for array in pixels[1:]:
        np.testing.assert_array_equal(array, pixels[0])
    answers = predictor(sources, topk=3)
    assert [len(answer) for answer in answers] == [3] * 4
    assert all(answer == answers[0] for answer in answers)


def test_answers_are_in_order_and_named(predictor):
    [answers] = predictor([encoded(gradient(8, 8))], topk=99)
    assert [answer.label for answer in answers] == [str(answer.class_id) for answer in answers]
    assert sorted(answer.class_id for answer in answers) == list(range(10))
    chances = [answer.probability for answer in answers]
    assert chances == sorted(chances, reverse=True)
    assert sum(chances) == pytest.approx(1)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 70])
def test_any_number_of_images(predictor, count):
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), np.uint8)
    together = predictor.probabilities(images)
    assert together.shape == (count, 10)
    assert together.dtype == np.float32
    for index in range(0, count, 23):
        np.testing.assert_allclose(predictor.probabilities(images[index : index + 1])[0], together[index], rtol=1e-4)


@pytest.mark.parametrize(
    ("count", "batches"),
    [(1, [1]), (2, [4]), (3, [4]), (5, [4, 1]), (9, [16]), (18, [16, 4]), (64, [64]), (70, [64, 4, 4])],
)
def test_few_sizes_cover_any_number(count, batches):
    assert cover(count, (1, 4, 16, 64)) == batches


def test_few_sizes_are_compiled(digits):
    predictor = Predictor.from_workdir(digits[0], batch_sizes=(3, 5, 17))
    assert predictor.batch_sizes == (8, 24)  # multiples of the eight devices
    predictor.compile()
    compiled = predictor._step._cache_size()
    for count in (1, 8, 11, 60):
        predictor.probabilities(np.zeros((count, 8, 8, 1), np.uint8))
    assert predictor._step._cache_size() == compiled == 2


@pytest.mark.parametrize("kind", ["pooled", "pyramid", "stride_2"])
def test_features_are_the_module_s(digits, predictor, kind):
    workdir, experiment = digits
    images = records_of(experiment, 9)
    pixels = np.stack([predictor.preprocess(image) for image in images])
    mean, std = experiment.data.mean_std()
    variables = densenet_jax.load_checkpoint(str(workdir))
    seen = (pixels / np.float32(255) - np.float32(mean)) / np.float32(std)
    want = jax.jit(experiment.model.clone(output=(2,) if kind == "stride_2" else kind).apply)(
        variables, jnp.asarray(seen)
    )
    actual = predictor.features(images, kind)
    assert jax.tree.structure(actual) == jax.tree.structure(want)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_ten_crops(digits):
    workdir, experiment = digits
    model = make_deployed(experiment.config, str(workdir))
    transform = eval_transform(image_size_px=8, resize_px=10, channels=1, crops=5, apply_exif_orientation=True)
    predictor = Predictor(dataclasses.replace(model, transform=transform), batch_sizes=(8,))
    assert predictor.image_shape == (5, 8, 8, 1)
    assert len(predictor([encoded(gradient())])[0]) == 5
    with pytest.raises(UserError, match="crops is 10"):
        predictor.features([encoded(gradient())])
    line = np.zeros((1, 10_000_000), np.uint8)
    with pytest.raises(ImageError, match="pixels"):
        predictor.preprocess(line)


def test_bad_inputs_are_refused(predictor):
    with pytest.raises(ImageError, match="photo: it is no JPEG"):
        predictor.preprocess(b"hello", name="photo")
    with pytest.raises(UserError, match=r"images are uint8\[2, 9, 8, 1\]; expected uint8 or uint16 \['b', 8, 8, 1\]"):
        predictor.probabilities(np.zeros((2, 9, 8, 1), np.uint8))
    with pytest.raises(UserError, match=r"features is 'deep'; expected pooled, pyramid or some of .* stride_1"):
        predictor.features([], "deep")
    with pytest.raises(UserError, match="expected 1 to 32"):
        predictor.dispatch(np.zeros((33, 8, 8, 1), np.uint8))
    small = Predictor(predictor.model, limits=ImageLimits(max_pixels=100))
    with pytest.raises(ImageError, match="40x30 pixels, at most 100"):
        small([gradient_array()])


def gradient_array():
    return np.asarray(gradient())


def test_mistakes_about_the_run(digits, tmp_path):
    with pytest.raises(UserError, match=r"not a run's directory"):
        Predictor.from_workdir(tmp_path)
    with pytest.raises(UserError, match="has no step 7; it has 1"):
        Predictor.from_workdir(digits[0], checkpoint="7")
    (tmp_path / "labels.txt").write_text("zero\none\n")
    with pytest.raises(UserError, match="has 2 labels, but the model has 10 classes"):
        Predictor.from_workdir(digits[0], labels=str(tmp_path / "labels.txt"))
    with pytest.raises(UserError, match="can't be read as labels"):
        Predictor.from_workdir(digits[0], labels=str(tmp_path))


def test_a_run_needs_no_data_set_any_more(digits, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(digits[0], moved)
    settings = json.loads((moved / "config.json").read_text())
    settings["data"]["dir"] = str(tmp_path / "nothing")
    (moved / "config.json").write_text(json.dumps(settings))
    assert Predictor.from_workdir(moved).class_names == tuple("0123456789")
    (moved / "labels.txt").unlink()
    assert Predictor.from_workdir(moved).class_names == tuple("0123456789")  # numbers, as nothing is known
    assert not (tmp_path / "nothing").exists()
    (moved / "labels.txt").write_text("# numbers\n\n" + "\n".join(f"number {i}" for i in range(10)))
    assert Predictor.from_workdir(moved).class_names[3] == "number 3"


def test_pretrained_weights(tmp_path):
    module = densenet_jax.create_model("densenet_bc_22_12", num_classes=4)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))
    variables = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01), shapes)
    save_torch_state_dict(variables, tmp_path / "small.safetensors")
    (tmp_path / "labels.txt").write_text("ant\nbee\ncat\ndog\n")
    predictor = densenet_jax.Predictor.from_pretrained(
        "densenet_bc_22_12", str(tmp_path / "small.safetensors"), labels=str(tmp_path / "labels.txt"), batch_sizes=(1,)
    )
    assert predictor.image_shape == (32, 32, 3)
    assert {answer.label for answer in predictor([gradient_array()])[0]} == {"ant", "bee", "cat", "dog"}
    source = str(tmp_path / "small.safetensors")
    assert Predictor.from_pretrained("densenet_bc_22_12", source, many_labels=True).model.many_labels
    assert Predictor.from_pretrained("densenet_bc_22_12", source, dtype="bfloat16").model.dtype == jnp.bfloat16
    with pytest.raises(UserError, match="dtype is 'half'; expected"):
        Predictor.from_pretrained("densenet_bc_22_12", source, dtype="half")
    assert not predictor.model.many_labels


def test_a_thousand_classes_are_imagenet_s(tmp_path):
    module = densenet_jax.create_model("densenet_bc_22_12", num_classes=1000)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))
    save_torch_state_dict(jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes), tmp_path / "large.safetensors")
    predictor = Predictor.from_pretrained("densenet_bc_22_12", str(tmp_path / "large.safetensors"))
    assert predictor.class_names[281] == "tabby"


def test_names_of_imagenet(tmp_path):
    names = imagenet_labels()
    assert len({name.lower() for name in names}) == 1000
    assert {number: names[number] for number in (0, 281, 282, 151, 999)} == {
        0: "tench", 281: "tabby", 282: "tiger cat", 151: "Chihuahua", 999: "toilet tissue",
    }  # fmt: skip
    write_labels(str(tmp_path), ["two\nlines", "#1"])
    assert read_labels(tmp_path / "labels.txt") == ("two\nlines", "#1")


def test_the_package_is_still_light():
    code = "import sys, densenet_jax; dir(densenet_jax); print('grain' in sys.modules, 'PIL' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.split() == ["False", "False"]
    with pytest.raises(AttributeError, match="no attribute 'Predicator'"):
        densenet_jax.Predicator  # noqa: B018
