"""What is refused of HTTP before any of it is parsed: an ASGI application around another."""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

METHODS = ("GET", "HEAD", "POST")
# A client that sends too much still reads the answer, where it stops at some multiple of the limit.
READ_ON_FACTOR = 4


class Refused(Exception):  # noqa: N818 - an answer, not an error of ours
    """The request is answered with `status`."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


class Limited:
    """Lets a request through with its whole body read, within limits of size and time."""

    def __init__(self, application: Application, *, max_body_bytes: int, body_secs: float):
        """Wraps `application`; a body must have arrived within `body_secs`."""
        self._application = application
        self._max_body_bytes = max_body_bytes
        self._body_secs = body_secs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] == "lifespan":
            await self._application(scope, receive, send)
        elif scope["type"] == "http":
            try:
                body = await self._body(scope, receive)
            except Refused as refused:
                await answer(send, refused.status, str(refused))
            else:
                if body is not None:
                    await self._application(scope, replaying(body, receive), send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None where the client is gone."""
        if scope["method"] not in METHODS:
            raise Refused(405, f"the method is not one of {', '.join(METHODS)}")
        headers = dict(scope["headers"])
        # What is small when packed may be of any size unpacked.
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise Refused(415, "bodies with a Content-Encoding are not taken; send it unpacked")
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if scope["method"] == "POST" and kind != b"application/json":
            raise Refused(415, "expected the Content-Type application/json")
        length = headers.get(b"content-length", b"0")
        announced = int(length) if length.isdigit() and len(length) < 20 else 0
        try:
            async with asyncio.timeout(self._body_secs):
                return await self._read(receive, announced)
        except TimeoutError as error:
            raise Refused(408, f"the body did not arrive within {self._body_secs:.0f} seconds") from error

    async def _read(self, receive: Receive, announced: int) -> bytes | None:
        parts: list[bytes] = []
        size = 0
        too_large = announced > self._max_body_bytes
        while True:
            if too_large and max(size, announced) > READ_ON_FACTOR * self._max_body_bytes:
                break
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            too_large = too_large or size > self._max_body_bytes
            if too_large:
                parts.clear()
            else:
                parts.append(part)
            if not message.get("more_body", False):
                break
        if too_large:
            raise Refused(413, f"the body is larger than {self._max_body_bytes} bytes")
        return b"".join(parts)


def replaying(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body at once, and then what the connection says."""
    given = False

    async def replay() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def answer(send: Send, status: int, why: str, *, close: bool = True) -> None:
    """Answers with an error, in the protocol's form; `close` ends the connection, of which something may be unread."""
    body = json.dumps({"error": why}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")] if close else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
