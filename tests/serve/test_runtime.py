"""The model behind the protocols, without a network."""

import asyncio
import dataclasses
import math
from types import SimpleNamespace

import numpy as np

from configs import default
from densenet_jax.predict.calibration import Calibration
from densenet_jax.predict.predictor import Predictor
from densenet_jax.serve.requests import Request, Tensor, Wanted
from densenet_jax.serve.runtime import Classifier
from tests.export.exporting import small_model

CONFIG = default.get_config()


def test_a_model_of_many_labels_names_all_of_them():
    model = Classifier(Predictor(dataclasses.replace(small_model(), many_labels=True)), CONFIG)
    assert [output["shape"] for output in model.metadata(model.name)["outputs"]][:4] == [[-1, 7]] * 4
    rows = np.linspace(0.1, 0.9, 14, dtype=np.float32).reshape(2, 7)
    labels = model._output(Wanted("labels"), rows)
    assert labels.tolist() == [list("gfedcba")] * 2
    best = model._output(Wanted("probabilities", classes=2), rows)
    assert (best.dtype, best.shape) == (object, (2, 2))
    assert best[0, 0].endswith(":6:g")


def test_calibrated_labels_say_which_are_predicted():
    calibration = Calibration((1.0,) * 7, (0.2, 0.2, 0.2, float("nan"), 0.95, 0.2, 0.2))
    model = Classifier(Predictor(dataclasses.replace(small_model(), many_labels=True, calibration=calibration)), CONFIG)
    assert model.metadata(model.name)["outputs"][-1] == {"name": "predicted", "datatype": "INT32", "shape": [-1, 7]}
    rows = np.array([[0.1, 0.3, 0.31, 0.45, 0.9, 0.21, 0.22]], np.float32)
    predicted, labels = (model._output(Wanted(name), rows) for name in ("predicted", "labels"))
    assert predicted.dtype == np.int32
    reached = [label for label, answer in zip(labels[0], predicted[0].tolist(), strict=True) if answer]
    assert sorted(reached) == ["b", "c", "f", "g"]


def test_a_late_request_is_given_up_and_one_without_a_client_dropped():
    model = Classifier(Predictor(small_model()), CONFIG)
    model.is_ready = True
    model._compute = SimpleNamespace(put=lambda image, turn: asyncio.get_running_loop().create_future())
    shape = [1, *model._predictor.image_shape]
    request = Request([Tensor("image", "UINT8", shape, bytes(math.prod(shape)))])

    async def case():
        gone, other = [asyncio.create_task(model.infer(lambda: request, 1)) for _ in range(2)]
        await asyncio.sleep(0)
        model._request_secs = 0.01
        answers = await asyncio.gather(model.infer(lambda: request, 1), return_exceptions=True)
        gone.cancel()
        answers += await asyncio.gather(gone, return_exceptions=True)
        assert len(model._deadlines) == 1
        await model.stop(0)
        return [*answers, *await asyncio.gather(other, return_exceptions=True)]

    late, gone, other = asyncio.run(case())
    assert isinstance(gone, asyncio.CancelledError)
    assert (late.status, other.status) == (504, 503)
