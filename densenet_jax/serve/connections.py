"""Limits HTTP connections: their number, their silence, and the size of a request's head."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 65536  # request line and headers together
HEAD_SECS = 10.0  # for them to arrive
IDLE_SECS = 60.0  # between requests of a connection


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with limits before a request, and room for newcomers.

    If `most` connections are open when another one comes, the one that has kept the server waiting longest is closed:
    first those that never sent a whole request, never one whose answer is being computed.
    """

    def __init__(self, *arguments: Any, most: int, **options: Any):
        super().__init__(*arguments, **options)
        self._most = most
        self._head_left, self._in_head = HEAD_BYTES, True
        self._timer: asyncio.TimerHandle | None = None
        self._has_asked = self._is_answering = False
        self._waiting_since = self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Makes room for the connection and starts its clock."""
        super().connection_made(transport)
        self._start_timer()
        if len(self.connections) > self._most:
            waiting = [other for other in self.connections if not other._is_answering and other is not self]
            if waiting:
                min(waiting, key=lambda other: (other._has_asked, other._waiting_since)).abort()
            else:
                self._refuse(503, "too many connections; come again")

    def connection_lost(self, exc: Exception | None) -> None:
        """Drops the work of a client that has disconnected."""
        super().connection_lost(exc)
        self._stop_timer()
        if self.cycle is not None and not self.cycle.response_complete:
            task = self.cycle.scope["state"].get("task")
            if task is not None:
                task.cancel()

    def abort(self) -> None:
        """Closes the connection at once."""
        self.connections.discard(self)
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Feeds the parser, but no more of a head than is allowed."""
        while data and not self.transport.is_closing() and self.parser is not None:
            was_in_head = self._in_head
            part = data[: self._head_left if was_in_head else HEAD_BYTES]
            data = data[len(part) :]
            super().data_received(part)
            if was_in_head and self._in_head:
                self._head_left -= len(part)
                if self._head_left <= 0:
                    is_url = len(self.url) > HEAD_BYTES // 2
                    self._refuse(414 if is_url else 431, f"the request line and headers have over {HEAD_BYTES} bytes")

    def eof_received(self) -> bool | None:
        """Still answers a client that has sent its request and closed its side."""
        if self.cycle is None or self.cycle.response_complete or self.cycle.more_body or self.scheme == "https":
            return None
        self.cycle.keep_alive = False
        return True

    def on_message_begin(self) -> None:
        """Starts a head."""
        super().on_message_begin()
        self._in_head, self._head_left = True, HEAD_BYTES
        if self._timer is None:
            self._start_timer()

    def on_headers_complete(self) -> None:
        """Starts a request."""
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Ends a request, so that its answer is computed now."""
        self._has_asked = self._is_answering = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Waits for the next request."""
        self._is_answering, self._waiting_since = bool(self.pipeline), self.loop.time()
        super().on_response_complete()

    def timeout_keep_alive_handler(self) -> None:
        """Closes an idle connection, even if the client does not read its answer."""
        self.abort()

    def send_400_response(self, msg: str) -> None:
        """Answers input that is not HTTP."""
        self._refuse(400, msg)

    def _start_timer(self) -> None:
        self._waiting_since = self.loop.time()
        self._timer = self.loop.call_later(HEAD_SECS, self._expire)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self._timer = None
        self._refuse(408, f"no request arrived within {HEAD_SECS:.0f} seconds")
        self.loop.call_later(1.0, self.abort)

    def _refuse(self, status: int, why: str) -> None:
        body = f'{{"error":"{why}"}}'.encode()
        head = f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.connections.discard(self)
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self.transport.close()
