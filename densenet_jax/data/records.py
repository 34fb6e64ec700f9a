"""Records, the base of their sources, and the error for images that can't be read."""

import abc
import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from densenet_jax.errors import UserError, list_some

logger = logging.getLogger(__name__)


class DamagedImage(UserError):  # noqa: N818  (what it is, in the data set's words)
    """An image that can't be read or decoded; the message names it and says why."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"Image {name} can't be decoded: {why}.")
        self.name = name
        self.why = why


@dataclasses.dataclass(frozen=True)
class Record:
    """One stored example."""

    image: bytes  # the encoded file (JPEG, PNG, ...)
    label: int | np.ndarray  # class number; or float32 [k] where the source has `many_labels`: 1, 0, NaN for unknown
    name: str  # how a person finds this example again: the file's name, or split and position
    label_set: tuple[int, ...] = ()  # every right class, where the source has `label_sets`; () where nobody could say


class Source(abc.ABC):
    """Random access to the examples of one split; safe to read from many threads."""

    class_names: tuple[str, ...]  # of the data set, whether or not the split has examples of all; or its labels
    label_sets = False  # whether examples have a set of right classes (ImageNet ReaL), possibly empty, instead of one
    many_labels = False  # whether examples have many labels, each present, absent or unknown

    @property
    def num_classes(self) -> int:
        """Number of classes or labels of the data set."""
        return len(self.class_names)

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record:
        """Reads the example at `index`, 0 <= index < len.

        Raises:
            DamagedImage: it can't be read.
        """

    @abc.abstractmethod
    def labels(self) -> np.ndarray:
        """Returns every label, int32 [n] or float32 [n, k], without reading images where the files allow that."""

    def groups(self) -> np.ndarray | None:
        """Returns the number of each example's group (a patient, say), int32 [n]; None without groups."""
        return None

    def identity(self) -> list[tuple[int, str]]:
        """Returns the count of each class and a digest of its names; [] if only the total is known."""
        return []

    def files(self) -> dict[str, int]:
        """Returns the bytes of each file by its path, -1 if not known; {} if the files are not known."""
        return {}

    def missing_classes(self) -> list[str]:
        """Returns the names of the classes without an image, for a source of one class an image."""
        counts = np.bincount(self.labels(), minlength=self.num_classes)
        return [name for name, count in zip(self.class_names, counts, strict=True) if not count]


def read_image_file(path: str | bytes, name: str) -> bytes:
    """Reads an encoded image; raises DamagedImage, with its `name`, where it can't."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise DamagedImage(name, error.strerror or str(error)) from error


def warn_of_missing(where: str, what: str, names: Sequence[str], total: int) -> None:
    """Warns that `where` has `what` ("no images") of the classes `names` of `total`, if there are any."""
    if names:
        listed = list_some([repr(name) for name in names])
        logger.warning("%s has %s of %d of %d classes: %s.", where, what, len(names), total, listed)
