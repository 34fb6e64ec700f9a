"""The normalize-once block is the plain block: outputs, statistics and every gradient."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax.kernels import select
from densenet_jax.models.densenet import PLAIN, BlockOptions, DenseBlock
from densenet_jax.models.fused import Fused
from densenet_jax.models.variants import VARIANTS, DenseNetArchitecture
from densenet_jax.training.sharding import make_mesh, over_data, replicated
from tests.models.comparing import drawn, largest_error, signed, training_case

PLATFORMS = ["cpu", "tpu", "gpu"]
SMALL = {"growth_rate": 4, "block_sizes": (2, 1)}


CASES = {
    "bottleneck": ("densenet_bc_22_12", {}),
    "no bottleneck": ("densenet_40_12", {}),
    "dropout": ("densenet_bc_22_12", {"layer_dropout": 0.3}),
    "dropout, no bottleneck": ("densenet_40_12", {"layer_dropout": 0.3}),
    "dropout after layers": ("densenet_bc_22_12", {"layer_dropout": 0.3, "dropout_every_convolution": False}),
    "groups": ("densenet_bc_22_12", {"batch_norm_group_size": 2}),
    "remat": ("densenet_bc_22_12", {"remat": True, "layer_dropout": 0.3}),
    "biased variance": ("densenet_bc_22_12", {"unbiased_running_variance": False, "batch_norm_momentum": 0.5}),
    "frozen": ("densenet_bc_22_12", {"frozen_norms": "params/(?!classifier)"}),
    "frozen block": ("densenet_bc_22_12", {"frozen_norms": "denseblock1/|transition1"}),
    "frozen norms after the block": ("densenet_bc_22_12", {"frozen_norms": "transition1|norm5"}),
    "frozen here and there": ("densenet_bc_22_12", {"frozen_norms": "layer1/norm2|layer2/norm1"}),
}
QUICK = ("no bottleneck", "dropout", "frozen norms after the block")
THOROUGH = ("bottleneck", "dropout, no bottleneck", "remat")
EVERY_CASE = [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize("case", EVERY_CASE)
def test_outputs_statistics_and_every_gradient_are_the_plain_ones(case):
    """Tests every platform on the structures, and each other option on one platform, by turns."""
    name, options = CASES[case]
    turn = PLATFORMS[list(CASES).index(case) % len(PLATFORMS)]
    with jax.enable_x64(True):
        run = training_case(name, jnp.float64, **SMALL, **options)
        expected = run("plain")
        for platform in PLATFORMS if case in THOROUGH else [turn]:
            assert largest_error(run(f"normalize_once_{platform}"), expected) < 1e-9, platform


def _thinned(name):
    """What of a variant is made smaller: fewer and thinner layers, of which the full ones are more.

    A layer that reads another one's output is in the first block; CASES has more of them.
    """
    sizes = (2, *(1 for _ in VARIANTS[name].architecture.block_sizes[1:]))
    return {"growth_rate": 4, "stem_width": 8, "block_sizes": sizes}


DENSENETS = [name for name, variant in VARIANTS.items() if isinstance(variant.architecture, DenseNetArchitecture)]
# Variants that are the same network when they are thinned are tested on a platform once.
THINNED = {
    (replace(VARIANTS[name].architecture, **_thinned(name)), PLATFORMS[index % len(PLATFORMS)]): name
    for index, name in enumerate(DENSENETS)
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "platform"), [(name, platform) for (_, platform), name in THINNED.items()])
def test_every_variant_is_the_plain_one(name, platform):
    """With its own stem, transitions and bottleneck."""
    with jax.enable_x64(True):
        run = training_case(name, jnp.float64, side_px=33, batch=2, **_thinned(name))
        assert largest_error(run(f"normalize_once_{platform}"), run("plain")) < 1e-9


def _block(form, dtype=jnp.float32, layers=2, **options):
    """A dense block and its variables for inputs of 8 channels."""
    implementation = PLAIN if form == "plain" else Fused(form.removeprefix("normalize_once").removeprefix("_"))
    module = DenseBlock(layers, 4, options=BlockOptions(dtype=dtype, **options), implementation=implementation)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 6, 6, 8), dtype), False))
    variables = {"params": jax.tree.map(signed, drawn(shapes["params"], 1, jnp.float32))}
    return module, variables | {"batch_stats": drawn(shapes["batch_stats"], 2, jnp.float32)}


def _block_gradients(module):
    def loss(params, statistics, x):
        features, mutated = module.apply(
            {"params": params, "batch_stats": statistics}, x, True, mutable=["batch_stats"]
        )
        raw = features.raw(1e-5).astype(jnp.float32)
        return jnp.sum(raw * jnp.sin(jnp.arange(raw.size)).reshape(raw.shape)), (raw, mutated)

    return jax.value_and_grad(loss, argnums=(0, 2), has_aux=True)


@functools.cache
def _results_of_three_inputs(form, dtype):
    module, variables = _block(form, dtype)
    run = jax.jit(_block_gradients(module))
    inputs = (3 * jax.random.normal(jax.random.key(seed), (8, 12, 12, 8)) + 1 for seed in range(3))
    return [run(variables["params"], variables["batch_stats"], x.astype(jnp.bfloat16).astype(dtype)) for x in inputs]


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
def test_in_bfloat16_it_is_as_near_to_the_exact_result_as_the_plain_one(platform):
    """Rectifiers that rounding closes or opens dominate: single leaves are a matter of luck, their median is not."""
    forms = (("plain", jnp.float32), ("plain", jnp.bfloat16), (f"normalize_once_{platform}", jnp.bfloat16))
    ratios = []
    for results in zip(*(_results_of_three_inputs(*form) for form in forms), strict=True):
        exact, plain, once = ([leaf for leaf in jax.tree.leaves(result) if leaf.ndim] for result in results)
        for a, b, e in zip(plain, once, exact, strict=True):
            if error := _distance(a, e):
                ratios.append(_distance(b, e) / error)
            else:  # statistics of the input itself, exact but for the order in which float32 values are added
                assert _distance(b, e) < 4 * jnp.finfo(jnp.float32).eps
    assert len(ratios) > 30
    assert np.median(ratios) < 1.5


def _distance(actual, exact):
    return np.linalg.norm(np.asarray(actual, np.float64) - np.asarray(exact, np.float64))


@pytest.mark.parametrize("form", ["normalize_once_cpu", "normalize_once_tpu"])
def test_devices_agree_on_the_statistics_of_each_map_once(form):
    """Forward: one all-reduce for the statistics of each feature map; what the compiler joins counts as one."""
    mesh = make_mesh()
    module, variables = _block(form, layers=3)
    x = jax.random.normal(jax.random.key(0), (8, 6, 6, 8))

    def run(variables, x):
        return module.apply(variables, x, True, mutable=["batch_stats"])

    compiled = jax.jit(run, in_shardings=(replicated(mesh), over_data(mesh))).lower(variables, x).compile()
    reduced = re.findall(r"= (\S+|\(.*?\)) all-reduce(?:-start)?\(", compiled.as_text())
    channels = sum(int(count) for shapes in reduced for count in re.findall(r"f32\[(?:1,)?(\d+)\]", shapes))
    # A mean and a variance a channel: the input's 8, three layers' 16 bottleneck and 4 new ones.
    assert channels == 2 * (8 + 3 * (16 + 4))
    actual = compiled(variables, jax.device_put(x, over_data(mesh)))
    assert largest_error(actual, jax.jit(run)(variables, x)) < 1e-4


def test_gradients_are_the_same_over_eight_devices():
    mesh = make_mesh()
    module, variables = _block("normalize_once")
    run = _block_gradients(module)
    arguments = (variables["params"], variables["batch_stats"], jax.random.normal(jax.random.key(0), (8, 6, 6, 8)))
    whole = (replicated(mesh), replicated(mesh), over_data(mesh))
    assert largest_error(jax.jit(run, in_shardings=whole)(*arguments), jax.jit(run)(*arguments)) < 1e-3


def test_stored_values_grow_linearly_with_depth_and_remat_stores_fewer(monkeypatch):
    def stored(layers, form="normalize_once", **options):
        module, variables = _block(form, layers=layers, **options)

        def values(params, x):
            return module.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])[0].values

        x = jax.ShapeDtypeStruct((8, 6, 6, 8), jnp.float32)
        _, pullback = jax.eval_shape(lambda p, x: jax.vjp(values, p, x), variables["params"], x)
        maps = [leaf.size for leaf in jax.tree.leaves(pullback) if leaf.ndim == 4 and leaf.shape[0] == 8]
        return sum(maps) / (8 * 6 * 6)

    # x^ of everything, and of each layer the bottleneck's output.
    for layers in (2, 5):
        assert stored(layers) == 8 + 4 * layers + 16 * layers
        assert stored(layers, remat=True) == 8 + 4 * layers
        assert stored(layers) <= stored(layers, "plain", remat=True) + 4
        assert stored(layers, "normalize_once_tpu") == stored(layers)
    monkeypatch.setattr(select, "_ON_CHIP_BYTES", 0)  # bottlenecks that a TPU would have to keep in memory
    assert stored(5, "normalize_once_tpu") == stored(5, remat=True)
