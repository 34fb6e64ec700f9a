"""Serves the protocol over gRPC and answers every mistake of a client with the status that fits.

The messages are the published definitions of the Open Inference Protocol, as Triton's client ships them. We parse them
ourselves, large ones in a thread: grpcio would parse them on the event loop.
"""

import functools
from collections.abc import Callable
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
CONTENTS = {"FP32": "fp32_contents", "INT32": "int_contents", "BYTES": "bytes_contents"}
OPTIONS = [
    ("grpc.max_receive_message_length", MAX_BODY_BYTES),
    ("grpc.max_metadata_size", 16384),
    ("grpc.max_concurrent_streams", 128),
    ("grpc.so_reuseport", 0),  # or two servers could share a port and get half of the requests each
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.max_connection_age_ms", 3_600_000),
    ("grpc.max_connection_age_grace_ms", 60_000),
    ("grpc.keepalive_time_ms", 60_000),
]
METHODS: dict[str, Callable[[Classifier, Any], dict[str, Any]]] = {  # fields of an answer, besides ModelInfer's
    "ServerLive": lambda model, given: {"live": True},
    "ServerReady": lambda model, given: {"ready": model.is_ready and not model.is_stopping},
    "ServerMetadata": lambda model, given: {"name": "densenet_jax", "version": __version__},
    "ModelReady": lambda model, given: {"ready": model.is_model_ready(given.name, given.version)},
    "ModelMetadata": lambda model, given: model.metadata(given.name, given.version),
    "RepositoryIndex": lambda model, given: {"models": model.index(given.ready)},
    "RepositoryModelLoad": lambda model, given: model.refuse_to_load(given.model_name),
    "RepositoryModelUnload": lambda model, given: model.refuse_to_load(given.model_name),
}


def make_server(model: Classifier, access: Access, port: int, most: int) -> tuple[grpc.aio.Server, int]:
    """Makes a server for at most `most` connections; returns it and its port. Raises UserError if that is in use."""
    server = grpc.aio.server(options=[*OPTIONS, ("grpc.max_allowed_incoming_connections", most)])
    handlers = {name: _handler(name, model, access) for name in ("ModelInfer", *METHODS)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
    try:
        if not access.pem:
            return server, server.add_insecure_port(f"{access.shown_host}:{port}")
        return server, server.add_secure_port(f"{access.shown_host}:{port}", grpc.ssl_server_credentials(access.pem))
    except RuntimeError as error:
        why = first_line(error)
        raise UserError(f"--grpc_port {port} of {access.host} can't be used ({why}); give another one.") from error


def _handler(name: str, model: Classifier, access: Access) -> grpc.RpcMethodHandler:
    """Makes the handler of a method, which turns errors into statuses and counts them."""
    labels = ("UNARY", SERVICE, name)
    started, duration = STARTED.labels(*labels), DURATION.labels(*labels)

    async def answer(data: bytes, context: grpc.aio.ServicerContext) -> Any:
        if access.token:
            access.check_token(str(dict(context.invocation_metadata() or ()).get("authorization", "")))
        if name == "ModelInfer":
            request, outputs = await model.infer(functools.partial(_read_request, model, data), len(data))
            return _write_answer(model.name, request, outputs)
        fields = METHODS[name](model, _parse(getattr(pb, f"{name}Request"), data))
        return getattr(pb, f"{name}Response")(**fields)

    async def call(data: bytes, context: grpc.aio.ServicerContext) -> Any:
        started.inc()
        code = grpc.StatusCode.CANCELLED  # stays if the client is gone
        with duration.time():
            try:
                status, result = await attempt(answer(data, context))
                code = STATUS[status]
            finally:
                HANDLED.labels(*labels, code.name).inc()
        return result if status == 200 else await context.abort(code, result)

    return grpc.unary_unary_rpc_method_handler(call, None, lambda message: message.SerializeToString())


def _parse(kind: Any, data: bytes) -> Any:
    """Parses a message, unless it would take much more memory than its bytes."""
    try:
        if len(data) > 2 * MAX_FIELDS:  # a field takes two bytes at least
            _count_fields(memoryview(data))
        return kind.FromString(data)
    except (DecodeError, IndexError, KeyError, ValueError) as error:
        raise RequestError("the message is malformed") from error


def _count_fields(data: memoryview, depth: int = 0, count: int = 0) -> int:
    """Counts the fields of a message, its inputs (5) and their contents (5); raises RequestError (413) for too many."""
    place = 0
    while place < len(data):
        key, place = _read_varint(data, place)
        number, kind, value = key >> 3, key & 7, 0
        if kind in (0, 2):
            value, place = _read_varint(data, place)
        size = {0: 0, 1: 8, 2: value, 5: 4}[kind]
        count += 1
        if count > MAX_FIELDS:
            raise RequestError(f"the message has more than {MAX_FIELDS} fields", 413)
        if depth == 1 and number == 3 and size > MAX_SHAPE_BYTES:
            raise RequestError("a tensor has too many dimensions", 413)
        if depth == 2 and number != 8 and size > MAX_NUMBERS_BYTES:
            raise RequestError("a tensor has too many numbers; send them in raw contents", 413)
        if (kind, number) == (2, 5) and depth < 2:
            count = _count_fields(data[place : place + size], depth + 1, count)
        place += size
    if place > len(data):
        raise ValueError("a field ends after the message")
    return count


def _read_varint(data: memoryview, place: int) -> tuple[int, int]:
    """Returns a number and the place after it."""
    value = 0
    for shift in range(0, 70, 7):  # ten bytes at most
        value |= (data[place] & 127) << shift
        place += 1
        if data[place - 1] < 128:
            return value, place
    raise ValueError("a number without an end")


def _read_request(model: Classifier, data: bytes) -> Request:
    message = _parse(pb.ModelInferRequest, data)
    model.check_name(message.model_name, message.model_version)
    contents: Any = message.raw_input_contents
    if not contents:  # the values are in a field of each tensor's, which depends on the datatype
        contents = [[value for _, values in one.contents.ListFields() for value in values] for one in message.inputs]
    if len(contents) != len(message.inputs):
        raise RequestError(f"{len(message.inputs)} inputs with {len(contents)} raw contents; expected one each")
    tensors = [
        Tensor(one.name, one.datatype, one.shape, values, one.parameters["content_type"].string_param == "base64")
        for one, values in zip(message.inputs, contents, strict=True)
    ]
    outputs = [Wanted(one.name, one.parameters["classification"].int64_param) for one in message.outputs]
    return Request(tensors, outputs, message.id or None, is_binary=bool(message.raw_input_contents))


def _write_answer(model: str, request: Request, outputs: Outputs) -> pb.ModelInferResponse:
    """Writes the message, in raw contents or in the contents of each datatype."""
    response = pb.ModelInferResponse(model_name=model, model_version=VERSION, id=request.request_id or "")
    for wanted, values in outputs:
        datatype = DATATYPES[values.dtype.name]
        output = response.outputs.add(name=wanted.name, datatype=datatype, shape=values.shape)
        if datatype == "BYTES":
            output.parameters["content_type"].string_param = "str"
        if request.is_binary:
            response.raw_output_contents.append(pack_array(values))
        else:
            plain = [one.encode() if datatype == "BYTES" else one for one in values.ravel().tolist()]
            getattr(output.contents, CONTENTS[datatype]).extend(plain)
    return response
