"""Measures requests a second and their latencies: `--mode serve` with shared batches and with single requests.

    python benchmarks/serving.py --output serving.json

Starts a server of each kind with a drawn model and clients that each send one image, wait for the answer and go on; the
two servers take turns. Clients and servers share the machine; the processor time of the server and of the clients for a
request is reported as well: the server's holds on a machine that has other work, and where both together fill the
cores, the clients' is missing from the server. `compute` rows are of the model alone, called in batches of one and of
the largest size: more than their ratio can't be gained by batches.
"""

import argparse
import asyncio
import base64
import contextlib
import importlib.metadata
import io
import json
import logging
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from versus import report

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
KINDS = {"batched": (1, 4, 16, 64), "single": (1,)}
IMAGES = 32  # different ones, sent in turn


def write_run(directory: pathlib.Path, model: str, image_size_px: int, channels: int) -> list[str]:
    """Saves a freshly drawn model as training saves it; returns the flags that name its settings."""
    import jax

    from configs import digits
    from densenet_jax.config import check_config, to_dict
    from densenet_jax.experiment import Experiment
    from densenet_jax.training.checkpoint import Checkpoints
    from densenet_jax.workdir import claim_workdir

    config = digits.get_config()
    config.unlock()
    config.model.name, config.data.image_size_px, config.data.channels = model, image_size_px, channels
    config.data.mean, config.data.std = (0.3,) * channels, (0.4,) * channels
    experiment = Experiment(check_config(config))
    claim_workdir(str(directory), experiment.config)
    checkpoints = Checkpoints(str(directory))
    checkpoints.save(1, jax.block_until_ready(experiment.initial_state()), to_dict(experiment.config), {}, {})
    checkpoints.wait()
    checkpoints.close()
    return ["--config", str(ROOT / "configs/digits.py"), "--workdir", str(directory)]


@contextlib.contextmanager
def server(
    flags: list[str], batch_sizes: tuple[int, ...], root: str = str(ROOT), python: str = sys.executable
) -> Iterator[tuple[str, str, int]]:
    """Yields a server's REST and gRPC addresses and its process, once it is ready."""
    command = [python, os.path.join(root, "main.py"), *flags, "--mode", "serve", "--port", "0", "--grpc_port", "0"]
    command += [f"--config.serve.batch_sizes={batch_sizes}"]
    with subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            said = ""
            for line in process.stderr:
                said += line
                if line.startswith("gRPC on"):
                    break
            match = re.search(r"page on (http://[\d.:]+)/.*\ngRPC on ([\d.:]+);", said)
            if not match:
                sys.exit(said)
            yield match[1], match[2], process.pid
        finally:
            process.terminate()
            process.communicate()


def requests_of(model: str, image_size_px: int, channels: int) -> dict[str, list]:
    """Makes the messages of each protocol: PNGs in base64 over REST, raw pixels over gRPC."""
    import numpy as np
    from PIL import Image
    from tritonclient.grpc import service_pb2

    shape = (image_size_px, image_size_px, channels)
    rest, grpc = [], []
    for pixels in np.random.default_rng(0).integers(0, 256, (IMAGES, *shape), dtype=np.uint8):
        file = io.BytesIO()
        Image.fromarray(pixels.squeeze()).save(file, "PNG", compress_level=1)
        picture = {"name": "image_bytes", "datatype": "BYTES", "shape": [1]}
        picture["data"] = [base64.b64encode(file.getvalue()).decode()]
        rest.append(json.dumps({"inputs": [picture], "outputs": [{"name": "probabilities"}]}).encode())
        message = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=[pixels.tobytes()])
        message.inputs.add(name="image", datatype="UINT8", shape=[1, *shape])
        message.outputs.add(name="probabilities")
        grpc.append(message)
    return {"rest": rest, "grpc": grpc}


def cpu_secs(process: int) -> float:
    """Returns the processor time that a process has used."""
    text = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(text[11]) + int(text[12])) / os.sysconf("SC_CLK_TCK")


async def load(protocol: str, addresses: tuple[str, str, int], model: str, messages: list, clients: int, secs: float):
    """Returns the latencies of all requests of `clients` clients, in seconds, and how long it took."""
    import aiohttp
    import grpc
    from tritonclient.grpc import service_pb2_grpc

    url, headers = f"{addresses[0]}/v2/models/{model}/infer", {"Content-Type": "application/json"}
    latencies: list[float] = []
    async with contextlib.AsyncExitStack() as stack:
        if protocol == "rest":
            connector = aiohttp.TCPConnector(limit=0)
            session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))

            async def send(message: bytes) -> None:
                async with session.post(url, data=message, headers=headers) as answer:
                    await answer.read()
                    answer.raise_for_status()
        else:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(addresses[1]))
            send = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer

        async def client(number: int, end: float) -> None:
            while (start := time.perf_counter()) < end:
                number += 1
                await send(messages[number % IMAGES])
                latencies.append(time.perf_counter() - start)

        start = time.perf_counter()
        await asyncio.gather(*(client(7 * number, start + secs) for number in range(clients)))
        return latencies, time.perf_counter() - start


def compute_rows(flags: list[str], rounds: int) -> list[dict]:
    """Measures images a second of the model alone, in batches of one and of the largest size."""
    import numpy as np

    from densenet_jax.predict.predictor import Predictor

    sizes = {kind: max(sizes) for kind, sizes in KINDS.items()}
    predictor = Predictor.from_workdir(flags[-1], batch_sizes=tuple(sizes.values()))
    predictor.compile()
    measured: dict[str, list] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind, size in sizes.items():
            images = np.zeros((size, *predictor.image_shape), np.uint8)
            count, start, started_cpu = 0, time.perf_counter(), time.process_time()
            while time.perf_counter() - start < 1:
                predictor.probabilities(images)
                count += size
            rate, cpu = count / (time.perf_counter() - start), (time.process_time() - started_cpu) / count
            measured[kind].append(([], rate, cpu, 0.0))
    return [row_of("compute", kind, 1, results) for kind, results in measured.items()]


def row_of(protocol: str, kind: str, clients: int, results: list[tuple[list[float], float, float, float]]) -> dict:
    """Takes medians over the rounds: latencies, requests a second, processor seconds a request of both sides."""
    rates = [rate for _, rate, _, _ in results]
    together = sorted(latency for latencies, *_ in results for latency in latencies)
    cuts = statistics.quantiles(together, n=100) if together else None
    return {
        "protocol": protocol,
        "batches": kind,
        "clients": clients,
        "requests_per_sec": round(statistics.median(rates), 1),
        "lowest": round(min(rates), 1),
        "highest": round(max(rates), 1),
        "cpu_milliseconds": round(1e3 * statistics.median(secs for _, _, secs, _ in results), 2),
        "clients_cpu_milliseconds": round(1e3 * statistics.median(secs for *_, secs in results), 2),
        "p50_milliseconds": cuts and round(cuts[49] * 1e3, 1),
        "p99_milliseconds": cuts and round(cuts[98] * 1e3, 1),
    }


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="densenet121")
    parser.add_argument("--image_size_px", type=int, default=32)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--secs", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each row, taken in turns")
    parser.add_argument(
        "--against", nargs=2, metavar=("TREE", "PYTHON"), help="another version's batched server, by turns with these"
    )
    parser.add_argument("--output", help="write the rows to this JSON file")
    arguments = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)
    model, size = arguments.model, (arguments.image_size_px, arguments.channels)
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        flags = write_run(pathlib.Path(directory), model, *size)
        rows = compute_rows(flags, arguments.rounds)
        servers = {kind: stack.enter_context(server(flags, sizes)) for kind, sizes in KINDS.items()}
        if arguments.against:
            servers["against"] = stack.enter_context(server(flags, KINDS["batched"], *arguments.against))
        messages = requests_of(model, *size)
        cases = [(protocol, kind, count) for count in arguments.clients for protocol in messages for kind in servers]
        measured: dict[tuple, list] = {case: [] for case in cases}
        for _ in range(arguments.rounds):
            for protocol, kind, count in cases:
                coming = load(protocol, servers[kind], model, messages[protocol], count, arguments.secs)
                before, clients_before = cpu_secs(servers[kind][2]), time.process_time()
                latencies, secs = asyncio.run(coming)
                used = (cpu_secs(servers[kind][2]) - before) / len(latencies)
                clients_used = (time.process_time() - clients_before) / len(latencies)
                measured[protocol, kind, count].append((latencies, len(latencies) / secs, used, clients_used))
        rows += [row_of(*case, results) for case, results in measured.items()]
    show(rows)
    if arguments.output:
        versions = {name: importlib.metadata.version(name) for name in ("jax", "uvicorn", "grpcio")}
        named = [{"model": model, "image_size_px": arguments.image_size_px, **row} for row in rows]
        report.write(arguments.output, report.device_name("cpu"), versions, named)


def show(rows: list[dict]) -> None:
    """Prints the table, with the gain of shared batches in requests a second and in processor time."""
    print(
        f"{'protocol':10}{'batches':10}{'clients':>8}{'requests/s':>12}{'range':>14}{'p50 ms':>9}{'p99 ms':>9}"
        f"{'cpu ms':>9}{'clients':>9}{'gain':>7}{'cpu':>6}"
    )
    single = {(row["protocol"], row["clients"]): row for row in rows if row["batches"] == "single"}
    for row in rows:
        other = single[row["protocol"], row["clients"]]
        gain = row["requests_per_sec"] / other["requests_per_sec"]
        cpu = other["cpu_milliseconds"] / row["cpu_milliseconds"]
        clients = row["clients_cpu_milliseconds"]
        spread, p50, p99 = f"{row['lowest']:.0f}-{row['highest']:.0f}", row["p50_milliseconds"], row["p99_milliseconds"]
        print(
            f"{row['protocol']:10}{row['batches']:10}{row['clients']:8}{row['requests_per_sec']:12.0f}{spread:>14}"
            f"{p50 or '':>9}{p99 or '':>9}{row['cpu_milliseconds']:9.2f}{clients:9.2f}{gain:7.2f}{cpu:6.2f}"
        )


if __name__ == "__main__":
    main()
