"""A small set of images with several labels in a table, and a run on it."""

import pathlib

import numpy as np
from PIL import Image

LABELS = ("bright", "left", "rare")


def write_label_set(folder: pathlib.Path, examples: int = 40) -> str:
    """Writes gray 8 px images and a table of their labels; returns the table's path.

    "bright" and "left" can be seen, some of "left" are unknown, and "rare" is never 1. Two images are of one patient;
    the last ten images are the split "validation".
    """
    generator = np.random.default_rng(0)
    lines = [f"path,patient,part,{','.join(LABELS)}"]
    (folder / "images").mkdir(parents=True)
    for number in range(examples):
        bright, left = generator.integers(0, 2, 2)
        pixels = generator.integers(0, 60, (8, 8)) + 100 * bright
        pixels[:, : 4 if left else 0] += 60
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{number}.png")
        part = "train" if number < examples - 10 else "validation"
        lines.append(f"images/{number}.png,{number // 2},{part},{bright},{'' if number % 7 == 0 else left},0")
    table = folder / "table.csv"
    table.write_text("\n".join(lines) + "\n")
    return str(table)


def label_settings(table: str, **changes: object) -> dict[str, object]:
    """Returns the settings of a small network on such a set, by "section.key"; `changes` are section__key."""
    settings: dict[str, object] = {
        "model.name": "densenet_bc_22_12",
        "model.block_sizes": (1,),
        "model.growth_rate": 4,
        "data.name": "table",
        "data.table": table,
        "data.dir": str(pathlib.Path(table).parent),
        "data.label_columns": LABELS,
        "data.split_column": "part",
        "data.group_column": "patient",
        "data.labels": "multi",
        "data.image_size_px": 8,
        "data.channels": 1,
        "data.mean": (0.5,),
        "data.std": (0.25,),
        "data.crop": "none",
        "augment.flip": False,
        "eval.crop_fraction": 1.0,
        "eval.batch_size": 8,
        "train.global_batch_size": 16,
        "train.epochs": 4.0,
        "eval.every_epochs": 2.0,
        "optim.schedule": "constant",
        "optim.learning_rate": 0.05,
    }
    return settings | {key.replace("__", "."): value for key, value in changes.items()}


def label_flags(table: str, **changes: object) -> list[str]:
    """Returns the same as flags of the command line."""
    settings = label_settings(table, **changes)
    return ["--config=configs/default.py", *(f"--config.{key}={value}" for key, value in settings.items())]
