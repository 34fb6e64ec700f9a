"""Checkpoints are restored to the bit, and damaged ones are named and passed over."""

import dataclasses
import functools
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from densenet_jax.errors import UserError
from densenet_jax.models.create import create_model
from densenet_jax.training import sharding
from densenet_jax.training.checkpoint import Checkpoints
from densenet_jax.training.restore import describe_checkpoints, find_checkpoint, load_checkpoint
from densenet_jax.training.state import StateRecipe

WINDOW = {"loss": 1.25, "top1": 3, "top5": 7, "examples": 8}
CONFIG = {"seed": 0}


@pytest.fixture(scope="module")
def recipe() -> StateRecipe:
    model = create_model("densenet_bc_22_12", block_sizes=(1,), growth_rate=2)
    return StateRecipe(model, optax.sgd(0.1, momentum=0.9), 0, (8, 8, 1), averages=True)


def everywhere(devices: int = 1):
    return sharding.replicated(sharding.make_mesh(jax.devices()[:devices]))


@functools.cache
def created(recipe: StateRecipe):
    return recipe.create(everywhere())


def state_at(recipe: StateRecipe, step: int):
    state = created(recipe)
    params = jax.tree.map(lambda leaf: leaf + step, state.params)
    return state.replace(step=jnp.asarray(step, jnp.int32), params=params)


def saved(recipe: StateRecipe, workdir: pathlib.Path, scores: dict[int, float | None], **options) -> None:
    checkpoints = Checkpoints(str(workdir), **options)
    for step, score in scores.items():
        metrics = None if score is None else {"top1": score}
        checkpoints.save(step, state_at(recipe, step), CONFIG, WINDOW, metrics)
    checkpoints.close()


def steps_in(workdir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def test_state_and_window_come_back_to_the_bit_on_another_number_of_devices(recipe, tmp_path):
    saved(recipe, tmp_path, {5: None})
    checkpoints = Checkpoints(str(tmp_path))
    state, window = checkpoints.restore(5, recipe.abstract(everywhere(4)))
    checkpoints.close()
    expected = state_at(recipe, 5)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(jax.tree.leaves(state.params)[0].sharding.device_set) == 4
    assert window == WINDOW


@pytest.mark.parametrize("scaled", [False, True], ids=["to_float16", "from_float16"])
def test_a_loss_scale_begins_anew_or_is_dropped_with_the_precision(recipe, tmp_path, scaled):
    before, after = (dataclasses.replace(recipe, scales_loss=scales) for scales in (scaled, not scaled))
    state = state_at(before, 5)
    if scaled:
        state = state.replace(loss_scale=state.loss_scale.update(jnp.asarray(False)))
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(5, state, CONFIG, WINDOW)
    checkpoints.wait()
    restored, _ = checkpoints.restore(5, after.abstract(everywhere(4)))
    same, _ = checkpoints.restore(5, before.abstract(everywhere(4)))
    checkpoints.close()
    for ours, theirs in zip(jax.tree.leaves(restored.opt_state), jax.tree.leaves(state.opt_state), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    if scaled:
        assert restored.loss_scale is None
        assert float(same.loss_scale.scale) == 2.0**15
    else:
        assert same.loss_scale is None
        assert float(restored.loss_scale.scale) == 2.0**16
        assert len(restored.loss_scale.scale.sharding.device_set) == 4


def test_newest_are_kept_and_the_best_besides(recipe, tmp_path):
    saved(recipe, tmp_path, {1: 0.5, 2: 0.9, 3: 0.7, 4: None, 5: 0.6, 6: None}, max_to_keep=2)
    assert steps_in(tmp_path) == [2, 5, 6]
    assert [find_checkpoint(str(tmp_path), which)[1] for which in ("best", "latest", "5")] == [2, 6, 5]
    with pytest.raises(UserError, match="has no step 3; it has 2, 5, 6"):
        find_checkpoint(str(tmp_path), "3")
    saved(recipe, tmp_path, {7: 0.8, 8: None}, max_to_keep=2)  # a restart must not forget which is best
    assert steps_in(tmp_path) == [2, 7, 8]


def test_the_best_is_best_in_the_chosen_metric(recipe, tmp_path):
    figures = {1: {"loss": 0.5, "top1": 0.9}, 2: {"loss": 0.3, "top1": 0.7}, 3: {"loss": 0.4, "top1": 0.8}}
    figures |= {4: {"loss": None, "top1": 0.1}, 5: {"top1": 0.2}}
    checkpoints = Checkpoints(str(tmp_path), max_to_keep=1, metric="loss")
    for step, each in figures.items():
        checkpoints.save(step, state_at(recipe, step), CONFIG, WINDOW, each)
    checkpoints.close()
    assert steps_in(tmp_path) == [2, 5]
    assert find_checkpoint(str(tmp_path), "best", "loss")[1] == 2
    assert describe_checkpoints(str(tmp_path), "loss") == (
        "the latest checkpoint is step 5, the best is step 2 (validation loss 0.3000)"
    )
    assert describe_checkpoints(str(tmp_path)).endswith("the best is step 2 (validation top-1 70.00%)")


def test_checkpoint_that_is_validated_later_can_be_the_best(recipe, tmp_path):
    saved(recipe, tmp_path, {1: 0.5, 2: None})
    checkpoints = Checkpoints(str(tmp_path), max_to_keep=1)
    checkpoints.add_metrics(2, {"top1": 0.9})
    checkpoints.add_metrics(2, {"top1": 0.1})  # what a checkpoint has stays
    assert find_checkpoint(str(tmp_path), "best")[1] == 2
    for step in (3, 4):
        checkpoints.save(step, state_at(recipe, step), CONFIG, WINDOW, {"top1": 0.7})
    checkpoints.close()
    assert steps_in(tmp_path) == [2, 4]
    saved(recipe, tmp_path, {5: None}, max_to_keep=1)
    assert steps_in(tmp_path) == [2, 5]
    checkpoints = Checkpoints(str(tmp_path))
    assert int(checkpoints.restore(2, recipe.abstract(everywhere()))[0].step) == 2
    checkpoints.close()


def damage(workdir: pathlib.Path, step: int) -> None:
    """Cuts every data file of a checkpoint to half its length."""
    files = [path for path in (workdir / "checkpoints" / str(step) / "state").rglob("*") if path.is_file()]
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damaged_checkpoint_is_named_and_passed_over(recipe, tmp_path, caplog):
    saved(recipe, tmp_path, {1: None, 2: None, 3: None})
    damage(tmp_path, 3)
    checkpoints = Checkpoints(str(tmp_path))
    restored = checkpoints.restore_newest(recipe.abstract(everywhere()))
    assert restored is not None
    assert int(restored[0].step) == 2
    assert (steps_in(tmp_path), (tmp_path / "damaged_checkpoints" / "3").is_dir()) == ([1, 2], True)
    checkpoints.save(3, state_at(recipe, 3), CONFIG, WINDOW)
    checkpoints.wait()
    again, _ = checkpoints.restore(3, recipe.abstract(everywhere()))
    assert int(again.step) == 3
    checkpoints.close()
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("densenet_jax")]
    assert any("checkpoints/3 is damaged" in warning and "going back" in warning for warning in warnings)


def test_nothing_but_damaged_checkpoints_is_a_users_error(recipe, tmp_path):
    saved(recipe, tmp_path, {1: None})
    damage(tmp_path, 1)
    checkpoints = Checkpoints(str(tmp_path))
    with pytest.raises(UserError, match=r"checkpoints/1 is damaged.*there is none before it"):
        checkpoints.restore_newest(recipe.abstract(everywhere()))
    checkpoints.close()


def list_files(checkpoint: pathlib.Path) -> list[str]:
    return sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


# What Orbax writes when it gives the checkpoint its name, and nothing reads.
NOT_READ = ("_CHECKPOINT_METADATA", "commit_success.txt")


@pytest.mark.parametrize(
    "harm", [flip, lambda data: data[: len(data) // 2], lambda data: None], ids=["flipped bit", "cut short", "missing"]
)
def test_harm_to_any_file_is_detected_and_the_file_named(harm, recipe, tmp_path):
    saved(recipe, tmp_path, {1: None, 2: 0.5})
    checkpoint, like = tmp_path / "checkpoints" / "2", recipe.abstract(everywhere())
    files = [name for name in list_files(checkpoint) if not name.endswith(NOT_READ)]
    assert {"data/metadata", "metrics/metrics", "state/_METADATA", "checksums.json"} <= set(files)
    checkpoints = Checkpoints(str(tmp_path))
    for name in files:
        content = (checkpoint / name).read_bytes()
        harmed = harm(content)
        (checkpoint / name).unlink() if harmed is None else (checkpoint / name).write_bytes(harmed)
        # A wrong checksum speaks against its file.
        named = ".*" if name == "checksums.json" and harmed is not None else name
        for read in (lambda: checkpoints.restore(2, like), lambda: load_checkpoint(str(tmp_path))):
            with pytest.raises(UserError, match=f"checkpoints/2 is damaged: {named} "):
                read()
        (checkpoint / name).write_bytes(content)
    state, _ = checkpoints.restore(2, like)
    checkpoints.close()
    assert int(state.step) == 2


def test_checkpoint_whose_validation_is_unreadable_is_passed_over(recipe, tmp_path, caplog):
    saved(recipe, tmp_path, {1: 0.5, 2: 0.9, 3: 0.7})
    (tmp_path / "checkpoints" / "2" / "metrics" / "metrics").write_text("{")
    assert find_checkpoint(str(tmp_path), "best")[1] == 3
    assert steps_in(tmp_path) == [1, 2, 3]
    checkpoints = Checkpoints(str(tmp_path))
    assert steps_in(tmp_path) == [1, 3]
    assert (tmp_path / "damaged_checkpoints" / "2").is_dir()
    assert find_checkpoint(str(tmp_path), "best")[1] == 3
    checkpoints.close()
    assert sum("2 is damaged: metrics/metrics" in record.getMessage() for record in caplog.records) == 2


def test_checkpoint_from_before_there_were_checksums_is_read(recipe, tmp_path):
    saved(recipe, tmp_path, {1: None, 2: None})
    for step in (1, 2):
        checkpoint = tmp_path / "checkpoints" / str(step)
        (checkpoint / "checksums.json").unlink()
        marked = (checkpoint / "data" / "metadata").read_text()
        (checkpoint / "data" / "metadata").write_text(marked.replace('"checksums": true', '"other": true'))
    damage(tmp_path, 2)  # what Orbax notices by itself is still reported
    checkpoints = Checkpoints(str(tmp_path))
    restored = checkpoints.restore_newest(recipe.abstract(everywhere()))
    checkpoints.close()
    assert restored is not None
    assert int(restored[0].step) == 1


def test_half_deleted_checkpoints_are_not_listed(recipe, tmp_path):
    saved(recipe, tmp_path, {1: 0.9, 2: 0.5, 3: 0.7})
    (tmp_path / "checkpoints" / "1" / "state" / "_METADATA").unlink()
    assert [find_checkpoint(str(tmp_path), which)[1] for which in ("latest", "best")] == [3, 3]
    with pytest.raises(UserError, match="has no step 7; it has 2, 3"):
        find_checkpoint(str(tmp_path), "7")
    shutil.rmtree(tmp_path / "checkpoints" / "3" / "data")
    for which in ("latest", "3"):
        message = r"checkpoints/3 is damaged: data/metadata is missing; give config.eval.checkpoint=2"
        with pytest.raises(UserError, match=message):
            find_checkpoint(str(tmp_path), which)
    checkpoints = Checkpoints(str(tmp_path))
    restored = checkpoints.restore_newest(recipe.abstract(everywhere()))
    checkpoints.close()
    assert restored is not None
    assert int(restored[0].step) == 2
    assert (tmp_path / "damaged_checkpoints" / "3").is_dir()


def test_a_directory_that_is_removed_during_the_run_is_a_users_error(recipe, tmp_path):
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(1, state_at(recipe, 1), CONFIG, WINDOW)
    checkpoints.wait()
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    with pytest.raises(UserError, match="was removed during the run"):
        checkpoints.wait()
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match="was removed during the run"):
        checkpoints.save(2, state_at(recipe, 2), CONFIG, WINDOW)
    with pytest.raises(UserError, match="was removed during the run"):
        checkpoints.close()
    assert not tmp_path.exists()


def test_whole_checkpoint_of_another_model_is_not_set_aside(recipe, tmp_path):
    saved(recipe, tmp_path, {1: None, 2: None})
    wider = create_model("densenet_bc_22_12", block_sizes=(1,), growth_rate=3)
    other = StateRecipe(wider, optax.sgd(0.1, momentum=0.9), 0, (8, 8, 1), averages=True)
    checkpoints = Checkpoints(str(tmp_path))
    with pytest.raises(UserError, match=r"checkpoints/2 is of another model: .* there and .* here"):
        checkpoints.restore_newest(other.abstract(everywhere()))
    checkpoints.close()
    assert steps_in(tmp_path) == [1, 2]


def test_averaged_weights_are_loaded_unless_the_raw_ones_are_asked_for(recipe, tmp_path, caplog):
    saved(recipe, tmp_path, {2: None})
    state = state_at(recipe, 2)
    caplog.clear()
    averaged, raw = load_checkpoint(str(tmp_path)), load_checkpoint(str(tmp_path), step=2, averaged=False)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []
    kernel = averaged["params"]["conv0"]["kernel"]
    np.testing.assert_array_equal(kernel, state.average["params"]["conv0"]["kernel"])
    np.testing.assert_array_equal(raw["params"]["conv0"]["kernel"], state.params["conv0"]["kernel"])


def test_a_directory_without_checkpoints_is_refused_and_left_unchanged(tmp_path):
    with pytest.raises(UserError, match="has no checkpoints"):
        load_checkpoint(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
