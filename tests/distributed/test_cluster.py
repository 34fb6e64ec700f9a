"""Who belongs to a run: flags, SLURM's variables and a TPU slice's, and what contradicts itself."""

import http.server
import threading

import pytest
from jax._src import cloud_tpu_init

from densenet_jax.distributed.cluster import Cluster, find_cluster
from densenet_jax.errors import UserError

ALONE = (None, None, None)
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "gpu[007-009,012],login1",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3",
}


def test_alone_without_a_network_call(monkeypatch):
    monkeypatch.setattr("densenet_jax.distributed.cluster._endpoints", lambda _: pytest.fail("asked the network"))
    assert find_cluster(*ALONE, {}) is None
    assert find_cluster("10.0.0.2:8476", 1, 0, {}) is None
    outside_of_srun = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}
    assert find_cluster(*ALONE, outside_of_srun) is None
    assert find_cluster(*ALONE, {**SLURM, "SLURM_NTASKS": "1"}) is None


def test_flags_win():
    assert find_cluster("[::1]:8476", 4, 3, SLURM) == Cluster("[::1]:8476", 4, 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("host:1", None, None), "--coordinator is given without --num_processes and --process_id"),
        ((None, 2, 0), "--num_processes is given without --coordinator"),
        ((None, None, 0), "--process_id is given without --coordinator and --num_processes"),
        (("host:1", 2, 2), "--process_id is 2; expected 0 to 1"),
        (("host:1", 2, -1), "--process_id is -1; expected 0 to 1"),
        (("host:1", 0, 0), "--num_processes is 0"),
        (("host", 2, 0), "expected HOST:PORT"),
        (("host:99999", 2, 0), "expected HOST:PORT"),
        (("host:port", 2, 0), "expected HOST:PORT"),
        (("", 2, 0), "expected HOST:PORT"),
    ],
)
def test_flags_that_contradict_themselves(flags, message):
    with pytest.raises(UserError, match=message):
        find_cluster(*flags, {})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Cluster("gpu007:61441", 8, 5, (1,))),  # a process a GPU, all of which all tasks see
        ({"SLURM_GPUS_PER_TASK": "1", "CUDA_VISIBLE_DEVICES": "0"}, Cluster("gpu007:61441", 8, 5)),
        ({"CUDA_VISIBLE_DEVICES": "1"}, Cluster("gpu007:61441", 8, 5)),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x8)", "SLURM_LOCALID": "0"}, Cluster("gpu007:61441", 8, 5)),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x4)"}, Cluster("gpu007:61441", 8, 5, (2, 3))),
        ({"SLURM_STEP_NODELIST": "node1,node2"}, Cluster("node1:61441", 8, 5, (1,))),
        ({"JAX_COORDINATOR_PORT": "7"}, Cluster("gpu007:7", 8, 5, (1,))),
    ],
)
def test_slurm(changes, expected):
    assert find_cluster(*ALONE, {**SLURM, **changes}) == expected


def test_tpu_slice_by_its_environment(monkeypatch):
    variables = {"TPU_WORKER_HOSTNAMES": "t0,t1,t2,t3", "TPU_WORKER_ID": "2"}
    assert find_cluster(*ALONE, variables) is None  # without chips they mean nothing
    monkeypatch.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    assert find_cluster(*ALONE, variables) == Cluster(None, 4, None)
    assert find_cluster(*ALONE, {**variables, "MEGASCALE_NUM_SLICES": "2"}) == Cluster(None, 8, None)
    assert find_cluster(*ALONE, {"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert find_cluster(*ALONE, {**variables, "JAX_PLATFORMS": "cpu"}) is None


@pytest.mark.parametrize(("endpoints", "count"), [("a:0:10.0.0.2,b:1:10.0.0.3", 2), ("10.0.0.2", None)])
def test_tpu_slice_by_the_metadata_server(monkeypatch, endpoints, count):
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.headers["Metadata-Flavor"] == "Google"
            assert self.path.endswith("/attributes/worker-network-endpoints")
            self.send_response(200)
            self.end_headers()
            self.wfile.write(endpoints.encode())

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        actual = find_cluster(*ALONE, {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"})
        server.shutdown()
        thread.join()
    assert actual == (Cluster(None, count, None) if count else None)
