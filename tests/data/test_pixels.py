"""Every kind of file becomes the right pixels, on every path, or is refused in words."""

import re
import struct
import time

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from densenet_jax.data import decode
from densenet_jax.data.decode import decode_image
from densenet_jax.data.headers import exif_orientation, has_wide_pixels, is_image_start
from densenet_jax.data.pixels import join, to_picture, widen
from densenet_jax.data.records import DamagedImage, Record
from densenet_jax.data.resize import resize
from densenet_jax.data.summary import look_at_pixels
from densenet_jax.data.transforms import eval_transform, train_transform
from densenet_jax.predict.annotate import annotate
from densenet_jax.predict.images import DEFAULT_LIMITS, ImageError, check_bytes, load_image
from densenet_jax.predict.predictor import ClassProbability
from tests.inputs import make
from tests.inputs.pixels import CASES, GRAY, TWELVE, WIDE, npy, oriented, pillow, tiff

READ = {name: case for name, case in CASES.items() if not isinstance(case.want, str)}
REFUSED = {name: case for name, case in CASES.items() if isinstance(case.want, str)}


@pytest.mark.parametrize("name", READ)
def test_pixels_are_right(name):
    case = READ[name]
    pixels = decode_image(case.data, case.channels, pixel_range=case.pixel_range, bits=0)
    want = case.want.reshape(*case.want.shape[:2], -1)
    assert pixels.dtype == want.dtype
    assert pixels.shape == want.shape
    assert np.abs(pixels.astype(int) - want).max() <= case.within
    assert is_image_start(case.data[:32])
    assert has_wide_pixels(case.data) == (pixels.dtype == np.uint16) or case.pixel_range


@pytest.mark.parametrize("name", REFUSED)
def test_unreadable_pixels_are_refused(name):
    case = REFUSED[name]
    with pytest.raises(DamagedImage, match=case.want):
        decode_image(case.data, case.channels, pixel_range=case.pixel_range, bits=0)
    with pytest.raises(DamagedImage, match=case.want):
        eval_transform(image_size_px=4, resize_px=4, channels=case.channels, pixel_range=case.pixel_range, bits=16)(
            case.data
        )


@pytest.mark.parametrize("name", [name for name in READ if name.endswith((".png", ".tif", ".bmp", ".webp"))])
def test_opencv_reads_the_same(name):
    """An independent reader, where it reads a file of its own accord as we promise to."""
    case = READ[name]
    own_ways = (
        "palette",
        "animation",
        "turned",
        "alpha",
        "white_is_zero",
        "ranged",
        "inverted",
        "half",
        "six",
        "four",
        "infrared",
        "inks",
        "_as_",
        "planar",
    )
    if any(way in name for way in own_ways):
        pytest.skip("OpenCV has another rule here, or can't read it")
    values = cv2.imdecode(np.frombuffer(case.data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values.ndim == 3:
        values = values[:, :, ::-1]
    if values.dtype.kind == "f":
        values = np.rint(values.astype(np.float64) * 65535)
    pixels = decode_image(case.data, case.channels, bits=0).reshape(values.shape)
    assert np.abs(pixels.astype(int) - values).max() <= case.within


@pytest.mark.parametrize("name", READ)
def test_every_path_gives_the_same(name):
    case = READ[name]
    height, width = case.want.shape[:2]
    upright = exif_orientation(case.data) == 1
    options = {"channels": case.channels, "pixel_range": case.pixel_range, "bits": 16}
    pixels = decode_image(case.data, **options)
    check_bytes(case.data)
    if upright:
        np.testing.assert_array_equal(load_image(case.data, **options), pixels)
    want = resize(pixels, 5, 5, "bilinear", True)
    trained = train_transform(kind="none", image_size_px=5, **options)
    np.testing.assert_array_equal(trained(case.data, np.zeros(0)), want)
    assert trained.dtype == want.dtype == np.uint16
    top = round((height - width) / 2)
    evaluated = eval_transform(image_size_px=width, resize_px=width, **options)(case.data)
    np.testing.assert_array_equal(evaluated, pixels[top : top + width])
    cropped = train_transform(image_size_px=3, **options)(case.data, np.full(40, 0.5))
    assert cropped.dtype == np.uint16
    assert cropped.shape == (3, 3, case.channels)


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_counts_once(kind, orientation):
    stored = np.repeat(GRAY[:, :, None], 3, axis=2)
    data = oriented(stored, orientation, kind)
    exif = Image.Exif()
    exif[0x0112] = orientation
    carrier = Image.fromarray(decode_image(data))  # as stored; of a JPEG what its compression left
    if kind != "JPEG" and kind != "WEBP":
        np.testing.assert_array_equal(np.asarray(carrier), stored)
    carrier.getexif()[0x0112] = orientation
    want = np.asarray(ImageOps.exif_transpose(carrier))
    np.testing.assert_array_equal(decode_image(data, apply_exif_orientation=True), want)
    np.testing.assert_array_equal(load_image(data), want)
    turned = train_transform(kind="none", image_size_px=5, apply_exif_orientation=True)(data, np.zeros(0))
    np.testing.assert_array_equal(turned, resize(want, 5, 5, "bilinear", True))


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("write", [{}, {"byteorder": ">"}, {"bigtiff": True}])
def test_orientation_of_every_kind_of_tiff(orientation, write):
    data = tiff(WIDE, extratags=[(274, "H", 1, orientation, True)], **write)
    assert exif_orientation(data) == orientation
    np.testing.assert_array_equal(decode_image(data, 1, bits=0)[:, :, 0], WIDE)
    turned = decode_image(data, 1, bits=0, apply_exif_orientation=True)[:, :, 0]
    np.testing.assert_array_equal(turned, np.rot90(WIDE, 2 if orientation == 3 else -1))


@pytest.mark.parametrize("pixels", [GRAY, WIDE], ids=["8 bits", "16 bits"])
@pytest.mark.parametrize("write", [{}, {"byteorder": ">"}, {"bigtiff": True}])
@pytest.mark.parametrize("kind", "BHIQh")
def test_orientation_of_another_type_counts_once(kind, write, pixels):
    """Pillow turns a TIFF file whatever the type of its tag is."""
    data = tiff(pixels, extratags=[(274, kind, 1, 6, True)], **write)
    np.testing.assert_array_equal(decode_image(data, 1, bits=0)[:, :, 0], pixels)
    turned = decode_image(data, 1, bits=0, apply_exif_orientation=True)[:, :, 0]
    np.testing.assert_array_equal(turned, pixels if kind == "h" else np.rot90(pixels, -1))


@pytest.mark.parametrize("tag", [0, 1, 3])
def test_orientation_in_xmp_counts_once_where_there_is_no_tag(tag):
    text = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    tags = [(274, "H", 1, tag, True)] if tag else []
    data = tiff(GRAY, extratags=[*tags, (700, "B", len(text), text, True)])
    np.testing.assert_array_equal(decode_image(data, 1)[:, :, 0], GRAY)
    turned = decode_image(data, 1, apply_exif_orientation=True)[:, :, 0]
    np.testing.assert_array_equal(turned, np.rot90(GRAY, {0: -1, 1: 0, 3: 2}[tag]))


def test_12_bit_tiff_is_scaled_by_its_own_white():
    values = TWELVE[:, :4]  # two numbers in three bytes
    pairs = values.reshape(-1, 2).astype(int)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
    data = bytearray(tiff(np.zeros((7, 6), np.uint8)))  # 42 bytes, as many as the packed numbers take
    place = data.rindex(bytes(42))
    data[place : place + 42] = packed.astype(np.uint8).tobytes()
    for tag, value in ((256, 4), (258, 12)):
        entry = data.index(tag.to_bytes(2, "little") + b"\x03\x00" if tag == 258 else tag.to_bytes(2, "little"), 8)
        data[entry + 8 : entry + 10] = value.to_bytes(2, "little")
    pixels = decode_image(bytes(data), 1, bits=0)[:, :, 0]
    assert np.abs(pixels.astype(int) - values.astype(int) * 65535 // 4095).max() <= 1


def test_8_bits_of_16_are_rounded_with_one_warning(caplog, monkeypatch):
    monkeypatch.setattr(decode, "_warned", [])
    for _ in range(2):
        pixels = decode_image(pillow(WIDE, "PNG"), 1, name="xray.png")
    np.testing.assert_array_equal(pixels[:, :, 0], np.rint(WIDE / 257).astype(np.uint8))
    assert [message.split()[0] for message in caplog.messages] == ["xray.png"]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [True, False])
def test_resizing_16_bits_loses_none(interpolation, antialias):
    wide = np.random.default_rng(0).integers(0, 256, (40, 30, 2), np.uint8)
    exact = resize(widen(wide), 16, 12, interpolation, antialias)
    for channel in range(2):
        coarse = resize(wide[:, :, channel : channel + 1], 16, 12, interpolation, antialias)
        assert np.abs(exact[:, :, channel] / 257 - coarse[:, :, 0]).max() <= 1.01
    dark = resize((wide // 16).astype(np.uint16), 16, 12, interpolation, antialias)
    assert len(np.unique(dark)) > 5  # all would be 0 in 8 bits


def test_pixels_of_both_depths_are_joined_as_the_same_brightness():
    joined = join([GRAY, widen(GRAY)])
    np.testing.assert_array_equal(joined[0], joined[1])
    assert join([GRAY, GRAY]).dtype == np.uint8
    assert join([GRAY, widen(GRAY)], np.concatenate).shape == (14, 5)


@pytest.mark.parametrize(("channels", "kept"), [(1, 1), (2, 1), (3, 3), (6, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_pictures_for_people(channels, kept, dtype):
    pixels = np.full((2, 3, channels), 60000 if dtype == np.uint16 else 200, dtype)
    picture = to_picture(pixels)
    assert picture.shape == (2, 3, kept)
    assert picture.max() == (234 if dtype == np.uint16 else 200)


@pytest.mark.parametrize(
    ("array", "want"),
    [
        (GRAY, GRAY), (WIDE, WIDE), (GRAY > 9, (GRAY > 9) * np.uint8(255)),
        ((GRAY / 255).astype(np.float32), widen(GRAY)), (GRAY / 255, widen(GRAY)),
    ],
)  # fmt: skip
def test_arrays(array, want):
    pixels = load_image(array, 1, bits=0)[:, :, 0]
    assert pixels.dtype == want.dtype
    np.testing.assert_array_equal(pixels, want)


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (GRAY.astype(np.int64), "int64 from 0 to 255; set config.data.pixel_range"),
        (GRAY.astype(np.float32), "float32 from 0 to 255"),
        (np.full((3, 3), np.nan), "not finite"),
        (GRAY.astype(complex), "dtype is complex128"),
        (np.zeros((3, 3, 65), np.uint8), r"shape is \(3, 3, 65\)"),
    ],
)
def test_arrays_that_mean_nothing(array, why):
    with pytest.raises(ImageError, match=why):
        load_image(array, 1)


class Files:
    """A source of files."""

    def __init__(self, *files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return Record(self.files[index], 0, str(index))


@pytest.mark.parametrize(
    ("files", "bits", "kinds"),
    [
        ((pillow(GRAY, "PNG"), pillow(GRAY, "JPEG")), 8, []),
        ((pillow(GRAY, "PNG"), pillow(WIDE, "PNG")), 16, []),
        ((pillow(TWELVE, "PNG"), b"damaged"), 16, ["dark"]),
        ((pillow(TWELVE, "PNG"), tiff(WIDE)), 16, []),
        ((oriented(GRAY, 6, "JPEG"), pillow(GRAY, "PNG")), 8, ["turned"]),
        ((tiff((GRAY / 255).astype(np.float32)),), 16, []),
        ((npy(WIDE), npy(WIDE)[:40], b"P5 2 2 1.5\n"), 16, []),
    ],
    ids=["8 bits", "mixed", "12 of 16", "16 among 12", "turned", "float", "npy"],
)
def test_a_look_at_the_data_set(files, bits, kinds):
    actual, warnings = look_at_pixels(Files(*files))
    assert actual == bits
    assert list(warnings) == kinds
    if kinds == ["dark"]:
        assert f"above {TWELVE.max()} of 65535" in warnings["dark"]


@pytest.mark.parametrize("back", [0, 20])
def test_pages_without_end_are_not_counted(back):
    data, count = bytearray(tiff(WIDE)), 100_000
    (start,) = struct.unpack_from("<I", data, 4)
    struct.pack_into("<I", data, start + 2 + 12 * struct.unpack_from("<H", data, start)[0], len(data))
    links = [len(data) + 6 * (page + 1) for page in range(count)]
    links[-1] = 0
    links[150] = links[150 - back]  # a circle that tifffile does not notice
    began = time.perf_counter()
    pixels = decode_image(bytes(data) + b"".join(struct.pack("<HI", 0, link) for link in links), 1, bits=0)
    assert time.perf_counter() - began < 5  # without end on a slow machine, too
    np.testing.assert_array_equal(pixels[:, :, 0], WIDE)


def test_large_pages_are_refused_by_their_sum(tmp_path):
    with tifffile.TiffWriter(tmp_path / "x.tif") as writer:
        for _ in range(6):
            writer.write(np.zeros((8, 8), np.uint16), contiguous=False, metadata=None)
    with tifffile.TiffFile(tmp_path / "x.tif", mode="r+b") as file:
        for page in file.pages[1:]:
            page.tags["ImageWidth"].overwrite(10_000)
            page.tags["ImageLength"].overwrite(10_000)
    with pytest.raises(DamagedImage, match="6 channels of 10000x10000, 8x8 pixels"):
        decode_image((tmp_path / "x.tif").read_bytes(), 6)


def test_an_offset_beyond_all_numbers_is_no_orientation():
    assert exif_orientation(b"II+\0\x08\0\0\0" + b"\xff" * 8) == 1


def test_no_bytes_crash_the_decoder():
    random = np.random.RandomState(0)
    names = ["gray_16_bit.tif", "six_channels.tif", "rgb_16_bit.png", "wide.npy", "six_pages.tif", "rgb_16_bit.ppm"]
    for name in names:
        whole = np.frombuffer(CASES[name].data, np.uint8)
        for _ in range(60):
            changed = whole.copy()
            places = random.randint(2, min(len(whole), 400), random.randint(1, 6))
            changed[places] = random.randint(0, 256, len(places))
            data = changed[: random.randint(8, len(whole) + 1)].tobytes() if random.rand() < 0.3 else changed.tobytes()
            try:
                pixels = decode_image(data, 0, bits=0, apply_exif_orientation=True)
            except DamagedImage:
                continue
            assert pixels.dtype in (np.uint8, np.uint16)


def test_a_tiff_bomb_costs_no_memory():
    data = bytearray(tiff(np.zeros((16, 16, 6), np.uint8), photometric="minisblack", planarconfig="contig"))
    for tag in (256, 257):
        (entry,) = (match.start() for match in re.finditer(tag.to_bytes(2, "little") + b"[\x03\x04]\0\1\0\0\0", data))
        data[entry + 2 : entry + 12] = b"\4\0\1\0\0\0" + (60_000).to_bytes(4, "little")
    with pytest.raises(DamagedImage, match="60000x60000"):
        decode_image(bytes(data), 6)


def test_the_folder_of_inputs_is_written(tmp_path):
    assert make.write(tmp_path) == len(CASES)
    assert (tmp_path / "gray_16_bit.png").read_bytes() == CASES["gray_16_bit.png"].data


@pytest.mark.parametrize("name", ["six_channels.npy", "signed_16_bit_ranged.tif", "gray_16_bit.png", "palette.gif"])
def test_any_image_can_be_annotated(tmp_path, name):
    (tmp_path / name).write_bytes(CASES[name].data)
    answers = [ClassProbability(0, "two\nlines", 0.5)]
    target = tmp_path / "annotated.jpg"
    annotate(str(tmp_path / name), str(target), answers, DEFAULT_LIMITS, pixel_range=CASES[name].pixel_range)
    with Image.open(target) as picture:
        assert picture.width == 320
