"""Crops and resizes encoded images to squares of one size, for training and evaluation, on the host.

All randomness is passed in as draws, so that a transform is a pure function.
"""

import abc
import dataclasses
from typing import Any, ClassVar, Self

import numpy as np

from densenet_jax.data.crop_boxes import TRIES, center_box, random_crop_box, resized_size
from densenet_jax.data.decode import decode_image
from densenet_jax.data.headers import check_size, exif_orientation, jpeg_size
from densenet_jax.data.native import crop as native
from densenet_jax.data.resize import resize, resize_closely


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transform(abc.ABC):
    """Maps one encoded image to an array of `shape` and `dtype`."""

    image_size_px: int = 224
    channels: int = 3  # 3 for RGB, 1 for gray, else the number that the files have
    interpolation: str = "bilinear"  # or "bicubic"
    pixel_range: tuple[float, ...] = ()  # for these four see `decode_image`
    bits: int = 8
    apply_exif_orientation: bool = False
    dicom_frame: int = 0
    draws: ClassVar[int] = 0  # uniform draws in [0, 1) that one example needs; 0 for a deterministic transform

    @abc.abstractmethod
    def __call__(self, data: bytes, draws: np.ndarray, name: str = "image") -> np.ndarray:
        """Transforms the file `data`; `draws` is float64[self.draws] in [0, 1).

        Raises:
            DamagedImage: `data` can't be decoded.
        """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result: height, width and channels, preceded by the number of crops if several."""
        return self.image_size_px, self.image_size_px, self.channels

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the result: uint8 or uint16; uint8 for `bits` 0."""
        return np.dtype(np.uint16 if self.bits == 16 else np.uint8)

    def with_fixed_bits(self) -> Self:
        """Returns the transform that always gives `dtype`, whatever the file has."""
        return dataclasses.replace(self, bits=8 * self.dtype.itemsize)

    def decode(self, data: bytes, name: str) -> np.ndarray:
        """Decodes the whole image; raises DamagedImage."""
        return decode_image(
            data,
            self.channels,
            name=name,
            apply_exif_orientation=self.apply_exif_orientation,
            pixel_range=self.pixel_range,
            bits=self.bits,
            dicom_frame=self.dicom_frame,
        )

    def native_size(self, data: bytes, name: str) -> tuple[int, int] | None:
        """Returns (height, width) of a JPEG that the compiled helper decodes like `decode`, else None."""
        if self.channels != 3 or self.pixel_range or self.bits == 16 or not native.available():
            return None
        if self.apply_exif_orientation and exif_orientation(data) != 1:
            return None
        return jpeg_size(data, name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomResizedCrop(Transform):
    """Cuts a random part of the image (arXiv:1409.4842, as torchvision draws it) and resizes it to a square."""

    # Average over all pixels that an output pixel covers, as Pillow does; False reads only the nearest ones, as OpenCV
    # and tf.image do, which is faster and gives other pixels.
    antialias: bool = True
    area_range: tuple[float, ...] = (0.08, 1.0)  # share of the image's area that a crop covers
    aspect_range: tuple[float, ...] = (3 / 4, 4 / 3)  # width over height of a crop, drawn evenly in its logarithm
    draws: ClassVar[int] = 4 * TRIES

    def __call__(self, data: bytes, draws: np.ndarray, name: str = "image") -> np.ndarray:
        """See `Transform`."""
        if size := self.native_size(data, name):
            box = random_crop_box(*size, self.area_range, self.aspect_range, draws)
            pixels = native.crop(data, box, self.image_size_px, self.interpolation, self.antialias)
            if pixels is not None:
                return pixels
        whole = self.decode(data, name)
        top, left, height, width = random_crop_box(
            whole.shape[0], whole.shape[1], self.area_range, self.aspect_range, draws
        )
        crop = whole[top : top + height, left : left + width]
        if self.antialias:
            return resize_closely(crop, self.image_size_px, self.interpolation)
        return resize(crop, self.image_size_px, self.image_size_px, self.interpolation, False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole(Transform):
    """Resizes the whole image to the square, whatever its shape; `antialias` as in `RandomResizedCrop`."""

    antialias: bool = True

    def __call__(self, data: bytes, draws: np.ndarray, name: str = "image") -> np.ndarray:
        """See `Transform`."""
        pixels = self.decode(data, name)
        return resize(pixels, self.image_size_px, self.image_size_px, self.interpolation, self.antialias)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResizedCenterCrop(Transform):
    """Resizes the short side to `resize_px`, at least `image_size_px`, then cuts the central square.

    The pixels are Pillow's antialiased ones, as in torchvision and timm.
    """

    resize_px: int = 256

    def __call__(self, data: bytes, draws: np.ndarray | None = None, name: str = "image") -> np.ndarray:
        """See `Transform`."""
        if size := self.native_size(data, name):
            box = center_box(*size, self.resize_px, self.image_size_px)
            if (result := native.crop_between(data, size, box, self.image_size_px, self.interpolation)) is not None:
                return result
        return self.of_pixels(self.decode(data, name))

    def of_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Transforms a decoded image [height, width, channels]."""
        box = center_box(pixels.shape[0], pixels.shape[1], self.resize_px, self.image_size_px)
        return resize(pixels, self.image_size_px, self.image_size_px, self.interpolation, True, box)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FiveCrops(ResizedCenterCrop):
    """Cuts the corners (top left, top right, bottom left, bottom right) and the middle of the resized image.

    They are the first axis of the result.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Transform`."""
        return 5, *super().shape

    def native_size(self, data: bytes, name: str) -> None:
        """Returns None: the helper cuts one part."""

    def of_pixels(self, stored: np.ndarray) -> np.ndarray:
        """See `ResizedCenterCrop`."""
        height, width = resized_size(stored.shape[0], stored.shape[1], self.resize_px)
        check_size(width, height, "of five crops")  # a line of pixels would be enlarged without limit
        pixels = resize(stored, height, width, self.interpolation, True)
        side = self.image_size_px
        down, right = height - side, width - side
        corners = ((0, 0), (0, right), (down, 0), (down, right), (round(down / 2), round(right / 2)))
        return np.stack([pixels[top : top + side, left : left + side] for top, left in corners])


def train_transform(*, kind: str = "random_resized_crop", **settings: Any) -> Transform:
    """Makes the training transform: "random_resized_crop", or "none" for the stored image, resized if its size differs.

    `settings` are the fields of `RandomResizedCrop`; `Whole` leaves out the ranges.
    """
    if kind == "random_resized_crop":
        return RandomResizedCrop(**settings)
    known = {field.name for field in dataclasses.fields(Whole)}
    return Whole(**{name: value for name, value in settings.items() if name in known})


def eval_transform(*, crops: int = 1, **settings: Any) -> ResizedCenterCrop:
    """Makes the evaluation transform from the fields of `ResizedCenterCrop`, of 1 crop or 5 (see `FiveCrops`)."""
    return (FiveCrops if crops == 5 else ResizedCenterCrop)(**settings)
