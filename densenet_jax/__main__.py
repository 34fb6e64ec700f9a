"""The command `densenet-jax`, in a checkout `python main.py`.

    densenet-jax [MODE] --config RECIPE --workdir DIR [--config.KEY=VALUE ...]

Trains, evaluates, predicts, exports and serves. RECIPE is the name of a shipped
recipe or a Python file; without it the settings of the run in DIR are taken.
configs/default.py has every setting with its default. `densenet-jax MODE
--help` explains one mode. Several processes as one run: the same command for
each, with --coordinator HOST:PORT --num_processes N --process_id I where
neither SLURM nor a TPU slice names them (docs/pods.md).

Exit status: 0 done, 2 a user's mistake, 3 done, but some inputs were refused,
130 interrupted.
"""

import os
import sys
from typing import NoReturn

# Set before XLA or TensorBoard load: their notes are not for the user, and XLA also raises its errors as exceptions.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from densenet_jax.flags import MODES, describe, entry
from densenet_jax.version import __version__


def help_or_version(arguments: list[str]) -> str:
    """Returns the text that --help or --version asks for, else "". Loads neither JAX nor data libraries."""
    if "--version" in arguments:
        return f"densenet_jax {__version__}"
    if not {"--help", "-h", "-help"} & set(arguments):
        return ""
    words = [word.removeprefix("--mode=") for word in arguments]
    if mode := next((word for word in words if word in MODES), ""):
        return describe(mode)
    from densenet_jax.config import recipes
    from densenet_jax.models.variants import list_models

    listed = "\n".join(entry(name, text, width=24) for name, text in recipes.summaries().items())
    models = entry("", ", ".join(list_models()), width=0)
    return f"{__doc__}\n{describe()}\n\nrecipes:\n{listed}\n\nmodels (config.model.name):\n{models}"


def open_standard_streams() -> None:
    """Opens those standard streams on /dev/null that the shell has closed (`2>&-`).

    Otherwise the next file opened, a checkpoint's for example, takes a stream's number and what libraries print to it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def print_and_exit(text: str) -> NoReturn:
    """Prints the text of --help; a reader that has had enough (`| head`) is no mistake, a full disk is one."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os._exit(0)
    except OSError as error:
        os.write(2, f"error: standard output can't be written: {error.strerror}\n".encode())
        os._exit(2)  # sys.exit would try again to write what is left
    sys.exit(0)


def main() -> NoReturn:
    """Runs the command line of this process and ends it."""
    open_standard_streams()
    if text := help_or_version(sys.argv[1:]):
        print_and_exit(text)
    try:
        from densenet_jax import cli

        if (checked := cli.check(sys.argv)) is None:
            sys.exit(2)
        from densenet_jax.system.host import keep_freed_memory, restart_without_thread_caches

        if checked[0].mode == "train":
            restart_without_thread_caches()
        keep_freed_memory()
        status = cli.run(*checked)
        from densenet_jax.distributed import processes
    except KeyboardInterrupt:  # while modules are imported; a mode handles it by itself
        os.write(2, b"interrupted\n")
        os._exit(130)
    processes.leave(status)


if __name__ == "__main__":
    main()
