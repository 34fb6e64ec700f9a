"""TensorFlow's files give the model's answers: SavedModel in a fresh process, TFLite in LiteRT's interpreter."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from densenet_jax.data.pixels import widen
from densenet_jax.errors import UserError
from densenet_jax.export.export import ExportOptions, export
from densenet_jax.export.graph import make_graph, reference_outputs
from tests.export.exporting import FAMILIES, FixedSamples, export_small, images, small_model
from tests.extras import needs
from tests.main_processes import make_environment

uses_tensorflow = needs("tensorflow")
uses_tflite = needs("tensorflow", "ai_edge_litert")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the converters, which are others'

SAVED = """
import importlib.util
import pathlib
import numpy as np
import tensorflow as tf
images = np.load("images.npy")
outputs = {}
for folder in pathlib.Path("saved").iterdir():
    call = tf.saved_model.load(str(folder)).signatures["serving_default"]
    whole, single = (call(images=tf.constant(batch))["probabilities"].numpy() for batch in (images, images[:1]))
    np.testing.assert_allclose(whole[:1], single, atol=1e-6, err_msg=folder.name)
    outputs[folder.name] = whole
np.savez("outputs.npz", **outputs)
assert importlib.util.find_spec("densenet_jax") is None, "the package can be imported here"
"""
TFLITE = """
import sys
import numpy as np
from ai_edge_litert.interpreter import Interpreter
interpreter = Interpreter(model_path="model.tflite")
(given,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
assert given["dtype"] is np.uint8, given
assert (given["shape_signature"][0], result["shape_signature"][0]) == (-1, -1)
images, outputs = np.load("images.npy"), []
for batch in np.split(images, [1, 4]):  # of 1, of 3, of the rest
    interpreter.resize_tensor_input(given["index"], batch.shape, strict=True)
    interpreter.allocate_tensors()
    interpreter.set_tensor(given["index"], batch)
    interpreter.invoke()
    outputs.append(interpreter.get_tensor(result["index"]))
np.save("outputs.npy", np.concatenate(outputs))
np.save("dtypes.npy", [str(tensor["dtype"].__name__) for tensor in interpreter.get_tensor_details()])
assert not {"jax", "densenet_jax", "tensorflow"} & set(sys.modules)
"""


def run(code, folder, outputs="outputs.npy"):
    """The outputs of `code` for the images, run in a fresh process in `folder`."""
    np.save(folder / "images.npy", images())
    subprocess.run([sys.executable, "-P", "-c", code], cwd=folder, env=make_environment(), check=True)
    return np.load(folder / outputs)


@uses_tensorflow
def test_savedmodels_run_in_a_process_without_the_package(tmp_path):
    """One process for every family: importing TensorFlow takes longer than running them."""
    expected = {}
    for name in FAMILIES:
        model, figures = export_small(tmp_path / "saved" / name, name, format="savedmodel")
        assert figures["max_abs_difference"] < 1e-6, name
        expected[name] = reference_outputs(make_graph(model), images())[0]
    actual = run(SAVED, tmp_path, "outputs.npz")
    assert set(actual) == set(FAMILIES)
    for name, outputs in expected.items():
        np.testing.assert_allclose(actual[name], outputs, rtol=0, atol=1e-6, err_msg=name)


@uses_tflite
@pytest.mark.parametrize("name", FAMILIES)
def test_tflite_answers_as_the_model_does(name, tmp_path):
    model, figures = export_small(tmp_path / "model.tflite", name, format="tflite")
    assert figures["max_abs_difference"] < 1e-6
    expected = reference_outputs(make_graph(model), images())[0]
    np.testing.assert_allclose(run(TFLITE, tmp_path), expected, rtol=0, atol=1e-6)


@uses_tflite
@pytest.mark.parametrize(("precision", "most"), [("float16", 1e-3), ("int8", 0.05)])
def test_coarser_tflite_is_smaller_and_near(precision, most, tmp_path):
    model, _ = export_small(tmp_path / "whole.tflite", "small_densenet", format="tflite")
    export_small(tmp_path / "model.tflite", "small_densenet", format="tflite", precision=precision)
    expected = reference_outputs(make_graph(model), images())[0]
    assert 0 < np.abs(run(TFLITE, tmp_path) - expected).max() < most
    sizes = [(tmp_path / name).stat().st_size for name in ("model.tflite", "whole.tflite")]
    assert sizes[0] < 0.7 * sizes[1]
    dtypes = set(np.load(tmp_path / "dtypes.npy").tolist())
    if precision == "int8":  # the bytes come in as they are; only the probabilities are given back as floats
        assert np.load(tmp_path / "dtypes.npy").tolist().count("float32") == 1, dtypes


@uses_tflite
def test_a_tflite_file_of_a_fixed_batch_takes_that_batch_only(tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    _, figures = export_small(tmp_path / "model.tflite", format="tflite", batch_size=2)
    assert figures["max_abs_difference"] < 1e-6
    (given,) = Interpreter(str(tmp_path / "model.tflite")).get_input_details()
    assert given["shape_signature"].tolist() == [2, 32, 32, 3]


@uses_tflite
def test_tflite_takes_16_bits_as_floats_only(tmp_path):
    model = small_model()
    model = dataclasses.replace(model, transform=dataclasses.replace(model.transform, bits=16))
    samples = FixedSamples()
    samples.images = widen(samples.images // 2) + np.uint16(3)  # no values of 8 bits
    options = ExportOptions(output=str(tmp_path / "model.tflite"), format="tflite")
    assert export(lambda: model, samples, options)["max_abs_difference"] < 1e-6
    with pytest.raises(UserError, match="int8 takes pixels of 8 bits, but this model has 16"):
        export(lambda: model, samples, dataclasses.replace(options, precision="int8", overwrite=True))
