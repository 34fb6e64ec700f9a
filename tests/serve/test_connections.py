"""The clocks of HTTP connections, without a model."""

import asyncio
import functools

import pytest

from tests.extras import needs


@needs("uvicorn")
@pytest.mark.parametrize("begun", [b"GET / HT", b"\r\n"])
def test_an_idle_connection_has_as_long_for_its_next_head_as_for_the_first(monkeypatch, begun):
    import uvicorn
    from uvicorn.server import ServerState

    from densenet_jax.serve import server

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def case():
        state = ServerState()
        config = uvicorn.Config(app, ws="none", proxy_headers=False, log_config=None)
        make = functools.partial(server.LimitedProtocol, config, state, {}, most=9)
        listening = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*listening.sockets[0].getsockname())
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200 ")
        (connection,) = state.connections

        async def is_late_after(secs):
            await asyncio.sleep(secs)
            connection.close_if_late()
            return connection.transport.is_closing()

        assert not await is_late_after(0.6)  # idle
        writer.write(begun)
        assert not await is_late_after(0.1)
        assert await is_late_after(0.6)
        assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
        writer.close()
        listening.close()

    monkeypatch.setattr(server, "HEAD_SECS", 0.5)
    asyncio.run(case())
