"""Runs both servers in one event loop: starts them, watches over them, and ends them in time."""

import asyncio
import logging
import signal
import socket
import time
from typing import Any

import uvicorn
from prometheus_client import Gauge
from uvicorn.server import ServerState

from densenet_jax.predict.predictor import Predictor
from densenet_jax.serve.connections import HEAD_SECS, IDLE_SECS, LimitedProtocol
from densenet_jax.serve.grpc import make_server
from densenet_jax.serve.limits import (
    SMALL_BODY_BYTES,
    Access,
    BodyMemory,
    allow_connections,
    open_files,
    return_memory,
    shed_quiet,
)
from densenet_jax.serve.rest import Rest
from densenet_jax.serve.runtime import Classifier
from densenet_jax.system.console import print_status, spinner

WATCH_SECS = 0.05
RETURN_MEMORY_TICKS = 20  # between returning freed memory
RETURN_MEMORY_SECS = 60.0  # after a large request: decoding that was begun for it goes on when it is given up
STALL = Gauge("event_loop_longest_stall_seconds", "How long the event loop has been kept from its work at most.")
FLUSH_SECS = 2.0  # to send the last answers


async def run(
    predictor: Predictor, listener: socket.socket, host: str, grpc_port: int, access: Access, config: Any
) -> dict[str, Any]:
    """Serves until SIGTERM or Ctrl-C: accepts nothing new then, and finishes requests or answers 503 to them.

    Until the model is ready, the server answers that it isn't.

    Args:
        listener: bound to the REST address.

    Returns:
        the counts of answered requests and images.

    Raises:
        UserError: the gRPC address is in use, or too few files may be open.
    """
    for library in ("uvicorn.error", "uvicorn", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    model, memory = Classifier(predictor, config), BodyMemory()
    most, most_grpc = allow_connections()
    state, tls = ServerState(), access.tls()
    asgi = uvicorn.Config(
        Rest(model, access, memory),
        http=LimitedProtocol,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        interface="asgi3",
        timeout_keep_alive=int(IDLE_SECS),
    )
    asgi.load()
    grpc, grpc_port = make_server(model, access, memory, host, grpc_port, most_grpc)
    rest = await loop.create_server(
        lambda: LimitedProtocol(asgi, state, {}, most=most),
        sock=listener,
        ssl=tls,
        backlog=256,
        ssl_handshake_timeout=HEAD_SECS if tls else None,
    )
    await grpc.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    watching = asyncio.create_task(_watch(model, memory, state, grpc_port, most_grpc))
    stopping, compiling = asyncio.create_task(stopped.wait()), asyncio.create_task(model.compile())
    with spinner(f"compiling for {', '.join(map(str, predictor.batch_sizes))} images"):
        await asyncio.wait([stopping, compiling], return_when=asyncio.FIRST_COMPLETED)
    if compiling.done():
        compiling.result()
        shown = f"[{host}]" if ":" in host else host
        where = f"{'https' if tls else 'http'}://{shown}:{listener.getsockname()[1]}"
        if not access.is_loopback and not access.token:
            print_status(f"anybody who reaches {shown} may ask: there is no login; config.serve.token_file sets one")
        print_status(f"{model.name} is ready: REST and a page on {where}/, metrics on {where}/metrics")
        print_status(f"gRPC on {shown}:{grpc_port}; Ctrl-C or SIGTERM stops")
    await stopping
    rest.close()
    _shut_down(state)
    closing = asyncio.create_task(grpc.stop(config.serve.stop_secs + FLUSH_SECS / 2))
    await model.stop(config.serve.stop_secs)
    await asyncio.wait([closing, *state.tasks], timeout=FLUSH_SECS)
    watching.cancel()
    _shut_down(state)
    await asyncio.sleep(0)  # lets transports flush what they can at once
    print_status(f"stopped after {model.requests_served:,} requests with {model.images_served:,} images")
    return {"requests": model.requests_served, "images": model.images_served}


def _shut_down(state: ServerState) -> None:
    for connection in list(state.connections):
        connection.shutdown()


async def _watch(model: Classifier, memory: BodyMemory, state: ServerState, grpc_port: int, most: int) -> None:
    """Gives up late requests, makes room for newcomers of gRPC, returns memory, and times the event loop."""
    loop, tick, longest, last_large = asyncio.get_running_loop(), 0, 0.0, float("-inf")
    while True:
        started, worked = loop.time(), time.process_time()
        await asyncio.sleep(WATCH_SECS)
        # No more than this process has worked: the work of other processes is not our stall.
        worked = time.process_time() - worked
        longest = max(longest, min(worked, loop.time() - started - WATCH_SECS))
        STALL.set(longest)
        tick += 1
        model.give_up_late()
        if len(open_files()) - len(state.connections) > most // 2:
            await asyncio.to_thread(shed_quiet, grpc_port, most)
        if memory.seen or memory.used > SMALL_BODY_BYTES:
            memory.seen, last_large = 0, started
        if started - last_large < RETURN_MEMORY_SECS and tick % RETURN_MEMORY_TICKS == 0:
            await asyncio.to_thread(return_memory)
