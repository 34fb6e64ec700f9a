"""A real server with real clients: answers equal the predictor's, and nothing that one client sends harms another."""

import asyncio
import contextlib
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import requests
from PIL import Image

from configs import default
from densenet_jax.config.run_settings import read_run_settings
from densenet_jax.predict.model import make_deployed
from densenet_jax.predict.predictor import Predictor
from tests.extras import needs
from tests.main_processes import find_free_port, parse_last_line, run_main, start_main
from tests.predict.files import BOMBS, encoded
from tests.serve.serving import MODEL, pictures_input, pixels_input, request_of, serving
from tests.untrained_run import make_run

# The compiler orders sums differently for batches of different sizes.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}
needs_server = needs("uvicorn", "tritonclient")


def post(server, body, **options) -> requests.Response:
    return requests.post(server.infer_url, json=body, timeout=60, **options)


def outputs_of(answer: requests.Response) -> dict[str, np.ndarray]:
    assert answer.status_code == 200, answer.text
    outputs = answer.json()["outputs"]
    return {output["name"]: np.asarray(output["data"]).reshape(output["shape"]) for output in outputs}


def grpc_client(server):
    from tritonclient import grpc

    return grpc.InferenceServerClient(server.grpc)


def grpc_input(name: str, datatype: str, array: np.ndarray):
    from tritonclient import grpc

    given = grpc.InferInput(name, list(array.shape), datatype)
    given.set_data_from_numpy(array)
    return given


@needs_server
def test_it_describes_itself(server, served):
    assert requests.get(f"{server.url}/v2/health/live", timeout=9).status_code == 200
    assert requests.get(f"{server.url}/v2/health/ready", timeout=9).status_code == 200
    assert requests.get(f"{server.url}/v2/models/{MODEL}/ready", timeout=9).status_code == 200
    metadata = requests.get(f"{server.url}/v2/models/{MODEL}", timeout=9).json()
    assert {given["name"]: (given["datatype"], given["shape"]) for given in metadata["inputs"]} == {
        "image": ("UINT8", [-1, 8, 8, 1]),
        "image_bytes": ("BYTES", [-1]),
    }
    assert {given["name"]: given["shape"] for given in metadata["outputs"]} == {
        "probabilities": [-1, 10],
        "class_ids": [-1, 5],
        "labels": [-1, 5],
        "top_probabilities": [-1, 5],
        "activation_map": [-1, *served.output_shapes(explain=True)["map"]],
    }
    for path, state in {
        "health/live": {"live": True},
        "health/ready": {"ready": True},
        f"models/{MODEL}/ready": {"name": MODEL, "ready": True},
    }.items():
        assert requests.get(f"{server.url}/v2/{path}", timeout=9).json() == state
    listed = requests.post(f"{server.url}/v2/repository/index", timeout=9).json()
    assert listed == [{"name": MODEL, "version": "1", "state": "READY", "reason": ""}]
    client = grpc_client(server)
    assert [model.name for model in client.get_model_repository_index().models] == [MODEL]
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert [output.name for output in client.get_model_metadata(MODEL).outputs] == [
        output["name"] for output in metadata["outputs"]
    ]


@needs_server
def test_an_rdnet_is_served_as_it_predicts(digits, tmp_path, user):
    shape = {"model__name": "rdnet_tiny", "model__block_sizes": (1, 2), "model__growth_rate": 16}
    make_run(tmp_path / "run", digits[1].config.data.dir, data__image_size_px=16, **shape)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), dtype=np.uint8)
    expected = Predictor.from_workdir(tmp_path / "run").probabilities(pixels)
    with serving(tmp_path / "run", **user) as running:
        wanted = request_of(pixels_input(pixels), outputs=[{"name": "probabilities"}, {"name": "activation_map"}])
        answer = requests.post(f"{running.url}/v2/models/rdnet_tiny/infer", json=wanted, timeout=60)
    got = outputs_of(answer)
    np.testing.assert_allclose(got["probabilities"], expected, **TOLERANCE)
    assert got["activation_map"].shape == (3, 2, 2)


@needs_server
def test_answers_over_rest_are_the_predictors(server, served, pixels, pictures, expected):
    got = outputs_of(post(server, request_of(pixels_input(pixels[:5]))))
    np.testing.assert_allclose(got["probabilities"], expected[:5], **TOLERANCE)
    best = [served.best(row) for row in expected[:5]]
    assert got["class_ids"].tolist() == [[one.class_id for one in row] for row in best]
    assert got["labels"].tolist() == [[one.label for one in row] for row in best]
    np.testing.assert_allclose(got["top_probabilities"], [[one.probability for one in row] for row in best], rtol=1e-4)
    got = outputs_of(post(server, request_of(pictures_input(*pictures[:5]), outputs=[{"name": "probabilities"}])))
    assert list(got) == ["probabilities"]
    np.testing.assert_allclose(got["probabilities"], expected[:5], **TOLERANCE)
    # A picture of another size goes through the model's own preprocessing.
    large = encoded(Image.fromarray(pixels[0, :, :, 0]).resize((30, 20)))
    want = served.probabilities(served.preprocess(large)[None])
    got = outputs_of(post(server, request_of(pictures_input(large))))
    np.testing.assert_allclose(got["probabilities"], want, **TOLERANCE)


@needs_server
def test_answers_over_grpc_are_the_predictors(server, served, pixels, pictures, expected):
    client = grpc_client(server)
    for given in (
        grpc_input("image", "UINT8", pixels[:5]),
        grpc_input("image_bytes", "BYTES", np.array(pictures[:5], dtype=object)),
    ):
        got = client.infer(MODEL, [given])
        np.testing.assert_allclose(got.as_numpy("probabilities"), expected[:5], **TOLERANCE)
        labels = [[one.label.encode() for one in served.best(row)] for row in expected[:5]]
        assert got.as_numpy("labels").tolist() == labels


@needs_server
def test_activation_maps_are_the_predictors(server, served, pixels, pictures):
    from tritonclient import grpc

    explained = np.stack([one.activation_map for one in served.explain(pictures[:3])])
    wanted = [{"name": "activation_map"}, {"name": "class_ids"}]
    got = outputs_of(post(server, request_of(pictures_input(*pictures[:3]), outputs=wanted)))
    np.testing.assert_allclose(got["activation_map"], explained, rtol=1e-3, atol=1e-4)
    assert got["class_ids"].shape == (3, 5)
    shapes = {one["name"]: one["shape"] for one in requests.get(f"{server.url}/v2/models/{MODEL}").json()["outputs"]}
    assert shapes["activation_map"] == [-1, *explained.shape[1:]]
    answer = grpc_client(server).infer(
        MODEL,
        [grpc_input("image", "UINT8", pixels[:3])],
        outputs=[grpc.InferRequestedOutput("activation_map")],
    )
    np.testing.assert_allclose(answer.as_numpy("activation_map"), explained, rtol=1e-3, atol=1e-4)
    assert "activation_map" not in outputs_of(post(server, request_of(pixels_input(pixels[:1]))))
    assert b'data-share="1"' in requests.get(server.url, timeout=9).content


@needs_server
def test_mistakes_are_reported_and_the_server_stays_healthy(server, pictures):
    good = pictures_input(pictures[0])
    gray = pixels_input(np.zeros((1, 8, 8, 1), np.uint8))
    bodies = {
        "expected 1 to 64": request_of(pixels_input(np.zeros((65, 8, 8, 1), np.uint8))),
        "expected \\[n, 8, 8, 1\\]": request_of(pixels_input(np.zeros((1, 8, 8, 3), np.uint8))),
        "expected UINT8": request_of({**gray, "datatype": "FP32"}),
        "datatype": request_of({**gray, "datatype": "UINT7"}),
        "not base64": request_of({**good, "data": ["%%%"]}),
        "image_bytes\\[0\\]": request_of(pictures_input(pictures[0][:30])),
        "malformed": {"inputs": 1},
        "no output": request_of(good, outputs=[{"name": "secrets"}]),
        "printable ASCII": request_of(good, id="a\r\nSet-Cookie: b"),
    }
    for why, body in bodies.items():
        answer = post(server, body)
        assert answer.status_code == 400, (why, answer.text)
        assert why.replace("\\", "") in answer.json()["error"]
        assert len(answer.text) < 400
    for bomb in BOMBS.values():
        answer = post(server, request_of(pictures_input(bomb)))
        assert answer.status_code == 400, answer.text
    headers = {"Content-Type": "application/json"}
    for text in (b"{", b"", b"\xff", b"[" * 100_000, b'{"inputs":' * 5000):
        assert requests.post(server.infer_url, data=text, headers=headers, timeout=9).status_code == 400
    huge = requests.post(server.infer_url, data=b" " * (33 * 2**20), headers=headers, timeout=60)
    assert huge.status_code == 413
    for odd in ({"Content-Encoding": "gzip"}, {"Content-Type": "text/plain"}):
        assert requests.post(server.infer_url, data=b"1", headers={**headers, **odd}, timeout=9).status_code == 415
    assert requests.delete(server.infer_url, timeout=9).status_code == 405
    for path in (
        "/v2/models/other/infer",
        f"/v2/models/{MODEL}/versions/7/infer",
        "/v2/models/..%2f..%2fetc/infer",
        f"/v2/models/{MODEL}/infer_stream",
        "/../../etc/passwd",
        f"/v2/repository/models/{MODEL}/load/x",
    ):
        assert requests.post(server.url + path, json=request_of(good), timeout=9).status_code == 404, path
    unload = requests.post(f"{server.url}/v2/repository/models/{MODEL}/unload", timeout=9)
    assert unload.status_code == 501
    assert post(server, request_of(good)).status_code == 200


@needs_server
def test_mistakes_over_grpc_are_reported(server, pixels):
    from tritonclient.utils import InferenceServerException

    client = grpc_client(server)
    good = grpc_input("image", "UINT8", pixels[:1])
    cut, huge = (grpc_input("image", "UINT8", pixels[:1]) for _ in range(2))
    cut._raw_content = b"12"
    huge._raw_content = b"1" * (33 * 2**20)
    wrong = {
        "INVALID_ARGUMENT": [lambda: client.infer(MODEL, [cut]), lambda: client.infer(MODEL, [good, good])],
        "NOT_FOUND": [
            lambda: client.infer("n" * 100_000, [good]),
            lambda: client.infer(MODEL, [good], model_version="7"),
            lambda: client.is_model_ready("../../etc"),
            lambda: client.get_model_metadata("other"),
        ],
        "RESOURCE_EXHAUSTED": [lambda: client.infer(MODEL, [huge])],
        "UNIMPLEMENTED": [lambda: client.unload_model(MODEL), lambda: client.load_model(MODEL)],
    }
    for status, calls in wrong.items():
        counted = answers_over_grpc(server, status)
        for call in calls:
            with pytest.raises(InferenceServerException) as raised:
                call()
            assert status in raised.value.status()
            assert len(raised.value.message()) < 400
        if status != "RESOURCE_EXHAUSTED":  # grpcio refuses it before any method is called
            assert answers_over_grpc(server, status) == counted + len(calls)
    counted = answers_over_grpc(server, "OK")
    assert client.infer(MODEL, [good]).as_numpy("probabilities").shape == (1, 10)
    assert answers_over_grpc(server, "OK") == counted + 1


@needs_server
def test_bad_requests_and_lost_clients_leave_the_rest_of_a_batch_alone(server, pictures, expected):
    def ask(number):
        if number % 4 == 1:
            return post(server, request_of(pictures_input(pictures[number % 64][:40]))).status_code == 400
        if number % 4 == 2:  # goes away at once
            with contextlib.suppress(requests.exceptions.ReadTimeout):
                requests.post(server.infer_url, json=request_of(pictures_input(pictures[0])), timeout=(9, 0.001))
            return True
        got = outputs_of(post(server, request_of(pictures_input(pictures[number % 64]))))
        return np.allclose(got["probabilities"][0], expected[number % 64], **TOLERANCE)

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(ask, range(400)))


def answers_over_grpc(server, code: str) -> int:
    """How many requests over gRPC the server says it has answered with this status."""
    text = requests.get(f"{server.url}/metrics", timeout=9).text
    return sum(int(float(count)) for count in re.findall(rf'^grpc_server_handled_total.*"{code}".* (.*)$', text, re.M))


@needs_server
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_requests_under_way_are_answered_before_it_stops(served_run, user, number, pixels, expected):
    """The signal comes once all requests have begun, with many times what one batch holds."""
    flags = ("--config.serve.batch_sizes=(1,)", "--config.serve.stop_secs=60")  # busy machines are slow
    with serving(served_run, *flags, **user) as short:
        client = grpc_client(short)
        assert post(short, request_of(pixels_input(pixels[:3]))).status_code == 200
        assert client.is_model_ready(MODEL)  # connected

        def over_rest(_):
            return outputs_of(post(short, request_of(pixels_input(pixels))))["probabilities"]

        def over_grpc(_):
            return client.infer(MODEL, [grpc_input("image", "UINT8", pixels)]).as_numpy("probabilities")

        with ThreadPoolExecutor(12) as pool:
            answers = [pool.submit(over_rest if index % 3 else over_grpc, index) for index in range(12)]
            while sum(short.metrics("model_infer_request_success_total", "model_infer_requests_under_way")) < 13:
                assert not any(answer.done() and answer.exception() for answer in answers)
                time.sleep(0.01)
            status, output = short.stop(number)
            assert status == 0, "".join(short.said)
            for answer in answers:
                np.testing.assert_allclose(answer.result(), expected, **TOLERANCE)
    assert parse_last_line(output) == {"mode": "serve", "requests": 13, "images": 3 + 12 * 64}
    assert output.count("\n") == 1


@needs_server
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_while_it_compiles(served_run, user, tmp_path, number):
    """Python's own end would abort with a thread in the compiler."""
    port = find_free_port()
    sizes = f"--config.serve.batch_sizes={tuple(range(1, 65))}"  # minutes of work, in steps that end at any time
    flags = ("--mode", "serve", "--port", str(port), "--grpc_port", "0", sizes)
    common = ("--config", "configs/digits.py", "--workdir", str(served_run), *flags)
    with start_main(*common, fresh=True, **{**user, "XDG_CACHE_HOME": str(tmp_path)}) as process:
        status = 0
        while status != 200:
            assert process.poll() is None, process.communicate()
            with contextlib.suppress(requests.ConnectionError):
                status = requests.get(f"http://127.0.0.1:{port}/v2/health/live", timeout=9).status_code
        time.sleep(0.5)
        assert requests.get(f"http://127.0.0.1:{port}/v2/health/ready", timeout=9).status_code == 400
        process.send_signal(number)
        output, errors = process.communicate(timeout=15)
    assert process.returncode == 0, errors
    assert errors.splitlines()[-1] == "stopped after 0 requests with 0 images"
    assert parse_last_line(output) == {"mode": "serve", "requests": 0, "images": 0}


@needs_server
def test_it_stops_while_it_loads(served_run, user, tmp_path):
    """Reading the labels waits for somebody to write them."""
    os.mkfifo(tmp_path / "labels")
    flags = ("--mode", "serve", "--port", "0", "--grpc_port", "0", "--labels", str(tmp_path / "labels"))
    common = ("--config", "configs/digits.py", "--workdir", str(served_run), *flags)
    with start_main(*common, **user) as process:
        writing = None
        while writing is None:
            assert process.poll() is None, process.communicate()
            with contextlib.suppress(OSError):  # nobody reads it yet
                writing = os.open(tmp_path / "labels", os.O_WRONLY | os.O_NONBLOCK)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=5)
        os.close(writing)
    assert (process.returncode, output, errors.splitlines()[-1]) == (130, "", "interrupted")


@needs_server
def test_nothing_is_compiled_after_the_start(served, pictures):
    """Not for files of 16 bits either, which share no batch with others."""
    from densenet_jax.serve.requests import ENCODED, Request, Tensor, Wanted
    from densenet_jax.serve.runtime import Classifier

    wide = [
        encoded(Image.fromarray(np.random.default_rng(seed).integers(0, 65536, (9, 9), np.uint16))) for seed in range(3)
    ]
    files = [pictures[0], wide[0], pictures[1], wide[1], wide[2]]
    predictor = Predictor(served.model, batch_sizes=(8, 32))

    async def ask():
        model = Classifier(predictor, default.get_config())
        await model.compile()
        compiled = predictor._step._cache_size()
        request = Request(
            [Tensor(ENCODED, "BYTES", [len(files)], files, is_base64=False)],
            [Wanted("probabilities"), Wanted("activation_map")],
        )
        _, outputs = await model.infer(lambda: request, 1)
        assert predictor._step._cache_size() == compiled == 2 + len(predictor.batch_sizes)
        return outputs[0][1]

    expected = np.concatenate([served.probabilities(served.preprocess(file)[None]) for file in files])
    np.testing.assert_allclose(asyncio.run(ask()), expected, **TOLERANCE)


@needs_server
def test_a_model_of_16_bits_takes_16_bits(served_run, user, pixels):
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc
    from tritonclient.utils import InferenceServerException

    change = {"data.pixel_range": (0.0, 1000.0)}
    config = read_run_settings(str(served_run), change)
    wide = np.random.default_rng(1).integers(0, 65536, (3, 8, 8, 1), dtype=np.uint16)
    expected = Predictor(make_deployed(config, str(served_run)), batch_sizes=(4,)).probabilities(wide)
    flags = ("--config.data.pixel_range=(0.0, 1000.0)", "--config.serve.batch_sizes=(4,)")
    with serving(served_run, *flags, **user) as server:
        described = requests.get(f"{server.url}/v2/models/{MODEL}", timeout=9).json()["inputs"][0]
        assert (described["name"], described["datatype"]) == ("image", "UINT16")
        got = outputs_of(post(server, request_of(pixels_input(wide))))["probabilities"]
        np.testing.assert_allclose(got, expected, **TOLERANCE)
        client = grpc_client(server)
        assert client.get_model_metadata(MODEL).inputs[0].datatype == "UINT16"
        got = client.infer(MODEL, [grpc_input("image", "UINT16", wide)]).as_numpy("probabilities")
        np.testing.assert_allclose(got, expected, **TOLERANCE)
        given = service_pb2.ModelInferRequest(model_name=MODEL)
        given.inputs.add(name="image", datatype="UINT16", shape=wide.shape).contents.uint_contents.extend(
            wide.ravel().tolist()
        )
        with grpc.insecure_channel(server.grpc) as channel:
            answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(given)
        np.testing.assert_allclose(answer.outputs[0].contents.fp32_contents, expected.ravel(), **TOLERANCE)
        assert post(server, request_of(pixels_input(pixels[:1]))).status_code == 400
        with pytest.raises(InferenceServerException, match="'UINT8'; expected UINT16"):
            client.infer(MODEL, [grpc_input("image", "UINT8", pixels[:1])])


@needs_server
def test_a_port_in_use_is_a_users_mistake(server, served_run, user):
    port = server.url.rsplit(":", 1)[1]
    common = ("--config", "configs/digits.py", "--workdir", str(served_run), "--mode", "serve")
    _, errors = run_main(*common, "--port", port, "--grpc_port", "0", expect=2, **user)
    assert errors.splitlines()[-1].startswith(f"error: --port {port} of 127.0.0.1 can't be used")
    _, errors = run_main(*common, "--port", "0", "--grpc_port", server.grpc.rsplit(":", 1)[1], expect=2, **user)
    assert errors.splitlines()[-1].startswith("error: --grpc_port")
