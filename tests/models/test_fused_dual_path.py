"""A dual-path stage that normalizes each map once is its blocks, one after the other, and so are its gradients."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax.models.create import create_model
from densenet_jax.models.fused import dual_path_vjp
from densenet_jax.models.variants import VARIANTS, DualPathArchitecture
from densenet_jax.training.sharding import make_mesh, over_data, replicated
from tests.models.comparing import drawn, largest_error, signed, training_case

PLATFORMS = ["cpu", "tpu", "gpu"]
SMALL = {"reduction_width": 8, "groups": 2, "block_sizes": (2, 2), "dense_increments": (2, 3)}
CASES = {
    "one kernel for both paths": ("dpn68", {}),
    "a kernel each": ("dpn48b", {}),
    "one block": ("dpn68", {"block_sizes": (1, 1)}),
    "groups of examples": ("dpn68", {"batch_norm_group_size": 2}),
    "remat": ("dpn48b", {"remat": True, "batch_norm_group_size": 2}),
    "biased variance": ("dpn68", {"unbiased_running_variance": False, "batch_norm_momentum": 0.5}),
    "frozen": ("dpn68", {"frozen_norms": "params/(?!classifier)", "remat": True}),
    "frozen stage": ("dpn68", {"frozen_norms": "conv1_1|conv2_"}),
    "frozen last stage": ("dpn68", {"frozen_norms": "conv3_|conv5_bn_ac"}),
    "frozen inside blocks": ("dpn68", {"frozen_norms": "conv2_1/c3x3_b|conv3_2/c1x1_c"}),
    "paths frozen here and there": ("dpn68", {"frozen_norms": "conv2_1/c1x1_a|conv3_2/c1x1_a"}),
}
THOROUGH = ("one kernel for both paths", "a kernel each")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_outputs_statistics_and_every_gradient_are_the_plain_ones(case):
    """Tests every platform on the two structures, and each option on one platform, by turns."""
    name, options = CASES[case]
    turn = PLATFORMS[list(CASES).index(case) % len(PLATFORMS)]
    with jax.enable_x64(True):
        run = training_case(name, jnp.float64, side_px=21, **SMALL | options)
        expected = run("plain")
        for platform in PLATFORMS if case in THOROUGH else [turn]:
            assert largest_error(run(f"normalize_once_{platform}"), expected) < 1e-9, platform


DUAL_PATHS = [name for name, variant in VARIANTS.items() if isinstance(variant.architecture, DualPathArchitecture)]


@pytest.mark.slow
@pytest.mark.parametrize("name", DUAL_PATHS)
def test_every_variant_is_the_plain_one(name):
    """With its own stem, paths, increments and projections; fewer and thinner blocks.

    With a narrower stem all of its ReLUs are open or closed throughout; its bias' gradient is then 0 but for
    rounding.
    """
    facts = VARIANTS[name].architecture
    sizes = tuple(min(blocks, 2) for blocks in facts.block_sizes[:2])
    with jax.enable_x64(True):
        options = {"reduction_width": 8, "groups": 4, "block_sizes": sizes, "stem_width": 16}
        run = training_case(name, jnp.float64, 21, 2, dense_increments=facts.dense_increments[:2], **options)
        platform = PLATFORMS[DUAL_PATHS.index(name) % len(PLATFORMS)]
        assert largest_error(run(f"normalize_once_{platform}"), run("plain")) < 1e-9


@pytest.mark.slow
def test_a_fault_in_the_derivative_is_caught(monkeypatch):
    """The dense path's gradients of earlier blocks are forgotten: neither outputs nor statistics show it."""
    exact = dual_path_vjp._first_backward

    def forgets(config, saved, index, end, gradient, carry):
        grads, conv = exact(config, saved, index, end, gradient, carry)
        return grads._replace(dense=carry.dense[..., :end]), conv

    with jax.enable_x64(True):
        small = SMALL | {"block_sizes": (2,), "dense_increments": (2,)}
        run = training_case("dpn68", jnp.float64, side_px=16, batch=2, **small)
        expected = run("plain")
        monkeypatch.setattr(dual_path_vjp, "_first_backward", forgets)
        actual = run("normalize_once_tpu")
    assert largest_error(actual[0], expected[0]) < 1e-9
    assert largest_error(actual[1], expected[1]) > 1e-3


def _network(form, dtype=jnp.float32, blocks=2, **options):
    """One stage between stem and head, and its variables; the map before the head is its output."""
    small = SMALL | {"block_sizes": (blocks,), "dense_increments": (4,), "stem_width": 8}
    module = create_model("dpn68", output="pooled", dtype=dtype, block_form=form, **small, **options)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3), dtype)))
    variables = {"params": jax.tree.map(signed, drawn(shapes["params"], 1, jnp.float32))}
    return module, variables | {"batch_stats": drawn(shapes["batch_stats"], 2, jnp.float32)}


def _gradients(module, variables, images):
    def loss(params, images):
        arrays = {**variables, "params": params}
        out, mutated = module.apply(arrays, images, train=True, mutable=["batch_stats"])
        out = out.astype(jnp.float32)
        return jnp.sum(out * jnp.sin(jnp.arange(out.size)).reshape(out.shape)), mutated

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], images)


@functools.cache
def _results_of_three_inputs(form, dtype):
    module, variables = _network(form, dtype)
    run = jax.jit(functools.partial(_gradients, module))
    inputs = (jax.random.normal(jax.random.key(seed), (8, 32, 32, 3)).astype(jnp.bfloat16) for seed in range(3))
    return [run(variables, images.astype(dtype)) for images in inputs]


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
def test_in_bfloat16_it_is_as_near_to_the_exact_result_as_the_plain_one(platform):
    """Rectifiers that rounding closes or opens dominate: single leaves are a matter of luck, their median is not."""
    forms = (("plain", jnp.float32), ("plain", jnp.bfloat16), (f"normalize_once_{platform}", jnp.bfloat16))
    ratios = []
    for results in zip(*(_results_of_three_inputs(*form) for form in forms), strict=True):
        exact, plain, actual = (jax.tree.leaves(result[1]) for result in results)
        ratios += [_distance(b, e) / _distance(a, e) for a, b, e in zip(plain, actual, exact, strict=True)]
    assert len(ratios) > 30
    assert np.median(ratios) < 1.5


def _distance(actual, exact):
    return np.linalg.norm(np.asarray(actual, np.float64) - np.asarray(exact, np.float64))


@pytest.mark.slow
def test_devices_agree_on_the_statistics_of_each_map_once():
    """Forward: an all-reduced mean and variance for each channel of each map, though several norms read it."""
    mesh = make_mesh()
    module, variables = _network("normalize_once_tpu", blocks=3)
    images = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))

    def run(variables, images):
        return module.apply(variables, images, train=True, mutable=["batch_stats"])

    compiled = jax.jit(run, in_shardings=(replicated(mesh), over_data(mesh))).lower(variables, images).compile()
    reduced = re.findall(r"= (\S+|\(.*?\)) all-reduce(?:-start)?\(", compiled.as_text())
    channels = sum(int(count) for shapes in reduced for count in re.findall(r"f32\[(?:1,)?(\d+)\]", shapes))
    # Stem and input; of three blocks two bottlenecks, the residual sum, 4 new channels; the shortcut's 8; no head's.
    assert channels == 2 * (8 + 8 + 3 * (8 + 8 + 64 + 4) + 8)
    actual = compiled(variables, jax.device_put(images, over_data(mesh)))
    assert largest_error(actual, jax.jit(run)(variables, images)) < 1e-4


@pytest.mark.slow
def test_gradients_are_the_same_over_eight_devices():
    mesh = make_mesh()
    module, variables = _network("normalize_once")
    run = functools.partial(_gradients, module)
    arguments = (variables, jax.random.normal(jax.random.key(0), (8, 16, 16, 3)))
    whole = (replicated(mesh), over_data(mesh))
    assert largest_error(jax.jit(run, in_shardings=whole)(*arguments), jax.jit(run)(*arguments)) < 1e-3


def test_stored_values_are_sums_dense_path_and_two_bottlenecks_a_block():
    def stored(blocks, **options):
        module, variables = _network("normalize_once_tpu", blocks=blocks, **options)

        def pooled(params, images):
            arrays = {**variables, "params": params}
            return module.apply(arrays, images, train=True, mutable=["batch_stats"])[0]

        images = jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.float32)
        _, pullback = jax.eval_shape(lambda p, x: jax.vjp(pooled, p, x), variables["params"], images)
        widths = [leaf.shape[3] for leaf in jax.tree.leaves(pullback) if leaf.shape[:3] == (8, 4, 4)]
        joined = 64 + 4 * (blocks + 2)  # what the head keeps
        return collections.Counter(width for width in widths if width != joined)

    for blocks in (2, 5):
        dense = 4 * (blocks + 2)
        # The input, the stem's maxima before the norm; of each block the residual sum, two bottlenecks; the dense path.
        assert stored(blocks) == {8: 2 + 2 * blocks, 64: blocks, dense: 1}
        assert stored(blocks, remat=True) == {8: 2, 64: blocks, dense: 1}
