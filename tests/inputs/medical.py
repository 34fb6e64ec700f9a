"""Writes small sets with the layout of ChestX-ray14 and CheXpert: python -m tests.inputs.medical DIR."""

import os
import sys

import numpy as np
from PIL import Image

from configs.chexpert import OBSERVATIONS

FINDINGS = (
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia"),
    *("Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax"),
)
_XRAY14_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)


def _write_image(path: str, number: int) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    pixels = np.random.RandomState(number).randint(0, 255, (20, 16)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def write_chest_xray14(directory: str, patients: int = 12) -> None:
    """Writes Data_Entry_2017.csv, both lists and images/ with two images a patient."""
    rows, names = [], []
    for number in range(2 * patients):
        name = f"{number // 2 + 1:08d}_{number % 2:03d}.png"
        findings = [FINDINGS[number % 14], FINDINGS[(number + 5) % 14]] if number % 4 else ["No Finding"]
        rows.append(f"{name},{'|'.join(findings)},{number % 2:03d},{number // 2 + 1},058Y,M,PA,2682,2749,0.143,0.143,")
        names.append(name)
        _write_image(os.path.join(directory, "images", name), number)
    for file, lines in (
        ("Data_Entry_2017.csv", [_XRAY14_HEADER, *rows]),
        ("train_val_list.txt", names[:-4]),
        ("test_list.txt", names[-4:]),
    ):
        with open(os.path.join(directory, file), "w", encoding="utf-8") as stream:
            stream.write("\n".join(lines))


def write_chexpert(directory: str, train: int = 16, valid: int = 4) -> None:
    """Writes CheXpert-v1.0-small/ with train.csv, valid.csv and an image a patient."""
    values = ("", "1.0", "0.0", "-1.0")
    for split, count in (("train", train), ("valid", valid)):
        rows = [f"Path,Sex,Age,Frontal/Lateral,AP/PA,{','.join(OBSERVATIONS)}"]
        for number in range(count):
            path = f"CheXpert-v1.0-small/{split}/patient{number:05d}/study1/view1_frontal.jpg"
            labels = [values[(number * (place + 1)) % 4] for place in range(14)]
            rows.append(f"{path},Female,68,Frontal,AP,{','.join(labels)}")
            _write_image(os.path.join(directory, path), number)
        with open(os.path.join(directory, "CheXpert-v1.0-small", f"{split}.csv"), "w", encoding="utf-8") as stream:
            stream.write("\n".join(rows) + "\n")


if __name__ == "__main__":
    write_chest_xray14(os.path.join(sys.argv[1], "NIH"))
    write_chexpert(sys.argv[1])
