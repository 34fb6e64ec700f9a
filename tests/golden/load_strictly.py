"""Loads files that save_torch_state_dict wrote into timm and torchvision, strictly, and compares the logits.

    python tests/golden/load_strictly.py FOLDER

FOLDER holds NAME.safetensors files with the golden weights. Needs torch and timm, as make_golden.py does.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from drawn import draw_images
from references import timm, torchvision
from safetensors.torch import load_file

HERE = Path(__file__).parent
SIDE_PX = 65
TORCHVISION = ("densenet121", "densenet161", "densenet169", "densenet201")


def check(model, path):
    model.load_state_dict(load_file(path), strict=True)
    images = torch.from_numpy(draw_images(2, SIDE_PX)).double()
    with torch.no_grad():
        logits = model.double().eval()(images).numpy()
    with np.load(HERE / f"{path.stem}.npz") as golden:
        expected = golden[f"{SIDE_PX}/logits"]
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    assert error < 1e-12, (path, error)


def main():
    for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
        check(timm.create_model(path.stem), path)
        if path.stem in TORCHVISION:
            check(torchvision.models.get_model(path.stem, weights=None), path)
        print(path.stem, flush=True)


if __name__ == "__main__":
    main()
