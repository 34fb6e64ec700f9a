"""How the program was called, for what is said and written about a run."""

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

from densenet_jax.errors import UserError

# Flags that only some modes have a use for.
_MODES_OF = {
    "compare": ("report",),
    "images": ("predict", "export"),
    "output": ("predict", "export"),
    "labels": ("predict", "export", "serve"),
    "topk": ("predict",),
    "annotate": ("predict",),
    "features": ("predict",),
    "host": ("serve",),
    "port": ("serve",),
    "grpc_port": ("serve",),
    "topology": ("plan",),
    "format": ("export",),
    "precision": ("export",),
    "preprocess": ("export",),
    "batch_size": ("export",),
}


@dataclasses.dataclass(frozen=True)
class Command:
    """The command line beside its mode, work directory and resolved settings.

    Attributes:
        recipe: the recipe's file as it was given.
        overrides: settings that the command line changed, by "section.key".
        defaults: every setting with its default, nested; what a run's settings are compared with.
        compare: work directories to put side by side.
        images: files, folders and patterns to predict.
        output: the file to write; "": the mode's own place in the work directory.
        labels: a file with a class name a line; "": the run's own.
        topk: classes to tell of each image.
        annotate: where images with their predictions drawn on go; "": nowhere.
        features: which features to write beside the predictions; "": none.
        host: where --mode serve listens.
        port: its port for REST and the page; 0: a free one.
        grpc_port: likewise for gRPC.
        topology: the chips that --mode plan plans for.
        format: of the exported file.
        precision: of the numbers in it.
        preprocess: whether it takes bytes and gives probabilities.
        batch_size: the only one that it takes; 0: any.
    """

    recipe: str = "configs/digits.py"
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    compare: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    output: str = ""
    labels: str = ""
    topk: int = 5
    annotate: str = ""
    features: str = ""
    host: str = "127.0.0.1"
    port: int = 8080
    grpc_port: int = 8081
    topology: str = ""
    format: str = ""
    precision: str = "float32"
    preprocess: bool = True
    batch_size: int = 0

    @staticmethod
    def flags() -> tuple[str, ...]:
        """The flags that some modes have a use for, which are attributes here."""
        return tuple(_MODES_OF)

    def check_mode(self, mode: str) -> None:
        """Checks that no flag was given that means nothing in this mode.

        Raises:
            UserError: one was.
        """
        for flag, modes in _MODES_OF.items():
            value = getattr(self, flag)
            if mode not in modes and value != getattr(Command, flag):
                shown = value[0] if isinstance(value, tuple) else value
                raise UserError(
                    f"--{flag} {shown} is for --mode {' or '.join(modes)}, but --mode is {mode}; leave it out."
                )

    def line(self, workdir: str, mode: str = "train", **more: Any) -> str:
        """The shell command that runs `mode` with these settings in `workdir`; `more` are settings as section__key."""
        changes = {**self.overrides, **{key.replace("__", "."): value for key, value in more.items()}}
        words = ["python", "main.py", "--config", self.recipe, "--workdir", workdir]
        words += [] if mode == "train" else ["--mode", mode]
        words += [f"--config.{key}={value}" for key, value in changes.items()]
        return shlex.join(words)


def recipe_first(arguments: list[str], default: str) -> list[str]:
    """The same command line with --config in front, since settings given before the recipe would be refused.

    Args:
        arguments: the program's name and its flags.
        default: the recipe where none is named.
    """
    program, *rest = arguments
    for place, word in enumerate(rest):
        if word in ("--config", "-config") and place + 1 < len(rest):
            return [program, f"--config={rest[place + 1]}", *rest[:place], *rest[place + 2 :]]
        if word.startswith(("--config=", "-config=")):
            return [program, word, *rest[:place], *rest[place + 1 :]]
    return [program, f"--config={default}", *rest]
