"""The only table of modes and flags: their names, defaults and help, and the modes that take each flag."""

import dataclasses
import os
import shlex
import sys
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from densenet_jax.errors import UserError

_COLUMNS = 80  # of --help


class Mode(NamedTuple):
    """A mode: its `--help`, and whether several processes can share it."""

    help: str
    example: str
    many_processes: bool = False


MODES: dict[str, Mode] = {
    "train": Mode(
        "Trains from the newest good checkpoint of the work directory, else from the start.",
        "train --config digits --workdir runs/digits",
        many_processes=True,
    ),
    "eval": Mode(
        "Evaluates a checkpoint of the work directory, or config.model.pretrained; changes nothing there.",
        "eval --workdir runs/digits --checkpoint best",
        many_processes=True,
    ),
    "calibrate": Mode(
        "Fits temperature and thresholds to a checkpoint on the evaluated split; predict, serve and export use them.",
        "calibrate --workdir runs/digits --checkpoint best",
        many_processes=True,
    ),
    "predict": Mode("Predicts the classes of --images.", "predict --workdir runs/digits --images 'photos/*.jpg'"),
    "export": Mode(
        "Writes the model as a file for other programs and checks it against the model.",
        "export --workdir runs/digits --format onnx",
    ),
    "serve": Mode("Answers requests over REST and gRPC until it is stopped.", "serve --workdir runs/digits"),
    "report": Mode(
        "Writes report/index.html about a run, or report/compare.html about those of --compare.",
        "report --workdir runs/digits",
        many_processes=True,
    ),
    "prepare": Mode("Prepares the data set and verifies every image of it.", "prepare --config densenet121"),
    "data": Mode(
        "Writes report/data.html: sample images, class balance, sizes and the pipeline's speed.",
        "data --config finetune:folder --config.data.dir=PHOTOS",
    ),
    "schedule": Mode("Draws the learning rate over the steps to schedule.png.", "schedule --config densenet121"),
    "parameters": Mode(
        "Prints the model's parameters as a table, and the cost of one image.", "parameters --config dpn"
    ),
    "plan": Mode(
        "Compiles the training step for chips that need not be here, and reports its memory and time.",
        "plan --config densenet121 --topology v5e:4x4",
    ),
}
_OF_MANY_PROCESSES = tuple(name for name, mode in MODES.items() if mode.many_processes)


def _flag(default: Any, text: str, *modes: str, **limits: Any) -> Any:
    """Makes a flag as a field of `Command`, for the given modes or all.

    Args:
        default: its type is the flag's; () stands for a flag that may be repeated.
        **limits: "type" where the default is None, "choices", or "lower" and "upper".
    """
    return dataclasses.field(default=default, metadata={"help": text, "modes": modes, **limits})


@dataclasses.dataclass(frozen=True)
class Command:
    """The command line and its resolved settings; each attribute with a help text is a flag of that name."""

    recipe: str = "digits"  # as given; "" takes the settings of the run in the work directory
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # settings changed, by "section.key"
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # every setting with its default, nested
    mode: str = _flag("train", "What to do; the first word of the command line does as well.", choices=tuple(MODES))
    workdir: str = _flag("", "The run's directory; by default ./runs/ and the recipe's name.")
    checkpoint: str = _flag(
        "",
        "latest, best or a step of the run; by default the latest.",
        *("eval", "calibrate", "predict", "export", "serve"),
    )
    each_label: bool = _flag(False, "Whether each of many labels has a temperature of its own.", "calibrate")
    specificity: float = _flag(
        0.0, "What each label's threshold must reach; 0: the best F1 instead.", "calibrate", lower=0.0, upper=1.0
    )
    images: tuple[str, ...] = _flag((), "A file, folder or pattern in quotes; repeatable.", "predict", "export")
    output: str = _flag(
        "",
        "The file to write; by default in the work directory; predict: .jsonl, .csv or .parquet.",
        "predict",
        "export",
    )
    overwrite: bool = _flag(False, "Replace the file of --output.", "export")
    labels: str = _flag(
        "", "A file with a class name a line; by default the run's own names.", "predict", "export", "serve"
    )
    topk: int = _flag(5, "How many classes an image, best first; 0: all.", "predict")
    annotate: str = _flag("", "A directory for the images with their predictions drawn on.", "predict")
    explain: str = _flag("", "A directory for the images with the class activation map of their best class.", "predict")
    explain_layer: str = _flag(
        "", "With --explain: Grad-CAM at this layer, such as stride_8, instead of the last layer's map.", "predict"
    )
    features: str = _flag("", "pooled, pyramid or stride_2,stride_8,..., written to a NumPy archive.", "predict")
    format: str = _flag("", "stablehlo, onnx, savedmodel or tflite.", "export")
    precision: str = _flag("float32", "float32, or what the format has of float16 and int8.", "export")
    preprocess: bool = _flag(
        True, "The file takes bytes and gives probabilities; --nopreprocess: normalized floats and logits.", "export"
    )
    batch_size: int = _flag(0, "The only batch size that the file takes; 0: any.", "export")
    maps: bool = _flag(False, "Give the class activation maps of all classes as a second output.", "export")
    host: str = _flag("127.0.0.1", "Where to listen; 0.0.0.0 for every network.", "serve")
    port: int = _flag(8080, "Port of REST and of its page; 0: a free one.", "serve", lower=0, upper=65535)
    grpc_port: int = _flag(8081, "Port of gRPC; 0: a free one.", "serve", lower=0, upper=65535)
    compare: tuple[str, ...] = _flag((), "Another run's directory to put beside this one; repeatable.", "report")
    topology: str = _flag("", "The chips to plan for, such as v5e:16x16 or h200:1x1x8.", "plan")
    coordinator: str | None = _flag(
        None, "HOST:PORT of process 0, where this is one of several processes.", *_OF_MANY_PROCESSES, type=str
    )
    num_processes: int | None = _flag(None, "How many processes there are.", *_OF_MANY_PROCESSES, type=int)
    process_id: int | None = _flag(None, "Which of them this is, from 0.", *_OF_MANY_PROCESSES, type=int)

    @staticmethod
    def flags() -> Iterator[dataclasses.Field]:
        """Yields the attributes that are flags; metadata: "help", "modes" and limits."""
        return (field for field in dataclasses.fields(Command) if "help" in field.metadata)

    def check_mode(self) -> None:
        """Checks that every flag given has a meaning in this mode.

        Raises:
            UserError: one has none.
        """
        for flag in self.flags():
            value, modes = getattr(self, flag.name), flag.metadata["modes"]
            if modes and self.mode not in modes and value != flag.default:
                shown = value[0] if isinstance(value, tuple) else value
                raise UserError(
                    f"--{flag.name} {shown} is for --mode {' or '.join(modes)}, but --mode is {self.mode}; "
                    "leave it out."
                )

    def line(self, workdir: str, mode: str = "train", **more: Any) -> str:
        """Returns the shell command that runs `mode` with these settings; `more` are settings as section__key."""
        changes = {**self.overrides, **{key.replace("__", "."): value for key, value in more.items()}}
        words = [*program_words(), *(["--config", self.recipe] if self.recipe else []), "--workdir", workdir]
        words += [] if mode == "train" else ["--mode", mode]
        words += [f"--config.{key}={value}" for key, value in changes.items()]
        return shlex.join(words)


def program_words() -> list[str]:
    """Returns the words that start this program again: the installed command, or `python main.py` in a checkout."""
    installed = os.path.basename(sys.argv[0]) == "densenet-jax" or sys.argv[0].endswith("densenet_jax/__main__.py")
    return ["densenet-jax"] if installed else ["python", "main.py"]


def entry(name: str, text: str, indent: int = 2, width: int = 16) -> str:
    """Returns a line of --help, wrapped: a name, then its text in a column of its own."""
    first = f"{'':{indent}}{name:{width}}"
    return textwrap.fill(text, _COLUMNS, initial_indent=first, subsequent_indent=" " * len(first))


def describe(mode: str = "") -> str:
    """Returns the text of --help for one mode; "" is all of them."""
    program = " ".join(program_words())
    if mode:
        lines = [f"{program} {mode}: {MODES[mode].help}", "", f"  {program} {MODES[mode].example}", "", "flags:"]
        return "\n".join([*lines, *_flag_lines(mode), *_flag_lines("")])
    lines = ["modes, each with its own flags and an example:"]
    for name, each in MODES.items():
        lines += ["", textwrap.fill(f"{name}: {each.help}", _COLUMNS, initial_indent="  ", subsequent_indent="    ")]
        lines += [f"    {program} {each.example}", *_flag_lines(name, 4)]
    return "\n".join([*lines, "", "flags of every mode:", *_flag_lines("")])


def _flag_lines(mode: str, indent: int = 2) -> list[str]:
    """Returns an entry for each flag of one mode alone, or with "" for those of all modes."""
    lines = []
    for flag in Command.flags():
        modes = flag.metadata["modes"]
        if (mode in modes) if mode else not modes:
            default = "" if flag.default in ("", None, (), False) else f" [{flag.default}]"
            lines.append(entry(f"--{flag.name}", flag.metadata["help"] + default, indent))
    if not mode:
        lines += [
            entry("--config", "A recipe's name or a Python file; by default the settings of the run, else digits."),
            entry("--config.KEY", "A setting's value, as in --config.optim.learning_rate=0.2; repeatable."),
        ]
    return lines
