"""Serves the protocol over REST: an ASGI application with a page, metrics and a description of itself."""

import asyncio
import contextlib
import functools
import importlib.resources
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import orjson
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Histogram, generate_latest

from densenet_jax.serve.limits import MAX_BODY_BYTES, SMALL_BODY_BYTES, Access
from densenet_jax.serve.requests import DATATYPES, ENCODED, Request, RequestError, Tensor, Wanted, pack_array, shorten
from densenet_jax.serve.runtime import MAX_IMAGES, VERSION, Classifier, Outputs, attempt
from densenet_jax.version import __version__

Message: TypeAlias = dict[str, Any]  # of ASGI
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Headers: TypeAlias = dict[str, str]  # by their names in lower case
Reply: TypeAlias = tuple[bytes, Headers]  # with the body

MODEL = "/v2/models/([^/]+)(?:/versions/([^/]+))?"
LABELS = {f"{MODEL}/infer": "/v2/models/infer"}  # in metrics; "" for the rest that names models, and what is unknown
MAX_JSON_BYTES = 16 * 2**20  # JSON part of a body
MAX_JSON_VALUES, MAX_JSON_CONTAINERS = 1_000_000, 200_000
BODY_SECS = 30.0  # for a request's body to arrive
ALL_BODIES_BYTES = 256 * 2**20  # larger bodies together
READ_ON_BYTES = 4 * MAX_BODY_BYTES  # a client that sends too much still gets its answer if it stops here
STATUS_HEADERS = {401: {"www-authenticate": 'Bearer, Basic realm="model"'}, 503: {"retry-after": "1"}}
# Pages may run their inline code and talk to this server, and nothing else.
PAGE_POLICY = (
    "default-src 'none'; img-src blob: data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGES = {"/": "page.html", "/docs": "docs.html", "/openapi.json": "openapi.json"}
EXTENSIONS = ["binary_tensor_data", "classification", "model_repository"]
SERVER = {"name": "densenet_jax", "version": __version__, "extensions": EXTENSIONS}
PAGE_HEADERS = {"content-security-policy": PAGE_POLICY, "x-content-type-options": "nosniff"}
JSON = "application/json"
JSON_LENGTH = "inference-header-content-length"
KINDS = {list: "a list", str: "a string", int: "a whole number", bool: "true or false", dict: "an object"}
TENSOR = (("name", str), ("datatype", str), ("shape", list))
REQUESTS = Counter("rest_server_requests", "Requests over REST.", ("method", "path", "status_code"))
DURATION = Histogram("rest_server_request_duration_seconds", "How long answering took.", ("path",))
_metrics = functools.cache(lambda *labels: (REQUESTS.labels(*labels), DURATION.labels(labels[1])))


class Rest:
    """ASGI application."""

    def __init__(self, model: Classifier, access: Access):
        self._model, self._access = model, access
        self._body_bytes = 0  # of all requests under way
        self._routes: list[tuple[str, str, Callable[..., Any]]] = [
            ("POST", f"{MODEL}/infer", self._infer),
            ("GET", MODEL, lambda *which: model.metadata(*which)),
            ("GET", f"{MODEL}/ready", lambda *which: {"name": model.name, "ready": model.is_model_ready(*which)}),
            ("GET", "/v2", lambda: SERVER),
            ("GET", "/v2/health/live", lambda: {"live": True}),
            ("GET", "/v2/health/ready", lambda: {"ready": model.is_ready and not model.is_stopping}),
            ("POST", "/v2/repository/index", self._index),
            ("POST", "/v2/repository/models/([^/]+)/(?:un)?load", lambda *given: model.refuse_to_load(given[-1])),
            ("GET", "/metrics", lambda: (generate_latest(), {"content-type": CONTENT_TYPE_LATEST})),
            *[("GET", path, _make_page(model, name)) for path, name in PAGES.items()],
        ]

    async def __call__(self, scope: Message, receive: Receive, send: Callable[[Message], Awaitable[None]]) -> None:
        """Answers one request."""
        started = time.perf_counter()
        scope["state"] |= {"task": asyncio.current_task(), "label": ""}  # canceled if the connection is lost
        try:
            status, reply = await attempt(self._route(scope, receive))
        except asyncio.CancelledError:
            return
        if status != 200:
            reply = {"error": reply}
        body, headers = reply if isinstance(reply, tuple) else (orjson.dumps(reply), {"content-type": JSON})
        headers = headers | {"content-length": str(len(body))} | STATUS_HEADERS.get(status, {})
        if status not in (200, 400, 404):  # something may be unread
            headers["connection"] = "close"
        pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": body})
        requests, duration = _metrics(scope["method"], scope["state"]["label"], status)
        requests.inc()
        duration.observe(time.perf_counter() - started)

    async def _route(self, scope: Message, receive: Receive) -> Any:
        headers = {name.decode("latin-1"): value.decode("latin-1").strip() for name, value in scope["headers"]}
        if "host" in headers or scope["http_version"] == "1.1":
            self._access.check_host(headers.get("host", ""))
        self._access.check_token(headers.get("authorization", ""))
        for method, path, answer in self._routes:
            if match := re.fullmatch(path, scope["path"]):
                if scope["method"] != method and (method, scope["method"]) != ("GET", "HEAD"):
                    raise RequestError(f"expected the method {method}", 405)
                scope["state"]["label"] = LABELS.get(path, "") if match.re.groups else path
                which = match.groups("")
                reply = await answer(headers, receive, *which) if method == "POST" else answer(*which)
                if isinstance(reply, dict) and not reply.get("ready", True):
                    raise RequestError("not ready")  # the protocol's status is 4xx
                return reply
        raise RequestError("there is nothing at this address; /docs tells what there is", 404)

    async def _index(self, headers: Headers, receive: Receive) -> list[dict[str, str]]:
        async with self._body(headers, receive, MAX_JSON_BYTES) as body:
            return self._model.index(bool(body and _field(_parse_json(body), "ready", bool, False)))

    async def _infer(self, headers: Headers, receive: Receive, *which: str) -> Reply:
        self._model.check_name(*which)
        # A small compressed body may unpack to any size.
        if headers.get("content-encoding", "") not in ("", "identity"):
            raise RequestError("bodies with a Content-Encoding are not taken; send it unpacked", 415)
        kind, _, options = headers.get("content-type", "").partition(";")
        kind, length = kind.strip().lower(), headers.get(JSON_LENGTH, "")
        most = MAX_JSON_BYTES if kind in ("", JSON) and not length else MAX_BODY_BYTES
        async with self._body(headers, receive, most) as body:
            if kind == "multipart/form-data":
                read = functools.partial(_read_files, body, options)
            elif kind.startswith("image/") or kind == "application/dicom":
                read = functools.partial(_request_of_pictures, [bytes(body)])
            elif kind in ("", JSON) or (kind == "application/octet-stream" and length):
                read = functools.partial(_read_json, body, length)
            else:
                raise RequestError("expected the Content-Type application/json, multipart/form-data or image/...", 415)
            request, outputs = await self._model.infer(read, len(body))
        return _write_answer(self._model.name, request, outputs)

    @contextlib.asynccontextmanager
    async def _body(self, headers: Headers, receive: Receive, most: int) -> AsyncIterator[bytearray]:
        """Yields the whole body of a request, and counts its bytes among those of all requests meanwhile.

        What comes after a refusal is read for a while, since clients look for an answer when they have sent everything.
        """
        body, size, has_more = bytearray(), 0, True
        announced = int(headers.get("content-length") or 0)
        too_large = RequestError(f"the body is larger than {most} bytes", 413)
        refused = too_large if announced > most else None
        try:
            async with asyncio.timeout(BODY_SECS):
                while has_more and (refused is None or max(size, announced) <= READ_ON_BYTES):
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise asyncio.CancelledError  # as losing the connection cancels the task
                    part, has_more = message["body"], message["more_body"]
                    size += len(part)
                    if size > most:
                        refused = too_large
                    elif size > SMALL_BODY_BYTES and self._body_bytes + len(part) > ALL_BODIES_BYTES:
                        refused = RequestError("the server has no memory for a large request now; come again", 503)
                    if refused is None:
                        self._body_bytes += len(part)
                        body += part
            if refused is not None:
                self._model.last_large = time.monotonic()
                raise refused
            yield body
        except TimeoutError as error:
            raise RequestError(f"the body did not arrive within {BODY_SECS:.0f} seconds", 408) from error
        finally:
            self._body_bytes -= len(body)


def _make_page(model: Classifier, name: str) -> Callable[[], Reply]:
    text = importlib.resources.files("densenet_jax.serve").joinpath(name).read_text("utf-8")
    text = text.replace("MODEL_NAME", model.name).replace("CROP_SHARE", f"{model.seen_share:.6g}")
    kind = "text/html; charset=utf-8" if name.endswith("html") else JSON
    reply = text.encode(), PAGE_HEADERS | {"content-type": kind}
    return lambda: reply


def _parse_json(text: bytes | bytearray) -> Any:
    """Parses JSON, unless it would take much time or memory."""
    values, containers = text.count(b","), text.count(b"[") + text.count(b"{")
    if len(text) > MAX_JSON_BYTES or values > MAX_JSON_VALUES or containers > MAX_JSON_CONTAINERS:
        limits = f"{MAX_JSON_BYTES:,} bytes, {MAX_JSON_VALUES:,} values or {MAX_JSON_CONTAINERS:,} lists"
        raise RequestError(f"the JSON has more than {limits}; send the data in binary", 413)
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the request is malformed: it is not JSON ({error.msg})") from error


def _field(tree: Any, name: str, kind: type, *default: Any) -> Any:
    """Returns a field of an object of JSON, or the default if it is missing or null; raises RequestError otherwise."""
    value = tree.get(name) if type(tree) is dict else None
    if value is None and default:
        return default[0]
    if type(value) is not kind:
        raise RequestError(f"the request is malformed: {name} is missing or not {KINDS[kind]}")
    return value


def _read_json(body: bytes | bytearray, json_length: str = "") -> Request:
    """Reads a request in JSON; binary tensors may follow after `json_length` bytes."""
    if json_length and not (json_length.isdecimal() and len(json_length) < 10 and int(json_length) <= len(body)):
        raise RequestError(f"{JSON_LENGTH} is {shorten(json_length)}; the body has {len(body)} bytes")
    end = place = int(json_length or len(body))
    tree = _parse_json(body[:end] if json_length else body)
    tensors, outputs = [], []
    for given in _field(tree, "inputs", list):
        name, datatype, shape = (_field(given, *field) for field in TENSOR)
        data, size = given.get("data"), _field(_field(given, "parameters", dict, {}), "binary_data_size", int, -1)
        if size >= 0:
            data = bytes(memoryview(body)[place : place + size])
            place += size
        tensors.append(Tensor(name, datatype, shape, data, is_base64=size < 0))
    if place != len(body):
        raise RequestError(f"the binary data have {len(body) - end} bytes; binary_data_size says {place - end}")
    is_binary = _field(_field(tree, "parameters", dict, {}), "binary_data_output", bool, False)
    for wanted in _field(tree, "outputs", list, ()):
        options = _field(wanted, "parameters", dict, {})
        classes = _field(options, "classification", int, 0)
        outputs.append(Wanted(_field(wanted, "name", str), classes, _field(options, "binary_data", bool, is_binary)))
    return Request(tensors, outputs, _field(tree, "id", str, None), is_binary)


def _read_files(body: bytes | bytearray, options: str) -> Request:
    """Reads the files of a form as pictures."""
    boundary = re.search(r'boundary="?([^";,\s]{1,70})"?', options)
    if boundary is None:
        raise RequestError("the form is malformed: its Content-Type has no boundary")
    line = b"\r\n--" + boundary[1].encode("latin-1")
    _, *parts = (b"\r\n" + body).split(line, MAX_IMAGES + 2)
    if not parts or not parts[-1].startswith(b"--"):
        raise RequestError(f"the form is malformed, or has more than {MAX_IMAGES} files")
    files = []
    for part in parts[:-1]:
        head, found, content = part.partition(b"\r\n\r\n")
        if not found or b"filename=" not in head[:4096]:
            raise RequestError("the form has a field that is no file; expected pictures, as curl -F image=@FILE does")
        files.append(bytes(content))
    return _request_of_pictures(files)


def _request_of_pictures(pictures: list[bytes]) -> Request:
    return Request([Tensor(ENCODED, "BYTES", [len(pictures)], pictures, is_base64=False)])


def _write_answer(model: str, request: Request, outputs: Outputs) -> Reply:
    """Writes the answer in JSON, followed by the binary tensors that were asked for."""
    tensors: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for wanted, values in outputs:
        datatype = DATATYPES[values.dtype.name]
        tensor: dict[str, Any] = {"name": wanted.name, "shape": values.shape, "datatype": datatype}
        if wanted.is_binary:
            binary.append(pack_array(values))
            tensor["parameters"] = {"binary_data_size": len(binary[-1])}
        elif datatype == "BYTES":
            tensor |= {"parameters": {"content_type": "str"}, "data": values.ravel().tolist()}
        else:
            tensor["data"] = values.ravel()
        tensors.append(tensor)
    content: dict[str, Any] = {"model_name": model, "model_version": VERSION, "outputs": tensors}
    if request.request_id is not None:
        content["id"] = request.request_id
    text = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    if not binary:
        return text, {"content-type": JSON}
    return b"".join([text, *binary]), {"content-type": "application/octet-stream", JSON_LENGTH: str(len(text))}
