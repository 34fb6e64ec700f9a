"""Exports a model to a file and compares the file with the model before putting it in place."""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from densenet_jax.errors import UserError, check_installed, report_write_errors
from densenet_jax.export.graph import Graph, make_graph, reference_outputs
from densenet_jax.export.samples import CheckImages, Samples
from densenet_jax.export.verify import Comparison, Outputs, compare, compare_maps, run_in_chunks
from densenet_jax.predict.model import Deployed
from densenet_jax.system.console import Bar, print_status, spinner

PRECISIONS = ("float32", "float16", "int8")
_CHECKED = {
    "float32": 64,
    "float16": 512,
    "int8": 512,
}  # most images to compare; a share of equal answers needs more than a difference
_REPRESENTATIVE = 200


class _Writer(Protocol):
    def write(self, graph: Graph, path: str, precision: str, representative: np.ndarray | None) -> None: ...

    def load(self, path: str) -> Callable[[np.ndarray], Outputs]: ...


@dataclasses.dataclass(frozen=True)
class Format:
    """A file format."""

    module: str  # module with `write` and `load`
    suffix: str  # ending of the default file name
    precisions: tuple[str, ...]
    needs: tuple[str, ...]  # modules that must be importable
    install: str

    def load_writer(self, name: str) -> Any:
        """Imports the module that writes and reads the format.

        Raises:
            UserError: a library is missing; the message has the command that installs it.
        """
        check_installed(f"--format {name}", self.needs, self.install)
        return importlib.import_module(self.module)


_HERE = "densenet_jax.export."
_EXTRA = "pip install -r requirements-export.txt"
# jax2onnx requires an older Orbax, which it does not use.
_WITH_ONNX = f"{_EXTRA} && pip install --no-deps jax2onnx==0.17.1"
FORMATS = {
    "stablehlo": Format(_HERE + "stablehlo", ".stablehlo", ("float32",), ("flatbuffers",), _EXTRA),
    "onnx": Format(_HERE + "onnx", ".onnx", ("float32", "int8"), ("onnx", "onnxruntime", "jax2onnx"), _WITH_ONNX),
    "savedmodel": Format(_HERE + "savedmodel", "_savedmodel", ("float32",), ("tensorflow",), _EXTRA),
    "tflite": Format(_HERE + "tflite", ".tflite", PRECISIONS, ("tensorflow", "ai_edge_litert"), _EXTRA),
}


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Options of `--mode export`."""

    format: str = ""
    output: str = ""  # path to write; "" uses `default_output` with the format's suffix
    default_output: str = ""
    precision: str = "float32"
    preprocess: bool = True  # whether to include normalization and the step from logits to probabilities
    batch_size: int = 0  # fixed batch size; 0 accepts any
    overwrite: bool = False
    maps: bool = False  # whether to give the class activation maps of all classes as well


def check_options(options: ExportOptions) -> Format:
    """Checks that the options fit together and returns the format.

    Raises:
        UserError: they don't.
    """
    name, known = options.format, ", ".join(FORMATS)
    if not name:
        raise UserError(f"--mode export needs a --format; give one of {known}.")
    if name not in FORMATS:
        nearest = difflib.get_close_matches(name, FORMATS, n=1)
        raise UserError(
            f"--format {name} is not known; " + (f"did you mean {nearest[0]}?" if nearest else f"it is one of {known}.")
        )
    if options.precision not in FORMATS[name].precisions:
        raise UserError(
            f"--precision {options.precision} is not for --format {name}, which has "
            f"{', '.join(FORMATS[name].precisions)}."
        )
    if options.batch_size < 0:
        raise UserError(f"--batch_size is {options.batch_size}; give 1 or more, or 0 for any.")
    return FORMATS[name]


def export(load_model: Callable[[], Deployed], samples: Samples, options: ExportOptions) -> dict[str, Any]:
    """Writes the file, compares it with the model, and only then moves it into place.

    Args:
        load_model: called after everything that can be checked without the model.
        samples: images to compare and quantize with.

    Returns:
        {"format", "path", "max_abs_difference", "examples"}.

    Raises:
        UserError: an option is wrong, a library is missing, or the file can't be written or differs from the model.
    """
    kind = check_options(options)
    writer: _Writer = kind.load_writer(options.format)
    path = os.path.abspath(options.output or options.default_output + kind.suffix)
    with _replace_when_done(path, overwrite=options.overwrite) as temporary:
        model = load_model()
        graph = make_graph(model, preprocess=options.preprocess, batch_size=options.batch_size, maps=options.maps)
        checked = samples.to_check(model.transform, _CHECKED[options.precision])
        if options.precision != "float32" and not checked.real:
            raise UserError(
                f"--precision {options.precision} is checked by predictions of real images, but there are only "
                f"{checked.source}; prepare the data set (--mode prepare), or use --precision float32."
            )
        training = samples.representative(model.transform, _REPRESENTATIVE) if options.precision == "int8" else None
        print_status(f"exporting {model.source}")
        with spinner(f"writing {options.format}"):
            writer.write(graph, temporary, options.precision, training)
        results = _compare_with_model(graph, checked, writer.load(temporary))
        for result, what in zip(results, ("", "maps: "), strict=False):
            print_status(f"checked with {checked.source}: {what}{result.describe()}")
            result.check(options.precision, f"the {options.format} file")
    print_status(f"{path}: {_size_bytes(path) / 1e6:.1f} MB")
    return {
        "format": options.format,
        "path": path,
        "max_abs_difference": max(result.max_abs_difference for result in results),
        "examples": results[0].examples,
    }


def _compare_with_model(graph: Graph, checked: CheckImages, call: Callable[[np.ndarray], Outputs]) -> list[Comparison]:
    """Compares probabilities or logits, and maps where the file has them."""
    expected = reference_outputs(graph, checked.images)
    bar = Bar("checking", len(checked.images))
    try:
        outputs = run_in_chunks(call, graph.prepare(checked.images), graph.batch_size, bar.advance)
    finally:
        bar.close()
    threshold = (0.0 if graph.preprocessed else 0.5) if graph.model.many_labels else None
    maps = [compare_maps(*pair) for pair in zip(expected[1:], outputs[1:], strict=True)]
    return [compare(expected[0], outputs[0], checked.labels, threshold), *maps]


@contextlib.contextmanager
def _replace_when_done(path: str, *, overwrite: bool) -> Iterator[str]:
    """Yields a temporary name beside `path`, moved to `path` on success and removed on failure."""
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"--output {path} exists; add --overwrite to replace it, or choose another.")
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{os.getpid()}.{name}")
    reported = functools.partial(report_write_errors, f"--output {path}", "choose another")
    with reported():
        os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    try:
        with reported():
            yield temporary
            if os.path.isdir(path) and not os.path.islink(path):  # a directory can't be replaced in one step
                shutil.rmtree(path)
            os.replace(temporary, path)
    finally:
        if os.path.isdir(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
        elif os.path.exists(temporary):
            os.remove(temporary)


def _size_bytes(path: str) -> int:
    if os.path.isfile(path):
        return os.path.getsize(path)
    return sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(path) for name in names)
