"""64 clients for half a minute, with attackers of every kind beside them: no wrong answer, no lost request."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable

import numpy as np
import requests

from tests.extras import needs
from tests.serve.serving import (
    INFER,
    MODEL,
    PREFACE,
    connect,
    many_files,
    pictures_input,
    pixels_input,
    request_of,
    serving,
)

# The compiler orders sums differently for batches of different sizes.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}
LOAD_SECS = 30
FILES = 1024
QUIET = 100  # connections of each kind, all closed and opened anew every few seconds
HUGE_JSON = [b"[" + b"[]," * 9_000_000 + b"[]]", b'{"inputs":[' + b"257," * 990_000 + b"1]}"]


@contextlib.contextmanager
def attackers(server):
    """Keeps silent connections, half heads and half bodies open, and sends heads without end and huge JSON."""
    left = threading.Event()
    rounds: dict[str, int] = {}

    def repeat(kind: str, attack: Callable[[], None]) -> None:
        while not left.is_set():
            with contextlib.suppress(OSError):  # the server has closed a connection, as it may
                attack()
            rounds[kind] = rounds.get(kind, 0) + 1

    def wait() -> None:
        with contextlib.ExitStack() as stack:
            for address, beginnings in (
                (server.url, (b"", b"POST / HTTP/1.1\r\nHost: a", INFER + b"Content-Length: 99\r\n\r\n{")),
                (server.grpc, (b"", PREFACE[:9], PREFACE + b"\0\0\0\4\0\0\0\0\0")),
            ):
                for beginning in beginnings * QUIET:
                    stack.enter_context(connect(address, beginning))
            left.wait(4)

    def send(data: bytes) -> None:
        with connect(server.url, data) as connection:
            assert connection.recv(99).split()[1] in (b"400", b"413", b"431", b"503")
        left.wait(0.5)

    kinds = {"quiet": wait, "endless head": lambda: send(b"GET / HTTP/1.1\r\na: " + b"a" * 2**18)}
    for number, body in enumerate(HUGE_JSON):
        head = INFER + f"Content-Length: {len(body)}\r\n\r\n".encode()
        kinds[f"JSON {number}"] = lambda data=head + body: send(data)
    threads = [threading.Thread(target=repeat, args=kind) for kind in kinds.items()]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        left.set()
        for thread in threads:
            thread.join(60)
    assert all(rounds.get(kind, 0) > 1 for kind in kinds), rounds


async def load(server, pixels, pictures, check, secs: float) -> tuple[int, int]:
    """32 clients over REST and 32 over gRPC for so long; the number of answers, all checked, and of their images."""
    import aiohttp
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    end = time.monotonic() + secs
    counts = []

    async def rest(session, number):
        while time.monotonic() < end:
            which = [(number * 7 + len(counts) + step) % 64 for step in range(1 + number % 3)]
            made = pictures_input(*[pictures[one] for one in which]) if number % 2 else pixels_input(pixels[which])
            async with session.post(server.infer_url, json=request_of(made)) as answer:
                text = await answer.text()
                assert answer.status == 200, text
            rows = json.loads(text)["outputs"][0]
            check(which, np.asarray(rows["data"]).reshape(rows["shape"]))
            counts.append(len(which))

    async def over_grpc(stub, number):
        while time.monotonic() < end:
            which = [(number * 5 + len(counts) + step) % 64 for step in range(1 + number % 3)]
            message = service_pb2.ModelInferRequest(model_name=MODEL)
            message.inputs.add(name="image", datatype="UINT8", shape=[len(which), 8, 8, 1])
            message.raw_input_contents.append(pixels[which].tobytes())
            answer = await stub.ModelInfer(message)
            check(which, np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(len(which), -1))
            counts.append(len(which))

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session, grpc.aio.insecure_channel(server.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        clients = [rest(session, number) for number in range(32)]
        await asyncio.gather(*clients, *[over_grpc(stub, number) for number in range(32)])
    return len(counts), sum(counts)


@needs("uvicorn", "aiohttp", "tritonclient")
def test_64_clients_among_attackers_get_the_predictors_answers(served_run, user, pixels, pictures, expected):
    def check(which, rows):
        np.testing.assert_allclose(rows, expected[which], **TOLERANCE)

    with many_files(), serving(served_run, files=FILES, **user) as server:
        with attackers(server):
            requests_sent, images_sent = asyncio.run(load(server, pixels, pictures, check, LOAD_SECS))
        batches, images = server.computed()
        assert images == images_sent
        # Each client has one request under way at a time; so many of them, and no more, may share a batch.
        assert requests_sent / 64 <= batches <= requests_sent / 2
        metrics = requests.get(f"{server.url}/metrics", timeout=9).text
        assert f'model_infer_request_success_total{{model="{MODEL}"' in metrics
        assert "grpc_server_handling_seconds" in metrics
        assert not [line for line in server.said if "Traceback" in line or "Error" in line]
