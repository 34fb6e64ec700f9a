"""Requests are checked before they may share a batch: what is refused, and what the pixels of the rest are."""

import base64

import numpy as np
import pytest

from configs import default
from densenet_jax.errors import UserError
from densenet_jax.modes import serve_mode
from densenet_jax.serve.limits import Access, listen
from densenet_jax.serve.requests import InputChecker, Request, RequestError, Tensor
from tests.predict.files import png

HOST = "127.0.0.1"
SHAPE = (2, 3, 1)
PIXELS = np.arange(12, dtype=np.uint8).reshape(2, *SHAPE)
WIDE = PIXELS.astype(np.uint16) * 5000


CHECKER = InputChecker(SHAPE, PIXELS.dtype, max_images=4, max_pixels=1000)
PICTURES = [png(7, 9, b""), png(9, 5, b"")]


def check(*tensors):
    return CHECKER.check(Request(tensors))


def pixels(data, shape=PIXELS.shape, datatype="UINT8", name="image"):
    return Tensor(name, datatype, shape, data)


def pictures(data, shape=(1,), datatype="BYTES", is_base64=True):
    return Tensor("image_bytes", datatype, shape, data, is_base64)


def in_base64(*values: bytes) -> list[str]:
    return [base64.b64encode(value).decode() for value in values]


@pytest.mark.parametrize("data", [PIXELS.tolist(), PIXELS.reshape(-1).tolist(), PIXELS.tobytes()])
def test_pixels_come_nested_flat_or_raw(data):
    np.testing.assert_array_equal(check(pixels(data)), PIXELS)


@pytest.mark.parametrize("data", [WIDE.tolist(), WIDE.reshape(-1).tolist(), WIDE.tobytes()])
def test_a_model_of_16_bits_takes_16_bits_only(data):
    checker = InputChecker(SHAPE, WIDE.dtype, max_images=4, max_pixels=1000)
    np.testing.assert_array_equal(checker.check(Request([pixels(data, datatype="UINT16")])), WIDE)
    for tensor, why in (
        (pixels(PIXELS.tolist()), "'UINT8'; expected UINT16"),
        (pixels([65536] * 12, datatype="UINT16"), "from 0 to 65535"),
        (pixels(bytes(23), datatype="UINT16"), "11.5 values"),
    ):
        with pytest.raises(RequestError, match=why):
            checker.check(Request([tensor]))


def test_pictures_come_in_base64_as_bytes_or_raw():
    raw = b"".join(len(one).to_bytes(4, "little") + one for one in PICTURES)
    for tensor in (
        pictures(in_base64(*PICTURES), (2,)),
        pictures([[text] for text in in_base64(*PICTURES)], (2, 1)),
        pictures(PICTURES, (2,), is_base64=False),
        pictures(raw, (2,), is_base64=False),
    ):
        assert [(one.data, one.pixels) for one in check(tensor)] == [(PICTURES[0], 63), (PICTURES[1], 45)]


def test_pixels_of_a_request_are_counted_before_any_is_decoded():
    with pytest.raises(RequestError, match="more than 1,000 pixels together") as raised:
        check(pictures([png(30, 30, b""), png(11, 10, b"")], (2,), is_base64=False))
    assert raised.value.status == 413


REFUSED = {
    "no input": ([], "inputs are none"),
    "two inputs": ([pictures(in_base64(PICTURES[0])), pixels(PIXELS.tolist())], "expected one of"),
    "unknown input": ([pixels([], name="../../etc/passwd")], "etc/passwd"),
    "16 bits for a model of 8": ([pixels(WIDE.tolist(), datatype="UINT16")], "'UINT16'; expected UINT8"),
    "wrong datatype": ([pixels(PIXELS.tolist(), datatype="FP32")], "'FP32'; expected UINT8"),
    "wrong shape": ([pixels(PIXELS.tolist(), (2, 3, 2, 1))], r"expected \[n, 2, 3, 1\]"),
    "a shape of fractions": ([pixels(PIXELS.tolist(), (2.0, *SHAPE))], "the shape"),
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
    "a number for the bytes of a picture": ([pictures([7], is_base64=False)], "is no picture"),
    "no picture": ([pictures(in_base64(b"x"))], r"image_bytes\[0\]: it is no JPEG"),
    "the second is no picture": ([pictures(in_base64(PICTURES[0], b"x"), (2,))], r"image_bytes\[1\]: it is no JPEG"),
    "a string for a list": ([pictures("a" * 4, (4,))], "no list of values"),
    "fewer pictures": ([pictures(in_base64(b"1"), (2,))], "1 values"),
    "raw that ends early": ([pictures(b"\x09\0\0\0a", is_base64=False)], "end within a string"),
    "raw with a cut length": ([pictures(b"\x01\0", is_base64=False)], "end within a string"),
    "raw of many empty strings": ([pictures(b"\0" * 4000, is_base64=False)], "2 values"),
    "pictures in rows": ([pictures(in_base64(b"1", b"2"), (1, 2))], r"expected \[n\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unauthorized_requests_are_refused(case):
    tensors, why = REFUSED[case]
    with pytest.raises(RequestError, match=why) as raised:
        check(*tensors)
    assert len(str(raised.value)) < 300


def test_ids_come_back_in_headers():
    CHECKER.check(Request([pixels(PIXELS.tolist())], request_id="a-1 b"))
    for wrong in ("a\r\nSet-Cookie: x", "é", "a" * 129):
        with pytest.raises(RequestError, match="printable ASCII"):
            CHECKER.check(Request([pixels(PIXELS.tolist())], request_id=wrong))


def make_access(host=HOST, **settings) -> Access:
    config = default.get_config()
    config.serve.update(settings)
    return Access(config, host)


def test_hosts_are_checked():
    for host in ("localhost:8080", "127.0.0.1", "[::1]:80", "LOCALHOST"):
        make_access().check_host(host)
    for host in ("evil.example", "192.0.2.1:80", "", "localhost.evil.example"):
        with pytest.raises(RequestError, match=r"config\.serve\.hosts"):
            make_access().check_host(host)
    make_access("0.0.0.0").check_host("192.0.2.1:80")  # an address can't be bound to another name
    with pytest.raises(RequestError, match="not served here"):
        make_access("0.0.0.0").check_host("evil.example")
    make_access("0.0.0.0", hosts=("models.example",)).check_host("Models.example:80")


def test_a_token_is_asked_for(tmp_path):
    (tmp_path / "token").write_text("secret\n")
    access = make_access(token_file=str(tmp_path / "token"))
    access.check_token("Bearer secret")
    access.check_token("Basic " + base64.b64encode(b"me:secret").decode())
    for wrong in ("", "secret", "Bearer ", "Bearer secreT", "Basic secret", "Bearer sécret"):
        with pytest.raises(RequestError, match="token is missing or wrong") as raised:
            access.check_token(wrong)
        assert raised.value.status == 401


def test_files_that_are_no_token_or_certificate_are_reported(tmp_path):
    empty = tmp_path / "empty"
    empty.write_text("")
    for settings, why in (
        ({"token_file": str(empty)}, "has no token"),
        ({"token_file": str(tmp_path / "none")}, "can't be read"),
        ({"tls_key": str(empty)}, "belong together"),
        ({"tls_key": str(empty), "tls_certificate": str(empty)}, "in PEM"),
    ):
        with pytest.raises(UserError, match=why):
            make_access(**settings)


def test_a_missing_extra_is_reported_with_its_command(monkeypatch, tmp_path):
    monkeypatch.setattr("densenet_jax.serve.limits.NEEDED", ("grpc", "not_there"))
    with pytest.raises(UserError, match=r"serve needs not_there.*pip install -r requirements-serve\.txt"):
        serve_mode(default.get_config(), str(tmp_path), None)


def test_a_port_in_use_is_reported():
    with listen(HOST, 0, 0) as taken:
        port = taken.getsockname()[1]
        taken.listen()
        with pytest.raises(UserError, match=f"--port {port} of 127.0.0.1 can't be used"):
            listen(HOST, port, 0)
        with pytest.raises(UserError, match=f"--grpc_port {port} of 127.0.0.1 can't be used"):
            listen(HOST, 0, port)
    with pytest.raises(UserError, match="another --host"):
        listen("203.0.113.1", 0, 0)
