"""Serves the protocol over gRPC and answers every mistake of a client with the status that fits.

The messages are the published definitions of the Open Inference Protocol, as Triton's client ships them. We parse them
ourselves, large ones in a thread: grpcio would parse them on the event loop.
"""

import functools
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NoReturn

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from prometheus_client import Counter, Histogram
from tritonclient.grpc import service_pb2 as pb

from densenet_jax.errors import UserError, first_line
from densenet_jax.serve.limits import MAX_BODY_BYTES, SMALL_BODY_BYTES, Access, BodyMemory
from densenet_jax.serve.requests import Request, RequestError, Tensor, Wanted, pack_array
from densenet_jax.serve.runtime import NOT_LOADED, VERSION, Classifier, Outputs
from densenet_jax.version import __version__

logger = logging.getLogger(__name__)
SERVICE = "inference.GRPCInferenceService"
LABELS = ("grpc_type", "grpc_service", "grpc_method")
STARTED = Counter("grpc_server_started", "Requests that were begun.", LABELS)
HANDLED = Counter("grpc_server_handled", "Requests that were answered, well or not.", (*LABELS, "grpc_code"))
DURATION = Histogram("grpc_server_handling_seconds", "How long answering took.", LABELS)
STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
MAX_FIELDS = 2000  # in a message with all it contains, except numbers of tensors
MAX_SHAPE_BYTES = 256
MAX_NUMBERS_BYTES = 4 * 2**20  # in a tensor outside of raw contents
CONTENTS = {"FP32": "fp32_contents", "INT32": "int_contents"}
OPTIONS = [
    ("grpc.max_receive_message_length", MAX_BODY_BYTES),
    ("grpc.max_metadata_size", 16384),
    ("grpc.absolute_max_metadata_size", 65536),
    ("grpc.max_concurrent_streams", 128),
    ("grpc.so_reuseport", 0),  # or two servers could share a port and get half of the requests each
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.max_connection_age_ms", 3_600_000),
    ("grpc.max_connection_age_grace_ms", 60_000),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]
Method = Callable[[bytes], Awaitable[Any]]


def make_server(
    model: Classifier, access: Access, memory: BodyMemory, host: str, port: int, most: int
) -> tuple[grpc.aio.Server, int]:
    """Makes a server for at most `most` connections on an address of its own; returns it and its port.

    Raises:
        UserError: the address is in use.
    """
    server = grpc.aio.server(options=[*OPTIONS, ("grpc.max_allowed_incoming_connections", most)])
    service = _Service(model, memory)
    methods = {name: getattr(service, name) for name in dir(service) if name[0].isupper()}
    handlers = {name: _handler(name, method, access) for name, method in methods.items()}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if not access.certificate:
            return server, server.add_insecure_port(where)
        with open(access.key, "rb") as key, open(access.certificate, "rb") as certificate:
            credentials = grpc.ssl_server_credentials([(key.read(), certificate.read())])
        return server, server.add_secure_port(where, credentials)
    except RuntimeError as error:
        raise UserError(
            f"--grpc_port {port} of {host} can't be used ({first_line(error)}); give another one."
        ) from error


def _handler(name: str, method: Method, access: Access) -> grpc.RpcMethodHandler:
    """Makes the handler of a method, which turns exceptions into statuses and counts them."""
    labels = ("UNARY", SERVICE, name)
    started, duration = STARTED.labels(*labels), DURATION.labels(*labels)
    handled = functools.cache(lambda code: HANDLED.labels(*labels, code.name))

    async def call(data: bytes, context: grpc.aio.ServicerContext) -> Any:
        begun = time.perf_counter()
        started.inc()
        code = grpc.StatusCode.CANCELLED  # stays if the client is gone
        try:
            if access.token:
                access.check_token(str(dict(context.invocation_metadata() or ()).get("authorization", "")))
            answer = await method(data)
            code = grpc.StatusCode.OK
            return answer
        except RequestError as error:
            code, why = STATUS.get(error.status, grpc.StatusCode.FAILED_PRECONDITION), str(error)
        except Exception:
            logger.exception("a gRPC request failed")
            code, why = grpc.StatusCode.INTERNAL, "the server is at fault; its log says why"
        finally:
            handled(code).inc()
            duration.observe(time.perf_counter() - begun)
        await context.abort(code, why)

    return grpc.unary_unary_rpc_method_handler(call, None, lambda message: message.SerializeToString())


class _Service:
    """The methods of the protocol; each takes the bytes of its message."""

    def __init__(self, model: Classifier, memory: BodyMemory):
        self._model, self._memory = model, memory

    async def ServerLive(self, data: bytes) -> pb.ServerLiveResponse:  # noqa: N802 - the protocol's names
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, data: bytes) -> pb.ServerReadyResponse:  # noqa: N802
        return pb.ServerReadyResponse(ready=self._model.is_ready and not self._model.is_stopping)

    async def ModelReady(self, data: bytes) -> pb.ModelReadyResponse:  # noqa: N802
        message = _parse(pb.ModelReadyRequest, data)
        self._model.check_name(message.name, message.version)
        return pb.ModelReadyResponse(ready=self._model.is_ready)

    async def ServerMetadata(self, data: bytes) -> pb.ServerMetadataResponse:  # noqa: N802
        return pb.ServerMetadataResponse(name="densenet_jax", version=__version__)

    async def ModelMetadata(self, data: bytes) -> pb.ModelMetadataResponse:  # noqa: N802
        message = _parse(pb.ModelMetadataRequest, data)
        self._model.check_name(message.name, message.version)
        return pb.ModelMetadataResponse(**self._model.metadata())

    async def RepositoryIndex(self, data: bytes) -> pb.RepositoryIndexResponse:  # noqa: N802
        return pb.RepositoryIndexResponse(models=self._model.index(_parse(pb.RepositoryIndexRequest, data).ready))

    async def RepositoryModelLoad(self, data: bytes) -> NoReturn:  # noqa: N802
        raise RequestError(NOT_LOADED, 501)

    RepositoryModelUnload = RepositoryModelLoad

    async def ModelInfer(self, data: bytes) -> pb.ModelInferResponse:  # noqa: N802
        is_raw = False

        def read() -> Request:
            nonlocal is_raw
            message = _parse(pb.ModelInferRequest, data)
            self._model.check_name(message.model_name, message.model_version)
            is_raw = bool(message.raw_input_contents)
            return _read_request(message)

        try:
            request, outputs = await self._model.infer(read, len(data))
        finally:
            self._memory.seen += len(data) if len(data) > SMALL_BODY_BYTES else 0
        return _write_answer(self._model.name, request, outputs, is_raw)


def _parse(kind: type, data: bytes) -> Any:
    """Parses a message, unless it would take much more memory than its bytes."""
    try:
        _check_fields(data)
        return kind.FromString(data)  # type: ignore[attr-defined]
    except (DecodeError, IndexError, ValueError) as error:
        raise RequestError("the message is malformed") from error


def _check_fields(data: bytes) -> None:
    """Counts fields of a message, its inputs (5) and their contents (5), which each cost far more than their bytes."""
    levels = [(memoryview(data), 0)]
    count = 0
    while levels:
        part, depth = levels.pop()
        for number, content in _read_fields(part):
            count += 1
            if count > MAX_FIELDS:
                raise RequestError(f"the message has more than {MAX_FIELDS} fields", 413)
            if number == 5 and depth < 2:
                levels.append((content, depth + 1))
            elif depth == 1 and number == 3 and len(content) > MAX_SHAPE_BYTES:
                raise RequestError("a tensor has too many dimensions", 413)
            elif depth == 2 and number != 8 and len(content) > MAX_NUMBERS_BYTES:
                raise RequestError("a tensor has too many numbers; send them in raw contents", 413)


def _read_fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yields number and content of each field of a message; the content of a field that is a number is empty."""
    place = 0

    def read_varint() -> int:
        nonlocal place
        value, shift = 0, 0
        while shift < 70:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("a number without an end")

    while place < len(data):
        key = read_varint()
        kind, size = key & 7, 0
        if kind == 0:
            read_varint()
        elif kind in (1, 5):
            place += 8 if kind == 1 else 4
        elif kind == 2:
            size = read_varint()
            place += size
        else:
            raise ValueError("an unknown kind of field")
        if place > len(data):
            raise ValueError("a field ends after the message")
        yield key >> 3, data[place - size : place]


def _read_request(message: pb.ModelInferRequest) -> Request:
    raw = list(message.raw_input_contents)
    if raw and len(raw) != len(message.inputs):
        raise RequestError(f"{len(message.inputs)} inputs with {len(raw)} raw contents; expected one each")
    contents = raw or [_read_contents(tensor) for tensor in message.inputs]
    tensors = [
        Tensor(tensor.name, tensor.datatype, list(tensor.shape), data, _is_base64(tensor))
        for tensor, data in zip(message.inputs, contents, strict=True)
    ]
    outputs = []
    for output in message.outputs:
        classes = output.parameters["classification"].int64_param if "classification" in output.parameters else 0
        outputs.append(Wanted(output.name, classes))
    return Request(tensors, outputs, message.id or None)


def _is_base64(tensor: pb.ModelInferRequest.InferInputTensor) -> bool:
    return "content_type" in tensor.parameters and tensor.parameters["content_type"].string_param == "base64"


def _read_contents(tensor: pb.ModelInferRequest.InferInputTensor) -> list[Any] | bytes:
    """Reads the values of a tensor from whichever field they are in; pixels as bytes."""
    fields = tensor.contents.ListFields()
    if len(fields) != 1:
        raise RequestError(f"a tensor has contents of {len(fields)} datatypes; expected one")
    descriptor, values = fields[0]
    if descriptor.name != "uint_contents":
        return list(values)
    numbers = np.fromiter(values, np.uint32, len(values))
    dtype = np.uint16 if tensor.datatype == "UINT16" else np.uint8
    most = np.iinfo(dtype).max
    if numbers.max() > most:
        raise RequestError(f"the value {numbers.max()} of a tensor is not a whole number from 0 to {most}")
    return numbers.astype(dtype).tobytes()


def _write_answer(model: str, request: Request, outputs: Outputs, is_raw: bool) -> pb.ModelInferResponse:
    """Writes the message, in raw contents or in the contents of each datatype."""
    response = pb.ModelInferResponse(model_name=model, model_version=VERSION, id=request.request_id or "")
    for wanted, datatype, values in outputs:
        output = response.outputs.add(name=wanted.name, datatype=datatype, shape=values.shape)
        if datatype == "BYTES":
            output.parameters["content_type"].string_param = "str"
        if is_raw:
            response.raw_output_contents.append(pack_array(values))
        elif datatype == "BYTES":
            output.contents.bytes_contents.extend(text.encode() for text in values.flat)
        else:
            getattr(output.contents, CONTENTS[datatype]).extend(values.ravel().tolist())
    return response
