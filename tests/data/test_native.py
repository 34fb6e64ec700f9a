"""Training and evaluation get the same pixels with and without the compiled helper. Skipped where it can not be had."""

import ctypes
import io
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs

from densenet_jax.data import resize
from densenet_jax.data.crop_boxes import random_crop_box
from densenet_jax.data.native import build, crop
from densenet_jax.data.records import DamagedImage
from densenet_jax.data.sampler import Draws
from densenet_jax.data.transforms import eval_transform, train_transform

KINDS = {
    "420": {},
    "444": {"subsampling": "4:4:4"},
    "422": {"subsampling": "4:2:2"},
    "progressive": {"progressive": True},
    "progressive_422": {"progressive": True, "subsampling": "4:2:2"},
    "restart": {"restart_marker_blocks": 5},
    "optimized_low_quality": {"optimize": True, "quality": 20},
}


@pytest.fixture(scope="module")
def helper(tmp_path_factory):
    """The helper, compiled for this test from the sources as they are."""
    patch = pytest.MonkeyPatch()
    path = tmp_path_factory.mktemp("native") / "crop_decode.so"
    patch.setattr(build, "library_paths", lambda: [path])
    patch.setattr(crop, "library_paths", lambda: [path])
    patch.delenv("DENSENET_JAX_NATIVE", raising=False)
    crop._library.cache_clear()
    try:
        build.build()
    except RuntimeError as error:
        patch.undo()
        pytest.skip(f"the helper can't be compiled here: {error}")
    assert crop.available()
    yield crop
    patch.undo()
    crop._library.cache_clear()


@pytest.fixture
def without(monkeypatch):
    """Runs a function as if there were no helper, and Pillow alone to resize."""

    def run(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(crop, "available", lambda: False)
            patch.setattr(resize, "_simd", None)
            return function(*arguments)

    return run


def encoded(pixels, **save):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **{"quality": 92} | save)
    return file.getvalue()


def used(helper, monkeypatch):
    """Counts how often the helper gave pixels."""
    calls = []
    inner = helper.decode_part

    def decode_part(*arguments, **keywords):
        result = inner(*arguments, **keywords)
        calls.append(result is not None)
        return result

    monkeypatch.setattr(helper, "decode_part", decode_part)
    return calls


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["astronaut", "chelsea", "brick"])
def test_training_crops_are_the_same(helper, without, monkeypatch, name, kind):
    data = encoded(getattr(photographs, name)(), **KINDS[kind])
    calls = used(helper, monkeypatch)
    for interpolation in ("bilinear", "bicubic"):
        for antialias in (True, False):
            transform = train_transform(image_size_px=120, interpolation=interpolation, antialias=antialias)
            for draws in Draws(5, transform.draws).stretch(0, 6):
                np.testing.assert_array_equal(transform(data, draws), without(transform, data, draws))
    assert len(calls) == 24
    assert all(calls)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["astronaut", "chelsea", "brick"])
def test_evaluation_is_the_same(helper, without, monkeypatch, name, kind):
    data = encoded(getattr(photographs, name)(), **KINDS[kind])
    calls = used(helper, monkeypatch)
    for interpolation in ("bilinear", "bicubic"):
        for resize_px, crop_px in ((256, 224), (64, 64), (330, 299)):
            transform = eval_transform(image_size_px=crop_px, resize_px=resize_px, interpolation=interpolation)
            np.testing.assert_array_equal(transform(data), without(transform, data))
    assert all(calls)


def test_every_part_has_the_pixels_of_the_whole(helper):
    random = np.random.RandomState(0)
    for save in KINDS.values():
        pixels = photographs.coffee()[: random.randint(20, 200), : random.randint(20, 200)]
        data = encoded(pixels, **save)
        whole = np.asarray(Image.open(io.BytesIO(data)))
        height, width = whole.shape[:2]
        for _ in range(60):
            top, left = random.randint(height), random.randint(width)
            rows, columns = random.randint(1, height - top + 1), random.randint(1, width - left + 1)
            for rgbx in (True, False):
                part = helper.decode_part(data, left, top, columns, rows, rgbx=rgbx)
                np.testing.assert_array_equal(part[..., :3], whole[top : top + rows, left : left + columns])


def test_tall_and_tiny_and_enlarged_crops(helper, without):
    for shape in ((400, 30), (30, 400), (5, 5), (1, 1), (17, 3), (300, 299)):
        data = encoded(np.random.RandomState(0).randint(0, 256, (*shape, 3), np.uint8))
        for interpolation in ("bilinear", "bicubic"):
            for size in (7, 64, 224):
                transform = train_transform(image_size_px=size, interpolation=interpolation)
                for draws in Draws(1, transform.draws).stretch(0, 4):
                    np.testing.assert_array_equal(transform(data, draws), without(transform, data, draws))


def test_unknown_kinds_of_files_are_left_to_other_decoders(helper, without, monkeypatch):
    monkeypatch.setattr(resize, "_simd", None)
    calls = used(helper, monkeypatch)
    chelsea = Image.fromarray(photographs.chelsea())
    cmyk = io.BytesIO()
    chelsea.convert("CMYK").save(cmyk, "JPEG")
    png = io.BytesIO()
    chelsea.save(png, "PNG")
    transform = train_transform(image_size_px=50)
    draws = Draws(0, transform.draws).stretch(0, 1)[0]
    for data in (cmyk.getvalue(), png.getvalue()):
        np.testing.assert_array_equal(transform(data, draws), without(transform, data, draws))
    assert calls == [False]
    assert helper.decode_part(encoded(photographs.chelsea()), 400, 0, 100, 10) is None  # outside
    assert helper.decode_part(b"", 0, 0, 1, 1) is None


def test_truncated_files_are_refused(helper):
    data = encoded(photographs.chelsea())
    transform = eval_transform(image_size_px=64, resize_px=64)
    for share in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(DamagedImage, match="cat"):
            transform(data[: int(len(data) * share)], name="cat")


def test_no_bytes_crash_it(helper):
    """Mutated files in a process of its own: a crash of the helper would end it."""
    code = """
import io, sys
import numpy as np
from PIL import Image
from skimage import data as photographs
from densenet_jax.data.records import DamagedImage
from densenet_jax.data.native import crop
from densenet_jax.data.sampler import Draws
from densenet_jax.data.transforms import eval_transform, train_transform
import pathlib
crop.library_paths = lambda: [pathlib.Path(sys.argv[1])]
assert crop.available()
random = np.random.RandomState(int(sys.argv[2]))
refused = 0
for round in range(int(sys.argv[3])):
    file = io.BytesIO()
    subsampling = ["4:2:0", "4:2:2", "4:4:4"][round % 3]
    options = {"progressive": round % 2 == 0, "restart_marker_blocks": round % 5}
    Image.fromarray(photographs.chelsea()[:90, :120]).save(file, "JPEG", subsampling=subsampling, **options)
    data = np.frombuffer(file.getvalue(), np.uint8).copy()
    end = 700 if round % 4 else len(data)  # mostly the headers, where sizes and tables are
    places = random.randint(2, end, random.randint(1, 6))
    data[places] = random.randint(0, 256, len(places))
    data = data.tobytes()[: len(data) if round % 3 else random.randint(100, len(data))]
    for transform in (train_transform(image_size_px=40), eval_transform(image_size_px=40, resize_px=48)):
        try:
            pixels = transform(data, Draws(0, 40).stretch(round, 1)[0])
            assert pixels.shape == (40, 40, 3)
        except DamagedImage:
            refused += 1
    for _ in range(4):  # also where the header's size is not believed
        crop.decode_part(data, *random.randint(0, 90, 2).tolist(), *random.randint(1, 60, 2).tolist())
print("refused", refused)
"""
    rounds = os.environ.get("FUZZ_ROUNDS", "150")
    result = subprocess.run(
        [sys.executable, "-c", code, str(build.library_paths()[0]), os.environ.get("FUZZ_SEED", "0"), rounds],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, f"{result.returncode}: {result.stderr[-2000:]}"
    assert int(result.stdout.split()[1]) > 10


def test_building_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "library_paths", lambda: [tmp_path / "lib" / "crop_decode.so"])
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match="no compiler for C"):
        build.build()
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/false")
    with pytest.raises(RuntimeError, match=r"/bin/false .* failed"):
        build.build()
    assert list(tmp_path.joinpath("lib").iterdir()) == []


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("DENSENET_JAX_NATIVE", "0")
    crop._library.cache_clear()
    try:
        assert not crop.available()
    finally:
        crop._library.cache_clear()


def test_the_passes_come_in_pillows_order(helper, monkeypatch):
    for height, width in ((400, 200), (400, 320), (100, 90), (64, 300)):
        pixels = np.random.RandomState(0).randint(0, 256, (height, width, 3), np.uint8)
        want = np.asarray(Image.fromarray(pixels).resize((96, 96), Image.Resampling.BICUBIC))
        padded = np.concatenate([pixels, np.zeros((height, width, 1), np.uint8)], 2)
        box = (0.0, 0.0, float(width), float(height))
        np.testing.assert_array_equal(helper.resize(padded, 96, box, cubic=True), want)
    with monkeypatch.context() as patch:
        patch.setattr(helper, "vertical_first", lambda *_: True)
        assert (helper.resize(padded, 96, box, cubic=True) != want).any()


def test_less_than_the_box_looks_at_is_refused(helper):
    pixels = np.zeros((20, 30, 4), np.uint8)
    box = (10.0, 10.0, 40.0, 30.0)
    helper.resize(pixels, 8, (0.0, 0.0, 30.0, 20.0), cubic=False)
    for corner in ((0, 0), (10, 0), (12, 12)):
        with pytest.raises(ValueError, match="30x20 pixels"):
            helper.resize(pixels, 8, box, cubic=False, whole=(100, 100), corner=corner)


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((20, 30, 4), np.float32), np.zeros((20, 30, 3), np.uint8), np.zeros((20, 60, 4), np.uint8)[:, ::2]],
)
def test_pixels_that_the_helper_would_misread_are_refused(helper, pixels):
    with pytest.raises(ValueError, match=r"expected uint8\[height, width, 4\]"):
        helper.resize(pixels, 8, (0.0, 0.0, 30.0, 20.0), cubic=False)


def test_the_helper_itself_refuses_parts_and_taps_that_do_not_fit(helper):
    library, data = helper._library(), encoded(photographs.chelsea())
    lines = np.zeros((300, 700, 3), np.uint8)
    for part in ((-1, 0, 9, 9), (0, -1, 9, 9), (0, 0, 0, 9), (0, 0, 9, 0), (2**31 - 1, 0, 2**31 - 1, 9)):
        numbers = (ctypes.c_int * 4)(*part)
        assert library.decode_part(data, len(data), numbers, False, lines.strides[0], lines.ctypes.data) == -1
    for first, count in ((-1, 2), (3, 2), (0, 0)):
        taps = helper._Taps(np.array([first], np.int32), np.array([count], np.int32))
        taps.size = 2
        arguments = (lines.ctypes.data, 16, 4, 16, taps, lines[9:].ctypes.data)
        assert library.down(*arguments) == 0
        assert library.across(*(*arguments[:3], 4, *arguments[4:]), lines[99:].ctypes.data) == 0


def test_the_box_of_a_crop_is_the_same_with_and_without(helper, without):
    data = encoded(photographs.coffee())
    transform = train_transform(image_size_px=32, area_range=(0.05, 0.1))
    draws = Draws(2, transform.draws).stretch(9, 1)[0]
    box = random_crop_box(400, 600, (0.05, 0.1), (3 / 4, 4 / 3), draws)
    assert box[2] * box[3] < 0.11 * 400 * 600
    np.testing.assert_array_equal(transform(data, draws), without(transform, data, draws))
