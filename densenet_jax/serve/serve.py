"""A classifier behind MLServer: the Open Inference Protocol v2 over REST and gRPC, metrics, and a page to try it on."""

import asyncio
import dataclasses
import importlib.util
import logging
import os
import socket
from typing import Any

from densenet_jax.errors import UserError
from densenet_jax.predict.images import ImageLimits
from densenet_jax.predict.predictor import Predictor
from densenet_jax.system.console import print_status, spinner
from densenet_jax.version import __version__

MAX_IMAGES = 64  # in one request
MAX_BODY_BYTES = 32 * 2**20  # of one request
LIMITS = ImageLimits(max_bytes=MAX_BODY_BYTES, max_pixels=50_000_000)  # of one picture
POLL_SECS = 0.05
VERSION = "1"  # of the protocol's models; a server has one


@dataclasses.dataclass(frozen=True)
class Address:
    """Where to listen; a port of 0 is any free one."""

    host: str = "127.0.0.1"
    port: int = 8080
    grpc_port: int = 8081


def check_installed() -> None:
    """Checks for the optional extra.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("mlserver") is None:
        raise UserError("--mode serve needs MLServer; run: pip install -r requirements-serve.txt")


def listen(address: Address) -> socket.socket:
    """Takes the address of REST, and looks whether that of gRPC is free.

    Raises:
        UserError: one of them is in use, or is not of this machine.
    """
    _bound("--grpc_port", address.host, address.grpc_port).close()
    return _bound("--port", address.host, address.port)


def _bound(flag: str, host: str, port: int) -> socket.socket:
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
    predictor: Predictor,
    listener: socket.socket,
    address: Address,
    *,
    batch_wait_secs: float,
) -> dict[str, Any]:
    """Serves until SIGTERM or Ctrl-C, which ends what is under way first.

    Args:
        predictor: what is served.
        listener: from `listen`.
        address: as given to `listen`.
        batch_wait_secs: how long a request waits for others while the device is idle; while it is busy, requests
            gather anyhow.

    Returns:
        How many requests and images were answered.

    Raises:
        UserError: the gRPC address was taken meanwhile.
    """
    import mlserver.utils

    for library in ("mlserver", "uvicorn.error", "uvicorn"):
        logging.getLogger(library).setLevel(logging.ERROR)
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)  # another MLServer's, maybe
    mlserver.utils.install_uvloop_event_loop()
    return asyncio.run(_serve(predictor, listener, address, batch_wait_secs))


async def _serve(
    predictor: Predictor,
    listener: socket.socket,
    address: Address,
    batch_wait_secs: float,
) -> dict[str, Any]:
    from mlserver import ModelSettings, Settings
    from mlserver.settings import ModelParameters

    from densenet_jax.serve.runtime import ImageClassifier, metadata
    from densenet_jax.serve.server import OneModelServer

    name = predictor.model.name
    described = ModelSettings(
        name=name,
        implementation=ImageClassifier,
        platform="densenet_jax",
        versions=[VERSION],
        parameters=ModelParameters(version=VERSION),
        **metadata(predictor),
    )
    sizes = predictor.batch_sizes
    model = ImageClassifier(described, predictor, max_images=MAX_IMAGES, batch_wait_secs=batch_wait_secs)
    settings = Settings(
        debug=False,
        host=address.host,
        http_port=listener.getsockname()[1],
        grpc_port=address.grpc_port,
        grpc_max_message_length=MAX_BODY_BYTES,
        parallel_workers=0,
        metrics_endpoint="/metrics",
        server_name="densenet_jax",
        server_version=__version__,
        gzip_enabled=False,
    )
    server = OneModelServer(settings, model, listener, MAX_BODY_BYTES)
    running = asyncio.create_task(server.start([described]))
    with spinner(f"compiling for {', '.join(map(str, sizes))} images"):
        while not (model.ready or running.done()):
            await asyncio.wait([running], timeout=POLL_SECS)
    if model.ready and not running.done():
        where = f"{bracketed(address.host)}:{settings.http_port}"
        print_status(f"{name} is ready: REST and a page on http://{where}/, metrics on http://{where}/metrics")
        print_status(f"gRPC on {bracketed(address.host)}:{server.grpc_port}; Ctrl-C or SIGTERM stops")
    await running
    if model.failure is not None:
        raise model.failure
    print_status(f"stopped after {model.requests_served:,} requests with {model.images_served:,} images")
    return {"requests": model.requests_served, "images": model.images_served}


def bracketed(host: str) -> str:
    """A host as it stands in an address."""
    return f"[{host}]" if ":" in host else host
