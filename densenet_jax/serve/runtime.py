"""Answers requests: decodes pictures one by one and computes the images of all requests together.

A bad request, or a client that disconnects, fails alone. Anything that takes more than a moment runs in threads, with
requests taking turns.
"""

import asyncio
import functools
import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
from prometheus_client import Counter, Summary

from densenet_jax.data.pixels import narrow
from densenet_jax.errors import UserError
from densenet_jax.predict.predictor import Predictor
from densenet_jax.serve.batching import FairQueue, compute_in_batches
from densenet_jax.serve.requests import ENCODED, PIXELS, InputChecker, Picture, Request, RequestError, Wanted, shorten

PROBABILITIES, MAP = "probabilities", "activation_map"
OUTPUTS = {PROBABILITIES: "FP32", "class_ids": "INT32", "labels": "BYTES", "top_probabilities": "FP32", MAP: "FP32"}
PREDICTED = "predicted"
BEST = 5  # classes in the outputs that name the best; a model of many labels names all
VERSION = "1"  # the only one of the model
NOT_LOADED = "models are not loaded or unloaded: a server serves the one it started with"
MAX_IMAGES = 64  # in one request
MAX_REQUESTS = 256  # at a time; more are asked to come back
INLINE_BYTES = 256 * 2**10  # smaller requests are parsed on the event loop: a thread would cost more
DECODED_TOGETHER = 16  # pictures: handing one to a thread costs as much as decoding a small one
LARGE_PIXELS = 2_000_000  # larger pictures have threads of their own
LATE = -1.0  # in place of the deadline of a request that has been given up
BATCHES = Counter("served_batches", "Batches that were computed, each of one or more requests.")
IMAGES = Counter("served_images", "Images that were computed.")
_LABELS = ("model", "version")
SUCCESSES = Counter("model_infer_request_success", "Requests for inference that were answered.", _LABELS)
FAILURES = Counter("model_infer_request_failure", "Requests for inference that were refused or failed.", _LABELS)
DURATION = Summary("model_infer_request_duration", "Seconds that a request for inference took.", _LABELS)

Answers: TypeAlias = tuple[np.ndarray, np.ndarray | None]  # probabilities [n, k], activation maps [n, h, w]
Outputs: TypeAlias = list[tuple[Wanted, str, np.ndarray]]  # with the datatype; strings are objects


class Classifier:
    """The model behind both protocols."""

    def __init__(self, predictor: Predictor, config: Any):
        """Reads `config.serve`; compiles nothing yet."""
        self.name = predictor.model.name
        # Calibrated labels have thresholds, and with them an answer: 1 from its threshold on, else 0.
        self._outputs = OUTPUTS if predictor.thresholds is None else OUTPUTS | {PREDICTED: "INT32"}
        self.is_ready = self.is_stopping = False
        self.requests_served = self.images_served = 0
        self._predictor, self._request_secs = predictor, config.serve.request_secs
        transform, most_pixels = predictor.model.transform, config.serve.max_request_pixels
        self._checker = InputChecker(predictor.image_shape, MAX_IMAGES, most_pixels, transform.dtype)
        self._read = FairQueue(_call_all, name="read")
        cores = os.cpu_count() or 1
        self._decode = FairQueue(self._decode_all, name="decode", most=DECODED_TOGETHER, workers=2)
        self._decode_large = FairQueue(self._decode_all, name="decode-large", workers=max(1, cores // 2))
        self._compute = FairQueue(
            self._compute_all, name="device", most=predictor.batch_sizes[-1], wait_secs=config.serve.batch_wait_secs
        )
        # Files of more bits than the model was trained on are rare: one size is compiled for them.
        self._wide_sizes: dict[np.dtype, tuple[int, ...]] = {}
        if transform.bits == 0:
            self._wide_sizes[np.dtype(np.uint16)] = predictor.batch_sizes[:1]
        self._explain = FairQueue(self._explain_all, name="explain", most=predictor.batch_sizes[0])
        self._can_explain = len(predictor.image_shape) == 3  # not with ten crops
        self._deadlines: dict[asyncio.Task, float] = {}  # of requests under way
        labels = {"model": self.name, "version": VERSION}
        self._successes, self._failures = SUCCESSES.labels(**labels), FAILURES.labels(**labels)
        self._duration = DURATION.labels(**labels)

    async def compile(self) -> None:
        """Compiles every batch size; after that the model is ready."""
        await asyncio.get_running_loop().run_in_executor(ThreadPoolExecutor(1), self._compile)
        gc.freeze()  # later collections skip everything loaded at the start
        self.is_ready = True

    def _compile(self) -> None:
        self._predictor.compile()
        for dtype, sizes in self._wide_sizes.items():
            self._predictor.probabilities(np.zeros((*sizes, *self._predictor.image_shape), dtype))
        if self._can_explain:
            self._explain_all([(np.zeros(self._predictor.image_shape, self._checker.dtype), 0)])

    @property
    def seen_share(self) -> float:
        """Share of an image's short side that the model sees; 0 if it can't be explained."""
        transform = self._predictor.model.transform
        return transform.image_size_px / transform.resize_px if self._can_explain else 0.0

    def check_name(self, name: str, version: str = "") -> None:
        """Raises RequestError (404) if a client asks for another model."""
        if name != self.name or version not in ("", VERSION):
            which = f" of version {shorten(version)}" if version else ""
            raise RequestError(f"there is no model {shorten(name)}{which}", 404)

    def index(self, only_ready: bool) -> list[dict[str, str]]:
        """Lists the models of the repository."""
        state = "READY" if self.is_ready else "LOADING"
        one = {"name": self.name, "version": VERSION, "state": state, "reason": ""}
        return [one] if self.is_ready or not only_ready else []

    def metadata(self) -> dict[str, Any]:
        """Describes inputs and outputs in the protocol's terms; -1 is any number of images."""
        classes = len(self._predictor.class_names)
        best = [len(self._predictor.best(np.zeros(classes, np.float32), BEST))]
        shapes = dict.fromkeys(self._outputs, best) | {PROBABILITIES: [classes]}
        if self._can_explain:
            shapes[MAP] = list(self._predictor.output_shapes(explain=True)["map"])
        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": "densenet_jax",
            "inputs": [
                {"name": PIXELS, "datatype": self._checker.datatype, "shape": [-1, *self._predictor.image_shape]},
                {"name": ENCODED, "datatype": "BYTES", "shape": [-1]},
            ],
            "outputs": [
                {"name": name, "datatype": datatype, "shape": [-1, *shapes[name]]}
                for name, datatype in self._outputs.items()
                if name != MAP or self._can_explain
            ],
        }

    async def infer(self, read: Callable[[], Request], size: int) -> tuple[Request, Outputs]:
        """Answers a request.

        Args:
            read: parses the request; called in a thread if it is large.
            size: bytes of the request.

        Raises:
            RequestError: it is rejected (400, 404, 413), the server is too busy or stopping (503), or it took too long
                (504).
        """
        begun = time.perf_counter()
        try:
            request, outputs, count = await self._infer(read, size)
        except Exception:
            self._failures.inc()
            raise
        finally:
            self._duration.observe(time.perf_counter() - begun)
        self._successes.inc()
        self.requests_served += 1
        self.images_served += count
        return request, outputs

    async def _infer(self, read: Callable[[], Request], size: int) -> tuple[Request, Outputs, int]:
        if self.is_stopping or not self.is_ready:
            raise RequestError(f"the server is {'stopping' if self.is_stopping else 'not ready yet'}", 503)
        if len(self._deadlines) >= MAX_REQUESTS:
            raise RequestError(f"{MAX_REQUESTS} requests are under way; come again", 503)
        task = asyncio.current_task()
        assert task is not None
        self._deadlines[task] = time.monotonic() + self._request_secs
        try:
            request, answers, outputs = await self._answer(read, size)
            return request, [self._output(wanted, *answers) for wanted in outputs], len(answers[0])
        except asyncio.CancelledError:
            if self._deadlines[task] != LATE:
                raise  # its client is gone
            task.uncancel()
            if self.is_stopping:
                raise RequestError("the server is stopping", 503) from None
            raise RequestError(f"it took more than {self._request_secs:g} seconds", 504) from None
        finally:
            del self._deadlines[task]

    def give_up_late(self) -> None:
        """Gives up the requests that are past their deadline; called many times a second."""
        now = time.monotonic()
        for task, deadline in list(self._deadlines.items()):
            if LATE < deadline <= now:
                self._deadlines[task] = LATE
                task.cancel()

    async def stop(self, secs: float) -> None:
        """Rejects new requests and gives up those not answered within `secs`."""
        self.is_stopping = True
        end = time.monotonic() + secs
        while self._deadlines and time.monotonic() < end:
            await asyncio.sleep(0.02)
        self._deadlines |= {task: min(deadline, end) for task, deadline in self._deadlines.items()}
        self.give_up_late()

    async def _answer(self, read: Callable[[], Request], size: int) -> tuple[Request, Answers, list[Wanted]]:
        def prepare() -> tuple[Request, np.ndarray | list[Picture]]:
            request = read()
            return request, self._checker.check(request)

        request, images = prepare() if size <= INLINE_BYTES else (await self._read([prepare]))[0]
        outputs, maps = select_outputs(request, self._outputs), None
        explains = any(wanted.name == MAP for wanted in outputs)
        if explains and not self._can_explain:
            raise RequestError(f"{MAP} needs a single crop, but this model evaluates ten")
        pixels = await self._decode_pictures(images) if isinstance(images, list) else list(images)
        rows = np.stack(await self._compute(pixels))
        if explains:
            maps = np.stack(await self._explain(list(zip(pixels, rows.argmax(axis=-1).tolist(), strict=True))))
        return request, (rows, maps), outputs

    async def _decode_pictures(self, pictures: list[Picture]) -> list[np.ndarray]:
        decoded: dict[int, np.ndarray] = {}
        for lane, is_large in ((self._decode, False), (self._decode_large, True)):
            numbers = [number for number, one in enumerate(pictures) if (one.pixels > LARGE_PIXELS) == is_large]
            if numbers:
                decoded |= zip(numbers, await lane([pictures[number] for number in numbers]), strict=True)
        return [decoded[number] for number in range(len(pictures))]

    def _decode_all(self, pictures: Sequence[Picture]) -> list[np.ndarray | Exception]:
        def decode(picture: Picture) -> np.ndarray:
            try:
                return self._predictor.preprocess(picture.data, picture.name)
            except UserError as error:
                raise RequestError(str(error)) from error

        return _call_all([functools.partial(decode, picture) for picture in pictures])

    def _compute_all(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Computes images of 16 bits apart: they would widen the batch to a dtype of which it isn't compiled."""
        answers: dict[int, np.ndarray] = {}
        for dtype, sizes in {self._checker.dtype: self._predictor.batch_sizes, **self._wide_sizes}.items():
            if numbers := [number for number, image in enumerate(images) if image.dtype == dtype]:
                chosen = np.stack([images[number] for number in numbers])
                rows = compute_in_batches(chosen, sizes, self._predictor.probabilities)
                answers |= zip(numbers, rows, strict=True)
                BATCHES.inc()
        IMAGES.inc(len(images))
        return [answers[number] for number in range(len(images))]

    def _explain_all(self, chosen: Sequence[tuple[np.ndarray, int]]) -> list[np.ndarray]:
        images = [narrow(image) if self._checker.dtype == np.uint8 else image for image, _ in chosen]
        return list(self._predictor.activation_maps(np.stack(images), [number for _, number in chosen]))

    def _output(
        self, wanted: Wanted, rows: np.ndarray, maps: np.ndarray | None = None
    ) -> tuple[Wanted, str, np.ndarray]:
        if wanted.name == MAP and maps is not None:
            return wanted, OUTPUTS[MAP], maps
        if wanted.name == PROBABILITIES and not wanted.classes:
            return wanted, OUTPUTS[PROBABILITIES], rows
        best = [self._predictor.best(row, wanted.classes or BEST)[: wanted.classes or None] for row in rows]
        if wanted.classes:
            texts = [[f"{one.probability:.6f}:{one.class_id}:{one.label}" for one in row] for row in best]
            return wanted, "BYTES", np.asarray(texts, dtype=object)
        if wanted.name == PREDICTED:
            reached = [[self._predictor.is_predicted(one) for one in row] for row in best]
            return wanted, self._outputs[PREDICTED], np.asarray(reached, np.int32)
        fields = {"class_ids": ("class_id", np.int32), "labels": ("label", object)}
        field, dtype = fields.get(wanted.name, ("probability", np.float32))
        return wanted, OUTPUTS[wanted.name], np.asarray([[getattr(one, field) for one in row] for row in best], dtype)


def _call_all(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Calls each job; an exception takes the place of a result."""
    results: list[Any] = []
    for job in jobs:
        try:
            results.append(job())
        except Exception as error:
            # The traceback matters for our own faults only, and holds the request's memory.
            results.append(error.with_traceback(None) if isinstance(error, RequestError) else error)
    return results


def select_outputs(request: Request, outputs: Mapping[str, str] = OUTPUTS) -> list[Wanted]:
    """Returns those of the `outputs` that a request asks for, in its order; all but activation maps if it names none.

    Raises RequestError if there is no such output, or for classes of one that has none.
    """
    for wanted in request.outputs:
        if wanted.name not in outputs:
            raise RequestError(f"there is no output {shorten(wanted.name)}; expected some of {', '.join(outputs)}")
        if wanted.classes and (wanted.name != PROBABILITIES or wanted.classes < 0):
            raise RequestError(
                f"a classification of {wanted.name} is not offered; expected a count for {PROBABILITIES}"
            )
    named = {wanted.name: wanted for wanted in request.outputs}
    return list(named.values()) or [Wanted(name, is_binary=request.is_binary) for name in outputs if name != MAP]
