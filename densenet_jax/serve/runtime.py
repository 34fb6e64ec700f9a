"""The model as MLServer's runtime: requests are checked and decoded one by one, and computed together.

MLServer's adaptive batcher joins requests as they come and waits for more, so that a bad one, or a client that goes
away, fails all that share its batch, and one that is alone waits for nobody. Here checked pixels only are joined:
those that have come while the device was busy.
"""

import asyncio
import functools
from collections.abc import Sequence

import numpy as np
from mlserver import MLModel, ModelSettings
from mlserver.errors import InferenceError
from mlserver.types import Datatype, MetadataTensor, Parameters
from prometheus_client import Counter

from densenet_jax.data.pixels import join
from densenet_jax.predict.predictor import Predictor
from densenet_jax.serve.batches import in_batches
from densenet_jax.serve.queue import WorkQueue
from densenet_jax.serve.requests import ENCODED, PIXELS, Reader, Request, RequestError, Tensor, wanted_outputs

PROBABILITIES = "probabilities"
BEST = 5  # classes in the outputs that name the best
DECODING_THREADS = 2
DECODED_TOGETHER = 16  # requests: handing one to a thread costs as much as decoding a small picture
BATCHES = Counter("served_batches", "Batches that were computed, each of one or more requests.")
IMAGES = Counter("served_images", "Images that were computed.")


class ImageClassifier(MLModel):
    """The runtime: from a request of the protocol to its outputs."""

    def __init__(
        self, settings: ModelSettings, predictor: Predictor, *, max_images: int, batch_wait_secs: float
    ) -> None:
        """Compiles nothing yet; `serve` says what the arguments mean."""
        super().__init__(settings)
        self._predictor = predictor
        self._best = functools.partial(predictor.best, topk=BEST)
        self._reader = Reader(predictor.image_shape, max_images, predictor.preprocess)
        self._decode = WorkQueue(self._read_all, name="decode", most=DECODED_TOGETHER, workers=DECODING_THREADS)
        self._compute = WorkQueue(
            self._compute_all, name="device", most=predictor.batch_sizes[-1], size=len, wait_secs=batch_wait_secs
        )
        self.requests_served = self.images_served = 0
        self.failure: Exception | None = None

    async def load(self) -> bool:
        """Compiles; MLServer reports ready only afterwards. It hides what went wrong, which stands in `failure`."""
        try:
            await asyncio.get_running_loop().run_in_executor(None, self._predictor.compile)
        except Exception as error:
            self.failure = error
            raise
        return True

    async def answer(self, request: Request) -> dict[str, np.ndarray]:
        """The outputs that a request asks for, by name: arrays of the datatypes of `OUTPUTS`.

        Raises:
            InferenceError: the request is at fault: status 400, gRPC's INVALID_ARGUMENT.
        """
        try:
            names = wanted_outputs(request.outputs, OUTPUTS)
            # Raw pixels take no time; everything else is kept away from the event loop.
            is_raw = all(tensor.name == PIXELS and isinstance(tensor.data, bytes) for tensor in request.tensors)
            images = self._reader.read(request.tensors) if is_raw else await self._decode(request.tensors)
        except RequestError as error:
            raise InferenceError(str(error)) from error
        rows = await self._compute(images)
        self.requests_served += 1
        self.images_served += len(images)
        return self._outputs(rows, names)

    def _read_all(self, requests: Sequence[Sequence[Tensor]]) -> list[np.ndarray | Exception]:
        found: list[np.ndarray | Exception] = []
        for tensors in requests:
            try:
                found.append(self._reader.read(tensors))
            except Exception as error:
                found.append(error)
        return found

    def _compute_all(self, requests: Sequence[np.ndarray]) -> list[np.ndarray]:
        images = requests[0] if len(requests) == 1 else join(requests, np.concatenate)
        rows = in_batches(images, self._predictor.batch_sizes, self._predictor.probabilities)
        BATCHES.inc()
        IMAGES.inc(len(images))
        return np.split(rows, np.cumsum([len(request) for request in requests[:-1]]))

    def _outputs(self, rows: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        if names == [PROBABILITIES]:
            return {PROBABILITIES: rows}
        best = [self._best(row) for row in rows]
        values = {
            PROBABILITIES: rows,
            "class_ids": np.asarray([[one.class_id for one in row] for row in best], np.int32),
            "labels": np.asarray([[one.label for one in row] for row in best], dtype=object),
            "top_probabilities": np.asarray([[one.probability for one in row] for row in best], np.float32),
        }
        return {name: values[name] for name in names}


# Outputs and their datatypes.
OUTPUTS = {PROBABILITIES: "FP32", "class_ids": "INT32", "labels": "BYTES", "top_probabilities": "FP32"}


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
