"""A state that is split over the devices: where its arrays lie, and that nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from densenet_jax.augment.basic import normalize
from densenet_jax.models.create import create_model
from densenet_jax.training import sharding
from densenet_jax.training.checkpoint import Checkpoints
from densenet_jax.training.state import StateRecipe
from densenet_jax.training.steps import TrainStep

SHAPE = (8, 8, 1)


def recipe_of(dtype) -> StateRecipe:
    model = create_model("densenet_bc_22_12", block_sizes=(1,), growth_rate=32, dtype=dtype, param_dtype=dtype)
    return StateRecipe(model, optax.adamw(0.01), 0, SHAPE, averages=True)


def augment(images, labels, step):
    return normalize(images, (0.3,), (0.4,), jax.dtypes.canonicalize_dtype(float)), labels


def batch_of(seed: int) -> dict[str, np.ndarray]:
    chance = np.random.default_rng(seed)
    return {
        "image": chance.integers(0, 256, (16, *SHAPE), np.uint8),
        "label": chance.integers(0, 10, 16).astype(np.int32),
    }


def trained(recipe: StateRecipe, name: str, steps: int = 3, **options):
    """The state after some steps, laid out as it is kept, and the losses."""
    mesh = sharding.make_mesh()
    layout = sharding.layout_of(name, mesh)
    step = TrainStep(
        recipe.model, recipe.optimizer, augment, 0, average_decay=0.9, mesh=mesh if name == "fsdp" else None, **options
    )
    where = sharding.shardings_of(recipe.abstract(layout))
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(where, sharding.replicated(mesh)))
    state = recipe.create(layout)
    losses = []
    for number in range(steps):
        state, report = jitted(state, sharding.to_devices(batch_of(number), mesh))
        losses.append(float(report.sums.loss))
    return state, losses


def bytes_on_one_device(tree) -> int:
    device = jax.devices()[3]
    shards = (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards if shard.device == device)
    return sum(shard.data.nbytes for shard in shards)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 3, 64, 32), (None, None, "data")),  # the longest
        ((3, 3, 60, 32), (None, None, None, "data")),  # of those that 8 devices divide
        ((3, 3, 30, 30), ()),  # there is none
        ((64,), ()),  # too small to be worth it
        ((4096,), ("data",)),
        ((), ()),
    ],
)
def test_the_longest_axis_that_the_devices_divide_is_split(shape, expected):
    layout = sharding.layout_of("fsdp", sharding.make_mesh())
    assert tuple(layout(jax.ShapeDtypeStruct(shape, jnp.float32)).spec) == expected


@pytest.mark.parametrize("options", [{}, pytest.param({"microbatches": 2}, marks=pytest.mark.slow)], ids=str)
def test_a_split_state_trains_to_the_same_numbers(options):
    with jax.enable_x64(True):
        recipe = recipe_of(jnp.float64)
        (split, losses), (whole, expected) = (
            trained(recipe, "fsdp", **options),
            trained(recipe, "replicated", **options),
        )
    np.testing.assert_allclose(losses, expected, rtol=1e-10)
    for ours, theirs in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-10, atol=1e-10)


def test_a_device_keeps_a_share_of_a_split_state():
    recipe, mesh = recipe_of(jnp.float32), sharding.make_mesh()
    whole, split = recipe.create(sharding.replicated(mesh)), recipe.create(sharding.layout_of("fsdp", mesh))
    for ours, theirs in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for part in ("params", "opt_state", "average"):
        large = [leaf for leaf in jax.tree.leaves(getattr(split, part)) if leaf.size >= 2**12]
        assert large
        assert all(leaf.addressable_shards[0].data.size == leaf.size // 8 for leaf in large)
    assert bytes_on_one_device(split) < 0.4 * bytes_on_one_device(whole)


@pytest.mark.parametrize(
    ("saved", "wanted", "before", "after"),
    [
        ("fsdp", "replicated", 8, 2),
        pytest.param("replicated", "fsdp", 8, 2, marks=pytest.mark.slow),
        pytest.param("fsdp", "fsdp", 2, 8, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_is_restored_into_the_other_layout_and_device_count(tmp_path, saved, wanted, before, after):
    recipe = recipe_of(jnp.float32)
    meshes = [sharding.make_mesh(jax.devices()[:count]) for count in (before, after)]
    state = recipe.create(sharding.layout_of(saved, meshes[0])).replace(step=jnp.asarray(5, jnp.int32))
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(5, state, {}, {})
    checkpoints.wait()
    like = recipe.abstract(sharding.layout_of(wanted, meshes[1]))
    restored, _ = checkpoints.restore(5, like)
    checkpoints.close()
    for ours, theirs, abstract in zip(*map(jax.tree.leaves, (restored, state, like)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.sharding == abstract.sharding
