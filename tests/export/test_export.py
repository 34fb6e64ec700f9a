"""Options, places and checks of the export mode; the formats have files of their own."""

import dataclasses
import json
import os
import sys
import types

import jax
import numpy as np
import pytest

from densenet_jax.errors import UserError
from densenet_jax.export import export as export_module
from densenet_jax.export.export import FORMATS, ExportOptions, Format, check_options, export
from densenet_jax.export.graph import make_graph, reference_outputs
from densenet_jax.export.verify import compare, run_in_chunks
from tests.export.exporting import FixedSamples, export_small, images, small_model
from tests.main_in_process import run_here


@pytest.fixture
def text_format(monkeypatch):
    """A format that writes its outputs for the fixed images as text, changed by what the test puts into "change"."""
    module = types.ModuleType("text_format")
    module.change = lambda outputs: outputs

    def write(graph, path, precision, representative):
        with open(path, "w") as file:
            file.write("whole")
        module.graph = graph

    def load(path):
        call = jax.jit(module.graph.function)
        return lambda batch: (module.change(np.array(call(batch))),)

    module.write, module.load = write, load
    monkeypatch.setitem(sys.modules, "text_format", module)
    form = Format("text_format", ".text", ("float32", "float16"), (), "")
    monkeypatch.setitem(FORMATS, "text", form)
    return module


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a --format; give one of stablehlo"),
        ({"format": "stablehlo", "precision": "int8"}, "--precision int8 is not for --format stablehlo"),
        ({"format": "stable_hlo"}, "--format stable_hlo is not known; did you mean stablehlo?"),
        ({"format": "word"}, "--format word is not known; it is one of stablehlo"),
        ({"format": "stablehlo", "batch_size": -1}, "--batch_size is -1"),
    ],
)
def test_wrong_options_are_reported(options, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        check_options(ExportOptions(**options))


def test_int8_of_the_cpu_kernels_is_in_no_file(user, tmp_path):
    """Refused before weights are loaded."""
    flags = ("--config.model.dtype=int8", "--config.model.pretrained=timm/none", "--mode=export", "--format=onnx")
    _, errors = run_here("--config=configs/densenet121.py", f"--workdir={tmp_path}", *flags, expect=2, **user)
    assert "config.model.dtype is 'int8', which no file has; export an int8 file by --precision int8." in errors


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_missing_library_is_reported_with_the_command_that_installs_it(name, monkeypatch, tmp_path):
    monkeypatch.setattr(export_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"run `pip install .*`\.$"):
        export_small(tmp_path / "model", format=name)
    assert os.listdir(tmp_path) == []


def test_the_graph_without_preprocessing_gives_the_logits_of_normalized_images():
    model = small_model()
    graph = make_graph(model, preprocess=False)
    normalized = (images() / 255 - np.array(model.mean)) / np.array(model.std)
    expected = jax.jit(model.module.apply)(model.variables, jax.numpy.asarray(normalized, jax.numpy.float32))
    np.testing.assert_allclose(graph.prepare(images()), normalized, atol=1e-5)
    np.testing.assert_allclose(jax.jit(graph.function)(graph.prepare(images())), expected, atol=1e-5)
    np.testing.assert_allclose(reference_outputs(graph, images())[0], expected, atol=1e-5)


def test_the_graph_with_preprocessing_gives_the_probabilities_of_bytes():
    model = small_model()
    bare, whole = make_graph(model, preprocess=False), make_graph(model)
    logits = jax.jit(bare.function)(bare.prepare(images()))
    np.testing.assert_allclose(jax.jit(whole.function)(images()), jax.nn.softmax(logits), atol=1e-6)
    np.testing.assert_allclose(reference_outputs(whole, images())[0], jax.nn.softmax(logits), atol=1e-6)


@pytest.mark.parametrize(
    "odd", ["# one", " lead", "\ufeffmark", '"quoted"', "two\nlines", "line\u2028separator", "a\rb"]
)
def test_a_file_names_its_classes_exactly(odd):
    """A comment or quotes, as labels.txt has, would shift the classes of a reader that takes a line for a name."""
    names = (odd, *"bcdefg")
    info = make_graph(dataclasses.replace(small_model(), class_names=names)).info
    assert json.loads(info["class_names_json"]) == list(names)
    assert info.get("class_names", "\n".join(names)) == "\n".join(names)
    assert ("class_names" in info) == (len(odd.splitlines()) == 1)


def test_ten_crops_are_refused():
    model = small_model()
    crops = types.SimpleNamespace(shape=(5, 32, 32, 3))
    with pytest.raises(UserError, match=r"config\.eval\.crops is 10"):
        make_graph(export_module.dataclasses.replace(model, transform=crops))


def test_the_figures_describe_the_file(text_format, tmp_path):
    path = tmp_path / "new" / "model.text"
    _, figures = export_small(path, format="text")
    assert figures == {
        "format": "text",
        "path": str(path),
        "max_abs_difference": figures["max_abs_difference"],
        "examples": 9,
    }
    assert 0 <= figures["max_abs_difference"] < 1e-6
    assert path.read_text() == "whole"
    assert os.listdir(path.parent) == ["model.text"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda outputs: outputs + 2e-4, "differs from the model by up to 2.00e-04, more than the 1e-04"),
        (lambda outputs: outputs * np.nan, "NaN or infinity"),
        (lambda outputs: outputs[:, :3], r"outputs of shape \(9, 3\); expected \(9, 7\)"),
    ],
)
def test_a_file_that_is_not_the_model_is_not_left_behind(text_format, tmp_path, change, message):
    text_format.change = change
    with pytest.raises(UserError, match=message):
        export_small(tmp_path / "model.text", format="text")
    assert os.listdir(tmp_path) == []


def test_coarse_numbers_are_judged_by_their_answers(text_format, tmp_path):
    text_format.change = lambda outputs: np.roll(outputs, 1, axis=1)
    with pytest.raises(UserError, match=r"float16 agrees with the model for .* of 9 images, less than the 99%"):
        export_small(tmp_path / "model.text", format="text", precision="float16")
    text_format.change = lambda outputs: outputs * 0.9
    export_small(tmp_path / "model.text", format="text", precision="float16")


def test_coarse_numbers_need_real_images(text_format, tmp_path):
    with pytest.raises(UserError, match="checked by predictions of real images, but there are only fixed images"):
        export_small(tmp_path / "m", format="text", precision="float16", samples=FixedSamples(real=False))


def test_a_failure_while_writing_leaves_nothing(text_format, tmp_path):
    def write(graph, path, precision, representative):
        os.mkdir(path)
        raise OSError(28, "No space left on device")

    text_format.write = write
    with pytest.raises(UserError, match=r"can't be written \(.*No space left on device"):
        export_small(tmp_path / "model.text", format="text")
    assert os.listdir(tmp_path) == []


def test_nothing_is_overwritten(text_format, tmp_path):
    path = tmp_path / "model.text"
    path.write_text("mine")
    with pytest.raises(UserError, match=r"model\.text exists; add --overwrite to replace it"):
        export(pytest.fail, FixedSamples(), ExportOptions("text", str(path)))
    assert path.read_text() == "mine"


@pytest.mark.parametrize("is_directory", [False, True])
def test_overwrite_replaces_only_with_a_checked_file(text_format, tmp_path, is_directory):
    path = tmp_path / "model.text"
    if is_directory:
        (path / "old").mkdir(parents=True)
    else:
        path.write_text("mine")
    text_format.change = lambda outputs: outputs + 1
    with pytest.raises(UserError, match="differs from the model"):
        export_small(path, format="text", overwrite=True)
    assert os.listdir(path) == ["old"] if is_directory else path.read_text() == "mine"
    text_format.change = lambda outputs: outputs
    export_small(path, format="text", overwrite=True)
    assert path.read_text() == "whole"


def test_a_place_where_nothing_can_be_written_is_reported(text_format, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"can't be written \((Not a directory|File exists)"):
        export(pytest.fail, FixedSamples(), ExportOptions("text", str(tmp_path / "file" / "model")))


@pytest.mark.parametrize(("batch_size", "sizes"), [(0, [1, 24, 5]), (8, [8, 8, 8, 8])])
def test_every_image_goes_through_once(batch_size, sizes):
    seen = []
    given = np.arange(30, dtype=np.float32)[:, None]

    def call(batch):
        seen.append(len(batch))
        return batch * 2, batch * 3

    twice, thrice = run_in_chunks(call, given, batch_size, lambda count: None)
    np.testing.assert_array_equal(twice, given * 2)
    np.testing.assert_array_equal(thrice, given * 3)
    assert seen == sizes


def test_accuracies_and_agreement_are_counted():
    ours = np.eye(4, dtype=np.float32)
    theirs = ours[[0, 1, 2, 2]]
    result = compare(ours, theirs, np.array([0, 1, 0, 2]))
    assert (result.agreement, result.accuracy, result.max_abs_difference) == (0.75, (0.5, 0.75), 1.0)
    assert "top-1 of the model 50.00%, of the file 75.00% (+25.00%)" in result.describe()


def test_classes_that_are_left_out_do_not_differ():
    logits = np.array([[1.0, -np.inf, 2.0]], np.float32)
    assert compare(logits, logits.copy(), None).max_abs_difference == 0
    assert np.isinf(compare(logits, np.zeros_like(logits), None).max_abs_difference)


def test_decisions_of_many_labels_are_compared_one_by_one():
    ours = np.array([[0.9, 0.2], [0.5, 0.7]], np.float32)
    theirs = np.array([[0.8, 0.6], [0.5, 0.7]], np.float32)
    result = compare(ours, theirs, np.array([[1, 0], [np.nan, 0]]), 0.5)
    assert (result.agreement, result.accuracy) == (0.75, pytest.approx((2 / 3, 1 / 3)))
    assert "same decision for 75.00%; right labels of the model 66.67%" in result.describe()


@pytest.mark.parametrize("preprocess", [True, False])
def test_a_graph_of_many_labels_gives_each_its_probability(preprocess):
    model = dataclasses.replace(small_model(), many_labels=True)
    graph = make_graph(model, preprocess=preprocess)
    given = images(3)
    output = np.asarray(jax.jit(graph.function)(graph.prepare(given)))
    np.testing.assert_allclose(output, reference_outputs(graph, given)[0], rtol=1e-4, atol=1e-5)
    logits = np.asarray(jax.jit(graph.logits)(graph.prepare(given)))
    np.testing.assert_allclose(output, 1 / (1 + np.exp(-logits)) if preprocess else logits, rtol=1e-4, atol=1e-6)
    assert graph.info["labels"] == "multi"
    assert "labels" not in make_graph(small_model()).info
