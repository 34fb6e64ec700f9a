"""Images from outside: every kind is read the right way round, and whatever is wrong with one is said in a sentence."""

import io
import os
import socket
import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageOps

from densenet_jax.predict.images import ImageError, ImageLimits, load_image, read_file, shown
from tests.predict.files import BOMBS, encoded, gradient, turned


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF"])
def test_kinds(tmp_path, kind):
    data = encoded(gradient(), kind)
    path = tmp_path / "image.anything"
    path.write_bytes(data)
    want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for source in (data, path, str(path)):
        np.testing.assert_array_equal(load_image(source), want)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpegs_in_other_colors(mode):
    pixels = load_image(encoded(gradient().convert(mode), "JPEG", quality=95))
    want = np.asarray(gradient().convert(mode).convert("RGB"), int)
    assert np.abs(pixels - want).mean() < 4


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "1", "L", "I;16"])
def test_pngs_in_other_colors(mode):
    image = gradient().convert("L").convert("LA") if mode == "LA" else gradient()
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257)
    elif mode != "LA":
        image = image.convert(mode)
    want = np.asarray(gradient().convert("L" if mode in ("L", "LA", "I;16", "1") else "RGB").convert("RGB"), int)
    limit = {"P": 40, "1": 130}.get(mode, 0.01)
    assert np.abs(load_image(encoded(image)) - want).mean() < limit


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for kind in ("GIF", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        np.testing.assert_array_equal(load_image(data)[0, 0], [255, 0, 0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_upright(orientation):
    data = turned(orientation)
    np.testing.assert_array_equal(load_image(data), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))


def test_damaged_exif_is_no_reason_to_refuse():
    data = turned(6).replace(b"MM\x00\x2a", b"MM\xff\xff", 1)
    assert load_image(data).shape == (30, 40, 3)


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (5, 6, 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_arrays(shape, channels):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    loaded = load_image(pixels, channels)
    assert loaded.shape == (5, 6, channels)
    if shape[-1] == channels:
        np.testing.assert_array_equal(loaded, pixels)


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.full((4, 4), 2, np.float32), "its pixels are float32 from 2 to 2; set config.data.pixel_range"),
        (np.zeros((4, 4, 4), np.uint8), "it has 4 channels, config.data.channels is 3"),
        (np.zeros(4, np.uint8), r"its shape is \(4,\)"),
        (np.zeros((0, 4), np.uint8), "4x0 pixels"),
        (np.zeros((20, 20), np.uint8), "20x20 pixels, at most 100"),
    ],
)
def test_wrong_arrays(array, why):
    with pytest.raises(ImageError, match=why):
        load_image(array, limits=ImageLimits(max_pixels=100))


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_nothing(name):
    assert len(BOMBS[name]) < 5000
    tracemalloc.start()
    with pytest.raises(ImageError, match="pixels"):
        load_image(BOMBS[name])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_jpeg_of_endless_scans_is_refused():
    data = encoded(gradient(), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    with pytest.raises(ImageError, match="JPEG scans"):
        load_image(data[:start] + data[start:-2] * 200 + data[-2:])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_truncated_files(kind, share):
    data = encoded(gradient(), kind)
    with pytest.raises(ImageError):
        load_image(data[: int(len(data) * share)])


def test_nothing_is_made_up_for_a_truncated_digit():
    data = encoded(gradient(8, 8).convert("L"))
    whole, read = load_image(data), 0
    for length in range(len(data)):
        try:
            pixels = load_image(data[:length])
        except ImageError:
            continue
        np.testing.assert_array_equal(pixels, whole)  # what is missing comes after the pixels
        read += 1
    assert read < 25


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "it is empty"),
        (b"hello", "it is no JPEG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is no JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is no JPEG"),
        (b"x" * 2001, "it has more than 2,000 bytes"),
    ],
)
def test_other_bytes(data, why):
    with pytest.raises(ImageError, match=f"^the image: {why}") as caught:
        load_image(data, limits=ImageLimits(max_bytes=2000))
    assert "0x" not in str(caught.value)  # an address would make every message another one


def test_wrong_types():
    with pytest.raises(ImageError, match="it is a int, expected a path, bytes"):
        load_image(7)


def test_missing_and_special_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket"))
        for path, why in (
            (tmp_path, "it is a directory"),
            (tmp_path / "pipe", "it is a pipe"),
            (tmp_path / "socket", "it is a socket"),
            ("/dev/zero", "it is a device"),
            (tmp_path / "absent.png", "No such file"),
            (tmp_path / ("long" * 100), "File name too long"),
            ("zero\0byte.png", "null byte"),
        ):
            with pytest.raises(ImageError, match=why):
                read_file(path)


def test_a_file_without_end(tmp_path):
    (tmp_path / "large").write_bytes(b"\0" * 1001)
    with pytest.raises(ImageError, match="more than 1,000 bytes"):
        read_file(tmp_path / "large", ImageLimits(max_bytes=1000))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_rights(tmp_path):
    (tmp_path / "secret.png").touch(0o000)
    with pytest.raises(ImageError, match="Permission denied"):
        read_file(tmp_path / "secret.png")


def test_names_that_a_terminal_would_obey():
    assert shown("a\x1b[2Jb\nc.png") == r"a\x1b[2Jb\nc.png"
    assert shown("\udcff.png") == r"\udcff.png"
    assert shown("猫.jpg") == "猫.jpg"
    assert len(shown("x" * 10_000)) < 600
