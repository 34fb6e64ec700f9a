"""Compilers for chips that are not here: libtpu and XLA's CUDA plugin.

Load them only in a process that is started with `ENVIRONMENT` and runs nothing itself.
"""

import importlib.util
import pathlib

import jax
from jax.experimental import topologies

from densenet_jax.errors import UserError
from densenet_jax.plan.topology import Topology, find_chip
from densenet_jax.training.sharding import make_mesh

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # compiled programs can't be run here
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "false",  # would change the program
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # there is no driver
    "TPU_SKIP_MDS_QUERY": "1",  # there is no TPU slice to query
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is held, so two processes may compile at a time
}
_MODULES = {"tpu": ("libtpu",), "cuda": ("jax_plugins.xla_cuda12", "nvidia.cuda_nvcc")}
_REQUIREMENTS = {"tpu": "requirements-plan.txt", "cuda": "requirements-plan-gpu.txt"}


def check_installed(compiler: str) -> None:
    """Checks that the compiler is installed.

    Raises:
        UserError: it isn't; the message says what to install.
    """
    find = importlib.util.find_spec  # raises an error where the parent package is missing
    missing = [name for name in _MODULES[compiler] if not (find(name.partition(".")[0]) and find(name))]
    if missing:
        raise UserError(
            f"planning for a {'TPU' if compiler == 'tpu' else 'GPU'} needs its compiler, but {missing[0]} is not "
            f"installed; run: pip install -r {_REQUIREMENTS[compiler]}"
        )


def absent_devices(topology: Topology) -> list[jax.Device]:
    """Returns the devices of a topology, one a chip, which can only be compiled for.

    Raises:
        UserError: the compiler is not installed.
    """
    check_installed(topology.chip.compiler)
    shape = "x".join(map(str, topology.shape))
    if topology.chip.compiler == "cuda":
        from jax._src import xla_bridge

        xla_bridge.backends()  # registers the plugin
        config = pathlib.Path(__file__).parent / "gpus" / f"{topology.chip.name}.txtpb"
        return topologies.get_topology_desc(
            topology.chip.name, "cuda", topology=shape, target_config=config.read_text(encoding="utf-8")
        ).devices
    options: dict[str, object] = {"chip_config_name": "megacore"} if topology.chip.axes == 3 else {}
    if topology.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    return topologies.get_topology_desc(f"{topology.chip.name}:{shape}", "tpu", **options).devices


def one_chip_mesh(name: str) -> jax.sharding.Mesh:
    """Makes a mesh of a single chip, such as "v5e" or "h200".

    Raises:
        UserError: there is no such chip, or its compiler is not installed.
    """
    chip = find_chip(name)
    return make_mesh(absent_devices(Topology(name, chip, (1,) * chip.axes)))
