"""Silent, endless and costly clients: a normal one is answered meanwhile, and memory comes back."""

import contextlib
import json
import os
import pathlib
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import requests
from PIL import Image

from tests.extras import needs
from tests.predict.files import encoded
from tests.serve.serving import INFER, MODEL, PREFACE, connect, many_files, pictures_input, request_of, serving

needs_server = needs("uvicorn", "tritonclient")
FILES = 1024
CONNECTIONS = 1000
MOST_LEFT_BYTES = 100 * 2**20
# Machines with other work are several times slower. The faults that these tests are for cost minutes, or never end.
USUAL_SECS, LONGEST_SECS = 2, 20


@pytest.fixture(scope="module", autouse=True)
def files():
    """See `many_files`."""
    with many_files():
        yield


@pytest.fixture(scope="module")
def attacked(served_run, user):
    """A server that may open few files, and takes more pixels a request than it would by default."""
    with serving(served_run, "--config.serve.max_request_pixels=10000000000", files=FILES, **user) as running:
        yield running


@pytest.fixture(scope="module")
def huge() -> bytes:
    """The request of 64 black pictures of 7000x7000 pixels."""
    black = encoded(Image.fromarray(np.zeros((7000, 7000), np.uint8)), compress_level=9)
    return json.dumps(request_of(pictures_input(*[black] * 64))).encode()


class Client:
    """Asks again and again until it is left, over both protocols; an answer that is not good fails the test."""

    def __init__(self, server, pixels, pictures):
        from tritonclient import grpc

        self._server, self._session = server, requests.Session()
        self._body = request_of(pictures_input(pictures[0]))
        self._given = grpc.InferInput("image", [1, 8, 8, 1], "UINT8")
        self._given.set_data_from_numpy(pixels[:1])
        self._make_grpc = lambda: grpc.InferenceServerClient(server.grpc)
        self._grpc = self._make_grpc()
        self.secs: list[float] = []
        self.failure: BaseException | None = None
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def ask(self, is_known: bool = False) -> None:
        """Asks each protocol once, and for health, over connections that are there or new ones."""
        session, grpc = (self._session, self._grpc) if is_known else (requests, self._make_grpc())
        for work in (
            lambda: session.post(self._server.infer_url, json=self._body, timeout=30).raise_for_status(),
            lambda: session.get(f"{self._server.url}/v2/health/ready", timeout=30).raise_for_status(),
            lambda: grpc.infer(MODEL, [self._given]),
        ):
            started = time.monotonic()
            work()
            self.secs.append(time.monotonic() - started)

    def _run(self) -> None:
        try:
            while not self._left.is_set():
                self.ask(is_known=True)
        except BaseException as error:
            self.failure = error

    def __enter__(self):
        self.ask(is_known=True)
        self.secs.clear()
        self._thread.start()
        return self

    def __exit__(self, *_):
        wait_for(lambda: len(self.secs) > 9 or self.failure is not None, 90)
        self._left.set()
        self._thread.join(60)
        if self.failure is not None:
            raise self.failure
        assert np.median(self.secs) < USUAL_SECS, sorted(self.secs)[-9:]
        assert max(self.secs) < LONGEST_SECS


@pytest.fixture
def client(attacked, pixels, pictures):
    """A normal client, during an attack after which memory must come back."""
    before = attacked.memory_bytes()
    stall = attacked.longest_stall_secs()
    with Client(attacked, pixels, pictures) as asking:
        yield asking
    wait_for(lambda: attacked.memory_bytes() - before < MOST_LEFT_BYTES, 60)
    assert attacked.longest_stall_secs() < max(USUAL_SECS, stall + 1e-9)


def wait_for(condition: Callable[[], bool], secs: float) -> None:
    end = time.monotonic() + secs
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@needs_server
@pytest.mark.parametrize(
    ("rest", "grpc"),
    [
        (b"", b""),
        (b"POST / HTTP/1.1\r\nHost: a", PREFACE[:9]),
        (INFER + b"Content-Length: 99\r\n\r\n{", PREFACE + b"\0\0\0\4\0\0\0\0\0"),
    ],
    ids=["silent", "half a head", "half a body"],
)
def test_a_thousand_connections_that_wait(attacked, client, rest, grpc):
    with contextlib.ExitStack() as stack:
        for address, data in ((attacked.url, rest), (attacked.grpc, grpc)):
            for _ in range(CONNECTIONS):
                stack.enter_context(connect(address, data))
        asked = len(client.secs)
        wait_for(lambda: len(client.secs) > asked + 30 or client.failure is not None, 90)
        for _ in range(10):
            client.ask()
        assert len(os.listdir(f"/proc/{attacked.process.pid}/fd")) < FILES


@needs_server
@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /" + b"a" * 2**20, 414),
        (b"GET / HTTP/1.1\r\na: " + b"a" * 2**20, 431),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200_000, 431),
    ],
    ids=["a URL", "a header", "many headers"],
)
def test_a_head_without_end(attacked, client, data, status):
    with connect(attacked.url) as connection:
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 600 * 2**20:
                connection.sendall(data)
                sent += len(data)
        assert sent < 64 * 2**20
    with connect(attacked.url, data[: 65536 + 100]) as connection:
        assert connection.recv(99).startswith(f"HTTP/1.1 {status}".encode())


@needs_server
def test_nobody_waits_for_ever(attacked):
    with connect(attacked.url) as silent, connect(attacked.url, b"GET / HTTP/1.1\r\n") as half:
        started = time.monotonic()
        for connection in (silent, half):
            assert b" 408 " in connection.recv(99)
        assert 8 < time.monotonic() - started < 10 + LONGEST_SECS


@needs_server
def test_json_that_would_take_memory(attacked, client):
    bodies = [
        b"[" + b"[]," * 10_000_000 + b"[]]",
        b"[" + b'{"":{}},' * 3_800_000 + b"{}]",
        b"[" + b"[]," * 5_000_000 + b"[]]",
        b'{"inputs":[' + b"[]," * 190_000 + b"[]]}",
        b'{"inputs":[' + b"257," * 990_000 + b"1]}",
    ]

    def send(body: bytes) -> None:
        headers = {"Content-Type": "application/json"}
        statuses.append(requests.post(attacked.infer_url, data=body, headers=headers, timeout=60).status_code)

    statuses: list[int] = []
    threads = [threading.Thread(target=send, args=(body,)) for body in bodies for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(statuses) == len(threads)
    assert set(statuses) <= {400, 413, 503}


@needs_server
def test_messages_of_grpc_that_would_take_memory(attacked, client):
    import grpc

    inputs = b"\x2a\x00" * (15 * 2**20)
    contents = b"\x42\x00" * (8 * 2**20)
    name = MODEL.encode()
    shape = b"\x0a" + bytes([len(name)]) + name + b"\x2a\x85\x80\x80\x08\x1a\x80\x80\x80\x08" + bytes(16 * 2**20)
    nested = b"\x2a" + b"\x85\x80\x80\x08" + b"\x2a" + b"\x80\x80\x80\x08" + contents
    with grpc.insecure_channel(attacked.grpc) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for status, messages in (
            ("RESOURCE_EXHAUSTED", (inputs, nested, shape)),
            ("INVALID_ARGUMENT", (b"\x2a\xff\xff\xff\xff\x0f", b"\xff" * 99, bytes(999))),
        ):
            for message in messages:
                with pytest.raises(grpc.RpcError) as raised:
                    call(message, timeout=30)
                assert raised.value.code().name == status


@needs_server
def test_large_pictures_leave_small_ones_alone(attacked, client, huge):
    """Nobody who asks for little waits for who asks for much; what takes too long is given up."""
    connections = [connect(attacked.url, INFER + f"Content-Length: {len(huge)}\r\n\r\n".encode() + huge) for _ in "12"]
    for connection in connections:
        connection.settimeout(150)
    asked = len(client.secs)
    started = time.monotonic()
    assert all(b" 504 " in connection.recv(99) for connection in connections)
    assert time.monotonic() - started < 30 + 3 * LONGEST_SECS
    assert len(client.secs) > asked + 30
    assert np.quantile(client.secs[asked:], 0.9) < USUAL_SECS
    for connection in connections:
        connection.close()


@needs_server
def test_by_default_they_are_refused_before_they_are_decoded(server, huge):
    started = time.monotonic()
    headers = {"Content-Type": "application/json"}
    answer = requests.post(server.infer_url, data=huge, headers=headers, timeout=30)
    assert answer.status_code == 413
    assert "pixels together" in answer.json()["error"]
    assert time.monotonic() - started < LONGEST_SECS


@needs_server
def test_the_server_ends_in_time_with_requests_under_way(served_run, user, huge, pixels):
    flags = ["--config.serve.max_request_pixels=10000000000", "--config.serve.stop_secs=2"]
    with serving(served_run, "--config.serve.batch_sizes=(1,)", *flags, **user) as stopping:
        head = INFER + f"Content-Length: {len(huge)}\r\n\r\n".encode()
        with connect(stopping.url, head + huge) as large, connect(stopping.url) as waiting:
            time.sleep(1)
            started = time.monotonic()
            assert stopping.stop()[0] == 0, "".join(stopping.said)
            assert 1.5 < time.monotonic() - started < LONGEST_SECS
            assert b" 503 " in large.recv(99)
            assert waiting.recv(99) == b""


@needs_server
def test_work_is_dropped_with_its_client(attacked, huge):
    connect(attacked.url, INFER + f"Content-Length: {len(huge)}\r\n\r\n".encode() + huge).close()

    def busy_secs() -> float:
        text = pathlib.Path(f"/proc/{attacked.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(text[11]) + int(text[12])) / os.sysconf("SC_CLK_TCK")

    def is_idle() -> bool:
        before = busy_secs()
        time.sleep(0.5)
        return busy_secs() - before < 0.2

    wait_for(is_idle, 60)  # the one that was begun is decoded to its end; all would take minutes
