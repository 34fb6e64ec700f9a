"""Writes the files of `tests.inputs.pixels`, their right pixels and right.json: `python -m tests.inputs.make DIR`."""

import json
import pathlib
import sys

import numpy as np

from tests.inputs.pixels import CASES


def write(folder: pathlib.Path) -> int:
    """Writes every file, its right pixels as .right.npy beside it, and right.json; returns how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    right = {}
    for name, case in CASES.items():
        (folder / name).write_bytes(case.data)
        refused = isinstance(case.want, str)
        if not refused:
            np.save(folder / f"{name}.right", case.want)
        right[name] = {
            "channels": case.channels,
            "pixel_range": list(case.pixel_range),
            "becomes": f"refused: {case.want}" if refused else f"{case.want.dtype} in {name}.right.npy",
        }
    (folder / "right.json").write_text(json.dumps(right, indent=1))
    return len(CASES)


if __name__ == "__main__":
    print(f"{write(pathlib.Path(sys.argv[1]))} files; right.json says what each becomes")
