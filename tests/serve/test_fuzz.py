"""Thousands of mutated requests: each gets an answer that blames it, and the server stays as it was."""

import asyncio
import contextlib
import json
import random
import time

import numpy as np
import requests

from tests.extras import needs
from tests.serve.serving import MODEL, pictures_input, pixels_input, request_of

SECS = 25
MOST_GROWTH_BYTES = 48 * 2**20
ODD = [
    *(None, True, -1, 0, 2**31, 2**63, 1e308, "", "a" * 5000, "\x00", "../../etc/passwd", "é😀", [], {}, [[]], [None]),
    *([-1, 8, 8, 1], [2**40, 2**40], ["1"], [1] * 5000, {"a": [1]}, "UINT8", "BYTES", "image", "image_bytes"),
]


def mutated_bytes(drawn: random.Random, data: bytes) -> bytes:
    """The bytes with a few of them changed, cut out, or doubled."""
    changed = bytearray(data)
    for _ in range(drawn.randint(1, 8)):
        start = drawn.randrange(len(changed) + 1)
        kind = drawn.randrange(4)
        if kind == 0 and start < len(changed):
            changed[start] = drawn.randrange(256)
        elif kind == 1:
            del changed[start : start + drawn.randint(1, 40)]
        elif kind == 2:
            changed[start:start] = changed[start : start + drawn.randint(1, 40)]
        else:
            changed[start:start] = drawn.randbytes(drawn.randint(1, 8))
    return bytes(changed)


def mutated_tree(drawn: random.Random, tree):
    """The JSON value with odd values in odd places."""
    if drawn.random() < 0.15:
        return drawn.choice(ODD)
    if isinstance(tree, dict):
        made = {key: mutated_tree(drawn, value) for key, value in tree.items() if drawn.random() > 0.05}
        return (
            {**made, drawn.choice(["id", "parameters", "outputs"]): drawn.choice(ODD)} if drawn.random() < 0.1 else made
        )
    if isinstance(tree, list) and len(tree) < 10:
        return [mutated_tree(drawn, value) for value in tree]
    return tree


def body(drawn: random.Random, pixels, pictures) -> bytes:
    """One mutated body for REST."""
    number = drawn.randrange(64)
    good = pictures_input(pictures[number]) if drawn.random() < 0.5 else pixels_input(pixels[number : number + 1])
    kind = drawn.randrange(3)
    if kind == 0:
        return mutated_bytes(drawn, json.dumps(request_of(good)).encode())
    if kind == 1:
        return json.dumps(mutated_tree(drawn, request_of(good, outputs=[{"name": "labels"}]))).encode()
    return json.dumps(request_of(pictures_input(mutated_bytes(drawn, pictures[number])))).encode()


async def fuzz_rest(server, drawn, pixels, pictures, end) -> int:
    import aiohttp

    count = 0
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < end:
            headers = {"Content-Type": "application/json"}
            if drawn.random() < 0.1:
                headers[drawn.choice(["Content-Encoding", "Content-Type", "X-a"])] = drawn.choice(["gzip", "a/b", "é"])
            model = MODEL if drawn.random() < 0.9 else drawn.choice(["x", "%00", "..%2f..", "a" * 3000, str(count)])
            method = "POST" if drawn.random() < 0.97 else drawn.choice(["GET", "PUT", f"A{count}"])
            url = f"{server.url}/v2/models/{model}/infer"
            content = body(drawn, pixels, pictures)
            async with session.request(method, url, data=content, headers=headers) as answer:
                text = await answer.text()
                assert answer.status in (200, 400, 404, 405, 413, 415, 421), (answer.status, text[:500], content[:500])
                assert len(text) < 20_000
            count += 1
    return count


async def fuzz_grpc(server, drawn, pixels, end) -> int:
    import grpc
    from tritonclient.grpc import service_pb2

    expected_statuses = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    count = 0
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        while time.monotonic() < end:
            message = service_pb2.ModelInferRequest(model_name=MODEL if drawn.random() < 0.9 else str(count))
            names, datatypes = ["image", "image_bytes", "é" * 99], ["UINT8", "BYTES", "FP32", ""]
            for _ in range(drawn.choice([0, 1, 1, 1, 1, 2])):
                shape = drawn.choice([[1, 8, 8, 1], [1], [], [-1, 8, 8, 1], [2**62, 2**62], [65, 8, 8, 1]])
                tensor = message.inputs.add(name=drawn.choice(names), datatype=drawn.choice(datatypes), shape=shape)
                if drawn.random() < 0.3:
                    tensor.contents.uint_contents.extend([drawn.choice([1, 2**31])] * drawn.choice([1, 64]))
                if drawn.random() < 0.3:
                    tensor.contents.bytes_contents.append(drawn.randbytes(9))
            if drawn.random() < 0.6:
                raw = drawn.choice([pixels[0].tobytes(), b"", b"\xff" * 9, drawn.randbytes(64)])
                message.raw_input_contents.append(raw)
            if drawn.random() < 0.1:
                message.id = drawn.choice(["a\nb", "é", "a" * 9999])
            status = grpc.StatusCode.OK
            try:
                await call(message.SerializeToString())
            except grpc.aio.AioRpcError as error:
                status = error.code()
            assert status in expected_statuses, (status, message)
            count += 1
    return count


async def fuzz_sockets(address: str, drawn, end) -> int:
    """Bytes that are neither HTTP nor gRPC, and connections that end at any time."""
    host, port = address.rsplit(":", 1)
    begin = (
        f"POST /v2/models/{MODEL}/infer HTTP/1.1\r\nHost: a\r\n"
        "Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    )
    count = 0
    while time.monotonic() < end:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(mutated_bytes(drawn, drawn.choice([begin.encode(), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"])))
        with contextlib.suppress(ConnectionError, TimeoutError):
            await writer.drain()
            await asyncio.wait_for(reader.read(100), 0.05)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        count += 1
    return count


@needs("uvicorn", "aiohttp", "tritonclient")
def test_mutated_requests_leave_the_server_healthy(server, pixels, pictures, expected):
    async def fuzz(secs: float) -> int:
        end = time.monotonic() + secs
        clients = [fuzz_rest(server, random.Random(seed), pixels, pictures, end) for seed in range(8)]
        clients += [fuzz_grpc(server, random.Random(seed), pixels, end) for seed in range(8, 12)]
        clients += [fuzz_sockets(where, random.Random(13), end) for where in (server.url.split("//")[1], server.grpc)]
        return sum(await asyncio.gather(*clients))

    asyncio.run(fuzz(SECS / 3))
    memory, metrics = server.memory_bytes(), requests.get(f"{server.url}/metrics", timeout=9).text
    assert asyncio.run(fuzz(SECS * 2 / 3)) > 1000
    assert server.memory_bytes() - memory < MOST_GROWTH_BYTES
    assert server.longest_stall_secs() < 0.5
    # Nothing that was sent has become the name of a metric.
    assert len(requests.get(f"{server.url}/metrics", timeout=9).text) < len(metrics) + 5000
    answer = requests.post(server.infer_url, json=request_of(pictures_input(*pictures)), timeout=60)
    got = np.asarray(answer.json()["outputs"][0]["data"]).reshape(64, -1)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    assert not [line for line in server.said if "Traceback" in line or "Error" in line], server.said[-40:]
