"""Exported files give class activation maps on request: those of `Predictor.explain`, in every runtime."""

import jax
import numpy as np
import pytest

from densenet_jax.errors import UserError
from densenet_jax.export.export import FORMATS, ExportOptions, export
from densenet_jax.export.graph import make_graph
from densenet_jax.export.verify import compare_maps
from densenet_jax.predict.predictor import Predictor
from tests.export.exporting import FixedSamples, export_small, images, small_model
from tests.extras import needs

FAMILIES = ("small_cifar", "small_dpn_b", "small_rdnet")
uses_stablehlo = needs("flatbuffers")
uses_tensorflow = needs("tensorflow", "ai_edge_litert")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the converters, which are others'


def explained(model, pixels):
    """The maps of every class, by `Predictor.explain`, and the probabilities."""
    predictor = Predictor(model, batch_sizes=(len(pixels),))
    maps = [
        [answer.activation_map for answer in predictor.explain(list(pixels), [number] * len(pixels))]
        for number in range(len(model.class_names))
    ]
    return np.moveaxis(np.array(maps), 0, -1), predictor.probabilities(pixels)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_maps_of_all_classes_are_those_of_each(name):
    model = small_model(name)
    maps, probabilities = explained(model, images())
    actual = jax.jit(make_graph(model, maps=True).function)(images())
    np.testing.assert_allclose(actual[0], probabilities, rtol=0, atol=1e-5)
    np.testing.assert_allclose(actual[1], maps, rtol=0, atol=1e-5 * max(1, np.abs(maps).max()))


@uses_stablehlo
@pytest.mark.parametrize("name", FAMILIES)
def test_stablehlo_s_maps_are_the_predictor_s(name, tmp_path):
    check_file("stablehlo", name, tmp_path)


@needs("onnx", "onnxruntime", "jax2onnx")
@pytest.mark.parametrize("name", FAMILIES)
def test_onnxruntime_s_maps_are_the_predictor_s(name, tmp_path):
    check_file("onnx", name, tmp_path)


@uses_tensorflow
@pytest.mark.parametrize("form", ["savedmodel", "tflite"])
@pytest.mark.parametrize("name", FAMILIES)
def test_tensorflow_s_maps_are_the_predictor_s(form, name, tmp_path):
    check_file(form, name, tmp_path)


def check_file(form, name, tmp_path):
    """Exports a model with maps, runs the file in its own runtime, and compares it with the predictor."""
    model, figures = export_small(tmp_path / "model", name, format=form, maps=True)
    maps, probabilities = explained(model, images())
    largest = max(1, np.abs(maps).max())
    assert figures["max_abs_difference"] < 1e-5 * largest
    call = FORMATS[form].load_writer(form).load(str(tmp_path / "model"))
    for count in (9, 1):
        actual = call(images()[:count])
        np.testing.assert_allclose(actual[0], probabilities[:count], rtol=0, atol=1e-5)
        np.testing.assert_allclose(actual[1], maps[:count], rtol=0, atol=1e-5 * largest)


@uses_stablehlo
def test_normalized_images_give_logits_and_the_same_maps(tmp_path):
    from jax import export as jax_export

    model, _ = export_small(tmp_path / "model", format="stablehlo", preprocess=False, maps=True)
    given = make_graph(model, preprocess=False).prepare(images())
    outputs = jax_export.deserialize(bytearray((tmp_path / "model").read_bytes())).call(given)
    assert set(outputs) == {"logits", "maps"}
    bias = np.asarray(model.variables["params"]["classifier"]["bias"])
    np.testing.assert_allclose(np.asarray(outputs["maps"]).mean(axis=(1, 2)) + bias, outputs["logits"], atol=1e-5)


@uses_tensorflow
@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_coarser_files_have_maps_too(precision, tmp_path):
    model, _ = export_small(tmp_path / "model", "small_densenet", format="tflite", precision=precision, maps=True)
    maps, _ = explained(model, images())
    _, actual = FORMATS["tflite"].load_writer("tflite").load(str(tmp_path / "model"))(images())
    assert 0 < np.abs(actual - maps).max() < {"float16": 0.01, "int8": 0.2}[precision] * np.abs(maps).max()


@uses_stablehlo
def test_a_file_with_other_maps_is_not_written(tmp_path, monkeypatch):
    from densenet_jax.export import stablehlo

    load = stablehlo.load

    def load_wrong(path):
        call = load(path)
        return lambda batch: (call(batch)[0], call(batch)[1] + 0.01 * (len(batch) > 1))

    monkeypatch.setattr(stablehlo, "load", load_wrong)
    options = ExportOptions("stablehlo", str(tmp_path / "model"), maps=True)
    with pytest.raises(UserError, match=r"the stablehlo file differs from the model by up to 1\.00e-02"):
        export(small_model, FixedSamples(), options)
    assert not (tmp_path / "model").exists()


def test_maps_of_another_shape_are_refused():
    with pytest.raises(UserError, match=r"maps of shape \(1, 2, 2, 3\); expected \(1, 4, 4, 3\)"):
        compare_maps(np.zeros((1, 4, 4, 3)), np.zeros((1, 2, 2, 3)))
