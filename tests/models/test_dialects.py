"""Weights of other programs: the same logits as theirs, by the golden files that make_dialects.py wrote."""

import logging

import h5py
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from densenet_jax.errors import UserError
from densenet_jax.models.create import create_model
from densenet_jax.models.dialects import adapt_channels, common_prefix, from_keras, modern_names, translate
from densenet_jax.models.pretrained import load_pretrained, save_torch_state_dict
from densenet_jax.models.torch_weights import to_torch
from tests.golden.drawn import draw, draw_images
from tests.models import golden

FOLDER = golden.GOLDEN / "dialects"
SMALL = {"growth_rate": 4, "block_sizes": (2, 1), "stem_width": 8}
CASES = {"monai": SMALL, "torchxrayvision": SMALL, "keras": {"block_sizes": (1, 2, 1, 1)}, "paddle": SMALL}
THRESHOLDS = np.array([*[0.05, 0.95] * 8, np.nan, np.nan], np.float32)
BASE, ARCHITECTURE = golden.SMALL_MODELS["small_densenet"]


def _shapes(case):
    names = np.load(FOLDER / f"{case}.npz")["names"]
    pairs = [str(line).rpartition(" ")[::2] for line in names]
    return {name: tuple(map(int, shape.split("x"))) if shape else () for name, shape in pairs}


def _write_state_dict(path, case):
    state = {name: draw(name, shape) for name, shape in _shapes(case).items()}
    if case == "torchxrayvision":
        state["op_threshs"] = THRESHOLDS
    save_file(state, path)


def _write_keras(path, case):
    endings = {("2", 4): ".running_mean", ("3", 4): ".running_var", ("1", 4): ".bias"}
    shapes = _shapes(case)
    with h5py.File(path, "w") as file:
        for place_and_name, shape in shapes.items():
            place, name = place_and_name.split(" ")
            group = file.require_group(place)
            group.attrs["name"], number = name.split("/")
            count = sum(key.startswith(f"{place} ") for key in shapes)
            group[number] = draw(name + endings.get((number, count), ""), shape)


@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_the_other_program_s(case, tmp_path):
    path = tmp_path / "weights.h5"
    if case == "paddle":
        path = FOLDER / "paddle.pdparams"
    else:
        (_write_keras if case == "keras" else _write_state_dict)(path, case)
    variables = load_pretrained("densenet121", path, **CASES[case])
    expected = np.load(FOLDER / f"{case}.npz")["logits"]
    channels = variables["params"]["conv0"]["kernel"].shape[2]
    images = draw_images(2, 64).transpose(0, 2, 3, 1)[..., :channels]
    model = create_model("densenet121", num_classes=expected.shape[1], **CASES[case])
    actual = jax.jit(model.apply)(variables, images)
    assert np.abs(actual - expected).max() < 2e-6 * np.abs(expected).max()


def test_a_second_dense_layer_of_keras_is_refused():
    dense = [np.ones((4, 4)), np.ones(4)]
    with pytest.raises(UserError, match="twice, once in 'head'"):
        from_keras({"hidden": dense, "head": dense})


def test_keras_files_are_written_as_keras_lays_them_out(tmp_path):
    _write_keras(tmp_path / "theirs.weights.h5", "keras")
    variables = load_pretrained("densenet121", tmp_path / "theirs.weights.h5", **CASES["keras"])
    save_torch_state_dict(variables, tmp_path / "ours.weights.h5")
    with h5py.File(tmp_path / "theirs.weights.h5") as theirs, h5py.File(tmp_path / "ours.weights.h5") as ours:
        for place_and_name, shape in _shapes("keras").items():
            place, name = place_and_name.split(" ")
            assert ours[place].attrs["name"] == name.split("/")[0]
            number = name.split("/")[1]
            assert ours[place][number].shape == shape
            np.testing.assert_allclose(ours[place][number], theirs[place][number], rtol=1e-6, atol=1e-9)


def test_monai_s_names_are_written_as_monai_has_them(tmp_path):
    _write_state_dict(tmp_path / "theirs.safetensors", "monai")
    variables = load_pretrained("densenet121", tmp_path / "theirs.safetensors", **SMALL)
    save_torch_state_dict(variables, tmp_path / "ours.safetensors", dialect="monai")
    ours, theirs = load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs.safetensors")
    assert {key for key in ours if "num_batches" not in key} == set(theirs)
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value)
    with pytest.raises(UserError, match="expected torchvision or monai"):
        save_torch_state_dict(variables, tmp_path / "x.safetensors", dialect="jax")


@pytest.mark.parametrize("channels", [1, 2, 4, 6, 64])
def test_a_first_convolution_is_adapted_as_by_timm(channels):
    expected = np.load(FOLDER / "first_convolutions.npz")[str(channels)]
    np.testing.assert_allclose(adapt_channels(draw("conv0.weight", (4, 3, 3, 3)), channels), expected, rtol=1e-6)


def test_one_channel_repeated_gives_what_it_gave():
    kernel = draw("conv0.weight", (4, 1, 3, 3))
    np.testing.assert_allclose(adapt_channels(kernel, 3).sum(axis=1), kernel[:, 0], rtol=1e-6)


@pytest.fixture(scope="module")
def state():
    return to_torch(golden.drawn_variables("small_densenet"))


def test_weights_for_other_channels_are_adapted_and_it_is_reported(state, tmp_path, caplog):
    save_file(state, tmp_path / "x.safetensors")
    variables = load_pretrained(BASE, tmp_path / "x.safetensors", channels=1, **ARCHITECTURE)
    expected = state["features.conv0.weight"].sum(axis=1)
    np.testing.assert_allclose(variables["params"]["conv0"]["kernel"][:, :, 0].transpose(2, 0, 1), expected, rtol=1e-6)
    assert "first convolution of 3 channels, not 1: their kernels are added up" in caplog.text
    for channels in (-1, 65):
        with pytest.raises(UserError, match=rf"channels={channels}: expected 1 to 64"):
            load_pretrained(BASE, tmp_path / "x.safetensors", channels=channels, **ARCHITECTURE)


@pytest.mark.parametrize("key", ["in_chans", "in_channels", "channels"])
def test_create_model_names_the_channels_setting(key):
    with pytest.raises(UserError, match=rf"{key}'.*load_pretrained's channels="):
        create_model("densenet121", **{key: 1})


@pytest.mark.parametrize(
    "prefix",
    [
        *("_orig_mod.", "module.", "model.", "net.", "backbone.", "encoder.", "densenet121."),
        *("module._orig_mod.", "_orig_mod.module.", "model.backbone.", "module.densenet121."),
    ],
)
def test_the_prefix_of_a_wrapper_is_stripped(prefix, state):
    prefixed = {f"{prefix}{key}".replace("classifier.", "classifier.0."): value for key, value in state.items()}
    prefixed["n_averaged"] = np.zeros((), np.int64)
    assert set(translate(prefixed)) == {key for key in state if "num_batches" not in key}


def test_an_unknown_prefix_is_named_first_and_ten_names_are_listed(state, tmp_path, caplog):
    save_file({f"student.{key}": value for key, value in state.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"model: all \d+ names begin with 'student\.', which is no known") as caught:
        load_pretrained(BASE, tmp_path / "x.safetensors", **ARCHITECTURE)
    assert str(caught.value).count("; ") <= 12
    assert len(str(caught.value)) < 1500
    assert not caplog.records


def test_a_part_that_all_names_share_is_no_prefix_of_a_wrapper():
    assert common_prefix(["features.conv0.weight", "features.norm0.bias"]) == ""
    assert common_prefix(["a.b.features.conv0.weight", "a.b.classifier.bias"]) == "a.b."
    assert common_prefix([]) == ""


def test_two_spellings_of_one_parameter_are_refused():
    key = "features.denseblock1.denselayer1.norm"
    with pytest.raises(UserError, match="twice"):
        modern_names({f"{key}1.weight": np.zeros(3), f"{key}.1.weight": np.zeros(3)})


def test_kernels_for_volumes_are_one_line(state, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    volume = {key: value[..., None] if value.ndim == 4 else value for key, value in state.items()}
    save_file(volume, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"kernel for volumes \(3-D\)"):
        load_pretrained(BASE, tmp_path / "x.safetensors", **ARCHITECTURE)
