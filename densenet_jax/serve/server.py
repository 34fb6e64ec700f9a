"""Runs both servers in one event loop: starts them, limits their connections, and ends them in time."""

import asyncio
import functools
import gc
import logging
import re
import signal
import socket
import time
from typing import Any

import uvicorn
import uvloop
from prometheus_client import Gauge
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from densenet_jax.distributed import processes
from densenet_jax.predict.predictor import Predictor
from densenet_jax.serve.grpc import make_server
from densenet_jax.serve.limits import Access, allow_connections, open_files, shed_quiet
from densenet_jax.serve.rest import Rest
from densenet_jax.serve.runtime import Classifier
from densenet_jax.system.console import print_status, spinner
from densenet_jax.system.host import release_freed_memory

HEAD_BYTES = 65536  # request line and headers together
HEAD_SECS = 10.0  # for them to arrive
IDLE_SECS = 60  # between requests of a connection
UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
WATCH_SECS = 0.05
SLOW_TICKS = 20  # between looks at what takes longer
RETURN_MEMORY_SECS = 60.0  # after a large request: decoding that was begun for it goes on when it is given up
STALL = Gauge("event_loop_longest_stall_seconds", "How long the event loop has been kept from its work at most.")
FLUSH_SECS = 2.0  # to send the last answers


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with limits before a request, and room for newcomers.

    If `most` connections are open when another one comes, the one that has kept the server waiting longest is closed:
    first those that never sent a whole request, never one whose answer is being computed.
    """

    def __init__(self, *arguments: Any, most: int, **options: Any):
        super().__init__(*arguments, **options)
        self._most, self._has_asked = most, False
        self._head_left: int | None = HEAD_BYTES  # None while a body is awaited
        self._waiting_since = self.loop.time()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Makes room for the connection."""
        super().connection_made(transport)
        if len(self.connections) > self._most:
            waiting = [other for other in self.connections if not other._is_answering and other is not self]
            if waiting:
                min(waiting, key=lambda other: (other._has_asked, other._waiting_since)).abort()
            else:
                self._refuse(503, "too many connections; come again")

    def connection_lost(self, exc: Exception | None) -> None:
        """Drops the work of a client that has disconnected."""
        super().connection_lost(exc)
        if self.cycle is not None and not self.cycle.response_complete and "task" in self.cycle.scope["state"]:
            self.cycle.scope["state"]["task"].cancel()

    def abort(self) -> None:
        """Closes the connection at once."""
        self.connections.discard(self)
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Feeds the parser, but no more of a head than is allowed, and nothing that it would switch protocols for."""
        if self.timeout_keep_alive_task is not None:  # a head begins
            self._waiting_since = self.loop.time()
        while data and not self.transport.is_closing() and self.parser is not None:
            part = data[:HEAD_BYTES]
            if self._head_left is not None:
                part = b"".join(data[: self._head_left].partition(b"\r\n\r\n")[:2])
                self._head_left -= len(part)
            data = data[len(part) :]
            super().data_received(part if self._head_left is None else UPGRADE.sub(b"\r\nx-upgrade:", part))
            if self._head_left == 0:
                is_url = len(self.url) > HEAD_BYTES // 2
                self._refuse(414 if is_url else 431, f"the request line and headers have over {HEAD_BYTES} bytes")

    def eof_received(self) -> bool | None:
        """Still answers a client that has sent its request and closed its side."""
        if not self._is_answering or self.scheme == "https":
            return None
        self.cycle.keep_alive = False
        return True

    def on_headers_complete(self) -> None:
        """Starts a request."""
        self._head_left = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Ends a request; what follows is another one's head."""
        self._head_left = HEAD_BYTES
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Waits for the next request."""
        self._has_asked, self._waiting_since = True, self.loop.time()
        super().on_response_complete()

    def close_if_late(self) -> None:
        """Closes the connection if a head has not come in time."""
        is_idle = self._is_answering or self.timeout_keep_alive_task is not None  # uvicorn's task closes it
        if self._head_left is not None and not is_idle and self.loop.time() - self._waiting_since > HEAD_SECS:
            self._refuse(408, f"no request arrived within {HEAD_SECS:.0f} seconds")

    def _refuse(self, status: int, why: str) -> None:
        body = f'{{"error":"{why}"}}'
        head = f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.connections.discard(self)
        self.transport.write(f"{head}connection: close\r\n\r\n{body}".encode())
        self.transport.close()
        self.loop.call_later(1.0, self.abort)  # if the client does not read that

    send_400_response = functools.partialmethod(_refuse, 400)  # to what is not HTTP
    timeout_keep_alive_handler = abort  # even if the client does not read its answer


def serve(predictor: Predictor, listener: socket.socket, grpc_port: int, access: Access, config: Any) -> dict[str, Any]:
    """Serves on `listener` until SIGTERM or Ctrl-C; returns the counts of answered requests and images.

    Until the model is ready, the server answers that it isn't. When it is stopped it accepts nothing new, and finishes
    requests or answers 503 to them. Raises UserError if the gRPC address is in use, or too few files may be open.
    """
    processes.abandon_threads()  # of a compilation, or of pictures that nobody waits for any more
    for library in ("uvicorn.error", "uvicorn", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    return uvloop.run(_run(Classifier(predictor, config), listener, grpc_port, access, config.serve.stop_secs))


async def _run(model: Classifier, listener: socket.socket, grpc_port: int, access: Access, stop_secs: float) -> dict:
    loop, stopped, state = asyncio.get_running_loop(), asyncio.Event(), ServerState()
    most, most_grpc = allow_connections()
    quiet: dict[str, Any] = {"log_config": None, "access_log": False}
    asgi = uvicorn.Config(Rest(model, access), ws="none", proxy_headers=False, timeout_keep_alive=IDLE_SECS, **quiet)
    grpc, grpc_port = make_server(model, access, grpc_port, most_grpc)
    protocol = functools.partial(LimitedProtocol, asgi, state, {}, most=most)
    tls: dict[str, Any] = {"ssl": access.tls, "ssl_handshake_timeout": HEAD_SECS} if access.tls else {}
    rest = await loop.create_server(protocol, sock=listener, backlog=256, **tls)
    await grpc.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    watching = asyncio.create_task(_watch(model, state, grpc_port, most_grpc))
    stopping, compiling = asyncio.create_task(stopped.wait()), asyncio.create_task(model.compile())
    with spinner(f"compiling for {', '.join(map(str, model.batch_sizes))} images"):
        await asyncio.wait([stopping, compiling], return_when=asyncio.FIRST_COMPLETED)
    if compiling.done():
        compiling.result()
        host = access.shown_host
        where = f"{'https' if access.tls else 'http'}://{host}:{listener.getsockname()[1]}"
        if not access.is_loopback and not access.token:
            print_status(f"anybody who reaches {host} may ask: there is no login; config.serve.token_file sets one")
        print_status(f"{model.name} is ready: REST and a page on {where}/, metrics on {where}/metrics")
        print_status(f"gRPC on {host}:{grpc_port}; Ctrl-C or SIGTERM stops")
    await stopping
    rest.close()
    for connection in list(state.connections):
        connection.shutdown()
    closing = asyncio.create_task(grpc.stop(stop_secs + FLUSH_SECS / 2))
    await model.stop(stop_secs)
    await asyncio.wait([closing, *state.tasks], timeout=FLUSH_SECS)
    watching.cancel()
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
                gc.collect()
                await asyncio.to_thread(release_freed_memory)
