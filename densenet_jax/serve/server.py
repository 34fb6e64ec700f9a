"""Runs both servers in one event loop: starts them, watches over them, and ends them in time."""

import asyncio
import functools
import logging
import signal
import socket
import time
from typing import Any

import uvicorn
import uvloop
from prometheus_client import Gauge
from uvicorn.server import ServerState

from densenet_jax.distributed import processes
from densenet_jax.predict.predictor import Predictor
from densenet_jax.serve.connections import HEAD_SECS, IDLE_SECS, LimitedProtocol
from densenet_jax.serve.grpc import make_server
from densenet_jax.serve.limits import Access, allow_connections, open_files, return_memory, shed_quiet
from densenet_jax.serve.rest import Rest
from densenet_jax.serve.runtime import Classifier
from densenet_jax.system.console import print_status, spinner

WATCH_SECS = 0.05
SLOW_TICKS = 20  # between looks at what takes longer
RETURN_MEMORY_SECS = 60.0  # after a large request: decoding that was begun for it goes on when it is given up
STALL = Gauge("event_loop_longest_stall_seconds", "How long the event loop has been kept from its work at most.")
FLUSH_SECS = 2.0  # to send the last answers


def serve(predictor: Predictor, listener: socket.socket, grpc_port: int, access: Access, config: Any) -> dict[str, Any]:
    """Serves until SIGTERM or Ctrl-C: accepts nothing new then, and finishes requests or answers 503 to them.

    Until the model is ready, the server answers that it isn't.

    Args:
        listener: bound to the REST address.

    Returns:
        the counts of answered requests and images.

    Raises:
        UserError: the gRPC address is in use, or too few files may be open.
    """
    processes.abandon_threads()  # of a compilation, or of pictures that nobody waits for any more
    for library in ("uvicorn.error", "uvicorn", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    return uvloop.run(_run(Classifier(predictor, config), listener, grpc_port, access, config.serve.stop_secs))


async def _run(
    model: Classifier, listener: socket.socket, grpc_port: int, access: Access, stop_secs: float
) -> dict[str, Any]:
    loop, stopped, state = asyncio.get_running_loop(), asyncio.Event(), ServerState()
    most, most_grpc = allow_connections()
    asgi = uvicorn.Config(
        Rest(model, access),
        http=LimitedProtocol,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        interface="asgi3",
        timeout_keep_alive=int(IDLE_SECS),
    )
    grpc, grpc_port = make_server(model, access, grpc_port, most_grpc)
    rest = await loop.create_server(
        functools.partial(LimitedProtocol, asgi, state, {}, most=most),
        sock=listener,
        ssl=access.tls,
        backlog=256,
        ssl_handshake_timeout=HEAD_SECS if access.tls else None,
    )
    await grpc.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    watching = asyncio.create_task(_watch(model, state, grpc_port, most_grpc))
    stopping, compiling = asyncio.create_task(stopped.wait()), asyncio.create_task(model.compile())
    with spinner(f"compiling for {', '.join(map(str, model.batch_sizes))} images"):
        await asyncio.wait([stopping, compiling], return_when=asyncio.FIRST_COMPLETED)
    if compiling.done():
        compiling.result()
        shown = f"[{access.host}]" if ":" in access.host else access.host
        where = f"{'https' if access.tls else 'http'}://{shown}:{listener.getsockname()[1]}"
        if not access.is_loopback and not access.token:
            print_status(f"anybody who reaches {shown} may ask: there is no login; config.serve.token_file sets one")
        print_status(f"{model.name} is ready: REST and a page on {where}/, metrics on {where}/metrics")
        print_status(f"gRPC on {shown}:{grpc_port}; Ctrl-C or SIGTERM stops")
    await stopping
    rest.close()
    for connection in list(state.connections):
        connection.shutdown()
    closing = asyncio.create_task(grpc.stop(stop_secs + FLUSH_SECS / 2))
    await model.stop(stop_secs)
    await asyncio.wait([closing, *state.tasks], timeout=FLUSH_SECS)
    watching.cancel()
    for connection in list(state.connections):
        connection.shutdown()
    await asyncio.sleep(0)  # lets transports flush what they can at once
    print_status(f"stopped after {model.requests_served:,} requests with {model.images_served:,} images")
    return {"requests": model.requests_served, "images": model.images_served}


async def _watch(model: Classifier, state: ServerState, grpc_port: int, most_grpc: int) -> None:
    """Closes late connections, makes room for newcomers of gRPC, returns memory, and times the event loop."""
    tick, longest = 0, 0.0
    while True:
        started, worked = time.monotonic(), time.process_time()
        await asyncio.sleep(WATCH_SECS)
        # No more than this process has worked: the work of other processes is not our stall.
        worked = time.process_time() - worked
        longest = max(longest, min(worked, time.monotonic() - started - WATCH_SECS))
        STALL.set(longest)
        tick += 1
        if len(open_files()) - len(state.connections) > most_grpc // 2:
            await asyncio.to_thread(shed_quiet, grpc_port, most_grpc)
        if tick % SLOW_TICKS == 0:
            for connection in list(state.connections):
                connection.close_if_late()
            if started - model.last_large < RETURN_MEMORY_SECS:
                await asyncio.to_thread(return_memory)
