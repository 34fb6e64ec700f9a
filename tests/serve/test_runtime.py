"""The model behind the protocols, without a network."""

import dataclasses

import numpy as np

from densenet_jax.predict.predictor import Predictor
from densenet_jax.serve.requests import Wanted
from densenet_jax.serve.runtime import Classifier
from tests.export.exporting import small_model


def test_a_model_of_many_labels_names_all_of_them():
    model = Classifier(Predictor(dataclasses.replace(small_model(), many_labels=True)))
    assert [output["shape"] for output in model.metadata()["outputs"]] == [[-1, 7]] * 4
    rows = np.linspace(0.1, 0.9, 14, dtype=np.float32).reshape(2, 7)
    _, _, labels = model._output(Wanted("labels"), rows)
    assert labels.tolist() == [list("gfedcba")] * 2
    _, datatype, best = model._output(Wanted("probabilities", classes=2), rows)
    assert (datatype, best.shape) == ("BYTES", (2, 2))
    assert best[0, 0].endswith(":6:g")
