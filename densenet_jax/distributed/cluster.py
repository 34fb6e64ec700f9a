"""Finds the processes of this run from flags or environment, before contacting any of them."""

import dataclasses
import os
import re
import urllib.request
from collections.abc import Mapping

from jax._src import cloud_tpu_init  # the only way to detect TPU chips offline

from densenet_jax.errors import UserError

_METADATA = "http://{}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Several processes that compute one run.

    Attributes:
        coordinator: "host:port" of process 0; None where JAX finds it, on TPUs.
        index: of this process; None where JAX finds it.
        local_devices: the devices of this host that belong to this process; None for all that it sees.
    """

    coordinator: str | None
    count: int
    index: int | None
    local_devices: tuple[int, ...] | None = None

    @property
    def address(self) -> str:
        """The coordinator for a message."""
        return self.coordinator or "process 0 of the TPU slice"


def find_cluster(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    environ: Mapping[str, str] = os.environ,
) -> Cluster | None:
    """Returns the cluster that the flags name, else that of SLURM or of the TPU slice; None for a single process.

    Uses no network, except on a TPU VM whose environment does not list the slice's workers: there it asks the machine's
    own metadata server.

    Raises:
        UserError: the flags contradict each other or are out of range.
    """
    if any(flag is not None for flag in (coordinator, num_processes, process_id)):
        return _from_flags(coordinator, num_processes, process_id)
    return _from_slurm(environ) or _from_tpu(environ)


def _from_flags(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Cluster | None:
    if coordinator is None or num_processes is None or process_id is None:
        given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
        missing = " and ".join(name for name, value in given.items() if value is None)
        present = next(name for name, value in given.items() if value is not None)
        raise UserError(
            f"{present} is given without {missing}; give all three, or none where SLURM or a TPU slice tells them."
        )
    address = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+):(\d{1,5})", coordinator)
    if address is None or not 0 < int(address.group(2)) < 2**16:
        raise UserError(f"--coordinator is {coordinator!r}; expected HOST:PORT of process 0, such as 10.0.0.2:8476.")
    if num_processes < 1:
        raise UserError(f"--num_processes is {num_processes}; expected 1 or more.")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id is {process_id}; expected 0 to {num_processes - 1} with that --num_processes.")
    return Cluster(coordinator, num_processes, process_id) if num_processes > 1 else None


def _from_slurm(environ: Mapping[str, str]) -> Cluster | None:
    """Returns the tasks of a SLURM job step; None outside of srun."""
    if not all(name in environ for name in _SLURM) or int(environ["SLURM_NTASKS"]) < 2:
        return None
    first = re.match(r"([^,\[]+)(?:\[([^],-]+))?", environ["SLURM_STEP_NODELIST"])
    if first is None:
        raise UserError(f"SLURM_STEP_NODELIST is {environ['SLURM_STEP_NODELIST']!r}, which names no host; use srun.")
    port = environ.get("JAX_COORDINATOR_PORT") or 2**16 - 2**12 + int(environ["SLURM_JOB_ID"]) % 2**12
    return Cluster(
        f"{first.group(1)}{first.group(2) or ''}:{port}",
        int(environ["SLURM_NTASKS"]),
        int(environ["SLURM_PROCID"]),
        _slurm_devices(environ),
    )


def _slurm_devices(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """Returns this task's share of the host's GPUs; None where SLURM has already assigned them."""
    tasks = re.match(r"\d+", environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_NTASKS_PER_NODE", "1")))
    count, place = int(tasks.group()) if tasks else 1, int(environ["SLURM_LOCALID"])
    visible = [name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    dealt_out = any(name in environ for name in ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK"))
    if count == 1 or dealt_out or len(visible) < count:
        return None
    share = len(visible) // count
    return tuple(range(place * share, (place + 1) * share))


def _from_tpu(environ: Mapping[str, str]) -> Cluster | None:
    """Returns the workers of one or several TPU slices; JAX finds which one this is."""
    platforms = environ.get("JAX_PLATFORMS", "")
    if not cloud_tpu_init.running_in_cloud_tpu_vm or (platforms and "tpu" not in platforms):
        return None
    names = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or _endpoints(environ)
    count = len(names.split(",")) * int(environ.get("MEGASCALE_NUM_SLICES") or 1)
    return Cluster(None, count, None) if count > 1 else None


def _endpoints(environ: Mapping[str, str]) -> str:
    """Reads the slice's workers from a TPU VM's metadata server; "" where there is none."""
    url = _METADATA.format(environ.get("GCE_METADATA_IP", "metadata.google.internal"))
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode("utf-8").strip()
    except OSError:
        return ""
