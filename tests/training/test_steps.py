"""The training step: the same on any number of devices, exact in every option."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from densenet_jax.augment.basic import normalize, random_flip
from densenet_jax.models.create import create_model
from densenet_jax.rng import Purpose, example_keys, step_key
from densenet_jax.training import sharding
from densenet_jax.training.losses import SoftmaxLoss
from densenet_jax.training.optimizer import make_optimizer
from densenet_jax.training.schedules import make_schedule
from densenet_jax.training.state import StateRecipe
from densenet_jax.training.steps import TrainStep

SHAPE = (8, 8, 1)
BATCH = 16


def batch_of(seed: int) -> dict[str, np.ndarray]:
    chance = np.random.default_rng(seed)
    return {
        "image": chance.integers(0, 256, (BATCH, *SHAPE), np.uint8),
        "label": chance.integers(0, 10, BATCH).astype(np.int32),
    }


def augment(images, labels, step):
    keys = example_keys(step_key(0, Purpose.FLIP, step), images.shape[0])
    return normalize(random_flip(images, keys), (0.3,), (0.4,), jax.dtypes.canonicalize_dtype(float)), labels


def recipe_of(dtype, **changes) -> StateRecipe:
    model = create_model(
        "densenet_bc_22_12", block_sizes=(1,), growth_rate=4, dtype=dtype, param_dtype=dtype, layer_dropout=0.2
    )
    schedule = make_schedule("constant", learning_rate=0.1, total_steps=10)
    optimizer = make_optimizer("sgd", schedule, momentum=0.9, nesterov=True, weight_decay=1e-4)
    return StateRecipe(model, optimizer, 0, SHAPE, **changes)


class Trainer:
    """The compiled step over some devices, and the states of three steps from the start."""

    def __init__(self, recipe: StateRecipe, devices: int, **options):
        self.recipe, self.mesh = recipe, sharding.make_mesh(jax.devices()[:devices])
        self.everywhere = sharding.replicated(self.mesh)
        options = {"seed": 0, "loss": SoftmaxLoss(0.1), **options}
        step = TrainStep(recipe.model, recipe.optimizer, augment, **options)
        self.step = jax.jit(step, out_shardings=self.everywhere)
        self.states, self.reports = self.run(3)

    def run(self, steps: int):
        states, reports = [self.recipe.create(self.everywhere)], []
        for number in range(steps):
            state, report = self.step(states[-1], sharding.to_devices(batch_of(number), self.mesh))
            states.append(state)
            reports.append(jax.device_get(report))
        self.on_devices = states
        return [jax.device_get(state) for state in states], reports


@pytest.fixture(scope="module")
def one():
    with jax.enable_x64(True):
        return Trainer(recipe_of(jnp.float64, averages=True), 1, average_decay=0.9)


@pytest.fixture(scope="module")
def eight():
    with jax.enable_x64(True):
        return Trainer(recipe_of(jnp.float64, averages=True), 8, average_decay=0.9)


def assert_close(ours, theirs, rtol):
    named = jax.tree_util.tree_leaves_with_path(ours)
    for (name, left), right in zip(named, jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(left, right, rtol=rtol, atol=rtol, err_msg=jax.tree_util.keystr(name))


def test_same_numbers_on_one_and_on_eight_devices(one, eight):
    assert_close((one.states, one.reports), (eight.states, eight.reports), 1e-10)
    assert [state.step for state in one.states] == [0, 1, 2, 3]


def test_batch_and_state_lie_where_they_should(eight):
    batch = sharding.to_devices(batch_of(0), eight.mesh)
    assert len(batch["image"].addressable_shards) == 8
    assert batch["image"].addressable_shards[3].data.shape[0] == BATCH // 8
    for leaf in jax.tree.leaves(eight.on_devices):
        assert len(leaf.sharding.device_set) == 8
        assert leaf.sharding.is_fully_replicated


def test_batch_that_devices_do_not_divide_is_a_users_error():
    mesh = sharding.make_mesh(jax.devices())
    with pytest.raises(Exception, match=r"config.x is 20, which 8 devices don't divide; take 16 or 24"):
        sharding.check_divides("config.x", 20, mesh.size)


def test_moving_average_follows_its_closed_form(one):
    start, first, *_ = one.states
    decay = min(0.9, 1 / 10)
    expected = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, start.variables, first.variables)
    assert_close(first.average, expected, 1e-6)  # the decay is a float32


def test_frozen_parts_stand_still_with_their_statistics():
    pattern = "^params/(?!classifier)"
    recipe = recipe_of(jnp.float32)
    schedule = make_schedule("constant", learning_rate=0.1, total_steps=10)
    optimizer = make_optimizer("sgd", schedule, momentum=0.9, nesterov=True, weight_decay=1e-4, freeze=pattern)
    frozen_norms = dataclasses.replace(recipe.model.norm_options, frozen=pattern)
    recipe = StateRecipe(recipe.model.clone(norm_options=frozen_norms), optimizer, 0, SHAPE)
    start, *_, end = Trainer(recipe, 1).states
    classifier = end.params.pop("classifier")
    assert np.abs(classifier["bias"] - start.params.pop("classifier")["bias"]).max() > 0
    assert_close(start.params, end.params, 0)
    assert_close(start.batch_stats, end.batch_stats, 0)


def test_float16_skips_a_step_whose_scaled_gradient_overflows():
    recipe = recipe_of(jnp.float32, scales_loss=True)
    start = recipe.create(sharding.replicated(sharding.make_mesh(jax.devices()[:1])))
    hot = start.replace(loss_scale=start.loss_scale.replace(scale=jnp.asarray(np.inf, jnp.float32)))
    step = TrainStep(recipe.model, recipe.optimizer, augment, seed=0)
    state, report = jax.jit(step)(hot, jax.tree.map(jnp.asarray, batch_of(0)))
    assert (int(report.skipped), int(state.loss_scale.skipped_steps), int(state.step)) == (1, 1, 1)
    assert np.isfinite(report.grad_norm)
    assert np.isfinite(report.sums.loss)
    for kept in ("params", "batch_stats", "opt_state"):
        assert_close(getattr(state, kept), getattr(start, kept), 0)


def test_step_is_a_function_of_seed_and_step_alone(one):
    with jax.enable_x64(True):
        states, reports = one.run(2)
    assert_close((states, reports), (one.states[:3], one.reports[:2]), 0)


class Noise(nn.Module):
    """Logits that are the drawn numbers of drop path."""

    drop_path_rate: float = 0.5

    @nn.compact
    def __call__(self, images, train=False):
        """Draws only in training, like the networks."""
        scale = self.param("scale", nn.initializers.ones, (10,))
        key = self.make_rng("drop_path") if train else jax.random.key(0)
        return jax.random.normal(key, (images.shape[0], 10)) * scale[None]


def small_rdnet():
    sizes = {"num_classes": 10, "block_sizes": (2,), "growth_rate": 8, "stem_width": 8}
    return create_model("rdnet_tiny", **sizes, drop_path_rate=0.5, layer_scale=1.0, block_form="plain")


@pytest.mark.parametrize("make", [Noise, pytest.param(small_rdnet, marks=pytest.mark.slow)])
def test_a_network_without_statistics_trains_alike_on_any_number_of_devices(make):
    optimizer = make_optimizer("sgd", make_schedule("constant", learning_rate=0.1, total_steps=10))
    recipe = StateRecipe(make(), optimizer, 0, SHAPE, averages=True)
    one, eight = (Trainer(recipe, devices, average_decay=0.5) for devices in (1, 8))
    state = one.states[-1]
    assert np.abs(jax.tree.leaves(state.params)[0] - jax.tree.leaves(one.states[0].params)[0]).max() > 0
    assert state.batch_stats == {} == state.average["batch_stats"]
    assert_close(eight.states[-1].params, state.params, 1e-4)
    assert_close(eight.states[-1].average, state.average, 1e-4)


def test_drop_path_is_a_function_of_seed_and_step():
    recipe = StateRecipe(Noise(), make_optimizer("sgd", lambda _: 0.1), 0, SHAPE)
    one, other_seed = (Trainer(recipe, 1, seed=seed) for seed in (0, 1))
    losses = [_loss_at(one, 0), _loss_at(one, 1), _loss_at(other_seed, 0)]
    assert len(set(losses)) == 3
    assert _loss_at(one, 0) == losses[0]


def _loss_at(trainer: Trainer, step: int) -> float:
    """The loss of the initial state as if it were at `step`, on images that are the same when they are mirrored."""
    batch = batch_of(0)
    batch["image"][:] = 9 * np.arange(BATCH, dtype=np.uint8)[:, None, None, None]
    state = trainer.on_devices[0].replace(step=jax.device_put(np.int32(step), trainer.everywhere))
    return float(trainer.step(state, sharding.to_devices(batch, trainer.mesh))[1].sums.loss)


def test_dropout_is_drawn_anew_at_every_step(one):
    with jax.enable_x64(True):
        assert _loss_at(one, 0) == _loss_at(one, 0) != _loss_at(one, 1)
