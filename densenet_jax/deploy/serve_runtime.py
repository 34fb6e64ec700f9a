"""The model as MLServer's runtime: requests are checked and decoded one by one, then share batches.

MLServer's adaptive batcher joins requests as they come, so that a bad one, or a client that goes away, would fail all
that share its batch. Here it is given checked pixels only, by tasks that outlive their clients.
"""

import asyncio
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from mlserver import MLModel, ModelSettings
from mlserver.batching.adaptive import AdaptiveBatcher
from mlserver.errors import InferenceError
from mlserver.types import (
    Datatype,
    InferenceRequest,
    InferenceResponse,
    MetadataTensor,
    Parameters,
    RequestInput,
    ResponseOutput,
    TensorData,
)
from prometheus_client import Counter

from densenet_jax.deploy.predictor import Predictor
from densenet_jax.deploy.serve_batches import in_batches
from densenet_jax.deploy.serve_requests import ENCODED, PIXELS, Reader, RequestError, Tensor, wanted_outputs

PROBABILITIES = "probabilities"
BEST = 5  # classes in the outputs that name the best
DECODING_THREADS = 2
BATCHES = Counter("served_batches", "Batches that were computed, each of one or more requests.")
IMAGES = Counter("served_images", "Images that were computed.")


class Engine(MLModel):
    """Computes what the batcher has joined, one batch at a time."""

    def __init__(self, settings: ModelSettings, predictor: Predictor):
        super().__init__(settings)
        self._predictor = predictor
        self._device = ThreadPoolExecutor(1, "device")

    async def compile(self) -> None:
        """Compiles all batch sizes, so that no request waits for it."""
        await asyncio.get_running_loop().run_in_executor(self._device, self._predictor.compile)

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Probabilities of the images of all requests of a batch."""
        pixels = payload.inputs[0]
        images = np.frombuffer(pixels.data.root, np.uint8).reshape(pixels.shape)
        rows = await asyncio.get_running_loop().run_in_executor(self._device, self._compute, images)
        BATCHES.inc()
        IMAGES.inc(len(rows))
        data = TensorData.model_construct(root=rows.reshape(-1))
        output = ResponseOutput.model_construct(
            name=PROBABILITIES, datatype="FP32", shape=list(rows.shape), parameters=None, data=data
        )
        return InferenceResponse.model_construct(model_name=self.name, parameters=None, outputs=[output])

    def _compute(self, images: np.ndarray) -> np.ndarray:
        return in_batches(images, self._predictor.batch_sizes, self._predictor.probabilities)


class Batcher(AdaptiveBatcher):
    """MLServer's batcher, which here waits for the batch under way: meanwhile more requests come for the next one."""

    async def _batcher(self) -> None:
        async for batch in self._batch_requests():
            computing = asyncio.create_task(self._predict_fn(batch.merged_request))
            await asyncio.wait([computing])
            self._predict_callback(batch, computing)


class ImageClassifier(MLModel):
    """The runtime: from a request of the protocol to its answer."""

    def __init__(self, settings: ModelSettings, predictor: Predictor, engine: Engine, max_images: int):
        super().__init__(settings)
        self._best = functools.partial(predictor.best, topk=BEST)
        self._reader = Reader(predictor.image_shape, max_images, predictor.preprocess)
        self._engine = engine
        self._decoding = ThreadPoolExecutor(DECODING_THREADS, "decode")
        batches = engine.settings.max_batch_size > 1 and engine.settings.max_batch_time > 0
        self._compute = Batcher(engine).predict if batches else engine.predict
        self.requests_served = self.images_served = 0
        self.failure: Exception | None = None

    async def load(self) -> bool:
        """Compiles; MLServer reports ready only afterwards. It hides what went wrong, which stands in `failure`."""
        try:
            await self._engine.compile()
        except Exception as error:
            self.failure = error
            raise
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Answers one request.

        Raises:
            InferenceError: the request is at fault; MLServer answers with status 400, gRPC's INVALID_ARGUMENT.
        """
        try:
            names = wanted_outputs(payload.outputs and [output.name for output in payload.outputs], OUTPUTS)
            tensors = [as_tensor(tensor) for tensor in payload.inputs]
            images = await asyncio.get_running_loop().run_in_executor(self._decoding, self._reader.read, tensors)
        except RequestError as error:
            raise InferenceError(str(error)) from error
        rows = await self._probabilities(images)
        self.requests_served += 1
        self.images_served += len(images)
        return InferenceResponse.model_construct(
            model_name=self.name, model_version=self.version, outputs=self._outputs(rows, names)
        )

    async def _probabilities(self, images: np.ndarray) -> np.ndarray:
        pixels = RequestInput.model_construct(
            name=PIXELS,
            datatype="UINT8",
            shape=list(images.shape),
            parameters=None,
            data=TensorData.model_construct(root=images.tobytes()),
        )
        request = InferenceRequest.model_construct(inputs=[pixels], outputs=None, parameters=None)
        # A client that goes away cancels its own request only: the batcher can't take one out of a batch.
        answer = await asyncio.shield(self._compute(request))
        return np.asarray(answer.outputs[0].data.root, np.float32).reshape(len(images), -1)

    def _outputs(self, rows: np.ndarray, names: Sequence[str]) -> list[ResponseOutput]:
        best = [self._best(row) for row in rows]
        values = {
            PROBABILITIES: rows,
            "class_ids": np.asarray([[one.class_id for one in row] for row in best]),
            "labels": np.asarray([[one.label for one in row] for row in best], dtype=object),
            "top_probabilities": np.asarray([[one.probability for one in row] for row in best]),
        }
        return [
            ResponseOutput.model_construct(
                name=name,
                datatype=OUTPUTS[name],
                shape=list(values[name].shape),
                parameters=Parameters(content_type="str") if OUTPUTS[name] == "BYTES" else None,
                data=TensorData.model_construct(root=values[name].reshape(-1).tolist()),
            )
            for name in names
        ]


# Outputs and their datatypes.
OUTPUTS = {PROBABILITIES: "FP32", "class_ids": "INT32", "labels": "BYTES", "top_probabilities": "FP32"}


def as_tensor(given: RequestInput) -> Tensor:
    """An input as the reader takes it; gRPC's has bytes where JSON has base64."""
    data = getattr(given.data, "root", given.data)
    parameters = given.parameters
    from_grpc = isinstance(data, bytes) or (isinstance(data, list) and bool(data) and isinstance(data[0], bytes))
    is_base64 = not from_grpc or (parameters is not None and parameters.content_type == "base64")
    return Tensor(given.name, str(given.datatype), given.shape, data, is_base64)


def metadata(predictor: Predictor) -> dict[str, list[MetadataTensor]]:
    """Inputs and outputs as the protocol tells them; -1 is any number of images."""
    classes = len(predictor.class_names)
    best = len(predictor.best(np.zeros(classes, np.float32), BEST))
    base64 = Parameters(content_type="base64")
    return {
        "inputs": [
            MetadataTensor(name=PIXELS, datatype=Datatype.UINT8, shape=[-1, *predictor.image_shape]),
            MetadataTensor(name=ENCODED, datatype=Datatype.BYTES, shape=[-1], parameters=base64),
        ],
        "outputs": [
            MetadataTensor(
                name=name, datatype=Datatype(datatype), shape=[-1, classes if name == PROBABILITIES else best]
            )
            for name, datatype in OUTPUTS.items()
        ],
    }
