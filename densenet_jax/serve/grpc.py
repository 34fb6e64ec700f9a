"""Serves the protocol over gRPC and answers every mistake of a client with the status that fits.

The messages are the published definitions of the Open Inference Protocol, as Triton's client ships them. We parse them
ourselves, large ones in a thread: grpcio would parse them on the event loop.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from prometheus_client import Counter, Histogram
from tritonclient.grpc import service_pb2 as pb

from densenet_jax.errors import UserError, first_line
from densenet_jax.serve.limits import MAX_BODY_BYTES, Access
from densenet_jax.serve.requests import DATATYPES, Request, RequestError, Tensor, Wanted, pack_array
from densenet_jax.serve.runtime import VERSION, Classifier, Outputs, attempt
from densenet_jax.version import __version__

SERVICE = "inference.GRPCInferenceService"
LABELS = ("grpc_type", "grpc_service", "grpc_method")
STARTED = Counter("grpc_server_started", "Requests that were begun.", LABELS)
HANDLED = Counter("grpc_server_handled", "Requests that were answered, well or not.", (*LABELS, "grpc_code"))
DURATION = Histogram("grpc_server_handling_seconds", "How long answering took.", LABELS)
STATUS = {
    200: grpc.StatusCode.OK,
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
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
METHODS: dict[str, Callable[[Classifier, Any], dict[str, Any]]] = {  # fields of an answer, besides ModelInfer's
    "ServerLive": lambda model, given: {"live": True},
    "ServerReady": lambda model, given: {"ready": model.is_ready and not model.is_stopping},
    "ServerMetadata": lambda model, given: {"name": "densenet_jax", "version": __version__},
    "ModelReady": lambda model, given: {"ready": model.is_model_ready(given.name, given.version)},
    "ModelMetadata": lambda model, given: model.metadata(given.name, given.version),
    "RepositoryIndex": lambda model, given: {"models": model.index(given.ready)},
    "RepositoryModelLoad": lambda model, given: model.refuse_to_load(),
    "RepositoryModelUnload": lambda model, given: model.refuse_to_load(),
}


def make_server(model: Classifier, access: Access, port: int, most: int) -> tuple[grpc.aio.Server, int]:
    """Makes a server for at most `most` connections on an address of its own; returns it and its port.

    Raises:
        UserError: the address is in use.
    """
    server = grpc.aio.server(options=[*OPTIONS, ("grpc.max_allowed_incoming_connections", most)])
    handlers = {name: _handler(name, model, access) for name in ("ModelInfer", *METHODS)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
    where = f"[{access.host}]:{port}" if ":" in access.host else f"{access.host}:{port}"
    try:
        if not access.certificate:
            return server, server.add_insecure_port(where)
        with open(access.key, "rb") as key, open(access.certificate, "rb") as certificate:
            credentials = grpc.ssl_server_credentials([(key.read(), certificate.read())])
        return server, server.add_secure_port(where, credentials)
    except RuntimeError as error:
        raise UserError(
            f"--grpc_port {port} of {access.host} can't be used ({first_line(error)}); give another one."
        ) from error


def _handler(name: str, model: Classifier, access: Access) -> grpc.RpcMethodHandler:
    """Makes the handler of a method, which turns errors into statuses and counts them."""
    labels = ("UNARY", SERVICE, name)
    started, duration = STARTED.labels(*labels), DURATION.labels(*labels)
    handled = functools.cache(lambda code: HANDLED.labels(*labels, code.name))

    async def answer(data: bytes, context: grpc.aio.ServicerContext) -> Any:
        if access.token:
            access.check_token(str(dict(context.invocation_metadata() or ()).get("authorization", "")))
        if name == "ModelInfer":
            return await _infer(model, data)
        fields = METHODS[name](model, _parse(getattr(pb, f"{name}Request"), data))
        return getattr(pb, f"{name}Response")(**fields)

    async def call(data: bytes, context: grpc.aio.ServicerContext) -> Any:
        started.inc()
        code = grpc.StatusCode.CANCELLED  # stays if the client is gone
        with duration.time():
            try:
                status, result = await attempt(answer(data, context))
                code = STATUS.get(status, grpc.StatusCode.FAILED_PRECONDITION)
            finally:
                handled(code).inc()
        return result if status == 200 else await context.abort(code, result)

    return grpc.unary_unary_rpc_method_handler(call, None, lambda message: message.SerializeToString())


async def _infer(model: Classifier, data: bytes) -> pb.ModelInferResponse:
    is_raw = False

    def read() -> Request:
        nonlocal is_raw
        message = _parse(pb.ModelInferRequest, data)
        model.check_name(message.model_name, message.model_version)
        is_raw = bool(message.raw_input_contents)
        return _read_request(message)

    request, outputs = await model.infer(read, len(data))
    return _write_answer(model.name, request, outputs, is_raw)


def _parse(kind: type, data: bytes) -> Any:
    """Parses a message, unless it would take much more memory than its bytes."""
    try:
        _check_fields(data)
        return kind.FromString(data)  # type: ignore[attr-defined]
    except (DecodeError, IndexError, ValueError) as error:
        raise RequestError("the message is malformed") from error


def _check_fields(data: bytes) -> None:
    """Refuses what costs far more than its bytes: many fields of a message, of its inputs and of their contents."""
    for count, (depth, number, size) in enumerate(_read_fields(memoryview(data))):
        if count >= MAX_FIELDS:
            raise RequestError(f"the message has more than {MAX_FIELDS} fields", 413)
        if depth == 1 and number == 3 and size > MAX_SHAPE_BYTES:
            raise RequestError("a tensor has too many dimensions", 413)
        if depth == 2 and number != 8 and size > MAX_NUMBERS_BYTES:
            raise RequestError("a tensor has too many numbers; send them in raw contents", 413)


def _read_fields(data: memoryview, depth: int = 0) -> Iterator[tuple[int, int, int]]:
    """Yields depth, number and size of each field of a message, of its inputs (5) and of their contents (5)."""
    place = 0
    while place < len(data):
        key, place = _read_varint(data, place)
        number, kind, size = key >> 3, key & 7, 0
        if kind == 0:
            _, place = _read_varint(data, place)
        elif kind == 2:
            size, place = _read_varint(data, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError("an unknown kind of field")
        yield depth, number, size
        if (kind, number) == (2, 5) and depth < 2:
            yield from _read_fields(data[place : place + size], depth + 1)
        place += size
    if place > len(data):
        raise ValueError("a field ends after the message")


def _read_varint(data: memoryview, place: int) -> tuple[int, int]:
    """Returns a number and the place after it."""
    value = data[place] & 127
    for shift in range(7, 77, 7):  # ten bytes at most
        if data[place] < 128:
            return value, place + 1
        place += 1
        value |= (data[place] & 127) << shift
    raise ValueError("a number without an end")


def _read_request(message: pb.ModelInferRequest) -> Request:
    raw = list(message.raw_input_contents)
    if raw and len(raw) != len(message.inputs):
        raise RequestError(f"{len(message.inputs)} inputs with {len(raw)} raw contents; expected one each")
    tensors = []
    for tensor, data in zip(message.inputs, raw or map(_read_contents, message.inputs), strict=True):
        is_base64 = "content_type" in tensor.parameters and tensor.parameters["content_type"].string_param == "base64"
        tensors.append(Tensor(tensor.name, tensor.datatype, list(tensor.shape), data, is_base64))
    outputs = [
        Wanted(one.name, one.parameters["classification"].int64_param if "classification" in one.parameters else 0)
        for one in message.outputs
    ]
    return Request(tensors, outputs, message.id or None)


def _read_contents(tensor: pb.ModelInferRequest.InferInputTensor) -> list[Any]:
    """Reads the values of a tensor from whichever field they are in."""
    fields = tensor.contents.ListFields()
    if len(fields) != 1:
        raise RequestError(f"a tensor has contents of {len(fields)} datatypes; expected one")
    return list(fields[0][1])


def _write_answer(model: str, request: Request, outputs: Outputs, is_raw: bool) -> pb.ModelInferResponse:
    """Writes the message, in raw contents or in the contents of each datatype."""
    response = pb.ModelInferResponse(model_name=model, model_version=VERSION, id=request.request_id or "")
    for wanted, values in outputs:
        datatype = DATATYPES[values.dtype.name]
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
