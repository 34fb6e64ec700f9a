"""How the program was called, for what is said and written about a run."""

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Command:
    """The command line beside its mode, work directory and resolved settings.

    Attributes:
        recipe: the recipe's file as it was given.
        overrides: settings that the command line changed, by "section.key".
        defaults: every setting with its default, nested; what a run's settings are compared with.
        compare: work directories to put side by side.
    """

    recipe: str = "configs/digits.py"
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    compare: tuple[str, ...] = ()

    def line(self, workdir: str, mode: str = "train", **more: Any) -> str:
        """The shell command that runs `mode` with these settings in `workdir`; `more` are settings as section__key."""
        changes = {**self.overrides, **{key.replace("__", "."): value for key, value in more.items()}}
        words = ["python", "main.py", "--config", self.recipe, "--workdir", workdir]
        words += [] if mode == "train" else ["--mode", mode]
        words += [f"--config.{key}={value}" for key, value in changes.items()]
        return shlex.join(words)
