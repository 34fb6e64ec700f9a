"""Thousands of damaged images: each is read or refused with a reason, none crashes, hangs or leaves memory behind.

A mutation is a function of its number, so that a failure can be repeated: `mutated(number)`.
"""

import pathlib
import random

import numpy as np
import pytest
from PIL import Image

from densenet_jax.predict.batch import PredictOptions, predict
from densenet_jax.predict.images import ImageError, ImageLimits
from densenet_jax.predict.predictor import Predictor
from tests.main_processes import run_python
from tests.predict.files import BOMBS, encoded, gradient, turned
from tests.tiny_model import tiny_model

LIMITS = ImageLimits(max_bytes=10**6, max_pixels=10**6)
_TRICKS = (
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xff\xd8",
    b"\xff\xda",
    b"\xff\xc2",
    b"\xff\xc4",
    b"IDAT",
    b"acTL",
    b"Exif",
)


def seeds() -> list[bytes]:
    """Good files of every kind."""
    small = gradient(37, 23)
    wide = Image.fromarray(np.asarray(small.convert("L"), np.uint16) * 257)
    return [
        encoded(small, "JPEG"),
        encoded(small, "JPEG", progressive=True),
        encoded(small.convert("L"), "JPEG"),
        encoded(small.convert("CMYK"), "JPEG"),
        turned(6, width=37, height=23),
        encoded(small, "PNG"),
        encoded(small.convert("P"), "PNG", transparency=3),
        encoded(small.convert("RGBA"), "PNG"),
        encoded(wide, "PNG"),
        encoded(small.convert("L").resize((8, 8)), "PNG"),
        encoded(small, "WEBP"),
        encoded(small.convert("RGBA"), "WEBP", lossless=True),
        encoded(small, "WEBP", save_all=True, append_images=[small.rotate(90)]),
        encoded(small, "GIF", save_all=True, append_images=[small.rotate(90)]),
        encoded(small, "BMP"),
        encoded(small, "PPM"),
        encoded(small, "TIFF"),
        encoded(small, "TIFF", compression="tiff_lzw"),
        *BOMBS.values(),
    ]


SEEDS = seeds()


def mutated(number: int) -> bytes:
    """The mutation of that number."""
    draw = random.Random(number)
    data = bytearray(SEEDS[number % len(SEEDS)])
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        place = draw.randrange(min(len(data), draw.choice((64, 400, 10**9))) or 1)
        match draw.randrange(6):
            case 0:
                data[place : place + 1] = bytes([draw.randrange(256)])
            case 1:
                data[place : place + 4] = draw.choice((0, 1, 2**16, 2**31 - 1, 2**32 - 1)).to_bytes(4, "big")
            case 2:
                trick = draw.choice(_TRICKS)
                data[place : place + len(trick)] = trick
            case 3:
                del data[place : place + draw.randrange(1, 200)]
            case 4:
                data[place:place] = data[draw.randrange(len(data) or 1) :][: draw.randrange(1, 500)]
            case _:
                del data[place:]
    return bytes(data)


def read(predictor: Predictor, number: int) -> bool:
    """Whether the mutation is an image; whatever else than an image or a reason comes out is an error."""
    try:
        pixels = predictor.preprocess(mutated(number), name=f"mutation {number}")
    except ImageError as error:
        refusal = error
    else:
        assert (pixels.shape, pixels.dtype) == (predictor.image_shape, np.uint8), number
        return True
    assert str(refusal) == f"mutation {number}: {refusal.why}"
    assert refusal.why, number
    assert refusal.why.isprintable(), number
    return False


@pytest.fixture(scope="module")
def predictor():
    return Predictor(tiny_model(side_px=16), limits=LIMITS)


@pytest.mark.filterwarnings("ignore")  # of Pillow, about odd files
def test_mutated_images(predictor):
    readable = sum(read(predictor, number) for number in range(1000))
    assert 100 < readable < 900  # the mutations are neither harmless nor hopeless


FUZZ = """
import faulthandler, sys, warnings
from tests.predict.test_fuzz import LIMITS, Predictor, read, tiny_model

faulthandler.dump_traceback_later(300, exit=True)
warnings.simplefilter("ignore")
predictor = Predictor(tiny_model(side_px=16), limits=LIMITS)

def resident_bytes():
    status = open("/proc/self/status").read().split()
    return 1024 * int(status[status.index("VmRSS:") + 1])

sizes = []
for start in range(0, 20_000, 4_000):
    readable = sum(read(predictor, number) for number in range(start, start + 4_000))
    assert 400 < readable < 3_600, readable
    sizes.append(resident_bytes())
print(*sizes)
"""


@pytest.mark.slow
def test_memory_stays_the_same_over_20000_mutations():
    """In a process of its own: a decoder's crash would take this one along, and a hang is ended after five minutes."""
    done = run_python("-c", FUZZ, timeout_secs=400)
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = [int(word) for word in done.stdout.split()]
    assert len(sizes) == 5
    assert sizes[-1] < sizes[0] + 20 * 2**20, sizes


def test_mutations_can_be_repeated():
    assert [mutated(number) for number in range(40)] == [mutated(number) for number in range(40)]
    assert len({mutated(number) for number in range(400)}) > 350


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_mutations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("mutations").mkdir()
    for number in range(120):
        pathlib.Path("mutations", f"{number:04d}.jpg").write_bytes(mutated(number))
    figures = predict(tiny_model, PredictOptions(("mutations",), "out.jsonl", features="pooled", annotate="drawn"))
    assert figures["images"] + figures["refused"] == 120
    assert min(figures["images"], figures["refused"]) > 10
    assert len(np.load("out.npz")["image"]) == figures["images"]
