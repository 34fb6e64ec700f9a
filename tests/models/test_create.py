"""Every option of create_model does what it says, on small networks."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax.errors import UserError
from densenet_jax.models.create import create_model
from tests.models import golden

DENSENET = {"growth_rate": 4, "block_sizes": (1, 2)}
DUAL_PATH = {
    "reduction_width": 8,
    "groups": 2,
    "block_sizes": (1, 2),
    "dense_increments": (2, 2),
}
ARCHITECTURES = {"densenet121": DENSENET, "densenet_bc_22_12": {"block_sizes": (2, 1)}, "dpn68": DUAL_PATH}


def _images(batch=2, side_px=32, channels=3):
    return jnp.asarray(np.random.default_rng(0).normal(0, 1, (batch, side_px, side_px, channels)), jnp.float32)


def _model(name="densenet121", **options):
    return create_model(name, **ARCHITECTURES[name], **{"num_classes": 5, **options})


@functools.cache
def _variables(name="densenet121"):
    return jax.jit(_model(name).init)(jax.random.key(1), _images())


@functools.cache
def _compiled(model, train):
    if not train:
        return jax.jit(lambda variables, images, _: model.apply(variables, images))
    options = {"train": True, "mutable": ["batch_stats"]}
    return jax.jit(lambda variables, images, key: model.apply(variables, images, **options, rngs={"dropout": key}))


def _apply(model, variables, images, train=False, key=0):
    return _compiled(model, train)(variables, images, jax.random.key(key))


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_the_four_outputs_belong_together(name):
    variables, images = _variables(name), _images()
    outputs = {
        kind: _apply(_model(name, output=kind), variables, images) for kind in ("logits", "pooled", "map", "pyramid")
    }
    pooled = outputs["map"].mean(axis=(1, 2))
    np.testing.assert_allclose(outputs["pooled"], pooled, rtol=1e-5, atol=1e-6)
    head = variables["params"]["classifier"]
    np.testing.assert_allclose(outputs["logits"], pooled @ head["kernel"] + head["bias"][None], rtol=1e-4, atol=1e-5)
    for stride, stage in outputs["pyramid"].items():
        assert stage.shape[1:3] == (32 // stride, 32 // stride)
    np.testing.assert_allclose(outputs["pyramid"][max(outputs["pyramid"])], outputs["map"], rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("max", lambda x: x.max((1, 2))),
        ("avgmax", lambda x: (x.mean((1, 2)) + x.max((1, 2))) / 2),
        ("catavgmax", lambda x: np.concatenate([x.mean((1, 2)), x.max((1, 2))], axis=1)),
    ],
)
def test_kinds_of_global_pooling(kind, expected):
    images, variables = _images(), jax.device_get(_variables())
    pooled = expected(np.asarray(_apply(_model(output="map"), variables, images)))
    np.testing.assert_allclose(_apply(_model(output="pooled", global_pool=kind), variables, images), pooled, rtol=1e-5)
    head = variables["params"]["classifier"]
    if kind == "catavgmax":
        head["kernel"] = np.concatenate([head["kernel"], 2 * head["kernel"]])
    logits = _apply(_model(global_pool=kind), variables, images)
    np.testing.assert_allclose(logits, pooled @ head["kernel"] + head["bias"][None], rtol=1e-4, atol=1e-5)


def test_a_kind_of_pooling_is_refused_where_it_says_nothing():
    with pytest.raises(UserError, match="global_pool='mean': expected one of avg, max, avgmax, catavgmax"):
        _model(global_pool="mean")
    with pytest.raises(UserError, match="global_pool='max': expected 'avg' beside test_time_pool_px"):
        _model(global_pool="max", test_time_pool_px=7)


def test_the_pyramid_has_four_stages():
    for name in ("small_densenet", "small_dpn"):
        model = golden.make(name, output="pyramid")
        shapes = jax.eval_shape(lambda x, m=model: m.init_with_output(jax.random.key(0), x)[0], _images(1, 96))
        assert {stride: shape.shape[1:3] for stride, shape in shapes.items()} == {
            s: (96 // s,) * 2 for s in (4, 8, 16, 32)
        }


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_strides_choose_levels_of_the_pyramid(name):
    variables, images = _variables(name), _images()
    pyramid, last = (_apply(_model(name, output=kind), variables, images) for kind in ("pyramid", "map"))
    strides = _model(name).strides
    chosen = _apply(_model(name, output=list(strides)), variables, images)
    assert set(strides) - set(pyramid) == (set() if "bc" in name else {2}), "the default has no stem's"
    for stride, level in chosen.items():
        assert level.shape[1:3] == (32 // stride, 32 // stride)
        if stride in pyramid:
            np.testing.assert_allclose(level, pyramid[stride], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(chosen[strides[-1]], last, rtol=1e-4, atol=1e-5)
    assert set(_apply(_model(name, output=strides[1:]), variables, images)) == set(strides[1:])


@pytest.mark.parametrize("name", ["densenet121", "dpn68"])
def test_gradients_through_the_stem_s_level_are_the_plain_form_s(name):
    variables, images = _variables(name), _images()

    def gradients(form):
        model = _model(name, output=(2, 8), block_form=form)

        def loss(params):
            everything = {**variables, "params": params}
            levels, state = model.apply(everything, images, train=True, mutable=["batch_stats"])
            return sum(jnp.sum(jnp.sin(level)) for level in levels.values()), state

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    actual, expected = gradients("normalize_once"), gradients("plain")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), actual, expected)


@pytest.mark.parametrize(
    ("name", "output", "known"),
    [
        (
            "rdnet_tiny",
            (2, 4),
            "output=(2, 4): expected some of the strides of rdnet_tiny's feature maps: 4, 8, 16, 32",
        ),
        (
            "densenet_bc_22_12",
            [8],
            "output=(8,): expected some of the strides of densenet_bc_22_12's feature maps: 1, 2",
        ),
        ("densenet121", (), "output=(): expected some of the strides of densenet121's feature maps: 2, 4, 8, 16, 32"),
    ],
)
def test_strides_that_a_network_lacks_are_refused(name, output, known):
    with pytest.raises(UserError, match=re.escape(known)):
        create_model(name, output=output)


def test_features_need_no_classifier():
    for kind in ("pooled", "map", "pyramid", (2,)):
        shapes = jax.eval_shape(_model(output=kind).init, jax.random.key(0), _images())
        assert "classifier" not in shapes["params"]


@pytest.mark.parametrize("name", list(ARCHITECTURES))
@pytest.mark.parametrize("side_px", [29, 45, (40, 33)])
def test_any_size_that_the_strides_allow(name, side_px):
    height, width = side_px if isinstance(side_px, tuple) else (side_px, side_px)
    images = jnp.zeros((1, height, width, 3))
    assert jax.eval_shape(_model(name).apply, _variables(name), images).shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "smallest_px"), [("densenet121", 29), ("densenetblur121d", 29), ("densenet_bc_22_12", 4)]
)
def test_the_smallest_size_works_and_one_less_is_refused(name, smallest_px):
    init = create_model(name, block_sizes=(1, 1, 1) if "bc" in name else (1, 1, 1, 1)).init
    jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, smallest_px, smallest_px, 3)))
    with pytest.raises(UserError, match=f"too small.*{smallest_px}x{smallest_px}"):
        jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, smallest_px + 5, smallest_px - 1, 3)))


@pytest.mark.parametrize("channels", [1, 4])
def test_channels_follow_the_images(channels):
    shapes = jax.eval_shape(_model().init, jax.random.key(0), _images(channels=channels))
    assert shapes["params"]["conv0"]["kernel"].shape == (7, 7, channels, 8)


@pytest.mark.parametrize("name", ["densenet121", "dpn68"])
def test_remat_changes_neither_output_nor_gradients(name):
    variables, images = _variables(name), _images()

    def gradients(model):
        def loss(params):
            variables_now = {"params": params, "batch_stats": variables["batch_stats"]}
            logits, state = model.apply(variables_now, images, train=True, mutable=["batch_stats"])
            return jnp.sum(logits**2), state

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    actual, expected = gradients(_model(name, remat=True)), gradients(_model(name))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), actual, expected)


@functools.cache
def _stored(name, **options):
    """How many numbers the forward pass of training keeps for the backward pass."""
    variables, model = _variables(name), _model(name, **options)

    def loss(params, images):
        variables_now = {"params": params, "batch_stats": variables["batch_stats"]}
        return jnp.sum(model.apply(variables_now, images, train=True, mutable=["batch_stats"])[0])

    _, pullback = jax.eval_shape(lambda p, x: jax.vjp(loss, p, x), variables["params"], _images(4, 64))
    return sum(leaf.size for leaf in jax.tree.leaves(pullback))


@pytest.mark.parametrize("name", ["densenet121", "dpn68"])
def test_remat_stores_less_for_the_backward_pass(name):
    assert _stored(name, remat=True, block_form="plain") < 0.75 * _stored(name, block_form="plain")
    assert _stored(name, remat=True) < _stored(name)


@pytest.mark.parametrize("name", ["densenet121", "dpn68"])
def test_normalizing_once_stores_less_than_the_plain_form(name):
    assert _stored(name) < 0.75 * _stored(name, block_form="plain")


@pytest.mark.parametrize("name", ["densenet121", "dpn68"])
def test_classifier_dropout_acts_in_training_only(name):
    variables, images = _variables(name), _images()
    model = _model(name, classifier_dropout=0.5)
    np.testing.assert_array_equal(_apply(model, variables, images), _apply(_model(name), variables, images))
    (one, state), (other, other_state) = (_apply(model, variables, images, True, key) for key in (0, 1))
    assert np.abs(one - other).max() > 1e-3
    jax.tree.map(np.testing.assert_array_equal, state, other_state)  # nothing before the head was touched


@pytest.mark.parametrize("every", [True, False])
def test_layer_dropout_is_where_the_paper_or_torchvision_puts_it(every):
    variables, images = _variables(), _images()
    model = _model(layer_dropout=0.5, dropout_every_convolution=every)
    _, state = _apply(model, variables, images, True, key=0)
    _, plain = _apply(_model(), variables, images, True)
    same = jax.tree.map(np.array_equal, state["batch_stats"], plain["batch_stats"])
    assert all(jax.tree.leaves(same["norm0"])), "nothing is dropped after the first convolution"
    assert all(jax.tree.leaves(same["denseblock1"]["denselayer1"]["norm1"]))
    assert all(jax.tree.leaves(same["denseblock1"]["denselayer1"]["norm2"])) is not every
    assert not any(jax.tree.leaves(same["transition1"]["norm"])), "every layer's last convolution is dropped from"


def test_layer_dropout_after_a_transition():
    model = _model(layer_dropout=0.9)

    @jax.jit
    def transition(variables, images):
        _, state = model.apply(
            variables,
            images,
            train=True,
            mutable=["batch_stats", "intermediates"],
            rngs={"dropout": jax.random.key(0)},
            capture_intermediates=lambda module, _: module.name == "transition1",
        )
        return state["intermediates"]["transition1"]["__call__"][0]

    dropped = transition(_variables(), _images())
    assert 0.4 < float((dropped == 0).mean()) < 0.9  # 0.9 to the fourth: all four pooled values dropped


def test_groups_of_the_batch_are_independent():
    variables, images = _variables(), _images(4)
    grouped, _ = _apply(_model(batch_norm_group_size=2), variables, images, True)
    alone, _ = _apply(_model(), variables, images[:2], True)
    whole, _ = _apply(_model(), variables, images, True)
    np.testing.assert_allclose(grouped[:2], alone, rtol=1e-3, atol=1e-4)
    assert np.abs(whole[:2] - alone).max() > 1e-2


@pytest.mark.parametrize("name", ["densenet121", "dpn68"])
def test_frozen_norms_have_no_groups_that_could_not_divide_the_batch(name):
    variables, images = _variables(name), _images(4)
    model = _model(name, batch_norm_group_size=3, frozen_norms="params/")
    trained, state = _apply(model, variables, images, True)
    np.testing.assert_allclose(trained, _apply(model, variables, images), rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, state["batch_stats"], variables["batch_stats"])


def test_momentum_and_epsilon_reach_every_norm():
    variables, images = _variables(), _images()
    _, state = _apply(_model(batch_norm_momentum=1.0), variables, images, True)
    jax.tree.map(np.testing.assert_array_equal, state["batch_stats"], variables["batch_stats"])
    assert create_model("dpn68").norm_options.epsilon == 1e-3
    assert create_model("densenet121", batch_norm_epsilon=0.1).norm_options.epsilon == 0.1
    zero = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    logits = _apply(_model(batch_norm_epsilon=1e30), {**variables, "batch_stats": zero}, images)
    np.testing.assert_allclose(logits, jnp.broadcast_to(variables["params"]["classifier"]["bias"], (2, 5)), atol=1e-6)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_bfloat16_keeps_parameters_and_logits_in_float32(name):
    variables, images = _variables(name), _images()
    actual = _apply(_model(name, dtype=jnp.bfloat16), variables, images)
    expected = _apply(_model(name), variables, images)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, atol=0.1 * np.abs(expected).max())
    shapes = jax.eval_shape(_model(name, dtype=jnp.bfloat16).init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", ["densenet121", "dpn68"])
def test_test_time_pooling_is_the_mean_of_average_and_maximum_over_windows(name):
    variables, images = _variables(name), _images(2, 128)
    last = _apply(_model(name, output="map"), variables, images)
    head = variables["params"]["classifier"]
    rows = last.shape[1] - 2
    windows = [last[:, i : i + 3, j : j + 3].mean(axis=(1, 2)) for i in range(rows) for j in range(rows)]
    logits = np.stack([window @ head["kernel"] + head["bias"][None] for window in windows])
    actual = _apply(_model(name, test_time_pool_px=3), variables, images)
    np.testing.assert_allclose(actual, 0.5 * (logits.mean(axis=0) + logits.max(axis=0)), rtol=1e-4, atol=1e-5)
    assert np.abs(actual - _apply(_model(name), variables, images)).max() > 1e-3
    with pytest.raises(UserError, match="test_time_pool_px=99"):
        jax.eval_shape(_model(name, test_time_pool_px=99).apply, variables, images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"growth": 3}, r"no setting 'growth'.*growth_rate"),
        ({"stem": "wide"}, r"stem='wide': expected one of plain"),
        ({"output": "maps"}, r"output='maps': expected one of logits"),
        ({"blur": True}, r"blur=True"),
        ({"num_classes": 0}, r"num_classes=0"),
        ({"batch_norm_momentum": 1.1}, r"batch_norm_momentum=1\.1"),
        ({"batch_norm_epsilon": 0.0}, r"batch_norm_epsilon=0\.0"),
        ({"batch_norm_group_size": -1}, r"batch_norm_group_size=-1"),
        ({"block_sizes": ()}, r"block_sizes=\(\)"),
        ({"compression": 0}, r"compression=0"),
        ({"growth_rate": 0}, r"growth_rate=0"),
        ({"classifier_dropout": 1.0}, r"classifier_dropout=1\.0"),
        ({"layer_dropout": -0.1}, r"layer_dropout=-0\.1"),
    ],
)
def test_a_wrong_option_says_what_was_expected(options, message):
    with pytest.raises(UserError, match=message):
        create_model("densenet121", **options)


def test_dual_path_networks_have_an_increment_a_stage_and_no_layer_dropout():
    with pytest.raises(UserError, match=r"block_sizes=\(1, 1\).*dense_increments=\(16, 32, 32, 64\)"):
        create_model("dpn68", block_sizes=(1, 1))
    with pytest.raises(UserError, match=r"layer_dropout=0\.2: dpn68"):
        create_model("dpn68", layer_dropout=0.2)


def test_parameters_start_as_the_references_do():
    model = create_model("densenet121", growth_rate=64, block_sizes=(1, 1), num_classes=200)
    params = jax.jit(model.init)(jax.random.key(0), _images(1))["params"]
    kernel = params["denseblock1"]["denselayer1"]["conv1"]["kernel"]
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / kernel.shape[2]), rtol=0.03)
    assert not np.any(params["classifier"]["bias"])
    assert np.all(params["norm5"]["scale"] == 1)
    bound = 1 / np.sqrt(params["classifier"]["kernel"].shape[0])
    assert 0.99 * bound < np.abs(params["classifier"]["kernel"]).max() <= bound
