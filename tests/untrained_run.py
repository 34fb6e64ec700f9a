"""A finished run without the training: a small model with drawn weights, saved as training saves it."""

import pathlib

import jax
import numpy as np

from configs import digits
from densenet_jax.config import check_config, to_dict
from densenet_jax.experiment import Experiment
from densenet_jax.training.checkpoint import Checkpoints
from densenet_jax.workdir import claim_workdir, write_labels


def make_run(workdir: pathlib.Path, directory: pathlib.Path, **changes) -> Experiment:
    """Writes a run on the digits, prepared in `directory`, as if it had been trained for one step.

    Its statistics are drawn, too, so that a mistake in a norm shows. `changes` are settings as section__key.
    """
    config = digits.get_config()
    config.unlock()
    config.data.dir = str(directory)
    config.train.global_batch_size = 16
    for key, value in changes.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    experiment = Experiment(check_config(config))
    state = jax.tree_util.tree_map_with_path(_draw, experiment.abstract_state)
    workdir.mkdir(parents=True, exist_ok=True)
    claim_workdir(str(workdir), experiment.config)
    write_labels(str(workdir), experiment.data.eval_source.class_names)
    checkpoints = Checkpoints(str(workdir))
    checkpoints.save(1, state, to_dict(experiment.config), {}, {"top1": 0.5}, experiment.data.identify(train=True))
    checkpoints.wait()
    checkpoints.close()
    return experiment


def _draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Numbers that keep activations in bounds, by what the leaf is; drawing them takes less time than compiling."""
    name, drawn = jax.tree_util.keystr(path), np.random.default_rng(leaf.size)
    if leaf.dtype != np.float32:
        values = np.ones(leaf.shape)
    elif "kernel" in name:
        fan_in = 1 if "classifier" in name else max(1, leaf.size // leaf.shape[-1])
        values = drawn.normal(0, (2 / fan_in) ** 0.5, leaf.shape)
    elif "scale" in name or "var" in name:
        values = drawn.uniform(0.5, 1.5, leaf.shape)
    else:
        values = drawn.normal(0, 0.1, leaf.shape)
    return jax.device_put(values.astype(leaf.dtype), leaf.sharding)
