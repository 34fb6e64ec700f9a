"""Clients as they come, with their defaults: Triton's over both protocols, forms, and KServe's."""

import asyncio
import importlib.util
import json
import struct
import subprocess

import numpy as np
import pytest
import requests

from tests.extras import needs
from tests.serve.serving import MODEL, pixels_input, request_of, serving

needs_server = needs("uvicorn", "tritonclient")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


def triton_input(module, name, datatype, array):
    given = module.InferInput(name, list(array.shape), datatype)
    given.set_data_from_numpy(array)
    return given


@needs("uvicorn", "tritonclient", "geventhttpclient")
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_tritons_client(server, served, pixels, pictures, expected, protocol):
    triton = importlib.import_module(f"tritonclient.{protocol}")
    client = triton.InferenceServerClient(server.grpc if protocol == "grpc" else server.url.split("//")[1])
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL, "1")
    encoded = np.array(pictures[:5], dtype=object)
    for given in (
        triton_input(triton, "image", "UINT8", pixels[:5]),
        triton_input(triton, "image_bytes", "BYTES", encoded),
    ):
        got = client.infer(MODEL, [given], request_id="a1")
        np.testing.assert_allclose(got.as_numpy("probabilities"), expected[:5], **TOLERANCE)
        assert got.as_numpy("labels")[0, 0].decode() == served.best(expected[0])[0].label
        wanted = triton.InferRequestedOutput("probabilities", class_count=3)
        classes = client.infer(MODEL, [given], outputs=[wanted]).as_numpy("probabilities")
        best = served.best(expected[0], 3)
        assert [text.decode().split(":")[1:] for text in classes[0]] == [[str(one.class_id), one.label] for one in best]
        with pytest.raises(Exception, match="classification of labels is not offered"):
            client.infer(MODEL, [given], outputs=[triton.InferRequestedOutput("labels", class_count=3)])


@needs_server
def test_lies_about_binary_data_are_refused(server, pixels):
    def post(length, size, data=bytes(64), **headers):
        given = {**pixels_input(pixels[:1]), "parameters": {"binary_data_size": size}}
        del given["data"]
        text = json.dumps(request_of(given)).encode()
        headers = {"Inference-Header-Content-Length": str(len(text) if length is None else length), **headers}
        return requests.post(server.infer_url, data=text + data, headers=headers, timeout=9)

    assert post(None, 64).status_code == 200
    assert post(None, 64, **{"Content-Type": "application/octet-stream"}).status_code == 200
    for length, size, data in (
        (None, 63, bytes(64)),
        (None, 65, bytes(64)),
        (None, 2**62, bytes(64)),
        (None, -1, bytes(64)),
        (None, 64, bytes(65)),
        (None, 64, b""),
        (10**6, 64, bytes(64)),
        (-1, 64, bytes(64)),
        (3, 64, bytes(64)),
        ("x", 64, bytes(64)),
        ("9" * 5000, 64, bytes(64)),
    ):
        answer = post(length, size, data)
        assert answer.status_code == 400, (length, size, answer.text)
        assert len(answer.text) < 300


@needs_server
def test_forms_and_bare_pictures(server, pictures, expected, tmp_path):
    files = [tmp_path / f"{number}.png" for number in range(2)]
    for file, picture in zip(files, pictures, strict=False):
        file.write_bytes(picture)
    command = ["curl", "-sf", *[f"-Fimage=@{file}" for file in files], server.infer_url]
    outputs = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)["outputs"]
    np.testing.assert_allclose(np.reshape(outputs[0]["data"], (2, -1)), expected[:2], **TOLERANCE)
    asked = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQCAAAAAAIAAAAA"}
    for session in (requests, requests.Session()):  # curl --http2 asks for another protocol with its first request
        for picture, row in zip(pictures[:2], expected[:2], strict=True):
            answer = session.post(server.infer_url, files={"image": ("a.png", picture)}, headers=asked, timeout=9)
            np.testing.assert_allclose(answer.json()["outputs"][0]["data"], row, **TOLERANCE)
    bare = requests.post(server.infer_url, data=pictures[0], headers={"Content-Type": "image/png"}, timeout=9)
    np.testing.assert_allclose(bare.json()["outputs"][0]["data"], expected[0], **TOLERANCE)
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    for body in (
        b"",
        b"--b--",
        b"--b\r\n\r\nx\r\n--b--",
        b'--b\r\nContent-Disposition: a; filename="a"\r\n\r\nx\r\n--b--',
    ):
        assert requests.post(server.infer_url, data=body, headers=form, timeout=9).status_code == 400, body


@needs_server
def test_json_without_a_content_type_and_a_client_that_closes_its_side(server, pixels, expected):
    body = json.dumps(request_of(pixels_input(pixels[:1]))).encode()
    head = f"POST /v2/models/{MODEL}/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    async def ask():
        reader, writer = await asyncio.open_connection(*server.url.split("//")[1].split(":"))
        writer.write(head + body)
        writer.write_eof()
        answer = await asyncio.wait_for(reader.read(), 9)
        writer.close()
        return answer

    answer = asyncio.run(ask())
    assert answer.startswith(b"HTTP/1.1 200")
    probabilities = json.loads(answer.split(b"\r\n\r\n", 1)[1])["outputs"][0]["data"]
    np.testing.assert_allclose(probabilities, expected[0], **TOLERANCE)


@needs_server
def test_openapi_describes_every_address(server):
    api = requests.get(f"{server.url}/openapi.json", timeout=9).json()
    assert api["openapi"].startswith("3.")
    for path, methods in api["paths"].items():
        for method in methods:
            assert requests.request(method, server.url + path, timeout=9).status_code in (200, 400), path


@needs_server
def test_foreign_hosts_are_refused(server):
    for host, status in (("evil.example", 421), ("localhost", 200), (f"127.0.0.1:{server.url.rsplit(':')[-1]}", 200)):
        assert requests.get(f"{server.url}/v2", headers={"Host": host}, timeout=9).status_code == status


@needs_server
@pytest.mark.skipif(importlib.util.find_spec("kserve") is None, reason="needs kserve, which asks for older versions")
def test_kserves_client(server, pixels, expected):
    import kserve

    async def ask():
        given = kserve.InferInput("image", [2, 8, 8, 1], "UINT8")
        given.set_data_from_numpy(pixels[:2], binary_data=True)
        request = kserve.InferRequest(MODEL, [given])
        rest = kserve.InferenceRESTClient(kserve.RESTConfig(protocol="v2", timeout=60))
        over_rest = await rest.infer(server.url, request, model_name=MODEL)
        assert await rest.is_server_live(server.url)
        assert await rest.is_server_ready(server.url)
        assert await rest.is_model_ready(server.url, MODEL)
        grpc = kserve.InferenceGRPCClient(server.grpc)
        return over_rest, await grpc.infer(request)

    for answer in asyncio.run(ask()):
        np.testing.assert_allclose(answer.outputs[0].as_numpy(), expected[:2], **TOLERANCE)


@needs_server
def test_tokens_and_tls(served_run, user, pixels, tmp_path):
    from tritonclient import grpc

    token, certificate, key = (tmp_path / name for name in ("token", "certificate.pem", "key.pem"))
    token.write_text("s3cret\n")
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*make, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True, timeout=60)
    settings = {"token_file": token, "tls_certificate": certificate, "tls_key": key}
    flags = [f"--config.serve.{name}={path}" for name, path in settings.items()]
    with serving(served_run, "--config.serve.batch_sizes=(1,)", *flags, **user) as locked:
        assert locked.url.startswith("https://")
        for path in ("/v2/health/ready", "/", "/metrics", "/openapi.json"):
            asked = {"verify": str(certificate), "timeout": 9}
            assert requests.get(locked.url + path, **asked).status_code == 401
            assert requests.get(locked.url + path, headers={"Authorization": "Bearer no"}, **asked).status_code == 401
            assert requests.get(locked.url + path, headers={"Authorization": "Bearer s3cret"}, **asked).ok
        address = locked.grpc.replace("127.0.0.1", "localhost")
        client = grpc.InferenceServerClient(address, ssl=True, root_certificates=str(certificate))
        given = triton_input(grpc, "image", "UINT8", pixels[:1])
        for call in (client.is_server_live, lambda: client.infer(MODEL, [given])):
            with pytest.raises(Exception, match="UNAUTHENTICATED"):
                call()
        answer = client.infer(MODEL, [given], headers={"authorization": "Bearer s3cret"})
        assert answer.as_numpy("probabilities").shape == (1, 10)
        assert locked.stop()[0] == 0


def test_strings_are_packed_as_the_protocol_says():
    from densenet_jax.serve.requests import pack_array, unpack_strings

    packed = pack_array(np.array([["a", "éb"]], dtype=object))
    assert packed == struct.pack("<I", 1) + b"a" + struct.pack("<I", 3) + "éb".encode()
    assert unpack_strings(packed, 2) == [b"a", "éb".encode()]
