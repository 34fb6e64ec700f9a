"""Names and layouts of PyTorch state dicts, both ways."""

import jax
import ml_dtypes
import numpy as np
import pytest

from densenet_jax.errors import UserError
from densenet_jax.models.torch_weights import from_torch, mismatches, to_torch
from tests.models import golden

NAMES = list(golden.SMALL_MODELS)


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return golden.abstract_variables(request.param), golden.drawn_variables(request.param)


def test_there_and_back_changes_nothing(model):
    template, variables = model
    back = from_torch(to_torch(variables), template)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_a_state_dict_has_counters_and_layouts_as_in_pytorch():
    state = to_torch(golden.drawn_variables("small_densenet"))
    assert state["features.norm0.num_batches_tracked"].dtype == np.int64
    assert state["features.conv0.weight"].shape == (16, 3, 7, 7)
    assert state["features.denseblock1.denselayer1.conv2.weight"].shape == (8, 32, 3, 3)
    width = state["features.norm5.weight"].shape[0]
    assert state["classifier.weight"].shape == (10, width)
    assert to_torch(golden.drawn_variables("small_dpn"))["classifier.weight"].shape[2:] == (1, 1)


def test_the_old_spelling_means_the_same():
    variables = golden.drawn_variables("small_densenet")
    state = to_torch(variables)
    old = {}
    for key, value in state.items():
        head, dot, tail = key.partition(".denselayer")
        for part in ("norm1", "norm2", "conv1", "conv2"):
            tail = tail.replace(part, f"{part[:-1]}.{part[-1]}")
        old[f"module.{head}{dot}{tail}"] = value
    assert "module.features.denseblock1.denselayer1.norm.1.weight" in old
    back = from_torch(old, golden.abstract_variables("small_densenet"))
    jax.tree.map(np.testing.assert_array_equal, back, variables)


@pytest.mark.parametrize("name", ["small_dpn", "small_densenet"])
@pytest.mark.parametrize("as_convolution", [True, False])
def test_a_classifier_may_be_linear_or_a_convolution(name, as_convolution):
    variables = golden.drawn_variables(name)
    state = to_torch(variables)
    weight = state["classifier.weight"]
    state["classifier.weight"] = weight.reshape(*weight.shape[:2], *([1, 1] if as_convolution else []))
    back = from_torch(state, golden.abstract_variables(name))
    np.testing.assert_array_equal(back["params"]["classifier"]["kernel"], variables["params"]["classifier"]["kernel"])


def test_every_difference_is_listed_with_both_shapes():
    template = golden.abstract_variables("small_densenet")
    state = to_torch(golden.drawn_variables("small_densenet"))
    del state["features.norm5.bias"]
    state["features.extra"] = np.zeros((2, 3), np.float32)
    state["features.conv0.weight"] = np.zeros((16, 1, 7, 7), np.float32)
    with pytest.raises(UserError) as caught:
        from_torch(state, template, "weights.pth")
    message = str(caught.value)
    assert message.startswith("weights.pth does not fit")
    assert "\n" not in message
    assert "missing features.norm5.bias, expected [" in message
    assert "left over features.extra [2, 3], expected none" in message
    assert "features.conv0.weight is [16, 1, 7, 7], expected [16, 3, 7, 7]" in message


def test_a_fitting_state_dict_has_no_mismatch():
    shapes = golden.torch_shapes(golden.abstract_variables("small_dpn_b"))
    assert mismatches(shapes, golden.abstract_variables("small_dpn_b")) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.ones(16, np.int64), "holds int64, expected floats"),
        (np.ones(16, np.complex64), "holds complex64, expected floats"),
        (np.ones(16, ml_dtypes.float8_e4m3fn), "holds float8_e4m3fn, expected floats"),
        (np.ones(16, ml_dtypes.float8_e5m2), "holds float8_e5m2, expected floats"),
        (np.full(16, np.nan, np.float32), "not finite"),
    ],
)
def test_wrong_values_are_refused(value, message):
    state = to_torch(golden.drawn_variables("small_densenet")) | {"features.norm0.weight": value}
    with pytest.raises(UserError, match=f"{message}.*norm0.weight|norm0.weight.*{message}"):
        from_torch(state, golden.abstract_variables("small_densenet"))


def test_other_trees_are_no_state_dict():
    with pytest.raises(UserError, match="create_model"):
        to_torch({"params": {"dense": {"w": np.zeros(3)}}, "batch_stats": {}})
