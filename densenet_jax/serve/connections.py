"""Limits HTTP connections: their number, their silence, and the size of a request's head."""

import asyncio
import functools
import re
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 65536  # request line and headers together
HEAD_SECS = 10.0  # for them to arrive
IDLE_SECS = 60.0  # between requests of a connection
UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with limits before a request, and room for newcomers.

    If `most` connections are open when another one comes, the one that has kept the server waiting longest is closed:
    first those that never sent a whole request, never one whose answer is being computed.
    """

    def __init__(self, *arguments: Any, most: int, **options: Any):
        super().__init__(*arguments, **options)
        self._most = most
        self._is_in_head, self._head_left, self._has_asked = True, HEAD_BYTES, False
        self._head_since: float | None = self.loop.time()  # when a head was first waited for
        self._waiting_since = self._head_since

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
        if self.cycle is not None and not self.cycle.response_complete:
            task = self.cycle.scope["state"].get("task")
            if task is not None:
                task.cancel()

    def abort(self) -> None:
        """Closes the connection at once."""
        self.connections.discard(self)
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Feeds the parser, but no more of a head than is allowed, and nothing that it would switch protocols for."""
        while data and not self.transport.is_closing() and self.parser is not None:
            part = data[:HEAD_BYTES]
            if self._is_in_head:
                part = b"".join(data[: self._head_left].partition(b"\r\n\r\n")[:2])
                self._head_left -= len(part)
            data = data[len(part) :]
            super().data_received(UPGRADE.sub(b"\r\nx-upgrade:", part) if self._is_in_head else part)
            if self._is_in_head and self._head_left <= 0:
                is_url = len(self.url) > HEAD_BYTES // 2
                self._refuse(414 if is_url else 431, f"the request line and headers have over {HEAD_BYTES} bytes")

    def eof_received(self) -> bool | None:
        """Still answers a client that has sent its request and closed its side."""
        if not self._is_answering or self.scheme == "https":
            return None
        self.cycle.keep_alive = False
        return True

    def on_message_begin(self) -> None:
        """Starts a head."""
        super().on_message_begin()
        self._head_since = self.loop.time()

    def on_headers_complete(self) -> None:
        """Starts a request."""
        self._is_in_head, self._head_since = False, None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Ends a request; what follows is another one's head."""
        self._is_in_head, self._head_left = True, HEAD_BYTES
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Waits for the next request."""
        self._has_asked, self._waiting_since = True, self.loop.time()
        super().on_response_complete()

    def close_if_late(self) -> None:
        """Closes the connection if a head has not come in time."""
        if self._head_since is not None and self.loop.time() - self._head_since > HEAD_SECS:
            self._refuse(408, f"no request arrived within {HEAD_SECS:.0f} seconds")

    def _refuse(self, status: int, why: str) -> None:
        body = f'{{"error":"{why}"}}'.encode()
        head = f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.connections.discard(self)
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self.transport.close()
        self.loop.call_later(1.0, self.abort)  # if the client does not read that

    send_400_response = functools.partialmethod(_refuse, 400)  # to what is not HTTP
    timeout_keep_alive_handler = abort  # even if the client does not read its answer
