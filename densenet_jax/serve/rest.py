"""Serves the protocol over REST: an ASGI application with a page, metrics and a description of itself."""

import asyncio
import contextlib
import functools
import html
import importlib.resources
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

import numpy as np
import orjson
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Histogram, generate_latest

from densenet_jax.serve.limits import MAX_BODY_BYTES, SMALL_BODY_BYTES, Access
from densenet_jax.serve.requests import DATATYPES, ENCODED, Request, RequestError, Tensor, Wanted, pack_array, shorten
from densenet_jax.serve.runtime import MAX_IMAGES, VERSION, Classifier, Outputs, attempt
from densenet_jax.version import __version__

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers: TypeAlias = dict[str, str]  # by their names in lower case
Reply: TypeAlias = tuple[bytes, Headers]  # with the body

METHODS = ("GET", "HEAD", "POST")
MODEL = "/v2/models/([^/]+)(?:/versions/([^/]+))?"
LABELS = {f"{MODEL}/infer": "/v2/models/infer"}  # in metrics; "" for the rest that names models, and what is unknown
MAX_JSON_BYTES = 16 * 2**20  # JSON part of a body
MAX_JSON_VALUES, MAX_JSON_CONTAINERS = 1_000_000, 200_000
BODY_SECS = 30.0  # for a request's body to arrive
ALL_BODIES_BYTES = 256 * 2**20  # larger bodies together
READ_ON_FACTOR = 4  # a client that sends too much still gets its answer if it stops at this multiple of the limit
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
TENSOR = {"name": str, "datatype": str, "shape": list, "parameters?": {"binary_data_size?": int}}
OUTPUT = {"name": str, "parameters?": {"classification?": int, "binary_data?": bool}}
REQUEST = {"inputs": [TENSOR], "outputs?": [OUTPUT], "id?": str, "parameters?": {"binary_data_output?": bool}}
REQUESTS = Counter("rest_server_requests", "Requests over REST.", ("method", "path", "status_code"))
DURATION = Histogram("rest_server_request_duration_seconds", "How long answering took.", ("path",))
_metrics = functools.cache(lambda *labels: (REQUESTS.labels(*labels), DURATION.labels(labels[1])))


class Rest:
    """ASGI application."""

    def __init__(self, model: Classifier, access: Access):
        self._model, self._access = model, access
        self._body_bytes = 0  # of all requests under way
        routes: list[tuple[str, str, Callable[..., Any]]] = [
            ("POST", f"{MODEL}/infer", self._infer),
            ("GET", MODEL, lambda *which: model.metadata(*which)),
            ("GET", f"{MODEL}/ready", lambda *which: _answer_if(model.is_model_ready(*which), name=model.name)),
            ("GET", "/v2", lambda: SERVER),
            ("GET", "/v2/health/live", lambda: {"live": True}),
            ("GET", "/v2/health/ready", lambda: _answer_if(model.is_ready and not model.is_stopping)),
            ("POST", "/v2/repository/index", self._index),
            ("POST", "/v2/repository/models/([^/]+)/(?:un)?load", lambda *given: model.refuse_to_load(given[-1])),
            ("GET", "/metrics", lambda: (generate_latest(), {"content-type": CONTENT_TYPE_LATEST})),
            *[("GET", path, _make_page(model, name)) for path, name in PAGES.items()],
        ]
        self._routes = [(method, re.compile(path), answer) for method, path, answer in routes]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
        method = scope["method"] if scope["method"] in METHODS else "other"
        requests, duration = _metrics(method, scope["state"]["label"], status)
        requests.inc()
        duration.observe(time.perf_counter() - started)

    async def _route(self, scope: Scope, receive: Receive) -> Any:
        headers = {name.decode("latin-1"): value.decode("latin-1").strip() for name, value in scope["headers"]}
        if "host" in headers or scope["http_version"] == "1.1":
            self._access.check_host(headers.get("host", ""))
        self._access.check_token(headers.get("authorization", ""))
        for method, path, answer in self._routes:
            if match := path.fullmatch(scope["path"]):
                if scope["method"] != method and (method, scope["method"]) != ("GET", "HEAD"):
                    raise RequestError(f"expected the method {method}", 405)
                scope["state"]["label"] = LABELS.get(path.pattern, "") if path.groups else path.pattern
                which = match.groups("")
                return await answer(headers, receive, *which) if method == "POST" else answer(*which)
        raise RequestError("there is nothing at this address; /docs tells what there is", 404)

    async def _index(self, headers: Headers, receive: Receive) -> list[dict[str, str]]:
        async with self._body(headers, receive, MAX_JSON_BYTES) as body:
            return self._model.index(bool(body and _parse_json(body, {"ready?": bool}).get("ready")))

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
        """Yields the whole body of a request, and counts its bytes among those of all requests meanwhile."""
        body = bytearray()
        try:
            await self._read(headers, receive, most, body)
            yield body
        finally:
            self._body_bytes -= len(body)

    async def _read(self, headers: Headers, receive: Receive, most: int, body: bytearray) -> None:
        length = headers.get("content-length", "")
        announced = int(length) if length.isdecimal() and len(length) < 20 else 0
        too_large = RequestError(f"the body is larger than {most} bytes", 413)
        refused = too_large if announced > most else None
        size, has_more = 0, True
        try:
            async with asyncio.timeout(BODY_SECS):
                while has_more and (refused is None or max(size, announced) <= READ_ON_FACTOR * MAX_BODY_BYTES):
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise asyncio.CancelledError  # as losing the connection cancels the task
                    part, has_more = message.get("body", b""), message.get("more_body", False)
                    size += len(part)
                    if size > most:
                        refused = too_large
                    elif size > SMALL_BODY_BYTES and self._body_bytes + len(part) > ALL_BODIES_BYTES:
                        refused = RequestError(
                            "the server has no memory for so large a request at the moment; come again", 503
                        )
                    if refused is None:
                        self._body_bytes += len(part)
                        body += part
                    else:
                        self._body_bytes -= len(body)
                        body.clear()
        except TimeoutError as error:
            raise RequestError(f"the body did not arrive within {BODY_SECS:.0f} seconds", 408) from error
        if refused is not None:
            self._model.last_large = time.monotonic()
            raise refused


def _make_page(model: Classifier, name: str) -> Callable[[], Reply]:
    text = importlib.resources.files("densenet_jax.serve").joinpath(name).read_text("utf-8")
    text = text.replace("MODEL_NAME", html.escape(model.name)).replace("CROP_SHARE", f"{model.seen_share:.6g}")
    kind = "text/html; charset=utf-8" if name.endswith("html") else JSON
    reply = text.encode(), PAGE_HEADERS | {"content-type": kind}
    return lambda: reply


def _answer_if(is_ready: bool, **more: str) -> dict[str, Any]:
    if not is_ready:
        raise RequestError("not ready")  # the protocol's status is 4xx
    return more | {"ready": True}


def _parse_json(text: bytes | bytearray, form: dict[str, Any]) -> dict[str, Any]:
    """Parses an object of the given form, see `_check_form`, unless it would take much time or memory."""
    if len(text) > MAX_JSON_BYTES:
        raise RequestError(f"the JSON is larger than {MAX_JSON_BYTES} bytes; send the data in binary", 413)
    if text.count(b",") > MAX_JSON_VALUES or text.count(b"[") + text.count(b"{") > MAX_JSON_CONTAINERS:
        why = f"the JSON has more than {MAX_JSON_VALUES:,} values or {MAX_JSON_CONTAINERS:,} lists"
        raise RequestError(f"{why}; send the data in binary", 413)
    try:
        tree = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the request is malformed: it is not JSON ({error.msg})") from error
    _check_form(tree, form, "")
    return tree


def _check_form(value: Any, form: Any, where: str) -> None:
    """Raises RequestError unless a value of JSON has a form: a type, or one for each key or item.

    A key that ends with "?" may be missing or null.
    """
    kind, given = form if isinstance(form, type) else type(form), type(value)
    if given is not kind:
        problem = "missing" if value is None else f"not {KINDS[kind]}"
        raise RequestError(f"the request is malformed: {where or 'it'} is {problem}; expected {KINDS[kind]}")
    if isinstance(form, list):
        for number, item in enumerate(value):
            _check_form(item, form[0], f"{where}.{number}")
    if isinstance(form, dict):
        for key, inner in form.items():
            name = key.rstrip("?")
            if name == key or value.get(name) is not None:
                _check_form(value.get(name), inner, f"{where}.{name}".lstrip("."))


def _read_json(body: bytes | bytearray, json_length: str = "") -> Request:
    """Reads a request in JSON; binary tensors may follow after `json_length` bytes."""
    if json_length and not (json_length.isdecimal() and len(json_length) < 10 and int(json_length) <= len(body)):
        raise RequestError(f"{JSON_LENGTH} is {shorten(json_length)}; the body has {len(body)} bytes")
    end = int(json_length) if json_length else len(body)
    tree = _parse_json(body[:end] if json_length else body, REQUEST)
    tensors, place = [], end
    for number, given in enumerate(tree["inputs"]):
        if not all(type(size) is int for size in given["shape"]):
            raise RequestError(f"the request is malformed: inputs.{number}.shape is not a list of whole numbers")
        data, size = given.get("data"), _parameter(given, "binary_data_size", -1)
        if size >= 0:
            data = bytes(memoryview(body)[place : place + size])
            place += size
        tensors.append(Tensor(given["name"], given["datatype"], given["shape"], data, is_base64=size < 0))
    if place != len(body):
        raise RequestError(
            f"the binary data have {len(body) - end} bytes; the inputs' binary_data_size say {place - end}"
        )
    is_binary = _parameter(tree, "binary_data_output", False)
    outputs = [
        Wanted(one["name"], _parameter(one, "classification", 0), _parameter(one, "binary_data", is_binary))
        for one in tree.get("outputs") or ()
    ]
    return Request(tensors, outputs, tree.get("id"), is_binary)


def _parameter(tree: dict[str, Any], name: str, default: Any) -> Any:
    value = (tree.get("parameters") or {}).get(name)
    return default if value is None else value


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
    told: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for wanted, values in outputs:
        is_text = values.dtype == object
        output: dict[str, Any] = {
            "name": wanted.name,
            "shape": list(values.shape),
            "datatype": DATATYPES[values.dtype.name],
        }
        if wanted.is_binary:
            binary.append(pack_array(values))
            told.append(output | {"parameters": {"binary_data_size": len(binary[-1])}})
            continue
        output |= {"parameters": {"content_type": "str"}} if is_text else {}
        told.append(output | {"data": values.ravel().tolist() if is_text else np.ascontiguousarray(values).ravel()})
    content: dict[str, Any] = {"model_name": model, "model_version": VERSION, "outputs": told}
    content |= {"id": request.request_id} if request.request_id is not None else {}
    text = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    if not binary:
        return text, {"content-type": JSON}
    return b"".join([text, *binary]), {"content-type": "application/octet-stream", JSON_LENGTH: str(len(text))}
