"""What `--mode` names: each takes the checked settings and a work directory and returns the last line's figures."""

import os
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from densenet_jax.evaluate import evaluate
from densenet_jax.experiment import Experiment
from densenet_jax.progress import say, working
from densenet_jax.train import train
from densenet_jax.training import sharding
from densenet_jax.training.checkpoint import Checkpoints, restore_variables

Config = ml_collections.FrozenConfigDict


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that a second start does not compile again.

    The directory is $JAX_COMPILATION_CACHE_DIR, by default densenet_jax/compiled in the user's cache.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(base, "densenet_jax", "compiled"))


def train_mode(config: Config, workdir: str) -> dict[str, Any]:
    """Trains from the newest good checkpoint of `workdir`, else from the start."""
    use_compilation_cache()
    return train(Experiment(config), workdir)


def eval_mode(config: Config, workdir: str) -> dict[str, Any]:
    """Evaluates a checkpoint of `workdir` and changes nothing there."""
    use_compilation_cache()
    experiment = Experiment(config)
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.resolve(str(config.eval.checkpoint))
    checkpoints.close()
    variables = restore_variables(checkpoints.directory, step, sharding.replicated(experiment.mesh))
    experiment.check_fits(variables, f"{checkpoints.directory}/{step}")
    say(f"evaluating step {step} of {workdir} on {config.data.name} {config.data.eval_split}")
    with working("compiling"):
        eval_step = experiment.compile_eval_step()
    figures = evaluate(
        eval_step,
        variables,
        experiment.eval_batches(),
        experiment.mesh,
        examples=len(experiment.eval_source),
        batch_count=experiment.eval_batch_count,
    )
    return {"step": step, **figures}


MODES: dict[str, Callable[[Config, str], dict[str, Any]]] = {"train": train_mode, "eval": eval_mode}


def describe() -> str:
    """One line a mode, for --help."""
    lines = (f"  {name:8}{(mode.__doc__ or '').splitlines()[0]}" for name, mode in MODES.items())
    return "modes:\n" + "\n".join(lines)
