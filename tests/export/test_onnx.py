"""The ONNX file gives the model's answers in onnxruntime."""

import numpy as np
import pytest

from densenet_jax.export.graph import make_graph, reference_outputs
from tests.export.exporting import FAMILIES, export_small, images
from tests.extras import needs
from tests.main_processes import parse_last_line, run_main
from tests.untrained_run import make_run

uses_onnx = needs("onnx", "onnxruntime", "jax2onnx")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the converters, which are others'


def run(path, batch):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    return given, result, session.run(None, {given.name: batch})[0]


@uses_onnx
@pytest.mark.parametrize("name", FAMILIES)
def test_onnxruntime_answers_as_the_model_does_for_any_batch_size(name, tmp_path):
    path = str(tmp_path / "model.onnx")
    model, figures = export_small(path, name, format="onnx")
    assert figures["max_abs_difference"] < 1e-6
    expected = reference_outputs(make_graph(model), images())[0]
    for count in (1, 9):
        given, result, actual = run(path, images()[:count])
        np.testing.assert_allclose(actual, expected[:count], rtol=0, atol=1e-6)
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(uint8)", [32, 32, 3])
    assert (result.name, result.type, result.shape[1]) == ("probabilities", "tensor(float)", 7)


@uses_onnx
def test_the_file_says_what_it_is(tmp_path):
    import onnx

    export_small(tmp_path / "model.onnx", format="onnx", preprocess=False, batch_size=4)
    model = onnx.load(tmp_path / "model.onnx")
    properties = {prop.key: prop.value for prop in model.metadata_props}
    names = {"class_names": "a\nb\nc\nd\ne\nf\ng", "class_names_json": '["a", "b", "c", "d", "e", "f", "g"]'}
    assert properties == {"model": "small_cifar", "weights": "drawn weights", **names}
    assert not {"BatchNormalization"} & {node.op_type for node in model.graph.node}
    given, result, logits = run(str(tmp_path / "model.onnx"), np.zeros((4, 32, 32, 3), np.float32))
    assert (given.shape, result.name, logits.shape) == ([4, 32, 32, 3], "logits", (4, 7))


@uses_onnx
def test_int8_is_a_quarter_of_the_size_and_answers_alike(tmp_path):
    import onnx

    model, _ = export_small(tmp_path / "whole.onnx", "small_densenet", format="onnx")
    export_small(tmp_path / "int8.onnx", "small_densenet", format="onnx", precision="int8")
    kinds = {node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    expected = reference_outputs(make_graph(model), images())[0]
    _, _, actual = run(str(tmp_path / "int8.onnx"), images())
    assert 0 < np.abs(actual - expected).max() < 0.05


@uses_onnx
def test_the_mode_exports_a_run_and_says_no_more_than_that(tmp_path, user):
    """jax2onnx logs a traceback for each library that it could support and that is not there, JAX one for CUDA."""
    make_run(tmp_path, user["TFDS_DATA_DIR"], model__block_sizes=(1, 1))
    output, errors = run_main(f"--workdir={tmp_path}", "--mode=export", "--format=onnx", **user)
    assert parse_last_line(output)["examples"] == 64
    assert "checked with images of digits test" in errors
    assert "Traceback" not in errors
    assert "jax2onnx" not in errors
