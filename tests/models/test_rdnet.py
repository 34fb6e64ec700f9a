"""RDNet beside what tests of all families cover: planted faults, drop path, counts, features, weights and settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import densenet_jax
from densenet_jax.errors import UserError
from densenet_jax.kernels.cpu.primitive import plain_kernels
from densenet_jax.models import rdnet
from densenet_jax.models.create import create_model
from densenet_jax.models.fused.rdnet import FusedRDNet, _gelu_by_erf
from densenet_jax.models.operations import count_multiply_adds
from densenet_jax.models.pretrained import load_pretrained, save_torch_state_dict
from densenet_jax.models.torch_weights import from_torch, to_torch
from densenet_jax.models.variants import get_variant
from densenet_jax.predict.explain import activation_maps
from densenet_jax.predict.predictor import Predictor
from tests.models import golden
from tests.untrained_run import make_run

NAME = "small_rdnet"
_LARGE = (("small", 8.71), ("base", 15.36), ("large", 34.68))


@pytest.fixture(scope="module")
def variables():
    return golden.drawn_variables(NAME)


def _run(variables, x, **options):
    return jax.device_get(jax.jit(golden.make(NAME, **options).apply)(variables, x))


def _logits_error(variables, px=64, **options):
    expected = golden.golden(NAME)[f"{px}/logits"]
    return np.abs(_run(variables, golden.images(4, px), **options) - expected).max() / np.abs(expected).max()


def approximate_gelu(monkeypatch):
    exact = jax.nn.gelu
    monkeypatch.setattr(rdnet.jax.nn, "gelu", lambda x, approximate: exact(x))


def newest_layer_first(monkeypatch):
    concatenate = jnp.concatenate
    monkeypatch.setattr(rdnet.jnp, "concatenate", lambda parts, axis: concatenate(parts[::-1], axis))


def no_gate(monkeypatch):
    monkeypatch.setattr(rdnet.jax.nn, "hard_sigmoid", jnp.ones_like)


def sigmoid_gate(monkeypatch):
    monkeypatch.setattr(rdnet.jax.nn, "hard_sigmoid", jax.nn.sigmoid)


def norm_before_pooling(monkeypatch):
    monkeypatch.setattr(rdnet, "select_output", lambda output, x, *rest: rest[-1](x).mean((1, 2))[:, :10])


def rows_shifted_by_one(monkeypatch):
    function = rdnet.Plain.depthwise_norm
    monkeypatch.setattr(rdnet.Plain, "depthwise_norm", lambda self, *rest: jnp.roll(function(self, *rest), 1, 1))


def unbiased_variance(monkeypatch):
    var = jnp.var
    monkeypatch.setattr(rdnet.jnp, "var", lambda x, **options: var(x, ddof=1, **options))


FAULTS = (approximate_gelu, newest_layer_first, no_gate, sigmoid_gate, norm_before_pooling, rows_shifted_by_one)


@pytest.mark.parametrize("fault", [*FAULTS, unbiased_variance], ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_caught(monkeypatch, variables, fault):
    golden.abstract_variables(NAME)
    fault(monkeypatch)
    assert _logits_error(variables, block_form="plain") > 1e-4


def test_other_architectures_and_epsilons_are_caught(variables):
    assert _logits_error(variables, epsilon=1e-3) > 1e-4
    assert _logits_error(variables, squeeze_excite_from=4) > 1e-4


def test_logits_equal_timm_in_float32_whatever_changes_nothing(variables):
    """Without these options test_faults.py compares them, at both sizes and in both implementations."""
    options = {"remat": True, "drop_path_rate": 0.5, "layer_dropout": 0.5, "classifier_dropout": 0.5}
    assert _logits_error(variables, **options) < 1e-5


def _make_few_layers(**options):
    """A network of one layer a stage, of which stage 3 is not halved, with the convolutions that compile quickly."""
    sizes = {"stem_width": 16, "block_sizes": (1, 1, 1, 1), "growth_rate": (8, 8, 16, 8), "halved_stages": (1, 3)}
    options = {"squeeze_excite_from": 1, "block_form": "plain", **options}
    return create_model("rdnet_tiny", num_classes=10, **{**sizes, **options})


def _draw(model, x):
    draw = np.random.default_rng(0).normal
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.tree.map(lambda leaf: draw(0, 0.3, leaf.shape).astype(np.float32), shapes)


def _image_gradient(x, **options):
    model = _make_few_layers(block_sizes=(1, 1), growth_rate=(8, 8), **options)
    gradient = jax.grad(lambda x, v: model.apply(v, x, train=True).sum())
    return jax.device_get(jax.jit(gradient)(x, _draw(model, x)))


def test_the_fused_gradient_is_the_plain_one():
    """Of images whose sides leave a rest at every convolution of patches, within float32's rounding."""
    x = golden.images(2, 39)
    fused, plain = (_image_gradient(x, block_form=form, squeeze_excite_from=0) for form in ("normalize_once", "plain"))
    np.testing.assert_allclose(fused, plain, rtol=0, atol=1e-4 * np.abs(plain).max())


def test_remat_changes_no_gradient():
    x = golden.images(2, 32)
    kept, again = (_image_gradient(x, remat=remat) for remat in (False, True))
    assert np.abs(kept).max() > 0
    np.testing.assert_allclose(again, kept, rtol=1e-4, atol=1e-4 * np.abs(kept).max())


SIZES = [("tiny", 5.03), *(pytest.param(*size, marks=pytest.mark.slow) for size in _LARGE)]


@pytest.mark.parametrize(("name", "giga"), SIZES)
def test_multiply_adds_are_the_published(name, giga):
    model = create_model(f"rdnet_{name}")
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    count = count_multiply_adds(model.apply, golden.abstract_variables(f"rdnet_{name}"), images)
    assert round(count / 1e9, 2) == giga


def test_features_are_those_of_every_stage_before_a_halving():
    x = golden.images(2, 64)
    variables = _draw(_make_few_layers(), x)
    pyramid, last, pooled, logits = (
        jax.device_get(jax.jit(_make_few_layers(output=output).apply)(variables, x))
        for output in ("pyramid", "map", "pooled", "logits")
    )
    shapes = {stride: part.shape[1:] for stride, part in pyramid.items()}
    assert shapes == {4: (16, 16, 24), 8: (8, 8, 24), 16: (4, 4, 16)}
    np.testing.assert_array_equal(last, pyramid[16])
    head = variables["params"]["classifier"]
    np.testing.assert_allclose(pooled @ head["kernel"] + head["bias"], logits, rtol=1e-4, atol=1e-5)


def test_the_mean_of_an_activation_map_and_the_bias_are_the_logit():
    x, classes = golden.images(3, 64), np.array([1, 9, 4])
    model = _make_few_layers(block_sizes=(1, 1), growth_rate=(8, 8))
    variables = _draw(model, x)
    maps = jax.device_get(jax.jit(functools.partial(activation_maps, model))(variables, x, classes))
    logits = jax.device_get(jax.jit(model.apply)(variables, x))[np.arange(3), classes]
    assert maps.shape == (3, 8, 8)
    bias = variables["params"]["classifier"]["bias"][classes]
    np.testing.assert_allclose(maps.mean((1, 2)) + bias, logits, rtol=1e-4, atol=1e-5)


def test_drop_path_zeroes_whole_examples_at_its_rate():
    x = jnp.ones((4000, 2, 2, 3))
    y = np.asarray(rdnet.drop_path(x, 0.25, jax.random.key(1)))
    assert set(np.unique(y)) == {0, np.float32(1 / 0.75)}
    first = y[:, 0, 0, 0]
    np.testing.assert_array_equal(y, np.broadcast_to(first[:, None, None, None], y.shape))
    assert abs((first == 0).mean() - 0.25) < 0.03
    assert rdnet.drop_path(x, 0.25, None) is x
    assert rdnet.drop_path(x, 0.0, jax.random.key(1)) is x


def test_drop_path_rises_linearly_to_the_last_layer():
    model = create_model("rdnet_tiny", drop_path_rate=0.4)
    rates = [rate for index in range(7) for rate in model._stage(index, 64, {}).drop_path_rates]
    np.testing.assert_allclose(rates, np.linspace(0, 0.4, 21))


def test_an_example_that_skips_a_layer_gets_zeros_from_it_and_no_gradient():
    """In a network of two layers, where all of a batch's second layers are skipped at a rate near 1."""
    model = _make_few_layers(block_sizes=(2,), growth_rate=8, halved_stages=(), drop_path_rate=0.999)
    x = jnp.asarray(golden.images(2, 32))
    drawn = jax.jit(model.init)(jax.random.key(0), x)["params"]

    def loss(params, seed):
        rngs = {"drop_path": jax.random.key(seed)}
        return model.apply({"params": params}, x, train=True, rngs=rngs).sum()

    gradient = jax.jit(jax.grad(loss))(drawn, 0)["stage1"]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient["layer2"]))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient["layer1"]))


def test_weights_go_there_and_back_by_file(tmp_path, variables):
    path = tmp_path / "weights.safetensors"
    save_torch_state_dict(variables, path, class_names=tuple("abcdefghij"))
    base, architecture = golden.SMALL_MODELS[NAME]
    back = load_pretrained(base, path, **architecture)
    jax.tree.map(np.testing.assert_array_equal, back, variables)
    gray = load_pretrained(base, path, num_classes=4, channels=1, **architecture)
    assert gray["params"]["stem"]["conv"]["kernel"].shape == (4, 4, 1, 20)
    assert gray["params"]["classifier"]["kernel"].shape == (48, 4)
    for dialect, name in (("monai", "w.safetensors"), ("torchvision", "w.weights.h5")):
        with pytest.raises(UserError, match="MONAI and Keras have DenseNets only"):
            save_torch_state_dict(variables, tmp_path / name, dialect=dialect)


def test_the_authors_own_names_mean_the_same(variables):
    own = {f"module.{key}".replace("module.stem.", "module.stem.stem."): v for key, v in to_torch(variables).items()}
    assert "module.stem.stem.0.weight" in own
    assert "module.head.fc.bias" in own
    jax.tree.map(np.testing.assert_array_equal, from_torch(own, golden.abstract_variables(NAME)), variables)


def test_published_weights_have_their_preprocessing():
    row = get_variant("rdnet_large")
    assert row.preprocessing.crop_fraction == 0.9
    assert row.preprocessing_of("naver-ai/rdnet_large.nv_in1k_ft_in1k_384").test_px == 384


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("densenet121", {"drop_path_rate": 0.1}, "densenet121 is no RDNet"),
        ("rdnet_tiny", {"drop_path_rate": 1.0}, r"drop_path_rate=1\.0"),
        ("rdnet_tiny", {"batch_norm_group_size": 2}, "no batch norms"),
        ("rdnet_tiny", {"kernels": "pallas"}, "no dense blocks that kernels exist for"),
        ("rdnet_tiny", {"block_sizes": (1, 2)}, "one growth rate a stage"),
        ("rdnet_tiny", {"growth_rate": 0}, "growth_rate="),
    ],
)
def test_settings_out_of_range_are_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        create_model(name, **options)


def test_images_too_small_are_refused():
    model = create_model("rdnet_tiny")
    with pytest.raises(UserError, match="at least 32x32"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 31, 64, 3)))


def test_a_run_without_statistics_is_evaluated_predicted_and_explained(digits, tmp_path):
    workdir, settings = tmp_path / "run", {"name": "rdnet_tiny", "block_sizes": (1, 1), "growth_rate": 16}
    changes = {f"model__{key}": value for key, value in settings.items()}
    run = make_run(workdir, digits[1].config.data.dir, data__image_size_px=16, train__average_decay=0.9, **changes)
    assert densenet_jax.load_checkpoint(str(workdir))["batch_stats"] == {}
    _, saved = run.saved_variables(str(workdir))
    with run.data.eval_batches() as batches:
        batch = next(batches)
    images = np.asarray(batch["image"])[:4]
    expected = run.compile_predict_step()(saved, batch)["probability"][:4]
    predictor = Predictor.from_workdir(workdir, batch_sizes=(4,))
    np.testing.assert_allclose(predictor.probabilities(images), expected, rtol=1e-5, atol=1e-6)
    outputs = jax.device_get(predictor.dispatch(images, "pyramid", np.zeros(4, np.int32)))
    assert {name: array.shape[1:] for name, array in outputs.items() if name.startswith("stride")} == {
        "stride_4": (4, 4, 80),
        "stride_8": (2, 2, 56),
    }
    assert outputs["map"].shape[1:] == (2, 2)


def test_the_backward_pass_keeps_the_gelus_input_and_output_alone():
    types = {"dtype": jnp.bfloat16, "param_dtype": jnp.float32}
    x = jnp.ones((1, 8, 8, 16), jnp.bfloat16)

    def count_kept(implementation):
        layer = rdnet.DenseLayer(8, 4, False, 0.0, 0.0, 0.0, 1e-6, types, implementation)
        params = jax.eval_shape(layer.init, jax.random.key(0), (x,))
        pullback = jax.eval_shape(lambda params, x: jax.vjp(lambda p: layer.apply(p, (x,)), params)[1], params, x)
        return sum(kept.shape == (1, 8, 8, 64) for kept in jax.tree.leaves(pullback))

    assert count_kept(FusedRDNet()) == count_kept(FusedRDNet("tpu")) == 2 < count_kept(rdnet.PLAIN)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-15), (jnp.float32, 1e-6), (jnp.bfloat16, 0.004)])
def test_the_gelu_for_tpus_is_the_exact_one(dtype, tolerance):
    with jax.enable_x64(True):
        z = jnp.linspace(-8, 8, 1001).astype(dtype)
        exact, ours = (
            jax.jit(jax.vmap(jax.value_and_grad(gelu)))
            for gelu in (functools.partial(jax.nn.gelu, approximate=False), _gelu_by_erf)
        )
        for actual, expected in zip(ours(z), exact(z.astype(jnp.float64)), strict=True):
            assert actual.dtype == dtype
            assert (abs(actual.astype(expected.dtype) - expected) / jnp.maximum(1, abs(expected))).max() < tolerance


def test_only_programs_for_tpus_have_the_gelu_for_tpus():
    def count_erf(platform):
        x, model = (
            jnp.ones((1, 32, 32, 3)),
            _make_few_layers(dtype=jnp.bfloat16, block_form=f"normalize_once{platform}"),
        )
        return str(jax.make_jaxpr(lambda x: model.init_with_output(jax.random.key(0), x)[0])(x)).count(" erf ")

    assert count_erf("_tpu") > 0 == count_erf("")
    with plain_kernels():
        assert count_erf("_tpu") == 0, "converters know erfc alone"
