"""A copy of the checkout in which the documentation's examples train small networks on few pictures."""

import pathlib
import shutil

from tests.main_processes import ROOT

NOT_COPIED = (".git", ".venv*", ".*_cache", "__pycache__", "*.egg-info", "build", "dist", "runs", ".whl")
# File, what stands there, and what stands there in the copy.
CHANGES = (
    ("configs/digits.py", "config.train.epochs = 40.0\n", "config.train.epochs = 4.0\n"),
    ("configs/digits.py", "config.optim.warmup_epochs = 2.0\n", "config.optim.warmup_epochs = 0.5\n"),
    ("configs/digits.py", "config.eval.every_epochs = 5.0\n", "config.eval.every_epochs = 2.0\n"),
    (
        "configs/digits.py",
        'config.model.name = "densenet_bc_22_12"\n',
        'config.model.name = "densenet_bc_22_12"\n    config.model.block_sizes = (1, 1)\n',
    ),
    ("examples/many_labels/make.py", "(0, 1100, 1500)", "(0, 1100, 300)"),
    ("examples/many_labels/make.py", "(1100, 1437, 600)", "(1100, 1437, 150)"),
    ("examples/many_labels/make.py", "(1437, 1797, 1000)", "(1437, 1797, 150)"),
)


def copy_checkout(directory: pathlib.Path) -> pathlib.Path:
    """Copies the checkout to `directory`, which does not exist yet, makes its examples small and returns it."""
    shutil.copytree(ROOT, directory, ignore=shutil.ignore_patterns(*NOT_COPIED))
    for file, usual, short in CHANGES:
        text = (directory / file).read_text()
        assert usual in text, f"{file} has no {usual!r} to be made small"
        (directory / file).write_text(text.replace(usual, short))
    return directory
