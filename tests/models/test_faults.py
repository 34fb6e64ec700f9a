"""The parity test would notice: each fault that no shape and no parameter count shows is planted and must be caught."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax import lax

from densenet_jax.models import densenet, dual_path, layers
from tests.models import golden

TOLERANCE = 1e-5


def _largest_error(name, side_px=64, run=golden.run_plain_with_taps, **options):
    model = golden.make(name, **options)
    outputs = jax.jit(lambda v, x: run(model, v, x))(golden.drawn_variables(name), golden.images(4, side_px))
    return max(golden.stage_errors(jax.device_get(outputs), golden.golden(name), side_px).values())


def _without_relu(monkeypatch, module, which):
    """Leaves out one of the ReLUs that a module calls itself: the first is the stem's, the last the head's."""
    calls = []

    def relu(x):
        calls.append(x)
        return x if len(calls) == which else jax.nn.relu(x)

    monkeypatch.setattr(module, "jax", SimpleNamespace(**{**vars(jax), "nn": SimpleNamespace(relu=relu)}))


def no_stem_relu(monkeypatch):
    _without_relu(monkeypatch, densenet, 1)


def no_final_relu(monkeypatch):
    # small_densenet: the ReLUs of nine dense layers, two each, and of three transitions, then the head's.
    _without_relu(monkeypatch, densenet, 23)


def no_stem_or_final_relu_in_dual_path(monkeypatch):
    monkeypatch.setitem(dual_path.ACTIVATIONS, "relu", lambda x: x)


def relu_for_silu(monkeypatch):
    monkeypatch.setitem(dual_path.ACTIVATIONS, "silu", jax.nn.relu)


def same_padding_in_convolutions(monkeypatch):
    def convolve(x, kernel, *, stride=1, padding=0, groups=1):
        same = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride, stride), "SAME")
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (stride,) * 2, same, None, None, numbers, groups)

    monkeypatch.setattr(layers, "convolve", convolve)


def same_padding_in_max_pool(monkeypatch):
    monkeypatch.setattr(densenet, "max_pool", lambda x, stride=2, **_: nn.max_pool(x, (3, 3), (stride, stride), "SAME"))


def newest_layer_first(monkeypatch):
    monkeypatch.setattr(densenet, "concatenate", lambda features: jnp.concatenate(features[::-1], axis=-1))


def input_after_the_layers(monkeypatch):
    monkeypatch.setattr(
        densenet, "concatenate", lambda features: jnp.concatenate([*features[1:], features[0]], axis=-1)
    )


def max_pool_in_transitions(monkeypatch):
    monkeypatch.setattr(densenet, "average_pool", lambda x: nn.max_pool(x, (2, 2), (2, 2)))


def zeros_around_the_blur(monkeypatch):
    pad = jnp.pad
    monkeypatch.setattr(layers, "jnp", SimpleNamespace(**{**vars(jnp), "pad": lambda x, widths, mode: pad(x, widths)}))


def blur_without_max(monkeypatch):
    monkeypatch.setattr(densenet, "max_pool", lambda x, stride=2, **_: x)


def dense_path_first(monkeypatch):
    def split_paths(x, residual_width):
        dense_width = x.shape[-1] - residual_width
        return x[..., dense_width:], x[..., :dense_width]

    monkeypatch.setattr(dual_path, "split_paths", split_paths)


def new_maps_before_old(monkeypatch):
    def join_paths(residual, dense, new):
        return jnp.concatenate([residual, new, dense], axis=-1)

    monkeypatch.setattr(dual_path, "join_paths", join_paths)


FAULTS = [
    ("small_densenet", no_stem_relu),
    ("small_densenet", no_final_relu),
    ("small_densenet", same_padding_in_convolutions),
    ("small_densenet", same_padding_in_max_pool),
    ("small_densenet", newest_layer_first),
    ("small_densenet", input_after_the_layers),
    ("small_densenet", max_pool_in_transitions),
    ("small_densenet_blur", zeros_around_the_blur),
    ("small_densenet_blur", blur_without_max),
    ("small_dpn", no_stem_or_final_relu_in_dual_path),
    ("small_dpn", same_padding_in_convolutions),
    ("small_dpn", same_padding_in_max_pool),
    ("small_dpn", dense_path_first),
    ("small_dpn", new_maps_before_old),
    ("small_dpn_b", relu_for_silu),
    ("small_dpn_b", dense_path_first),
]


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_planted_fault_is_caught(monkeypatch, name, fault):
    golden.abstract_variables(name)  # before the fault, which counts calls, and for others to use afterwards
    fault(monkeypatch)
    assert _largest_error(name) > 10 * TOLERANCE


@pytest.mark.parametrize(("name", "epsilon"), [("small_densenet", 1e-3), ("small_dpn", 1e-5)])
def test_the_other_family_s_epsilon_is_caught(name, epsilon):
    assert _largest_error(name, batch_norm_epsilon=epsilon) > 10 * TOLERANCE


@pytest.mark.parametrize("side_px", [64, 67])
@pytest.mark.parametrize("name", list(golden.SMALL_MODELS))
def test_without_a_fault_nothing_is_caught(name, side_px):
    assert _largest_error(name, side_px, golden.run_with_taps) < TOLERANCE


def test_options_that_change_nothing_in_evaluation():
    plain = golden.make("small_densenet")
    changed = golden.make("small_densenet", remat=True, layer_dropout=0.5, classifier_dropout=0.5)
    assert changed.remat
    assert dataclasses.replace(changed.norm_options) == plain.norm_options
    options = {"remat": True, "layer_dropout": 0.5, "classifier_dropout": 0.5}
    assert _largest_error("small_densenet", run=golden.run_with_taps, **options) < TOLERANCE
