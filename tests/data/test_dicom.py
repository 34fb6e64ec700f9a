"""DICOM: the test files that ship inside pydicom, against its own tables and windows; and hostile ones."""

import io
import os
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest

from densenet_jax.data import dicom
from densenet_jax.data.decode import decode_image
from densenet_jax.data.headers import has_wide_pixels, image_size, is_image_start
from densenet_jax.data.records import DamagedImage
from densenet_jax.data.settings import TableSettings
from densenet_jax.data.sources import open_source
from densenet_jax.data.summary import look_at_pixels
from densenet_jax.data.transforms import eval_transform
from densenet_jax.predict.images import ImageError, check_bytes, load_image
from tests.extras import needs

DEFLATED = "1.2.840.10008.1.2.1.99"


def read(name):
    import pydicom

    folder = os.path.join(os.path.dirname(pydicom.__file__), "data", "test_files")
    with open(os.path.join(folder, name), "rb") as file:
        return file.read()


def change(data, **values):
    """Writes the file with other values of its elements; None removes one."""
    import pydicom

    dataset = pydicom.dcmread(io.BytesIO(data))
    for key, value in values.items():
        if value is None:
            del dataset[key]
        else:
            setattr(dataset, key, value)
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        dataset.save_as(file)
    return file.getvalue()


def by_pydicom(data, prefer_lut=True):
    """Rescaled and windowed by pydicom's own functions: shares of the output's range, and the data set."""
    import pydicom
    from pydicom.pixels import apply_modality_lut, apply_windowing

    dataset = pydicom.dcmread(io.BytesIO(data))
    values = apply_windowing(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    return values, dataset


@needs("pydicom")
@pytest.mark.parametrize(
    "name",
    [f"MR_small{kind}.dcm" for kind in ("", "_RLE", "_bigendian", "_implicit", "_jp2klossless")],
)
def test_a_window_makes_black_and_white(name):
    data = read(name)
    pixels = decode_image(data, 1, bits=0)
    values, _ = by_pydicom(data)
    shares = (values + 2.0**15) / (2.0**16 - 1)  # pydicom's output has the range of the stored numbers
    assert (pixels.shape, pixels.dtype) == ((64, 64, 1), np.uint16)
    np.testing.assert_allclose(pixels[:, :, 0], 65535 * shares, atol=0.51)
    assert 0 < pixels.mean() < 65535
    assert has_wide_pixels(data)
    assert is_image_start(data[:132])
    assert image_size(data) == (64, 64)


@needs("pydicom")
def test_functions_of_windows():
    data = read("examples_overlay.dcm")
    for function in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        changed = change(data, VOILUTFunction=function, WindowCenter=[450, 300], WindowWidth=[700, 100])
        values, dataset = by_pydicom(changed)
        pixels = decode_image(changed, 1, bits=16)[:, :, 0]
        np.testing.assert_allclose(pixels / 65535, values / (2.0**dataset.BitsStored - 1), atol=2e-5)


@needs("pydicom")
def test_stored_numbers_are_rescaled_and_ranges_are_of_the_result():
    data = read("CT_small.dcm")  # signed, intercept -1024, no window
    with pytest.raises(DamagedImage, match=r"from -896 to 1167; set config.data.pixel_range"):
        decode_image(data, 1)
    values, _ = by_pydicom(data)
    pixels = decode_image(data, 1, pixel_range=(-1000, 1000), bits=16)[:, :, 0]
    np.testing.assert_allclose(pixels, np.clip((values + 1000) / 2000, 0, 1) * 65535, atol=0.51)


@needs("pydicom")
def test_a_lookup_table_comes_before_a_window():
    import pydicom
    from pydicom.dataset import Dataset

    data, table = read("examples_overlay.dcm"), Dataset()
    table.LUTDescriptor, table.LUTData = [4, 100, 8], b"\x00\x00\x28\x00\x50\x00\xff\x00"
    dataset = pydicom.dcmread(io.BytesIO(data))
    dataset.VOILUTSequence = [table]
    file = io.BytesIO()
    dataset.save_as(file)
    pixels = decode_image(file.getvalue(), 1, bits=16)[:, :, 0]
    expected = np.array([0, 40, 80, 255])[np.clip(dataset.pixel_array.astype(int) - 100, 0, 3)]
    np.testing.assert_array_equal(pixels, expected * 257)


@needs("pydicom")
def test_monochrome1_is_inverted_with_and_without_a_range():
    for data, pixel_range in ((read("MR_small.dcm"), ()), (read("CT_small.dcm"), (-1000, 1000))):
        inverted = change(data, PhotometricInterpretation="MONOCHROME1")
        plain, other = (decode_image(each, 1, pixel_range=pixel_range, bits=16) for each in (data, inverted))
        np.testing.assert_allclose(plain.astype(int) + other, 65535, atol=1)


@needs("pydicom")
@pytest.mark.parametrize(
    ("name", "channels", "shape", "dtype"),
    [
        ("examples_rgb_color.dcm", 3, (240, 320, 3), np.uint8),
        ("SC_rgb_dcmtk_+eb+cy+np.dcm", 3, (100, 100, 3), np.uint8),
        ("SC_ybr_full_422_uncompressed.dcm", 3, (100, 100, 3), np.uint8),
        ("SC_rgb_rle_16bit.dcm", 3, (100, 100, 3), np.uint16),
        ("SC_rgb_gdcm_KY.dcm", 3, (100, 100, 3), np.uint8),
        ("examples_palette.dcm", 3, (350, 800, 3), np.uint16),
        ("examples_rgb_color.dcm", 1, (240, 320, 1), np.uint8),
        ("image_dfl.dcm", 1, (512, 512, 1), np.uint8),
        ("liver_1frame.dcm", 1, (512, 512, 1), np.uint16),
        ("rtdose_1frame.dcm", 1, (10, 10, 1), np.uint16),
        ("JPEG2000.dcm", 3, (1024, 256, 3), np.uint16),
    ],
)
def test_kinds_of_pixels(name, channels, shape, dtype):
    data = read(name)
    pixel_range = (-2000, 2000) if name == "JPEG2000.dcm" else ()
    pixels = decode_image(data, channels, bits=0, pixel_range=pixel_range)
    assert (pixels.shape, pixels.dtype) == (shape, dtype)
    assert pixels.min() < pixels.max()


@needs("pydicom")
def test_color_is_what_pydicom_gives():
    import pydicom

    data = read("SC_rgb_dcmtk_+eb+cy+np.dcm")
    np.testing.assert_array_equal(decode_image(data, 3), pydicom.dcmread(io.BytesIO(data)).pixel_array)
    # Deflated 8-bit gray is stored as it is shown.
    data = read("image_dfl.dcm")
    np.testing.assert_array_equal(decode_image(data, 1)[:, :, 0], pydicom.dcmread(io.BytesIO(data)).pixel_array)


@needs("pydicom")
def test_a_frame_is_chosen_or_several_are_refused():
    import pydicom

    data = read("SC_rgb_rle_2frame.dcm")
    with pytest.raises(DamagedImage, match=r"it has 2 frames; choose one from 1 on by config.data.dicom_frame"):
        decode_image(data, 3)
    frames = pydicom.dcmread(io.BytesIO(data)).pixel_array
    for frame in (1, 2):
        np.testing.assert_array_equal(decode_image(data, 3, dicom_frame=frame), frames[frame - 1])
        np.testing.assert_array_equal(load_image(data, 3, dicom_frame=frame), frames[frame - 1])
    with pytest.raises(DamagedImage, match=r"it has 2 frames; config.data.dicom_frame is 3"):
        decode_image(data, 3, dicom_frame=3)
    single = read("examples_rgb_color.dcm")
    np.testing.assert_array_equal(decode_image(single, 3, dicom_frame=2), decode_image(single, 3))
    transform = eval_transform(image_size_px=100, resize_px=100, dicom_frame=2)
    np.testing.assert_array_equal(transform(data), frames[1])


@needs("pydicom")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: read("MR_small.dcm")[:5000], "."),
        (lambda: read("MR_truncated.dcm"), "."),
        (lambda: read("MR_small.dcm")[:140], "."),
        (lambda: b"\0" * 128 + b"DICM", "."),
        (lambda: b"\0" * 128 + b"DICM" + bytes(range(256)) * 40, "."),
        (lambda: change(read("MR_small.dcm"), Rows=60000, Columns=60000), "it claims 60000x60000 pixels"),
        (lambda: change(read("MR_small.dcm"), Rows=8000, Columns=8000), "."),
        (lambda: change(read("MR_small.dcm"), Rows=0), "without an image"),
        (lambda: change(read("MR_small.dcm"), WindowWidth=0), "its window has the width 0"),
        (lambda: change(read("MR_small.dcm"), PixelData=None), "."),
        (lambda: change(read("SC_rgb_rle_2frame.dcm"), NumberOfFrames=2**31 - 1), "it has 2147483647 frames"),
        (lambda: read("SC_rgb_jpeg_gdcm.dcm"), "no decoder; `pip install pylibjpeg pylibjpeg-libjpeg` reads it"),
        (lambda: read("JPEGLSNearLossless_08.dcm"), "compressed as JPEG-LS .* no decoder; `pip install pyjpegls`"),
        (lambda: read("nested_priv_SQ.dcm"), "without an image"),
    ],
)  # fmt: skip
def test_damaged_and_hostile_files_in_one_line(make, message):
    data = make()
    assert has_wide_pixels(data) in (False, True)
    for decode in (lambda: decode_image(data, 1), lambda: load_image(data, 1)):
        with pytest.raises((DamagedImage, ImageError), match=message) as error:
            decode()
        assert "\n" not in str(error.value)


@needs("pydicom")
def test_a_deflated_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(dicom, "_MAX_INFLATED_BYTES", 2**22)
    syntax = DEFLATED.encode() + b"\0"
    meta = b"\2\0\x10\0UI" + struct.pack("<H", len(syntax)) + syntax
    deflate = zlib.compressobj(9, wbits=-15)
    bomb = b"\0" * 128 + b"DICM" + meta + deflate.compress(b"\0" * 2**24) + deflate.flush()
    assert len(bomb) < 2**16
    with pytest.raises(DamagedImage, match="deflated and too large"):
        decode_image(bomb, 1)
    with pytest.raises(ImageError, match="deflated and too large"):
        check_bytes(bomb)


@needs("pydicom")
def test_folders_and_tables_take_dicom(tmp_path):
    for number, name in enumerate(("MR_small.dcm", "MR_small_RLE.dcm")):
        place = tmp_path / "train" / f"class_{number}" / f"{number}{'' if number else '.dcm'}"
        place.parent.mkdir(parents=True)
        place.write_bytes(read(name))
    source = open_source("folder", str(tmp_path))
    assert [source[i].name for i in range(2)] == ["train/class_0/0.dcm", "train/class_1/1"]
    assert look_at_pixels(source) == (16, {})
    (tmp_path / "t.csv").write_text("path,kind\ntrain/class_0/0.dcm,a\ntrain/class_1/1,b\n")
    table = open_source("table", table=TableSettings(str(tmp_path / "t.csv"), label_columns=("kind",)))
    transform = eval_transform(image_size_px=64, resize_px=64, channels=1, bits=16)
    np.testing.assert_array_equal(transform(table[0].image), decode_image(read("MR_small.dcm"), 1, bits=16))


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    data = b"\0" * 128 + b"DICM" + b"\2\0\0\0UL\4\0\0\0\0\0"
    assert not has_wide_pixels(data)
    with pytest.raises(DamagedImage, match=r"it is DICOM, which needs one more package: `pip install pydicom"):
        decode_image(data, 1)
    with pytest.raises(ImageError, match="pip install pydicom"):
        check_bytes(data)
