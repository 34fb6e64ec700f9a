"""Crops are those of the references, pixel by pixel where the reference is Pillow."""

import io
from concurrent import futures

import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs

from densenet_jax.data import resize, transforms
from densenet_jax.data.crop_boxes import center_box, random_crop_box
from densenet_jax.data.native import crop as native
from densenet_jax.data.sampler import Draws
from densenet_jax.data.transforms import eval_transform, train_transform

PHOTOGRAPHS = ("astronaut", "cat", "chelsea", "coffee", "rocket", "brick")
PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def photograph(name):
    pixels = getattr(photographs, name)()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=92)
    return file.getvalue()


def resize_then_crop(data, resize_px, crop_px, interpolation):
    """The published evaluation: torchvision's Resize and CenterCrop on a Pillow image, in their own arithmetic."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    short, long = min(width, height), max(width, height)
    new_long = int(resize_px * long / short)
    new_width, new_height = (resize_px, new_long) if width <= height else (new_long, resize_px)
    image = image.resize((new_width, new_height), PILLOW[interpolation])
    top, left = round((new_height - crop_px) / 2), round((new_width - crop_px) / 2)
    return np.asarray(image)[top : top + crop_px, left : left + crop_px].astype(int)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("resize_px", "crop_px"), [(256, 224), (232, 224), (288, 288), (320, 299), (64, 33)])
def test_evaluation_differs_from_pillow_by_at_most_one_level(name, interpolation, resize_px, crop_px):
    data = photograph(name)
    pixels = eval_transform(image_size_px=crop_px, resize_px=resize_px, interpolation=interpolation)(data)
    difference = np.abs(pixels - resize_then_crop(data, resize_px, crop_px, interpolation))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.03  # values at exactly half a level, rounded the other way


@pytest.fixture(params=["wheel", "pillow", "helper"])
def resizer(request, monkeypatch):
    """Who resizes training crops; skipped where it can not be had."""
    if request.param == "wheel":
        pytest.importorskip("cykooz_resizer", reason="has no wheel for this machine")
    if request.param == "helper" and not native.available():
        pytest.skip("the helper was not built")
    if request.param == "pillow":
        monkeypatch.setattr(resize, "_simd", None)
    monkeypatch.setattr(native, "available", lambda: request.param == "helper")
    return request.param


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_training_crops_differ_from_pillow_by_at_most_one_level(name, interpolation, resizer):
    data = photograph(name)
    transform = train_transform(image_size_px=160, interpolation=interpolation)
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    differences = []
    for draws in Draws(3, transform.draws).stretch(0, 8):
        top, left, height, width = random_crop_box(whole.height, whole.width, (0.08, 1), (3 / 4, 4 / 3), draws)
        want = whole.crop((left, top, left + width, top + height)).resize((160, 160), PILLOW[interpolation])
        differences.append(np.abs(transform(data, draws) - np.asarray(want, int)))
    if resizer == "wheel" and interpolation == "bilinear":
        assert np.max(differences) == 1
        assert np.mean(np.array(differences) > 0) < 0.01
    else:
        assert np.max(differences) == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_the_wheels_resize_is_within_a_level_of_pillows(channels):
    """Also of noise and of black and white, which photographs have little of, and where a side is enlarged."""
    pytest.importorskip("cykooz_resizer", reason="has no wheel for this machine")
    random = np.random.RandomState(0)
    differ = []
    for index in range(60):
        shape = (*random.randint(1, 600, 2), channels)
        pixels = random.randint(0, 256, shape) if index % 2 else random.randint(0, 2, shape) * 255
        out_px = (32, 96, 224)[index % 3]
        got = resize.resize_closely(pixels.astype(np.uint8), out_px, "bilinear")
        want = resize.resize(pixels.astype(np.uint8), out_px, out_px, "bilinear", True)
        assert got.shape == want.shape == (out_px, out_px, channels)
        difference = np.abs(got.astype(int) - want)
        assert difference.max() <= 1
        differ.append((difference > 0).mean())
    assert np.mean(differ) < 0.01


def test_many_threads_resize_at_once():
    pixels = np.random.RandomState(0).randint(0, 256, (80, 300, 260, 3), np.uint8)
    pixels[8:] = np.tile(pixels[:8], (9, 1, 1, 1))
    with futures.ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda image: resize.resize_closely(image, 224, "bilinear"), pixels))
    for index in range(8, 80):
        np.testing.assert_array_equal(got[index], got[index % 8])


def test_plain_interpolation_is_another_function():
    data = photograph("coffee")
    draws = Draws(0, 40).stretch(0, 1)[0] * 0 + 0.5
    plain = train_transform(image_size_px=64, antialias=False)(data, draws)
    smooth = train_transform(image_size_px=64)(data, draws)
    assert plain.shape == smooth.shape == (64, 64, 3)
    assert np.abs(plain.astype(int) - smooth).max() > 10


def test_crop_boxes_fit_and_are_spread_as_torchvisions():
    draws = Draws(1, 40).stretch(0, 4000)
    boxes = np.array([random_crop_box(375, 500, (0.08, 1.0), (3 / 4, 4 / 3), numbers) for numbers in draws])
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (top + height <= 375).all()
    assert (left + width <= 500).all()
    aspect = width / height
    assert aspect.min() > 0.73
    assert aspect.max() < 1.36
    share = height * width / (375 * 500)
    assert share.min() > 0.078
    # Means over 200,000 boxes of torchvision's RandomResizedCrop.get_params on this size.
    assert share.mean() == pytest.approx(0.4339, abs=0.012)
    assert np.log(aspect).mean() == pytest.approx(0.0308, abs=0.012)


@pytest.mark.parametrize(
    ("height", "width", "box"), [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10)), (30, 30, (0, 0, 30, 30))]
)
def test_where_no_try_fits_the_largest_central_crop_is_taken(height, width, box):
    draws = np.full(40, 0.999999)  # whole area at the most extreme aspect ratio: never fits
    assert random_crop_box(height, width, (1.0, 1.0), (3 / 4, 4 / 3), draws) == box


def test_whole_images_stay_as_they_are():
    pixels = np.random.RandomState(0).randint(0, 256, (8, 8), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    transform = train_transform(kind="none", image_size_px=8, channels=1)
    assert transform.draws == 0
    np.testing.assert_array_equal(transform(file.getvalue(), np.empty(0))[:, :, 0], pixels)
    np.testing.assert_array_equal(
        eval_transform(image_size_px=8, resize_px=8, channels=1)(file.getvalue())[:, :, 0], pixels
    )
    doubled = train_transform(kind="none", image_size_px=16, channels=3)(file.getvalue(), np.empty(0))
    want = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(doubled, np.repeat(np.asarray(want)[:, :, None], 3, 2))


def test_the_central_box_lies_inside():
    for height, width in [(1, 1), (3, 1000), (375, 500), (500, 375), (224, 224), (7, 5)]:
        left, top, right, bottom = center_box(height, width, 256, 224)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def test_gray_crops():
    data = photograph("brick")
    draws = Draws(0, 40).stretch(5, 1)[0]
    for antialias in (True, False):
        assert transforms.train_transform(image_size_px=50, channels=1, antialias=antialias)(data, draws).shape == (
            50,
            50,
            1,
        )


@pytest.mark.parametrize("name", ["coffee", "astronaut"])
def test_five_crops_are_corners_and_middle_of_the_resized_image(name):
    data = photograph(name)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    short = min(image.size)
    size = [int(64 * side / short) for side in image.size]
    whole = np.asarray(image.resize(size, PILLOW["bicubic"]), int)
    crops = eval_transform(image_size_px=48, resize_px=64, interpolation="bicubic", crops=5)(data)
    down, right = whole.shape[0] - 48, whole.shape[1] - 48
    assert down == 16
    places = [(0, 0), (0, right), (down, 0), (down, right), (8, round(right / 2))]
    for crop, (top, left) in zip(crops, places, strict=True):
        assert np.abs(crop - whole[top : top + 48, left : left + 48]).max() <= 1
    single = eval_transform(image_size_px=48, resize_px=64, interpolation="bicubic")(data)
    assert np.abs(crops[4].astype(int) - single).max() <= 1
