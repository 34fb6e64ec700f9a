"""Serves a classifier over REST and gRPC: the Open Inference Protocol v2, metrics, and a page to try it on."""

import dataclasses
import importlib.util
import os
import signal
import socket
from typing import Any, NoReturn

from densenet_jax.distributed import processes
from densenet_jax.errors import UserError
from densenet_jax.predict.predictor import Predictor
from densenet_jax.serve.limits import Access
from densenet_jax.system.console import print_status

NEEDED = ("uvicorn", "httptools", "uvloop", "orjson", "grpc", "tritonclient", "prometheus_client")


@dataclasses.dataclass(frozen=True)
class Address:
    """Address to listen on; port 0 is any free one."""

    host: str = "127.0.0.1"
    port: int = 8080
    grpc_port: int = 8081


def check_installed() -> None:
    """Checks that the optional extra is installed.

    Raises:
        UserError: it isn't.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--mode serve needs {', '.join(missing)}; run: pip install -r requirements-serve.txt")


def end_when_asked() -> None:
    """Lets SIGTERM and Ctrl-C end the process at once, until the server handles them: there is nothing to finish."""

    def end(*_: Any) -> NoReturn:
        print_status("interrupted")
        os._exit(130)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


def listen(address: Address) -> socket.socket:
    """Takes the REST address and checks that the gRPC address is free.

    Raises:
        UserError: one of them is in use, or is not of this machine.
    """
    _bind("--grpc_port", address.host, address.grpc_port).close()
    return _bind("--port", address.host, address.port)


def _bind(flag: str, host: str, port: int) -> socket.socket:
    bound = None
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(where)
    except (OSError, OverflowError) as error:
        if bound is not None:
            bound.close()
        raise UserError(
            f"{flag} {port} of {host} can't be used ({getattr(error, 'strerror', None) or error}); "
            "give another port, 0 for any free one, or another --host."
        ) from error
    return bound


def serve(
    predictor: Predictor, listener: socket.socket, address: Address, access: Access, config: Any
) -> dict[str, Any]:
    """Serves until SIGTERM or Ctrl-C, then finishes open requests; returns the counts of answered requests and images.

    Args:
        listener: from `listen`.

    Raises:
        UserError: the gRPC address was taken meanwhile, or too few files may be open.
    """
    import uvloop

    from densenet_jax.serve import server

    processes.abandon_threads()  # of a compilation, or of pictures that nobody waits for any more
    return uvloop.run(server.run(predictor, listener, address.host, address.grpc_port, access, config))
