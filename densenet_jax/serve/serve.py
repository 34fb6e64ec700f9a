"""Prepares serving: what must be in order before a model is loaded."""

import importlib.util
import os
import signal
import socket
from typing import Any, NoReturn

from densenet_jax.errors import UserError
from densenet_jax.system.console import print_status

NEEDED = ("uvicorn", "httptools", "uvloop", "orjson", "grpc", "tritonclient", "prometheus_client")


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


def listen(host: str, port: int, grpc_port: int) -> socket.socket:
    """Takes the REST address and checks that the gRPC address is free; port 0 is any free one.

    Raises:
        UserError: one of them is in use, or is not of this machine.
    """
    _bind("--grpc_port", host, grpc_port).close()
    return _bind("--port", host, port)


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
