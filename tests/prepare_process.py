"""Prepares a process for running tests: importing this module does it, before anything of ours is imported."""

import functools

from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401 - the hook below looks it up by name

# From here on the shapes in signatures are checked at every call.
install_import_hook(["densenet_jax.models", "densenet_jax.training", "densenet_jax.augment"], "tests.typecheck.checked")

import jax  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
from jax._src import core  # noqa: E402
from jax._src.interpreters import mlir  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# All programs of a worker share a context: making one loads every dialect, a fifth of compiling a single operation.
mlir.make_ir_context = functools.cache(mlir.make_ir_context)
# Since JAX 0.10 `jnp.asarray` compiles a program for each shape of a NumPy array, which returns its argument.
if hasattr(core, "stage_p"):
    core.stage_p.def_impl(lambda x: x if isinstance(x, jax.Array) else jax.device_put(x, may_alias=False))
# What is quickly compiled again is not written for other workers: writing took longer than reading it ever spared.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
# A checkpoint is written by one of this process's eight devices and not by all in turns, for which every shape is
# sliced by a program of its own. The processes that tests start write as users' do.
ocp.type_handlers.get_type_handler(jax.Array)._use_replica_parallel = False
