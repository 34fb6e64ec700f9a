"""Every file that data sets are known to hold is decoded like Pillow does it, or refused by name."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from skimage import data as photographs

from densenet_jax.data import decode, headers
from densenet_jax.data.decode import decode_image
from densenet_jax.data.records import DamagedImage
from densenet_jax.data.transforms import eval_transform
from densenet_jax.predict.images import check_bytes

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")


def encoded(image, kind="JPEG", **save):
    file = io.BytesIO()
    image.save(file, kind, **save)
    return file.getvalue()


@pytest.fixture(scope="module")
def photograph():
    return Image.fromarray(photographs.chelsea()[:121, :163])


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize(
    "save",
    [
        {"quality": 90},
        {"quality": 95, "subsampling": "4:4:4"},
        {"quality": 75, "subsampling": "4:2:2"},
        {"quality": 90, "progressive": True},
        {"quality": 90, "restart_marker_blocks": 7},
    ],
    ids=["420", "444", "422", "progressive", "restart"],
)
def test_photographs_have_the_pixels_that_pillow_gives(name, save):
    data = encoded(Image.fromarray(getattr(photographs, name)()), **save)
    np.testing.assert_array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("channels", [1, 3])
def test_gray_jpeg(photograph, channels):
    data = encoded(photograph.convert("L"))
    want = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode_image(data, channels), np.repeat(want[:, :, None], channels, 2))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_color_read_as_gray(photograph, kind):
    data = encoded(photograph, kind)
    want = np.asarray(Image.open(io.BytesIO(data)).convert("L"))[:, :, None]
    np.testing.assert_array_equal(decode_image(data, 1), want)


def test_cmyk(photograph):
    data = encoded(photograph.convert("CMYK"))
    want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode_image(data), want)
    assert np.abs(want.astype(int) - np.asarray(photograph)).mean() < 5  # and that is the photograph, not its negative


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_the_first_bytes_decide_not_the_name(photograph, kind):
    data = encoded(photograph, kind)
    pixels = decode_image(data, name="n02105855_2933.JPEG")
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "1", "L"])
@pytest.mark.parametrize("channels", [1, 3])
def test_png_modes(photograph, mode, channels):
    image = photograph.convert("L").convert("LA") if mode == "LA" else photograph.convert(mode)
    pixels = decode_image(encoded(image, "PNG"), channels)
    want = np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(121, 163, channels)
    np.testing.assert_array_equal(pixels, want)


def test_palette_with_transparency(photograph):
    data = encoded(photograph.quantize(16), "PNG", transparency=3)
    assert decode_image(data).shape == (121, 163, 3)


def test_16_bits_are_scaled_not_clipped():
    wide = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = decode_image(encoded(Image.fromarray(wide), "PNG"), 1)
    np.testing.assert_array_equal(pixels[:, :, 0], np.round(wide / 257).astype(np.uint8))


def test_dark_16_bits_stay_dark():
    dark = np.full((8, 8), 200, np.uint16)
    assert decode_image(encoded(Image.fromarray(dark), "PNG"), 1).max() == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(photograph, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photograph, exif=exif)
    want = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(decode_image(data), np.asarray(want))
    turned = decode_image(data, apply_exif_orientation=True)
    np.testing.assert_array_equal(turned, np.asarray(ImageOps.exif_transpose(want)))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.97])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncated_files_are_refused_by_name(photograph, kind, share):
    data = encoded(photograph, kind)
    with pytest.raises(DamagedImage, match=r"train/cat_7\.JPEG") as caught:
        decode_image(data[: int(len(data) * share)], name="train/cat_7.JPEG")
    assert caught.value.name == "train/cat_7.JPEG"


def test_size_is_checked_before_decoding(photograph, monkeypatch):
    monkeypatch.setattr(headers, "MAX_PIXELS", 121 * 163 - 1)
    monkeypatch.setattr(decode.simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("was decoded"))
    for kind in ("JPEG", "PNG"):
        with pytest.raises(DamagedImage, match="163x121"):
            decode_image(encoded(photograph, kind))


def test_a_bomb_costs_no_memory():
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b""))
    )
    with pytest.raises(DamagedImage, match="x"):
        decode_image(data)


def test_no_bytes_crash_the_decoder(photograph):
    random = np.random.RandomState(0)
    for kind in ("JPEG", "PNG"):
        whole = np.frombuffer(encoded(photograph.resize((40, 30)), kind), np.uint8)
        for _ in range(150):
            bytes_ = whole.copy()
            places = random.randint(2, len(bytes_), random.randint(1, 8))
            bytes_[places] = random.randint(0, 256, len(places))
            try:
                pixels = decode_image(bytes_.tobytes(), name="x")
            except DamagedImage:
                continue
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3
            assert pixels.shape[2] == 3


def test_a_small_plain_png_needs_no_pillow(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 1), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels[:, :, 0]), "PNG")
    monkeypatch.setattr(Image, "open", None)
    monkeypatch.setattr(Image, "fromarray", None)
    check_bytes(data)
    transform = eval_transform(image_size_px=8, resize_px=8, channels=1, apply_exif_orientation=True)
    np.testing.assert_array_equal(transform(data), pixels)
