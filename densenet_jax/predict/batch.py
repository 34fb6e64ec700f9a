"""Predicts any number of images into a file, with the memory of a few batches."""

import dataclasses
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from densenet_jax.data.batches import available_cores, read_ahead
from densenet_jax.data.pixels import join
from densenet_jax.distributed.preemption import Preempted, StopRequest
from densenet_jax.errors import UserError
from densenet_jax.predict.annotate import annotate, annotation_path
from densenet_jax.predict.compiled import BEST_CLASS, FEATURES, check_layer, parse_features
from densenet_jax.predict.explain import write_explanation
from densenet_jax.predict.features import FeatureArchive
from densenet_jax.predict.files import Candidate, check_places, common_folder, find_images
from densenet_jax.predict.images import ImageError, shown
from densenet_jax.predict.model import Deployed
from densenet_jax.predict.output import PredictionFile
from densenet_jax.predict.predictor import ClassProbability, Predictor
from densenet_jax.predict.table import check_table, is_table, write_table
from densenet_jax.system.console import Bar, print_status, spinner

logger = logging.getLogger(__name__)
_SIZES = (1, 8, 64)  # only the one that suits the number of images is compiled
_READ_AHEAD = 2  # batches prepared in advance
_STRIDES = re.compile(r"stride_\d+(,stride_\d+)*")


@dataclasses.dataclass(frozen=True)
class PredictOptions:
    """Options of `--mode predict`."""

    images: tuple[str, ...]
    output: str  # file to write: .jsonl, .csv or .parquet
    topk: int = 5  # number of classes listed for an image; 0 lists all, as do models of many labels
    annotate: str = ""  # directory for annotated images; "" writes none
    explain: str = ""  # directory for class activation maps; "" writes none
    explain_layer: str = ""  # computes Grad-CAM at this layer instead, such as "stride_8"
    features: str = ""  # see `parse_features`, written to an archive beside the predictions; "" writes none
    largest_batch: int = 0  # images computed at a time; 0 means 64

    def check(self) -> None:
        """Checks the values without touching files.

        Raises:
            UserError: a value is out of range.
        """
        if self.topk < 0:
            raise UserError(f"--topk is {self.topk}; expected 1 or more, or 0 for all classes.")
        if self.features not in ("", *FEATURES) and not _STRIDES.fullmatch(self.features):
            raise UserError(
                f"--features is {self.features!r}; expected pooled, pyramid or strides such as stride_2,stride_8."
            )
        if self.explain_layer and not self.explain:
            raise UserError(f"--explain_layer {self.explain_layer} needs --explain and a directory for the maps.")

    def request(self) -> dict[str, Any]:
        """Returns the options that predictions depend on; newer ones only if set, so that older files are continued."""
        request = dataclasses.asdict(self)
        del request["output"], request["largest_batch"]
        return {key: value for key, value in request.items() if value or not key.startswith("explain")}

    @property
    def lines(self) -> str:
        """Path of the JSON lines; those of a table are removed once it is written."""
        return f"{self.output}.partial" if is_table(self.output) else self.output

    @property
    def archive(self) -> str:
        """Path of the feature archive."""
        return f"{os.path.splitext(self.output)[0]}.npz"


def predict(load: Callable[[], Deployed], options: PredictOptions) -> dict[str, Any]:
    """Predicts the images that the output lacks; `load` is called once images have been found.

    Returns:
        {"images": number predicted, "refused": number with an error, "path": output} for the whole file; with
        features also {"features": archive}.

    Raises:
        UserError: there are no images, or a file can't be written.
        Preempted: SIGTERM or Ctrl-C; the same command continues.
    """
    options.check()
    check_places(options.images)
    if is_table(options.output):
        check_table(options.output)
    model = load()
    if options.explain_layer:
        check_layer(model, options.explain_layer)
    if options.features:
        parse_features(options.features, model)
    if model.many_labels:
        options = dataclasses.replace(options, topk=0)
    request = {"model": f"{model.name}, {model.source}", "labels": list(model.class_names), **options.request()}
    if jax.process_count() > 1:
        raise UserError("--mode predict runs in one process; start it without --num_processes.")
    with PredictionFile(options.lines, request) as output, StopRequest() as stop:
        if output.resumed:
            print_status(f"{options.output} already has {output.answered + output.refused:,} images")
        todo = sum(1 for candidate in find_images(options.images) if candidate.path not in output)
        unfinished_archive = options.features and not os.path.exists(options.archive)
        if todo or unfinished_archive:
            _Run(model, options, output, stop, todo).run()
        output.finish()
        if is_table(options.output):
            decided = model.thresholds is not None
            write_table(options.output, options.lines, model.class_names, options.topk, decided=decided)
            output.remove()
        figures = {"images": output.answered, "refused": output.refused, "path": options.output}
        return {**figures, "features": options.archive} if options.features else figures


class _Run:
    """Predicts the images that an output lacks."""

    def __init__(
        self, model: Deployed, options: PredictOptions, output: PredictionFile, stop: StopRequest, todo: int
    ) -> None:
        largest = options.largest_batch or _SIZES[-1]
        size = next((size for size in _SIZES if todo <= size <= largest), largest)
        self._predictor = Predictor(model, batch_sizes=(size,))
        self._size = self._predictor.batch_sizes[-1]
        self._options, self._output, self._stop, self._todo = options, output, stop, todo
        self._root = common_folder(options.images)
        self._archive: FeatureArchive | None = None

    def run(self) -> None:
        """Predicts all images and completes the feature archive."""
        predictor, options = self._predictor, self._options
        print_status(f"predicting {self._todo:,} images with {predictor.model.name}, {predictor.model.source}")
        if options.features:
            shapes = predictor.output_shapes(options.features)
            del shapes["probability"]
            self._archive = FeatureArchive(options.archive, shapes, self._output.answered)
        if self._todo:
            with spinner("compiling"):
                predictor.compile(options.features, explain=bool(options.explain), layer=options.explain_layer)
        bar = Bar("predicting", self._todo)
        try:
            with ThreadPoolExecutor(available_cores()) as pool:
                self._predict_all(pool, bar)
        finally:
            bar.close()
            if self._archive is not None:
                self._archive.close()
        if self._archive is not None:
            self._archive.finish(self._output.answered_names, self._output.answered)

    def _predict_all(self, pool: ThreadPoolExecutor, bar: Bar) -> None:
        options = self._options
        wanted = (image for image in find_images(options.images) if image.path not in self._output)
        prepared = read_ahead(pool, self._prepare, wanted, _READ_AHEAD * self._size)
        waiting: tuple[list[Candidate], Any] | None = None
        done = 0
        for batch in _batches(prepared, self._size):
            pixels = [item.pixels for item in batch if item.pixels is not None]
            # The devices compute this batch while the previous one is written.
            classes = np.full(len(pixels), BEST_CLASS, np.int32) if options.explain else None
            parts = (options.features, classes, options.explain_layer)
            computing = self._predictor.dispatch(join(pixels), *parts) if pixels else {}
            if waiting is not None:
                self._write(pool, *waiting)
                bar.advance(len(waiting[0]))
            waiting = batch, computing
            done += len(batch)
            if self._stop.received is not None:
                break
        if waiting is not None:
            self._write(pool, *waiting)
            bar.advance(len(waiting[0]))
        if done < self._todo and self._stop.received is not None:
            raise Preempted(f"stopped after {done:,} of {self._todo:,} images; run the same command to continue")

    def _prepare(self, candidate: Candidate) -> Candidate:
        if candidate.why:
            return candidate
        try:
            return candidate._replace(pixels=self._predictor.preprocess(candidate.path))
        except ImageError as error:
            return candidate._replace(why=error.why)

    def _write(self, pool: ThreadPoolExecutor, batch: list[Candidate], computing: dict[str, jax.Array]) -> None:
        outputs = {name: np.asarray(array) for name, array in computing.items()}
        answered = [item for item in batch if item.pixels is not None]
        topk = self._options.topk or len(self._predictor.class_names)
        rows = zip(answered, outputs.get("probability", ()), strict=False)  # without those that pad the batch
        answers = {item.path: self._predictor.best(probabilities, topk) for item, probabilities in rows}
        if self._archive is not None and answered:
            self._archive.write({name: array[: len(answered)] for name, array in outputs.items()})
        if self._options.annotate:
            list(pool.map(self._annotate, answers, answers.values()))
        if self._options.explain and answered:
            list(pool.map(self._explain, answered, outputs["map"]))
        self._output.write(self._line(item, answers.get(item.path, [])) for item in batch)
        for item in batch:
            words = self._short(answers[item.path]) if item.path in answers else f"error: {item.why}"
            print_status(f"{shown(item.path)}  {words}")

    def _short(self, answers: list[ClassProbability]) -> str:
        """Returns the best class, or of many labels all that are more likely than not."""
        if not self._predictor.model.many_labels:
            return _words(answers[0])
        predicted = self._predictor.is_predicted
        return ", ".join(_words(answer) for answer in answers if predicted(answer)) or "none"

    def _line(self, item: Candidate, answers: list[ClassProbability]) -> dict[str, Any]:
        """Returns the line of an image; calibrated labels say as well whether their threshold is reached."""
        if item.pixels is None:
            return {"image": item.path, "error": item.why}
        predictions = [answer._asdict() for answer in answers]
        if self._predictor.thresholds is not None:
            for answer, entry in zip(answers, predictions, strict=True):
                entry["predicted"] = self._predictor.is_predicted(answer)
        return {"image": item.path, "predictions": predictions}

    def _explain(self, item: Candidate, activation_map: np.ndarray) -> None:
        picture, array = (
            annotation_path(self._options.explain, item.path, self._root, (suffix,)) for suffix in (".png", ".npy")
        )
        assert item.pixels is not None
        write_explanation(picture, array, item.pixels, activation_map)

    def _annotate(self, path: str, answers: list[ClassProbability]) -> None:
        target = annotation_path(self._options.annotate, path, self._root)
        try:
            transform = self._predictor.model.transform
            decoding = {"pixel_range": transform.pixel_range, "dicom_frame": transform.dicom_frame}
            annotate(path, target, answers, self._predictor.limits, **decoding)
        except ImageError as error:
            logger.warning("%s can't be annotated: %s", error.name, error.why)


def _words(answer: ClassProbability) -> str:
    return f"{{{answer.class_id}: {answer.label!r}}} {answer.probability:.2f}"


def _batches(items: Iterable[Candidate], size: int) -> Iterator[list[Candidate]]:
    """Yields lists with `size` readable images, or fewer at the end or among many unreadable ones."""
    batch: list[Candidate] = []
    readable = 0
    for item in items:
        batch.append(item)
        readable += item.pixels is not None
        if readable == size or len(batch) == 4 * size:
            yield batch
            batch, readable = [], 0
    if batch:
        yield batch
