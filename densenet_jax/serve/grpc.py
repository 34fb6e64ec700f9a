"""The protocol over gRPC: MLServer's servicer, with every mistake of a client answered by a status that says so."""

from typing import Any

import grpc
import numpy as np
from mlserver.errors import MLServerError
from mlserver.grpc import dataplane_pb2 as pb
from mlserver.grpc.converters import ModelMetadataResponseConverter
from mlserver.grpc.dataplane_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from mlserver.grpc.server import GRPCServer
from mlserver.grpc.servicers import InferenceServicer
from mlserver.settings import Settings

from densenet_jax.errors import UserError, first_line
from densenet_jax.serve.dataplane import CheckedDataPlane
from densenet_jax.serve.grpc_methods import answered
from densenet_jax.serve.requests import Request, Tensor, pack_strings
from densenet_jax.serve.runtime import OUTPUTS

MAX_METADATA_BYTES = 16384
CONTENTS = {"FP32": "fp32_contents", "INT32": "int_contents"}


async def left_out(self: Any, request: Any, context: grpc.aio.ServicerContext) -> None:
    """Stands for a method that this server does not offer."""
    del self, request, context
    raise MLServerError("this server serves one model, request by request", 501)


@answered
class Servicer(InferenceServicer):
    """Health, metadata and inference; loading and unloading of models and streams are left out."""

    RepositoryIndex = RepositoryModelLoad = RepositoryModelUnload = ModelStreamInfer = left_out

    async def ModelMetadata(  # noqa: N802 - the protocol's name
        self, request: pb.ModelMetadataRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelMetadataResponse:
        """Inputs and outputs."""
        del context
        found = await self._data_plane.model_metadata(name=request.name, version=request.version)
        return ModelMetadataResponseConverter.from_types(found)

    async def ModelInfer(  # noqa: N802 - the protocol's name
        self, request: pb.ModelInferRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelInferResponse:
        """Answers a request for inference, in raw contents where it came in raw contents."""
        del context
        asked = as_request(request)
        outputs = await self._data_plane.answer(asked)
        return as_response(asked, self._data_plane.version, outputs, raw=bool(request.raw_input_contents))


def as_request(message: pb.ModelInferRequest) -> Request:
    """The message as the runtime takes it; raw contents stay bytes, where MLServer would make a number of each byte.

    Raises:
        MLServerError: inputs and raw contents don't belong together.
    """
    raw = list(message.raw_input_contents)
    if raw and len(raw) != len(message.inputs):
        raise MLServerError(f"{len(message.inputs)} inputs with {len(raw)} raw contents; expected one each")
    contents = raw or [contents_of(tensor.contents) for tensor in message.inputs]
    tensors = [
        Tensor(
            name=tensor.name,
            datatype=tensor.datatype,
            shape=list(tensor.shape),
            data=data,
            is_base64="content_type" in tensor.parameters
            and tensor.parameters["content_type"].string_param == "base64",
        )
        for tensor, data in zip(message.inputs, contents, strict=True)
    ]
    outputs = [output.name for output in message.outputs]
    return Request(message.model_name, message.model_version, message.id or None, tensors, outputs or None)


def as_response(request: Request, version: str, outputs: dict[str, np.ndarray], raw: bool) -> pb.ModelInferResponse:
    """The message for the outputs of `request`, in raw contents or in those of each datatype."""
    response = pb.ModelInferResponse(model_name=request.model, model_version=version, id=request.request_id)
    for name, values in outputs.items():
        output = response.outputs.add(name=name, datatype=OUTPUTS[name], shape=values.shape)
        strings = [text.encode() for text in values.flat] if OUTPUTS[name] == "BYTES" else None
        if strings is not None:
            output.parameters["content_type"].string_param = "str"
        if raw:
            response.raw_output_contents.append(
                values.astype(values.dtype.newbyteorder("<")).tobytes() if strings is None else pack_strings(strings)
            )
        elif strings is not None:
            output.contents.bytes_contents.extend(strings)
        else:
            getattr(output.contents, CONTENTS[OUTPUTS[name]]).extend(values.ravel().tolist())
    return response


def contents_of(contents: pb.InferTensorContents) -> list[Any] | bytes:
    """The values of a tensor, whichever field they are in; of small whole numbers the bytes."""
    fields = contents.ListFields()
    if len(fields) != 1:
        raise MLServerError(f"a tensor has contents of {len(fields)} datatypes; expected one")
    descriptor, values = fields[0]
    if descriptor.name != "uint_contents":
        return list(values)
    numbers = np.fromiter(values, np.uint32, len(values))
    if numbers.max() > 255:
        raise MLServerError("the values of a tensor are not all whole numbers from 0 to 255")
    return numbers.astype(np.uint8).tobytes()


class BoundGRPCServer(GRPCServer):
    """MLServer's gRPC server with our servicer and limits, on an address that is its own."""

    def __init__(self, settings: Settings, data_plane: CheckedDataPlane, *, max_requests: int):
        """Serves at most `max_requests` at once."""
        super().__init__(settings, data_plane, None)
        self._max_requests = max_requests
        self.port = settings.grpc_port

    def bind(self) -> None:
        """Takes the address; a port of 0 becomes a free one, told by `port`.

        Raises:
            UserError: it is in use.
        """
        size = self._settings.grpc_max_message_length
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=self._max_requests,
            options=[
                ("grpc.max_receive_message_length", size),
                ("grpc.max_metadata_size", MAX_METADATA_BYTES),
                ("grpc.so_reuseport", 0),  # else two servers would share a port, and each get half of the requests
            ],
        )
        add_GRPCInferenceServiceServicer_to_server(Servicer(self._data_plane, None), self._server)
        try:
            self.port = self._server.add_insecure_port(f"{self._settings.host}:{self._settings.grpc_port}")
        except RuntimeError as error:
            raise UserError(
                f"--grpc_port {self._settings.grpc_port} of {self._settings.host} can't be used ({first_line(error)}); "
                "give another one."
            ) from error

    async def start(self) -> None:
        """Serves until it is stopped."""
        await self._server.start()
        await self._server.wait_for_termination()
