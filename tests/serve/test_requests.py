"""Requests are checked before they may share a batch: what is refused, and what the pixels of the rest are."""

import asyncio
import base64
import json

import numpy as np
import pytest

from densenet_jax.errors import UserError
from densenet_jax.serve import serve
from densenet_jax.serve.batches import cover, in_batches
from densenet_jax.serve.http import Limited
from densenet_jax.serve.requests import Reader, RequestError, Tensor, check_id, wanted_outputs

SHAPE = (2, 3, 1)
PIXELS = np.arange(12, dtype=np.uint8).reshape(2, *SHAPE)


def decode(data: bytes, name: str) -> np.ndarray:
    if not data.isdigit():
        raise UserError(f"{name}: no image")
    return np.full(SHAPE, int(data), np.uint8)


READER = Reader(SHAPE, max_images=4, decode=decode)


def pixels(data, shape=PIXELS.shape, datatype="UINT8", name="image"):
    return Tensor(name, datatype, shape, data)


def pictures(data, shape=(1,), datatype="BYTES", is_base64=True):
    return Tensor("image_bytes", datatype, shape, data, is_base64)


def in_base64(*values: bytes) -> list[str]:
    return [base64.b64encode(value).decode() for value in values]


@pytest.mark.parametrize("data", [PIXELS.tolist(), PIXELS.reshape(-1).tolist(), PIXELS.tobytes()])
def test_pixels_come_nested_flat_or_raw(data):
    np.testing.assert_array_equal(READER.read([pixels(data)]), PIXELS)


def test_pictures_come_in_base64_as_bytes_or_raw():
    want = np.stack([decode(b"7", ""), decode(b"9", "")])
    raw = b"\x01\0\0\x007\x01\0\0\x009"
    for tensor in (
        pictures(in_base64(b"7", b"9"), (2,)),
        pictures([[text] for text in in_base64(b"7", b"9")], (2, 1)),
        pictures([b"7", b"9"], (2,), is_base64=False),
        pictures(raw, (2,), is_base64=False),
    ):
        np.testing.assert_array_equal(READER.read([tensor]), want)


REFUSED = {
    "no input": ([], "inputs are none"),
    "two inputs": ([pictures(in_base64(b"1")), pixels(PIXELS.tolist())], "expected one of"),
    "unknown input": ([pixels([], name="../../etc/passwd")], "etc/passwd"),
    "wrong datatype": ([pixels(PIXELS.tolist(), datatype="FP32")], "'FP32'; expected UINT8"),
    "wrong shape": ([pixels(PIXELS.tolist(), (2, 3, 2, 1))], r"expected \[n, 2, 3, 1\]"),
    "no shape": ([pixels(PIXELS.tolist(), ())], "the shape"),
    "negative shape": ([pixels(PIXELS.tolist(), (-2, *SHAPE))], "-2 images"),
    "too many images": ([pixels(b"\0" * 30, (5, *SHAPE))], "5 images in a request; expected 1 to 4"),
    "a huge number of images": ([pictures(in_base64(b"1"), (2**62,))], "images in a request"),
    "fewer values": ([pixels([1] * 11)], "11 values"),
    "more values": ([pixels(b"\0" * 13)], "13 values"),
    "a value too large": ([pixels([256] * 12)], "from 0 to 255"),
    "a negative value": ([pixels([-1] * 12)], "from 0 to 255"),
    "fractions": ([pixels([0.5] * 12)], "from 0 to 255"),
    "strings": ([pixels(["a" * 1000] * 12)], "from 0 to 255"),
    "nothing": ([pixels([None] * 12)], "from 0 to 255"),
    "a number for a list": ([pixels(10**12)], "no list"),
    "ragged": ([pixels([[[[1]] * 3] * 2, [[[1]] * 2] * 2])], "not nested"),
    "too deep": ([pixels([[[[[1]]] * 3] * 2] * 2)], "from 0 to 255"),
    "no base64": ([pictures(["?" * 8])], "not base64"),
    "letters that base64 does not know": ([pictures(["é"])], "not base64"),
    "a number for a picture": ([pictures([7])], "not base64"),
    "no picture": ([pictures(in_base64(b"x"))], r"image_bytes\[0\]: no image"),
    "the second is no picture": ([pictures(in_base64(b"1", b"x"), (2,))], r"image_bytes\[1\]: no image"),
    "a string for a list": ([pictures("a" * 4, (4,))], "no list of values"),
    "fewer pictures": ([pictures(in_base64(b"1"), (2,))], "1 values"),
    "raw that ends early": ([pictures(b"\x09\0\0\0a", is_base64=False)], "end within a string"),
    "raw with a cut length": ([pictures(b"\x01\0", is_base64=False)], "end within a string"),
    "raw of many empty strings": ([pictures(b"\0" * 4000, is_base64=False)], "2 values"),
    "pictures in rows": ([pictures(in_base64(b"1", b"2"), (1, 2))], r"expected \[n\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused(case):
    tensors, why = REFUSED[case]
    with pytest.raises(RequestError, match=why) as raised:
        READER.read(tensors)
    assert len(str(raised.value)) < 300


def test_ids_come_back_in_headers():
    check_id("a-1 b")
    for wrong in ("a\r\nSet-Cookie: x", "é", "a" * 129, 7):
        with pytest.raises(RequestError, match="printable ASCII"):
            check_id(wrong)


def test_outputs_are_chosen_by_name():
    assert wanted_outputs(None, {"a": 1, "b": 2}) == ["a", "b"]
    assert wanted_outputs(["b", "b"], {"a": 1, "b": 2}) == ["b"]
    with pytest.raises(RequestError, match="no output 'c'; expected some of a, b"):
        wanted_outputs(["c"], {"a": 1, "b": 2})


@pytest.mark.parametrize(
    ("count", "batches"),
    [(1, [1]), (2, [4]), (3, [4]), (5, [4, 1]), (9, [16]), (18, [16, 4]), (64, [64]), (70, [64, 4, 4])],
)
def test_few_sizes_cover_any_number(count, batches):
    assert cover(count, (1, 4, 16, 64)) == batches


def test_every_image_is_computed_once():
    sizes = []

    def compute(batch):
        sizes.append(len(batch))
        return batch * 2.0

    images = np.arange(23, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(in_batches(images, (8, 16), compute), images * 2)
    assert sizes == [16, 7]


def exchange(limited: Limited, *messages: dict, method: str = "POST", **headers: str) -> tuple[int, dict]:
    """What the limits answer to a request whose body comes in `messages`."""
    sent: list[dict] = []
    waiting = list(messages)

    async def receive():
        if not waiting:
            await asyncio.sleep(60)
        return waiting.pop(0)

    async def send(message):
        sent.append(message)

    given = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    scope = {
        "type": "http",
        "method": method,
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }
    asyncio.run(limited(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])


async def echo(scope, receive, send):
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(message["body"].decode()).encode()})


def part(body: bytes, more: bool = False) -> dict:
    return {"type": "http.request", "body": body, "more_body": more}


def test_bodies_are_limited_before_they_are_parsed():
    limited = Limited(echo, max_body_bytes=10, body_secs=0.2)
    assert exchange(limited, part(b"12345", more=True), part(b"67890")) == (200, "1234567890")
    assert exchange(limited, part(b"12345", more=True), part(b"678901"))[0] == 413
    assert exchange(limited, content_length="11")[0] == 408  # it still reads what was announced
    assert exchange(limited, content_length="1000000")[0] == 413  # but not any amount
    assert exchange(limited, *[part(b"1" * 9, more=True)] * 9)[0] == 413
    assert exchange(limited, part(b"12345", more=True))[0] == 408
    assert exchange(limited, part(b"1"), content_encoding="gzip")[0] == 415
    assert exchange(limited, part(b"1"), content_type="text/plain")[0] == 415
    assert exchange(limited, part(b"1"), method="DELETE")[0] == 405
    assert "error" in exchange(limited, part(b"1"), method="DELETE")[1]


def test_a_missing_extra_is_told_with_its_command(monkeypatch):
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -r requirements-serve\.txt"):
        serve.check_installed()


def test_a_port_in_use_is_told():
    with serve.listen(serve.Address(port=0, grpc_port=0)) as taken:
        port = taken.getsockname()[1]
        taken.listen()
        with pytest.raises(UserError, match=f"--port {port} of 127.0.0.1 can't be used"):
            serve.listen(serve.Address(port=port, grpc_port=0))
        with pytest.raises(UserError, match=f"--grpc_port {port} of 127.0.0.1 can't be used"):
            serve.listen(serve.Address(port=0, grpc_port=port))
    with pytest.raises(UserError, match="another --host"):
        serve.listen(serve.Address(host="203.0.113.1"))
