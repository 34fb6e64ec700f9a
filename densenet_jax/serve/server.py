"""Runs both servers in one event loop: starts them, watches over them, and ends them in time."""

import asyncio
import functools
import logging
import signal
import socket
import time

import uvicorn
from prometheus_client import Gauge
from uvicorn.server import ServerState

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

WATCH_SECS = 0.05
RETURN_MEMORY_TICKS = 20  # between returning freed memory
STALL = Gauge("event_loop_longest_stall_seconds", "How long the event loop has been kept from its work at most.")
FLUSH_SECS = 2.0  # to send the last answers


class Server:
    """REST and gRPC for one model.

    Attributes:
        port, grpc_port: where they listen.
    """

    def __init__(self, model: Classifier, access: Access, listener: socket.socket, host: str, grpc_port: int):
        """Takes the gRPC address; `listener` is bound to the REST address.

        Raises:
            UserError: the address is in use, or too few files may be open.
        """
        for library in ("uvicorn.error", "uvicorn", "asyncio"):
            logging.getLogger(library).setLevel(logging.CRITICAL)
        self._model, self._access, self._listener = model, access, listener
        self._memory = BodyMemory()
        self._most, self._most_grpc = allow_connections()
        self._state = ServerState()
        self._stop = asyncio.Event()
        self.port = listener.getsockname()[1]
        self._grpc, self.grpc_port = make_server(model, access, self._memory, host, grpc_port, self._most_grpc)

    async def start(self) -> None:
        """Starts listening; until the model is ready, the server answers that it isn't."""
        application = Rest(self._model, self._access, self._memory)
        config = uvicorn.Config(
            application,
            http=LimitedProtocol,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            interface="asgi3",
            timeout_keep_alive=int(IDLE_SECS),
        )
        config.load()
        make = functools.partial(LimitedProtocol, config, self._state, {}, most=self._most)
        loop, tls = asyncio.get_running_loop(), self._access.tls()
        handshake_secs = HEAD_SECS if tls else None
        self._rest = await loop.create_server(
            make, sock=self._listener, ssl=tls, backlog=256, ssl_handshake_timeout=handshake_secs
        )
        await self._grpc.start()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        self._watching = asyncio.create_task(self._watch())

    async def stopped(self) -> None:
        """Waits for SIGTERM or Ctrl-C."""
        await self._stop.wait()

    async def stop(self, secs: float) -> None:
        """Accepts nothing new, finishes requests that take up to `secs`, answers 503 to the rest, and closes."""
        self._rest.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        closing = asyncio.create_task(self._grpc.stop(secs + FLUSH_SECS / 2))
        await self._model.stop(secs)
        await asyncio.wait([closing, *self._state.tasks], timeout=FLUSH_SECS)
        self._watching.cancel()
        for connection in list(self._state.connections):
            connection.shutdown()
        await asyncio.sleep(0)  # lets transports flush what they can at once

    async def _watch(self) -> None:
        """Makes room for gRPC's newcomers, returns memory after large requests, and times the event loop."""
        loop, tick, longest = asyncio.get_running_loop(), 0, 0.0
        while True:
            started, worked = loop.time(), time.process_time()
            await asyncio.sleep(WATCH_SECS)
            # No more than this process has worked: the work of other processes is not our stall.
            worked = time.process_time() - worked
            longest = max(longest, min(worked, loop.time() - started - WATCH_SECS))
            STALL.set(longest)
            tick += 1
            if len(open_files()) - len(self._state.connections) > self._most_grpc // 2:
                await asyncio.to_thread(shed_quiet, self.grpc_port, self._most_grpc)
            if self._memory.seen and tick % RETURN_MEMORY_TICKS == 0:
                self._memory.seen = self._memory.used if self._memory.used > SMALL_BODY_BYTES else 0
                await asyncio.to_thread(return_memory)
