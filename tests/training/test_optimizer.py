"""Optimizers against their update rules written out in numpy; what decays, moves and stands still."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from densenet_jax.choices import OPTIMIZERS
from densenet_jax.errors import UserError
from densenet_jax.training.optimizer import decay_mask, frozen_mask, layer_factors, make_optimizer
from tests.models import golden

STEPS = 6
PARAMS = {
    "conv": {"kernel": np.linspace(-1.0, 1.0, 6).reshape(2, 3)},
    "norm": {"scale": np.array([1.0, 2.0]), "bias": np.array([0.5, -0.5])},
    "classifier": {"kernel": np.linspace(1.0, -0.4, 6).reshape(3, 2), "bias": np.array([0.1, 0.2])},
}
GRADIENTS = [
    jax.tree.map(lambda leaf, seed=step: np.random.default_rng(seed).normal(size=leaf.shape), PARAMS)
    for step in range(STEPS)
]


def single(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def rate(step):
    return 0.1 / (1.0 + step)


def run(name, **settings):
    """Parameters after each step, float32."""
    optimizer = make_optimizer(name, rate, **settings)
    params = single(PARAMS)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for gradients in GRADIENTS:
        updates, state = update(single(gradients), state, params)
        params = optax.apply_updates(params, updates)
    return params


def by_rule(rule, decay_norm_and_bias=True):
    """Applies rule(parameter, gradient, memory, step, decays) for each leaf alone."""

    def leaf(path, value, *gradients):
        decays = decay_norm_and_bias or path[-1].key == "kernel"
        memory = {}
        for step, gradient in enumerate(gradients):
            value = value - rule(value, gradient, memory, step, decays)
        return value

    return jax.tree_util.tree_map_with_path(leaf, PARAMS, *GRADIENTS)


def assert_close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), actual, expected)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("everywhere", [False, True])
def test_sgd_in_torchs_form(nesterov, everywhere):
    def rule(value, gradient, memory, step, decays):
        gradient = gradient + 0.05 * value * decays
        memory["buffer"] = buffer = 0.9 * memory["buffer"] + gradient if step else gradient
        return rate(step) * (gradient + 0.9 * buffer if nesterov else buffer)

    params = run("sgd", momentum=0.9, nesterov=nesterov, weight_decay=0.05, decay_norm_and_bias=everywhere)
    assert_close(params, by_rule(rule, everywhere))


def test_sgd_without_momentum():
    assert_close(run("sgd", momentum=0.0), by_rule(lambda value, gradient, memory, step, decays: rate(step) * gradient))


def adam_step(gradient, memory, step, epsilon, betas=(0.9, 0.99)):
    first, second = memory.get("moments", (0.0, 0.0))
    first = betas[0] * first + (1 - betas[0]) * gradient
    second = betas[1] * second + (1 - betas[1]) * gradient**2
    memory["moments"] = first, second
    corrected = second / (1 - betas[1] ** (step + 1))
    return first / (1 - betas[0] ** (step + 1)) / (np.sqrt(corrected) + epsilon)


def test_adamw():
    def rule(value, gradient, memory, step, decays):
        return rate(step) * (adam_step(gradient, memory, step, 1e-8) + 0.05 * value * decays)

    params = run("adamw", weight_decay=0.05, decay_norm_and_bias=False, betas=(0.9, 0.99))
    assert_close(params, by_rule(rule, decay_norm_and_bias=False))


def test_lamb_spares_norm_and_bias_of_decay_and_scaling():
    def rule(value, gradient, memory, step, decays):
        direction = adam_step(gradient, memory, step, 1e-6) + 0.05 * value * decays
        trust = np.linalg.norm(value) / np.linalg.norm(direction) if decays else 1.0
        return rate(step) * trust * direction

    params = run("lamb", weight_decay=0.05, decay_norm_and_bias=False, betas=(0.9, 0.99))
    assert_close(params, by_rule(rule, decay_norm_and_bias=False))


def test_rmsprop_in_torchs_form():
    def rule(value, gradient, memory, step, decays):
        gradient = gradient + 0.05 * value * decays
        memory["square"] = 0.9 * memory.get("square", 0.0) + 0.1 * gradient**2
        memory["buffer"] = 0.8 * memory.get("buffer", 0.0) + gradient / (np.sqrt(memory["square"]) + 0.01)
        return rate(step) * memory["buffer"]

    assert_close(run("rmsprop", momentum=0.8, weight_decay=0.05, epsilon=0.01), by_rule(rule))


def test_clipping_cuts_the_norm_over_all_parameters():
    norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(GRADIENTS[0])))
    optimizer = make_optimizer("sgd", lambda step: 1.0, momentum=0.0, clip_grad_norm=float(norm) / 4)
    updates, _ = optimizer.update(single(GRADIENTS[0]), optimizer.init(single(PARAMS)), single(PARAMS))
    assert_close(updates, jax.tree.map(lambda leaf: -leaf / 4, GRADIENTS[0]))
    generous = make_optimizer("sgd", lambda step: 1.0, momentum=0.0, clip_grad_norm=float(norm) * 2)
    updates, _ = generous.update(single(GRADIENTS[0]), generous.init(single(PARAMS)), single(PARAMS))
    assert_close(updates, jax.tree.map(np.negative, GRADIENTS[0]))


def test_weight_decay_touches_the_expected_parameters():
    spared = decay_mask(PARAMS, decay_norm_and_bias=False)
    assert jax.tree.leaves_with_path(spared) == [
        (path, path[-1].key == "kernel") for path, _ in jax.tree.leaves_with_path(PARAMS)
    ]
    assert all(jax.tree.leaves(decay_mask(PARAMS, decay_norm_and_bias=True)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_parameters_stand_still_to_the_bit(name):
    settings = {"weight_decay": 0.05, "clip_grad_norm": 1.0, "freeze": "^params/(?!classifier)"}
    params = run(name, **settings)
    for part in ("conv", "norm"):
        for leaf, value in params[part].items():
            np.testing.assert_array_equal(value, PARAMS[part][leaf].astype(np.float32))
    for leaf, value in params["classifier"].items():
        assert np.abs(value - PARAMS["classifier"][leaf]).min() > 1e-4


def test_frozen_gradients_do_not_count_in_the_clipped_norm():
    frozen = run("sgd", clip_grad_norm=0.5, freeze="^params/(conv|norm)/")
    own = single({"classifier": PARAMS["classifier"]})
    optimizer = make_optimizer("sgd", rate, clip_grad_norm=0.5)
    state, params = optimizer.init(own), own
    for gradients in GRADIENTS:
        updates, state = optimizer.update(single({"classifier": gradients["classifier"]}), state, params)
        params = optax.apply_updates(params, updates)
    assert_close(frozen["classifier"], params["classifier"])


def test_a_lower_rate_for_the_body():
    def rule(value, gradient, memory, step, decays):
        return rate(step) * gradient

    whole = by_rule(rule)
    params = run("sgd", momentum=0.0, rate_multipliers=(("^params/conv/", 0.5), ("^params/(?!classifier)", 0.1)))
    for part, factor in {"conv": 0.5, "norm": 0.1, "classifier": 1.0}.items():
        expected = jax.tree.map(lambda old, new, f=factor: old + f * (new - old), PARAMS[part], whole[part])
        assert_close(params[part], expected)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("config.optim.freeze", {"freeze": "denseblock9"}),
        ("config.optim.freeze", {"freeze": "params"}),
        ("config.optim.rate_multipliers", {"rate_multipliers": (("denseblock9", 0.1),)}),
    ],
)
def test_patterns_that_fit_nothing_are_refused(key, settings):
    with pytest.raises(UserError, match=key):
        make_optimizer("sgd", rate, **settings).init(PARAMS)


LAYERS = {
    "norm0": {"scale": jnp.ones(2), "bias": jnp.zeros(2)},
    "denseblock1": {"denselayer1": {"norm1": {"scale": jnp.ones(2)}, "conv1": {"kernel": jnp.ones((2, 2))}}},
    "norm5": {"scale": jnp.ones(2), "bias": jnp.zeros(2)},
}
FROZEN = "^params/(norm0|denseblock1)/"


def test_parameters_by_pattern():
    assert frozen_mask(LAYERS, FROZEN) == {
        "norm0": {"scale": True, "bias": True},
        "denseblock1": {"denselayer1": {"norm1": {"scale": True}, "conv1": {"kernel": True}}},
        "norm5": {"scale": False, "bias": False},
    }


# (network, layers behind) of some parameters; all of densenet121's and rdnet_tiny's were compared with timm's groups.
LAYERS_BEHIND = {
    "small_densenet": {  # blocks of 2, 3, 2 and 2 layers
        **{"conv0/kernel": 10, "norm0/bias": 10, "denseblock1/denselayer1/norm1/scale": 9},
        **{"denseblock1/denselayer2/conv2/kernel": 8, "transition1/conv/kernel": 8, "transition3/norm/scale": 3},
        **{"denseblock4/denselayer2/conv1/kernel": 1, "norm5/scale": 0, "classifier/kernel": 0},
    },
    "small_densenet_blur": {"conv2/kernel": 5, "norm2/scale": 5, "denseblock1/denselayer1/conv1/kernel": 4},
    "small_dpn": {  # stages of 1, 2, 1 and 2 blocks
        **{"conv1_1/conv/kernel": 7, "conv2_1/c1x1_a/bn/scale": 6, "conv3_2/c3x3_b/conv/kernel": 4},
        **{"conv5_2/c1x1_c/conv/kernel": 1, "conv5_bn_ac/bn/scale": 0, "classifier/bias": 0},
    },
    "small_rdnet": {  # four stages
        **{"stem/conv/kernel": 5, "stem/norm/scale": 5, "stage1/layer2/gamma": 4, "stage2/conv/bias": 3},
        **{"stage4/layer1/gate/kernel": 1, "norm/bias": 0, "classifier/kernel": 0},
    },
}


@pytest.mark.parametrize("name", list(LAYERS_BEHIND))
def test_rates_fall_by_the_decay_with_every_layer_towards_the_stem(name):
    factors = layer_factors(golden.abstract_variables(name)["params"], 0.5)
    leaves = jax.tree_util.tree_leaves_with_path(factors)
    factors = {jax.tree_util.keystr(path, simple=True, separator="/"): factor for path, factor in leaves}
    assert {path: factors[path] for path in LAYERS_BEHIND[name]} == {
        path: 0.5**behind for path, behind in LAYERS_BEHIND[name].items()
    }


def test_layer_decay_scales_the_update_of_each_layer():
    params = single({"stem": {"conv": {"bias": np.ones(2)}}, "classifier": {"bias": np.ones(2)}})
    optimizer = make_optimizer("sgd", lambda _: 0.1, momentum=0.0, layer_decay=0.5)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_allclose(updates["stem"]["conv"]["bias"], -0.05)
    np.testing.assert_allclose(updates["classifier"]["bias"], -0.1)
