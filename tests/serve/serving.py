"""A real server in a process of its own, and clients for it."""

import base64
import contextlib
import pathlib
import re
import resource
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import requests

from tests.main_processes import start_main

MODEL = "densenet_bc_22_12"
INFER = f"POST /v2/models/{MODEL}/infer HTTP/1.1\r\nHost: localhost\r\n".encode()
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Server:
    """A running `--mode serve`.

    Attributes:
        url: of REST and the page.
        grpc: "host:port".
        process: the process; its standard error is kept in `said`.
    """

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process
        self.said: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()
        assert self._ready.wait(240), "".join(self.said)
        assert process.poll() is None, "".join(self.said)
        text = "".join(self.said)
        self.url = re.search(r"page on (https?://[\d.:]+)/", text)[1]
        self.grpc = re.search(r"gRPC on ([\d.:]+);", text)[1]

    def _listen(self) -> None:
        for line in self.process.stderr:
            self.said.append(line)
            if line.startswith("gRPC on"):
                self._ready.set()
        self._ready.set()

    @property
    def infer_url(self) -> str:
        return f"{self.url}/v2/models/{MODEL}/infer"

    def memory_bytes(self) -> int:
        """Resident memory."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1])

    def metrics(self, *names: str) -> list[float]:
        """The values of metrics, each of its first labels."""
        text = requests.get(f"{self.url}/metrics", timeout=9).text
        return [float(re.search(rf"^{name}(?:{{.*}})? (.*)$", text, re.M)[1]) for name in names]

    def longest_stall_secs(self) -> float:
        """How long the event loop has been kept from its work at most, since the start."""
        return self.metrics("event_loop_longest_stall_seconds")[0]

    def computed(self) -> list[float]:
        """Batches and images that it has computed."""
        return self.metrics("served_batches_total", "served_images_total")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Asks it to stop; returns its exit status and standard output."""
        self.process.send_signal(number)
        output = self.process.stdout.read()
        status = self.process.wait(60)
        self._reader.join(10)
        return status, output


@contextlib.contextmanager
def serving(workdir: pathlib.Path, *arguments: str, files: int = 0, **environment: str) -> Iterator[Server]:
    """Serves the run in `workdir` on free ports, in a process that may open so many files."""
    ports = ("--port", "0", "--grpc_port", "0")
    digits = ("--config", "configs/digits.py", "--workdir", str(workdir), "--mode", "serve")
    with start_main(*digits, *ports, *arguments, **environment) as process:
        if files:
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (files, files))
        try:
            yield Server(process)
        finally:
            process.kill()


@contextlib.contextmanager
def many_files() -> Iterator[None]:
    """Lets this process have both ends of what it attacks with."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, before[1]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def connect(address: str, data: bytes = b"") -> socket.socket:
    """Connects to a URL or "host:port" and sends `data`, as far as the server takes it."""
    host, port = address.split("//")[-1].split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    with contextlib.suppress(OSError):
        connection.sendall(data)
    return connection


def pixels_input(pixels: np.ndarray) -> dict[str, Any]:
    """The input of a REST request that holds pixels."""
    return {
        "name": "image",
        "datatype": pixels.dtype.name.upper(),
        "shape": list(pixels.shape),
        "data": pixels.tolist(),
    }


def pictures_input(*pictures: bytes) -> dict[str, Any]:
    """The input of a REST request that holds encoded pictures."""
    data = [base64.b64encode(picture).decode() for picture in pictures]
    return {"name": "image_bytes", "datatype": "BYTES", "shape": [len(data)], "data": data}


def request_of(*inputs: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A REST request."""
    return {"inputs": list(inputs), **more}
