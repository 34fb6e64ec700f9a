"""Answers requests: decodes pictures one by one and computes the images of all requests together.

A bad request, or a client that disconnects, fails alone. Anything that takes more than a moment runs in threads, with
requests taking turns.
"""

import asyncio
import gc
import logging
import os
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeAlias

import numpy as np
from prometheus_client import Counter, Gauge, Summary

from densenet_jax.data.pixels import narrow
from densenet_jax.errors import UserError
from densenet_jax.predict.predictor import Predictor
from densenet_jax.serve.batching import FairQueue, take_turns
from densenet_jax.serve.limits import SMALL_BODY_BYTES
from densenet_jax.serve.requests import DATATYPES, InputChecker, Picture, Request, RequestError, Wanted, shorten

logger = logging.getLogger(__name__)
PROBABILITIES, PREDICTED, MAP = "probabilities", "predicted", "activation_map"
BEST_OUTPUTS = {
    "class_ids": ("class_id", np.int32),
    "labels": ("label", object),
    "top_probabilities": ("probability", np.float32),
}
BEST = 5  # classes in the outputs that name the best; a model of many labels names all
VERSION = "1"  # the only one of the model
MAX_IMAGES = 64  # in one request
MAX_REQUESTS = 256  # at a time; more are asked to come back
INLINE_BYTES = 256 * 2**10  # smaller requests are parsed on the event loop: a thread would cost more
DECODED_TOGETHER = 16  # pictures: handing one to a thread costs as much as decoding a small one
LARGE_PIXELS = 2_000_000  # larger pictures have threads of their own
BATCHES = Counter("served_batches", "Batches that were computed, each of one or more requests.")
IMAGES = Counter("served_images", "Images that were computed.")
_LABELS = ("model", "version")
SUCCESSES = Counter("model_infer_request_success", "Requests for inference that were answered.", _LABELS)
FAILURES = Counter("model_infer_request_failure", "Requests for inference that were refused or failed.", _LABELS)
UNDER_WAY = Gauge("model_infer_requests_under_way", "Requests for inference that are not answered yet.")
DURATION = Summary("model_infer_request_duration", "Seconds that a request for inference took.", _LABELS)

Outputs: TypeAlias = list[tuple[Wanted, np.ndarray]]  # strings are objects


async def attempt(work: Awaitable[Any]) -> tuple[int, Any]:
    """Returns 200 and the result of `work`, or the status and the message of its error."""
    try:
        return 200, await work
    except RequestError as error:
        return error.status, str(error)
    except Exception:
        logger.exception("a request failed")
        return 500, "the server is at fault; its log says why"


class Classifier:
    """The model behind both protocols."""

    def __init__(self, predictor: Predictor, config: Any):
        """Reads `config.serve`; compiles nothing yet."""
        self.name, self.batch_sizes = predictor.model.name, predictor.batch_sizes
        self.is_ready = self.is_stopping = False
        self.requests_served = self.images_served = 0
        self.last_large = float("-inf")  # when a large request came, by `time.monotonic`
        self._predictor, self._request_secs = predictor, config.serve.request_secs
        self._transform, shape = predictor.model.transform, predictor.image_shape
        self._checker = InputChecker(shape, self._transform.dtype, MAX_IMAGES, config.serve.max_request_pixels)
        rows = np.zeros((1, len(predictor.class_names)), np.float32)
        self._outputs = {name: self._output(Wanted(name), rows) for name in (PROBABILITIES, *BEST_OUTPUTS)}
        self.seen_share = 0.0  # of an image's short side in its activation map, if it has one
        if len(shape) == 3:  # not with ten crops
            self.seen_share = self._transform.image_size_px / self._transform.resize_px
            self._outputs[MAP] = np.zeros((1, *predictor.output_shapes(explain=True)["map"]), np.float32)
        # Calibrated labels have thresholds, and with them an answer: 1 from its threshold on, else 0.
        if predictor.thresholds is not None:
            self._outputs[PREDICTED] = self._output(Wanted(PREDICTED), rows)
        self._read = ThreadPoolExecutor(1, "read")
        self._decode = FairQueue(self._decode_all, name="decode", most=DECODED_TOGETHER, workers=2)
        large_workers = max(1, (os.cpu_count() or 1) // 2)
        self._decode_large = FairQueue(self._decode_all, name="decode-large", workers=large_workers)
        sizes, wait_secs = self.batch_sizes, config.serve.batch_wait_secs
        self._compute = FairQueue(self._compute_all, name="device", most=sizes[-1], wait_secs=wait_secs)
        # Files of more bits than the model was trained on are rare: one size is compiled for them.
        self._compute_wide = FairQueue(self._compute_all, name="device-wide", most=sizes[0])
        self._explain = FairQueue(self._explain_all, name="explain", most=sizes[0])
        self._deadlines: set[asyncio.Timeout] = set()  # of requests under way
        UNDER_WAY.set_function(lambda: len(self._deadlines))
        self._successes, self._failures = (one.labels(self.name, VERSION) for one in (SUCCESSES, FAILURES))
        self._duration = DURATION.labels(self.name, VERSION)

    async def compile(self) -> None:
        """Compiles every batch size; after that the model is ready."""
        await asyncio.get_running_loop().run_in_executor(self._read, self._compile)
        gc.freeze()  # later collections skip everything loaded at the start
        self.is_ready = True

    def _compile(self) -> None:
        self._predictor.compile()
        if self._transform.bits == 0:
            self._predictor.probabilities(np.zeros((1, *self._predictor.image_shape), np.uint16))
        if MAP in self._outputs:
            self._explain_all([(np.zeros(self._predictor.image_shape, self._transform.dtype), 0)])

    def check_name(self, name: str, version: str = "") -> None:
        """Raises RequestError (404) if a client asks for another model."""
        if name != self.name or version not in ("", VERSION):
            which = f" of version {shorten(version)}" if version else ""
            raise RequestError(f"there is no model {shorten(name)}{which}", 404)

    def is_model_ready(self, name: str, version: str = "") -> bool:
        """Returns whether the model is compiled; raises RequestError (404) for another model."""
        self.check_name(name, version)
        return self.is_ready

    def refuse_to_load(self, name: str) -> NoReturn:
        """Refuses to load or unload a model (501)."""
        self.check_name(name)
        raise RequestError("models are not loaded or unloaded: a server serves the one it started with", 501)

    def index(self, only_ready: bool) -> list[dict[str, str]]:
        """Lists the models of the repository."""
        one = {"name": self.name, "version": VERSION, "state": "READY" if self.is_ready else "LOADING", "reason": ""}
        return [one] if self.is_ready or not only_ready else []

    def metadata(self, name: str, version: str = "") -> dict[str, Any]:
        """Describes inputs and outputs in the protocol's terms; -1 is any number of images."""
        self.check_name(name, version)
        outputs = {output: (DATATYPES[one.dtype.name], one.shape[1:]) for output, one in self._outputs.items()}
        return {"name": self.name, "versions": [VERSION], "platform": "densenet_jax"} | {
            key: [{"name": one, "datatype": kind, "shape": [-1, *shape]} for one, (kind, shape) in tensors.items()]
            for key, tensors in (("inputs", self._checker.inputs), ("outputs", outputs))
        }

    async def infer(self, read: Callable[[], Request], size: int) -> tuple[Request, Outputs]:
        """Answers a request of `size` bytes, which `read` parses: in a thread if it is large.

        Raises RequestError if it is rejected (400, 404, 413), the server is too busy or stopping (503), or it takes too
        long (504).
        """
        with self._duration.time(), self._failures.count_exceptions():
            if size > SMALL_BODY_BYTES:
                self.last_large = time.monotonic()
            if self.is_stopping or not self.is_ready:
                raise RequestError(f"the server is {'stopping' if self.is_stopping else 'not ready yet'}", 503)
            if len(self._deadlines) >= MAX_REQUESTS:
                raise RequestError(f"{MAX_REQUESTS} requests are under way; come again", 503)
            try:
                async with asyncio.timeout(self._request_secs) as deadline:
                    self._deadlines.add(deadline)
                    request, outputs = await self._answer(read, size)
            except TimeoutError:
                if self.is_stopping:
                    raise RequestError("the server is stopping", 503) from None
                raise RequestError(f"it took more than {self._request_secs:g} seconds", 504) from None
            finally:
                self._deadlines.discard(deadline)
        self._successes.inc()
        self.requests_served += 1
        self.images_served += len(outputs[0][1])
        return request, outputs

    async def stop(self, secs: float) -> None:
        """Rejects new requests and gives up those not answered within `secs`."""
        self.is_stopping = True
        end = asyncio.get_running_loop().time() + secs
        for deadline in self._deadlines:
            if not deadline.expired():
                deadline.reschedule(min(deadline.when() or end, end))
        while self._deadlines:
            await asyncio.sleep(0.02)

    async def _answer(self, read: Callable[[], Request], size: int) -> tuple[Request, Outputs]:
        def prepare() -> tuple[Request, list[Wanted], Any]:
            request = read()
            images = self._checker.check(request)
            return request, self._select_outputs(request), images

        if size <= INLINE_BYTES:
            request, outputs, images = prepare()
        else:
            request, outputs, images = await asyncio.get_running_loop().run_in_executor(self._read, prepare)
        if not isinstance(images, np.ndarray):
            images = await take_turns(
                images, lambda one: self._decode_large if one.pixels > LARGE_PIXELS else self._decode
            )
        dtype, maps = self._transform.dtype, None
        answers = await take_turns(images, lambda one: self._compute if one.dtype == dtype else self._compute_wide)
        rows = np.asarray(answers)
        if any(wanted.name == MAP for wanted in outputs):
            chosen = list(zip(images, rows.argmax(axis=-1).tolist(), strict=True))
            maps = np.stack(await take_turns(chosen, lambda _: self._explain))
        return request, [(wanted, self._output(wanted, rows, maps)) for wanted in outputs]

    def _select_outputs(self, request: Request) -> list[Wanted]:
        """Returns the outputs that a request asks for, in its order; all but activation maps if it names none."""
        if not request.outputs:
            return [Wanted(name, is_binary=request.is_binary) for name in self._outputs if name != MAP]
        for name, classes, _ in request.outputs:
            if name not in self._outputs:
                raise RequestError(f"there is no output {shorten(name)}; expected some of {', '.join(self._outputs)}")
            if classes and (name != PROBABILITIES or classes < 0):
                raise RequestError(f"a classification of {name} is not offered; expected a count for {PROBABILITIES}")
        return list({wanted.name: wanted for wanted in request.outputs}.values())

    def _decode_all(self, pictures: list[Picture]) -> list[np.ndarray | Exception]:
        results: list[np.ndarray | Exception] = []
        for picture in pictures:
            try:
                results.append(self._predictor.preprocess(picture.data, picture.name))
            except Exception as error:  # a user's without its traceback, which would hold the request's memory
                results.append(RequestError(str(error)) if isinstance(error, UserError) else error)
        return results

    def _compute_all(self, images: list[np.ndarray]) -> list[np.ndarray]:
        BATCHES.inc()
        IMAGES.inc(len(images))
        return list(self._predictor.probabilities(np.stack(images)))

    def _explain_all(self, chosen: list[tuple[np.ndarray, int]]) -> list[np.ndarray]:
        images = [narrow(image) if self._transform.dtype == np.uint8 else image for image, _ in chosen]
        return list(self._predictor.activation_maps(np.stack(images), [number for _, number in chosen]))

    def _output(self, wanted: Wanted, rows: np.ndarray, maps: np.ndarray | None = None) -> np.ndarray:
        if wanted.name == MAP and maps is not None:
            return maps
        if wanted.name == PROBABILITIES and not wanted.classes:
            return rows
        best = [self._predictor.best(row, wanted.classes or BEST)[: wanted.classes or None] for row in rows]
        if wanted.classes:
            texts = [[f"{one.probability:.6f}:{one.class_id}:{one.label}" for one in row] for row in best]
            return np.asarray(texts, dtype=object)
        if wanted.name == PREDICTED:
            return np.asarray([[self._predictor.is_predicted(one) for one in row] for row in best], np.int32)
        field, dtype = BEST_OUTPUTS[wanted.name]
        return np.asarray([[getattr(one, field) for one in row] for row in best], dtype)
