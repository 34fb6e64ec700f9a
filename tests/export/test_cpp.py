"""The C++ example compiles, and answers as the model does in Python.

The headers come from examples/cpp/fetch_headers.sh, in a directory that ONNXRUNTIME_INCLUDE_DIR names.
"""

import os
import pathlib
import shutil
import subprocess

import numpy as np
import pytest

from densenet_jax.export.graph import make_graph, reference_outputs
from tests.export.exporting import export_small, images
from tests.extras import needs
from tests.main_processes import ROOT

HEADERS = os.environ.get("ONNXRUNTIME_INCLUDE_DIR", "/usr/include/onnxruntime")
uses_onnx = needs("onnx", "onnxruntime", "jax2onnx")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the converters, which are others'


@pytest.fixture(scope="module")
def classify(tmp_path_factory):
    """The compiled program."""
    import onnxruntime

    if not os.path.exists(os.path.join(HEADERS, "onnxruntime_cxx_api.h")) or shutil.which("cmake") is None:
        reason = f"needs cmake and the headers of onnxruntime in {HEADERS} (ONNXRUNTIME_INCLUDE_DIR)"
        (pytest.fail if os.environ.get("DENSENET_JAX_ALL_EXTRAS") == "1" else pytest.skip)(reason)
    folder = pathlib.Path(onnxruntime.__file__).parent / "capi"
    (library,) = folder.glob("libonnxruntime.so.*")
    build = tmp_path_factory.mktemp("build")
    places = [f"-DONNXRUNTIME_INCLUDE_DIR={HEADERS}", f"-DONNXRUNTIME_LIBRARY={library}"]
    subprocess.run(["cmake", "-S", ROOT / "examples" / "cpp", "-B", build, *places], check=True)
    subprocess.run(["cmake", "--build", build], check=True)
    return build / "classify"


def write_ppm(path, image):
    height, width, _ = image.shape
    path.write_bytes(f"P6\n# a comment\n{width} {height} 255\n".encode() + image.tobytes())
    return path


@uses_onnx
def test_the_program_answers_as_the_model_does(classify, tmp_path):
    model, _ = export_small(tmp_path / "model.onnx", "small_densenet", format="onnx")
    expected = reference_outputs(make_graph(model), images())[0]
    for image, probabilities in zip(images()[:3], expected, strict=False):
        command = [classify, tmp_path / "model.onnx", write_ppm(tmp_path / "x.ppm", image), "7"]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows = [line.split("\t") for line in output.splitlines()]
        best = np.argsort(-probabilities)
        assert [int(row[0]) for row in rows] == best.tolist()
        assert [row[2] for row in rows] == [model.class_names[i] for i in best]
        np.testing.assert_allclose([float(row[1]) for row in rows], probabilities[best], rtol=0, atol=2e-6)


@uses_onnx
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"P6\n32 32 255\n" + bytes(3 * 32 * 32 - 1), "ends too early"),
        (b"P6\n31 32 255\n" + bytes(3 * 31 * 32), "has 31x32 pixels and 3 channels, but the model takes 32x32 and 3"),
        (b"P5\n32 32 255\n" + bytes(32 * 32), "and 1 channels"),
        (b"P6\n99999999999999999999 1 255\n", "too large a number"),
        (b"P6\n32 32 65535\n", "does not have 8 bits"),
        (b"P6\n-1 32 255\n", "header is damaged"),
        (b"P6", "header is damaged"),
        (b"GIF89a", "no binary PPM"),
    ],
)
def test_a_wrong_picture_is_reported(classify, tmp_path_factory, tmp_path, content, message):
    model = tmp_path_factory.getbasetemp() / "wrong_pictures.onnx"
    if not model.exists():
        export_small(model, format="onnx")
    (tmp_path / "x.ppm").write_bytes(content)
    done = subprocess.run([classify, model, tmp_path / "x.ppm"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
