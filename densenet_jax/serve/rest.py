"""Serves the protocol over REST: an ASGI application with a page, metrics and a description of itself."""

import asyncio
import functools
import html
import importlib.resources
import logging
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

import numpy as np
import orjson
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Histogram, generate_latest

from densenet_jax.serve.limits import BODY_SECS, MAX_BODY_BYTES, MAX_JSON_BYTES, Access, BodyMemory, check_json, header
from densenet_jax.serve.requests import ENCODED, Request, RequestError, Tensor, Wanted, pack_array, shorten
from densenet_jax.serve.runtime import MAX_IMAGES, NOT_LOADED, VERSION, Classifier, Outputs
from densenet_jax.version import __version__

logger = logging.getLogger(__name__)
Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers: TypeAlias = dict[bytes, bytes]
Reply: TypeAlias = tuple[bytes, dict[str, str]]  # body, headers

METHODS = ("GET", "HEAD", "POST")
PATHS = ("/metrics", "/v2", "/v2/health/live", "/v2/health/ready", "/v2/repository/index")  # and the pages
READ_ON_FACTOR = 4  # a client that sends too much still gets its answer if it stops at this multiple of the limit
# Pages may run their inline code and talk to this server, and nothing else.
PAGE_POLICY = (
    "default-src 'none'; img-src blob: data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
EXTENSIONS = ["binary_tensor_data", "classification", "model_repository"]
JSON = "application/json"
JSON_LENGTH = "Inference-Header-Content-Length"
REQUESTS = Counter("rest_server_requests", "Requests over REST.", ("method", "path", "status_code"))
DURATION = Histogram("rest_server_request_duration_seconds", "How long answering took.", ("path",))


class Gone(Exception):  # noqa: N818 - a client, not an error
    """The client has closed the connection."""


class Rest:
    """ASGI application."""

    def __init__(self, model: Classifier, access: Access, memory: BodyMemory):
        self._model, self._access, self._memory = model, access, memory
        self._pages: dict[str, Reply] = {}
        for path, name in {"/": "page.html", "/docs": "docs.html", "/openapi.json": "openapi.json"}.items():
            text = importlib.resources.files("densenet_jax.serve").joinpath(name).read_text("utf-8")
            text = text.replace("MODEL_NAME", html.escape(model.name)).replace("CROP_SHARE", f"{model.seen_share:.6g}")
            body = text.encode()
            kind = "text/html; charset=utf-8" if name.endswith("html") else JSON
            security = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
            self._pages[path] = body, {"content-type": kind, **security}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        started = time.perf_counter()
        scope["state"]["task"] = asyncio.current_task()  # canceled if the connection is lost
        status, closes = 200, False
        try:
            reply = await self._route(scope, dict(scope["headers"]), receive)
        except RequestError as error:
            status, reply = error.status, _to_json({"error": str(error)})
            closes = status not in (400, 404)  # something may be unread
        except (Gone, asyncio.CancelledError):
            return
        except Exception:
            logger.exception("a REST request failed")
            status, reply, closes = 500, _to_json({"error": "the server is at fault; its log says why"}), True
        body, given = reply
        given = given | {"content-length": str(len(body))} | ({"connection": "close"} if closes else {})
        if status in (401, 503):
            given |= {"WWW-Authenticate": 'Bearer, Basic realm="model"'} if status == 401 else {"Retry-After": "1"}
        pairs = [(name.lower().encode(), value.encode("latin-1")) for name, value in given.items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": body if scope["method"] != "HEAD" else b""})
        method, route = scope["method"] if scope["method"] in METHODS else "other", scope["state"].get("route", "")
        requests, duration = _metrics(method, route, status)
        requests.inc()
        duration.observe(time.perf_counter() - started)

    async def _route(self, scope: Scope, headers: Headers, receive: Receive) -> Reply:
        if scope["method"] not in METHODS:
            raise RequestError(f"the method is not one of {', '.join(METHODS)}", 405)
        if b"host" in headers or scope["http_version"] == "1.1":
            self._access.check_host(header(headers, b"host"))
        self._access.check_token(header(headers, b"authorization"))
        model = self._model
        parts = scope["path"].split("/")[1:]
        if parts[:2] == ["v2", "models"] and len(parts) > 2:
            version = parts[4] if parts[3:4] == ["versions"] and len(parts) > 4 else ""
            rest = parts[5:] if version else parts[3:]
            if rest == ["infer"]:
                _require(scope, "POST")
                model.check_name(parts[2], version)
                scope["state"]["route"] = "/v2/models/infer"
                return await self._infer(headers, receive)
            if rest in ([], ["ready"]):
                _require(scope, "GET")
                model.check_name(parts[2], version)
                return _answer_if(model.is_ready, "ready", name=model.name) if rest else _to_json(model.metadata())
        path = scope["path"]
        scope["state"]["route"] = path if path in PATHS or path in self._pages else ""  # metrics keep names forever
        if path in self._pages:
            return self._pages[path]
        match parts:
            case ["metrics"]:
                return generate_latest(), {"content-type": CONTENT_TYPE_LATEST}
            case ["v2"]:
                return _to_json({"name": "densenet_jax", "version": __version__, "extensions": EXTENSIONS})
            case ["v2", "health", "live"]:
                return _answer_if(True, "live")
            case ["v2", "health", "ready"]:
                return _answer_if(model.is_ready and not model.is_stopping, "ready")
            case ["v2", "repository", "index"]:
                _require(scope, "POST")
                body = await self._body(headers, receive)
                check_json(body)
                return _to_json(model.index(bool(_parse_json(body).get("ready")) if body else False))
            case ["v2", "repository", "models", name, "load" | "unload"]:
                _require(scope, "POST")
                model.check_name(name)
                raise RequestError(NOT_LOADED, 501)
        raise RequestError("there is nothing at this address; /docs tells what there is", 404)

    async def _infer(self, headers: Headers, receive: Receive) -> Reply:
        # A small compressed body may unpack to any size.
        if header(headers, b"content-encoding") not in ("", "identity"):
            raise RequestError("bodies with a Content-Encoding are not taken; send it unpacked", 415)
        kind, _, options = header(headers, b"content-type").partition(";")
        kind, length = kind.strip().lower(), header(headers, JSON_LENGTH.lower().encode())
        body: bytes | bytearray = b""
        held = [0]
        try:
            most = MAX_JSON_BYTES if kind in ("", JSON) and not length else MAX_BODY_BYTES
            body = await self._body(headers, receive, held, most)
            if kind == "multipart/form-data":
                read = lambda: _read_files(body, options)  # noqa: E731
            elif kind.startswith("image/") or kind == "application/dicom":
                read = lambda: _request_of_pictures([bytes(body)])  # noqa: E731
            elif kind in ("", JSON) or (kind == "application/octet-stream" and length):
                read = lambda: _read_json(body, length)  # noqa: E731
            else:
                raise RequestError("expected the Content-Type application/json, multipart/form-data or image/...", 415)
            request, outputs = await self._model.infer(read, len(body))
        finally:
            self._memory.used -= held[0]
        return _write_answer(self._model.name, request, outputs)

    async def _body(
        self, headers: Headers, receive: Receive, held: list[int] | None = None, most: int = MAX_JSON_BYTES
    ) -> bytearray:
        """Returns the whole body; `held` gets the memory it takes, which the caller gives back."""
        length = header(headers, b"content-length")
        announced = int(length) if length.isdecimal() and len(length) < 20 else 0
        try:
            async with asyncio.timeout(BODY_SECS):
                return await self._read(receive, announced, [0] if held is None else held, most)
        except TimeoutError as error:
            raise RequestError(f"the body did not arrive within {BODY_SECS:.0f} seconds", 408) from error

    async def _read(self, receive: Receive, announced: int, held: list[int], most: int) -> bytearray:
        body, size, has_more = bytearray(), 0, True
        too_large = RequestError(f"the body is larger than {most} bytes", 413)
        refused = too_large if announced > most else None
        while has_more and (refused is None or max(size, announced) <= READ_ON_FACTOR * MAX_BODY_BYTES):
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Gone
            part, has_more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            try:
                if size > most:
                    raise too_large
                if refused is None:
                    self._memory.take(len(part), size)
                    held[0] += len(part)
                    body += part
            except RequestError as error:
                refused, body = error, bytearray()
        if refused is not None:
            raise refused
        return body


@functools.cache
def _metrics(method: str, route: str, status: int) -> tuple[Counter, Histogram]:
    return REQUESTS.labels(method, route, status), DURATION.labels(route)


def _answer_if(is_good: bool, state: str, **more: str) -> Reply:
    if not is_good:
        raise RequestError(f"not {state}")  # the protocol's status is 4xx
    return _to_json(more | {state: True})


def _require(scope: Scope, method: str) -> None:
    """Raises RequestError (405) if a request has another method; HEAD counts as GET."""
    if scope["method"] != method and (method, scope["method"]) != ("GET", "HEAD"):
        raise RequestError(f"expected the method {method}", 405)


def _to_json(content: Any) -> Reply:
    return orjson.dumps(content), {"content-type": JSON}


def _parse_json(text: bytes | bytearray) -> dict[str, Any]:
    try:
        tree = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the request is malformed: it is not JSON ({error.msg})") from error
    if not isinstance(tree, dict):
        raise RequestError("the request is malformed: it is not an object")
    return tree


def _read_json(body: bytes | bytearray, json_length: str = "") -> Request:
    """Reads a request in JSON; binary tensors may follow after `json_length` bytes."""
    if json_length and not (json_length.isdecimal() and len(json_length) < 10 and int(json_length) <= len(body)):
        raise RequestError(f"{JSON_LENGTH} is {shorten(json_length)}; the body has {len(body)} bytes")
    end = int(json_length) if json_length else len(body)
    text = body[:end] if json_length else body
    check_json(text)
    tree = _parse_json(text)
    tensors, place = [], end
    for number, given in enumerate(_field(tree, "inputs", list)):
        where = f"inputs.{number}."
        shape = _field(given, "shape", list, where=where)
        if not all(type(size) is int for size in shape):
            raise RequestError(f"the request is malformed: {where}shape is not a list of whole numbers")
        size = _field(_field(given, "parameters", dict, {}, where=where), "binary_data_size", int, -1, where=where)
        if size >= 0:
            data: Any = bytes(memoryview(body)[place : place + size])
            place += size
        else:
            data = _field(given, "data", list, where=where)
        name, datatype = (_field(given, key, str, where=where) for key in ("name", "datatype"))
        tensors.append(Tensor(name, datatype, shape, data, is_base64=size < 0))
    if place != len(body):
        raise RequestError(
            f"the binary data have {len(body) - end} bytes; the inputs' binary_data_size say {place - end}"
        )
    parameters = _field(tree, "parameters", dict, {})
    is_binary = _field(parameters, "binary_data_output", bool, False)
    outputs = [
        _read_output(given, f"outputs.{number}.", is_binary)
        for number, given in enumerate(_field(tree, "outputs", list, []))
    ]
    return Request(tensors, outputs, _field(tree, "id", str, None), is_binary)


def _read_output(given: Any, where: str, is_binary: bool) -> Wanted:
    parameters = _field(given, "parameters", dict, {}, where=where)
    classes = _field(parameters, "classification", int, 0, where=where)
    is_binary = _field(parameters, "binary_data", bool, is_binary, where=where)
    return Wanted(_field(given, "name", str, where=where), classes, is_binary)


def _field(tree: Any, name: str, kind: type, *default: Any, where: str = "") -> Any:
    """Returns `tree[name]`, or the default if it is missing or null; raises RequestError unless it is of `kind`."""
    value = tree.get(name) if isinstance(tree, dict) else None
    if value is None and default:
        return default[0]
    if type(value) is not kind:
        kinds = {list: "a list", str: "a string", int: "a whole number", bool: "true or false", dict: "an object"}
        problem = "missing" if value is None else f"not {kinds[kind]}"
        raise RequestError(f"the request is malformed: {where}{name} is {problem}; expected {kinds[kind]}")
    return value


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
    for wanted, datatype, values in outputs:
        output: dict[str, Any] = {"name": wanted.name, "shape": list(values.shape), "datatype": datatype}
        if wanted.is_binary:
            binary.append(pack_array(values))
            told.append(output | {"parameters": {"binary_data_size": len(binary[-1])}})
            continue
        output |= {"parameters": {"content_type": "str"}} if datatype == "BYTES" else {}
        data = values.ravel().tolist() if values.dtype == object else np.ascontiguousarray(values).ravel()
        told.append(output | {"data": data})
    content: dict[str, Any] = {"model_name": model, "model_version": VERSION, "outputs": told}
    content |= {"id": request.request_id} if request.request_id is not None else {}
    text = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    if not binary:
        return text, {"content-type": JSON}
    return b"".join([text, *binary]), {"content-type": "application/octet-stream", JSON_LENGTH: str(len(text))}
