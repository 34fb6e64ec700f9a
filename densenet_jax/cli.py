"""Turns the command line into one call of a mode, and a user's mistake into one line.

Importing JAX takes most of a second and the modes more, so `run` alone does: a mistake in the settings is reported at
once.
"""

import difflib
import importlib
import os
import re
import sys
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from densenet_jax.config import check_config, flatten, recipes, to_dict
from densenet_jax.config.run_settings import read_run_settings, read_settings, started_from
from densenet_jax.errors import UserError, first_line
from densenet_jax.flags import MODES, Command
from densenet_jax.models.variants import get_variant
from densenet_jax.system.console import drop, print_status
from densenet_jax.system.logs import start_quietly

# Errors of absl, ml_collections and recipes.
_MISTAKES = (flags.Error, ArithmeticError, LookupError, AttributeError, OSError, TypeError, ValueError)


_UNLIKE = 0.5  # likeness up to which a name is not taken for a misspelling of another


def _nearest(name: str, known: list[str], prefix: str = "") -> str:
    """Returns the known key most like `name`, whole or by its last part, after `prefix`; "" if none is alike."""

    def likeness(key: str) -> float:
        own, last = name.split(".")[-1], key.split(".")[-1]
        if own == "".join(word[:1] for word in last.split("_")):
            return 1.0
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in ((name, key), (own, last)))

    nearest = max(known, key=likeness)
    return f"{prefix}{nearest}" if likeness(nearest) > _UNLIKE else ""


def _explain_no_setting(start: str, name: str, known: list[str]) -> str:
    nearest = _nearest(name, known, "config.")
    where = f"the nearest is {nearest}" if nearest else "configs/default.py has them all"
    return f"{start} is not a setting; {where}."


def explain_unknown_flag(name: str, flags: list[str], known: ml_collections.ConfigDict) -> str:
    """Returns a sentence about a flag that does not exist, with the flag or setting that was probably meant.

    Args:
        name: the flag without its dashes.
        known: settings with every valid key.
    """
    keys = [key for key, _ in flatten(known)]
    if name.startswith("config."):
        return _explain_no_setting(name, name.removeprefix("config."), keys)
    plain = name.replace("-", "_")
    if (plain in flags or plain not in {key.split(".")[-1] for key in keys}) and (
        close := difflib.get_close_matches(plain, [*flags, "config"], n=1, cutoff=0.7)
    ):
        return f"--{name} is not a flag; the nearest is --{close[0]}."
    if nearest := _nearest(plain, keys, "--config."):
        return f"--{name} is not a flag; the nearest is {nearest}=VALUE."
    return f"--{name} is not a flag; --help lists them, and configs/default.py the settings."


# Errors of the flags' parsers and their meaning.
_EXPECTED_BY_PARSERS = {
    "invalid literal for int": "a whole number",
    "could not convert string to float": "a number",
    "Non-boolean argument": "True or False",
    "is not an integer in the range": "a whole number",
    "is not a number in the range": "a number",
}


def explain_flag_error(error: Exception, arguments: list[str], known: ml_collections.ConfigDict) -> str:
    """Explains in a sentence an error that absl, ml_collections or a recipe raised on the command line.

    Args:
        known: settings with every valid key, to find the one nearest to a misspelled key.
    """
    if wrong := re.match(r"flag --(\S+?)=(.*?): (.*)", str(error), re.DOTALL):
        name, value, why = wrong.groups()
        if "as a ConfigDict" in why:
            return f"{name} is a section of settings, not one; give one of its own, as in configs/default.py."
        for part, expected in _EXPECTED_BY_PARSERS.items():
            if part in why:
                shown = name if name.startswith("config.") else f"--{name}"
                limits = re.search(r"in the range \[(\d+)(?:\.0)?, (\d+)(?:\.0)?\]", why)
                span = f" from {limits[1]} to {limits[2]}" if limits else ""
                return f"{shown} is {value!r}; expected {expected}{span}."
    if not isinstance(error, AttributeError | KeyError):
        return first_line(error).replace("flag --", "--").replace("Missing value for", "there is no value after")
    quoted = re.search(r"""['"]([\w.]+)\\?['"]""", str(error))
    name = quoted.group(1) if quoted else str(error)
    keys = [key for key, _ in flatten(known)]
    for argument in arguments:
        given = argument.lstrip("-").split("=")[0]
        if given.startswith("config.") and name in given.split("."):
            return _explain_no_setting(given, given.removeprefix("config."), keys)
    return _explain_no_setting(f"the recipe sets or reads {name}, which", name, keys)


def parse(arguments: list[str]) -> tuple[Command, Any]:
    """Reads the command line, and the recipe or the settings of the run in the work directory; checks no values yet.

    Raises:
        UserError: there is a mistake in any of them.
    """
    program, *words = arguments
    recipe, words = recipes.split_off(words)
    if words and words[0] in MODES:
        words[0] = f"--mode={words[0]}"
    values = flags.FlagValues()
    _define_flags(values)
    try:
        config = recipes.load(recipe or Command.recipe)
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=[program, *words])
        values.set_gnu_getopt(True)  # flags may follow --images *.jpg, which the shell expands to many words
        left_over = values([program, *words])[1:]
    except flags.UnrecognizedFlagError as error:
        known = [flag.name for flag in Command.flags()]
        raise UserError(explain_unknown_flag(error.flagname, known, recipes.defaults())) from error
    except _MISTAKES as error:
        raise UserError(explain_flag_error(error, words, recipes.defaults())) from error
    given: dict[str, Any] = {flag.name: values[flag.name].value for flag in Command.flags()}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if left_over and not given["images"]:
        raise UserError(f"{left_over[0]} is not a flag; {_explain_word(left_over[0], given['mode'])}.")
    given["images"] += tuple(left_over)
    overrides = config_flags.get_override_values(values["config"])
    if given["checkpoint"]:
        overrides["eval.checkpoint"] = config.eval.checkpoint = given["checkpoint"]
    defaults = to_dict(recipes.defaults())
    if not recipe and given["workdir"] and os.path.exists(os.path.join(given["workdir"], "config.json")):
        config = read_run_settings(given["workdir"], overrides, defaults)
    else:
        recipe = recipe or Command.recipe
        given["workdir"] = given["workdir"] or (given["compare"] or (recipes.workdir_of(recipe),))[0]
    return Command(recipe, overrides, defaults, **given), config


def _explain_word(word: str, mode: str) -> str:
    """Returns what a word that belongs to no flag may have been meant as."""
    if mode == "predict":
        return f"images are given as --images {word}"
    if word in recipes.names():
        return f"a recipe is given as --config {word}"
    nearest = difflib.get_close_matches(word, MODES, n=1)
    return f"the nearest mode is {nearest[0]}" if nearest else "settings are given as --config.KEY=VALUE"


def _define_flags(values: flags.FlagValues) -> None:
    for flag in Command.flags():
        default: Any = flag.default
        kind = flag.metadata.get("type", type(default))
        common: Any = {"help": flag.metadata["help"], "flag_values": values}
        if "choices" in flag.metadata:
            flags.DEFINE_enum(flag.name, default, flag.metadata["choices"], **common)
        elif kind in (int, float):
            limits: Any = {f"{end}_bound": flag.metadata.get(end) for end in ("lower", "upper")}
            define_number: Any = flags.DEFINE_integer if kind is int else flags.DEFINE_float
            define_number(flag.name, default, **limits, **common)
        elif kind is tuple:
            flags.DEFINE_multi_string(flag.name, [], **common)
        else:
            define: Any = flags.DEFINE_bool if kind is bool else flags.DEFINE_string
            define(flag.name, default, **common)


# Keys that only tables have, or how they begin.
_OF_TABLES = tuple(f"data.{start}" for start in ("table", "image_column", "label_", "split_", "group_column", "empty"))


def _check_read(command: Command, name: str) -> None:
    """Checks that the data set `name` reads the settings on the command line, which would else be passed over.

    Raises:
        UserError: it does not read one of them.
    """
    for key in command.overrides:
        kinds = ("folder", "table") if key == "data.class_order" else (name,)
        kinds = ("table",) if key.startswith(_OF_TABLES) else kinds
        if name not in kinds:
            raise UserError(
                f"config.{key} is for config.data.name={' or '.join(kinds)}, but that is {name!r}; leave it out, or "
                "choose that data set."
            )


def _check_model(command: Command, config: Any) -> None:
    """Checks that the weights or the run that the mode needs are there.

    Raises:
        UserError: they aren't.
    """
    weights, applies = config.model.pretrained, ("predict", "export", "serve")
    if weights and command.mode in ("train", "eval", *applies) and not started_from(command.workdir, weights):
        from densenet_jax.models.weight_files import check_source

        check_source(weights)
    elif command.mode in applies:
        read_settings(command.workdir)


def check(arguments: list[str]) -> tuple[Command, Any] | None:
    """Reads and checks the command line, which starts with the program's name; returns None where it is refused."""
    try:
        command, config = parse(arguments)
        command.check_mode()
        config = check_config(config)
        get_variant(config.model.name)
        _check_read(command, config.data.name)
        _check_model(command, config)
        return command, config
    except UserError as error:
        _print_mistake(error)
        return None


def run(command: Command, config: Any) -> int:
    """Runs one mode with checked settings and returns the exit status."""
    start_quietly(lambda: importlib.import_module("jax"))
    from densenet_jax import modes
    from densenet_jax.distributed import processes
    from densenet_jax.distributed.cluster import find_cluster
    from densenet_jax.distributed.preemption import Preempted
    from densenet_jax.workdir import to_json

    try:
        cluster = None
        if MODES[command.mode].many_processes:
            cluster = find_cluster(command.coordinator, command.num_processes, command.process_id)
        with processes.join(cluster, stops_together=command.mode == "train"):
            result = modes.run(command.mode, config, command.workdir, command)
    except UserError as error:
        _print_mistake(error)
        return 2
    except (Preempted, KeyboardInterrupt) as stop:
        print_status(str(stop) or "interrupted", everywhere=True)
        return 130
    if processes.is_first():
        try:
            print(to_json(result), flush=True)
        except (OSError, ValueError, AttributeError):  # nobody reads it any more, but the work is done
            drop(sys.stdout)
    return 3 if result.get("refused") else 0


def main(arguments: list[str]) -> int:
    """Runs the command line and returns the exit status."""
    checked = check(arguments)
    return 2 if checked is None else run(*checked)


def _print_mistake(error: UserError) -> None:
    print_status(f"error: {' '.join(str(error).split())}", everywhere=True)
