"""A trained model as a file for other programs, compared with the model before it is put where it was wanted."""

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from densenet_jax.errors import UserError, first_line
from densenet_jax.export.graph import Graph, make_graph, reference_outputs
from densenet_jax.export.samples import CheckImages, Samples
from densenet_jax.export.verify import Comparison, compare, run_in_chunks
from densenet_jax.predict.model import Deployed
from densenet_jax.system.console import Bar, print_status, spinner

PRECISIONS = ("float32", "float16", "int8")
_CHECKED = {"float32": 64, "float16": 512, "int8": 512}  # images at most; agreement needs more than a difference does
_REPRESENTATIVE = 200


class _Writer(Protocol):
    def write(self, graph: Graph, path: str, precision: str, representative: np.ndarray | None) -> None: ...

    def load(self, path: str) -> Callable[[np.ndarray], np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class Format:
    """One kind of file.

    Attributes:
        module: where it is written and read back.
        suffix: of the default name.
        precisions: of the numbers in it.
        needs: modules that must be importable.
        install: the command that installs them.
    """

    module: str
    suffix: str
    precisions: tuple[str, ...]
    needs: tuple[str, ...]
    install: str

    def writer(self, name: str) -> Any:
        """The module that writes and reads it.

        Raises:
            UserError: a library is missing; the message has the command that installs it.
        """
        if missing := [need for need in self.needs if importlib.util.find_spec(need) is None]:
            raise UserError(f"--format {name} needs {', '.join(missing)}, not installed here: run `{self.install}`.")
        return importlib.import_module(self.module)


_HERE = "densenet_jax.export."
_EXTRA = "pip install -r requirements-export.txt"
# jax2onnx declares an older Orbax than ours, of which it uses nothing.
_WITH_ONNX = f"{_EXTRA} && pip install --no-deps jax2onnx==0.17.1"
FORMATS = {
    "stablehlo": Format(_HERE + "stablehlo", ".stablehlo", ("float32",), ("flatbuffers",), _EXTRA),
    "onnx": Format(_HERE + "onnx", ".onnx", ("float32", "int8"), ("onnx", "onnxruntime", "jax2onnx"), _WITH_ONNX),
    "savedmodel": Format(_HERE + "savedmodel", "_savedmodel", ("float32",), ("tensorflow",), _EXTRA),
    "tflite": Format(_HERE + "tflite", ".tflite", PRECISIONS, ("tensorflow", "ai_edge_litert"), _EXTRA),
}


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What the file is.

    Attributes:
        format: a name of `FORMATS`.
        output: where it goes; "": `default_output` and the format's suffix.
        default_output: a path without suffix.
        precision: of the numbers in it, one of `PRECISIONS`.
        preprocess: whether normalisation and softmax are in it.
        batch_size: the only one that it takes; 0: any.
    """

    format: str = ""
    output: str = ""
    default_output: str = ""
    precision: str = "float32"
    preprocess: bool = True
    batch_size: int = 0


def checked_format(options: ExportOptions) -> Format:
    """The format that is asked for, where all options fit together.

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
    """Writes the file, compares it with the model, and only then moves it to its place.

    Args:
        load_model: gives the model; called after all that can be checked without it.
        samples: images to compare and to quantise with.
        options: what to write and where.

    Returns:
        {"format", "path", "max_abs_difference", "examples"}.

    Raises:
        UserError: an option is wrong, a library is missing, the file can't be written or is not close to the model.
    """
    form = checked_format(options)
    writer: _Writer = form.writer(options.format)
    path = os.path.abspath(options.output or options.default_output + form.suffix)
    with _placed(path) as temporary:
        model = load_model()
        graph = make_graph(model, preprocess=options.preprocess, batch_size=options.batch_size)
        checked = samples.to_check(model.transform, _CHECKED[options.precision])
        if options.precision != "float32" and not checked.real:
            raise UserError(
                f"--precision {options.precision} is judged by answers to real images, but there are only "
                f"{checked.source}; prepare the data set (--mode prepare), or use --precision float32."
            )
        training = samples.representative(model.transform, _REPRESENTATIVE) if options.precision == "int8" else None
        with spinner(f"exporting {model.source} to {options.format}"):
            writer.write(graph, temporary, options.precision, training)
        result = _compared(model, graph, checked, writer.load(temporary))
        print_status(f"checked with {checked.source}: {result.describe()}")
        result.check(options.precision, f"the {options.format} file")
    print_status(f"{path}: {_size_bytes(path) / 1e6:.1f} MB")
    return {
        "format": options.format,
        "path": path,
        "max_abs_difference": result.max_abs_difference,
        "examples": result.examples,
    }


def _compared(
    model: Deployed, graph: Graph, checked: CheckImages, call: Callable[[np.ndarray], np.ndarray]
) -> Comparison:
    expected = reference_outputs(model, graph, checked.images)
    bar = Bar("checking", len(checked.images))
    try:
        found = run_in_chunks(call, graph.prepared(checked.images), graph.batch_size, bar.advance)
    finally:
        bar.close()
    return compare(expected, found, checked.labels)


@contextlib.contextmanager
def _placed(path: str) -> Iterator[str]:
    """A name beside `path` to write to; moved to `path` at the end, removed where something went wrong.

    Raises:
        UserError: `path` exists, or nothing can be written there.
    """
    if os.path.exists(path):
        raise UserError(f"--output {path} exists; remove it or choose another.")
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{os.getpid()}.{name}")
    try:
        os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UserError(f"--output {path} can't be written: {error.strerror}; choose another.") from error
    try:
        yield temporary
        os.rename(temporary, path)
    except OSError as error:
        raise UserError(f"--output {path} can't be written: {first_line(error)}; choose another.") from error
    finally:
        if os.path.isdir(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
        elif os.path.exists(temporary):
            os.remove(temporary)


def _size_bytes(path: str) -> int:
    if os.path.isfile(path):
        return os.path.getsize(path)
    return sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(path) for name in names)
