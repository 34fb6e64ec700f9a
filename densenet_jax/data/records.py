"""Records, and the protocol of a source of them."""

import dataclasses
from typing import Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Record:
    """One stored example.

    Attributes:
        image: the encoded file (JPEG, PNG, ...).
        label: a class number; or float32 [k] where the source has `many_labels`: 1, 0 and NaN for unknown.
        name: how a person finds this example again: the file's name, or split and position.
        label_set: every right class, where the source has `label_sets`; () where nobody could say.
    """

    image: bytes
    label: int | np.ndarray
    name: str
    label_set: tuple[int, ...] = ()


class Source(Protocol):
    """Random access to the examples of one split; safe to read from many threads."""

    @property
    def num_classes(self) -> int:
        """Number of classes of the data set, whether or not the split has examples of all."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """A name for each class."""

    @property
    def label_sets(self) -> bool:
        """Whether examples have a set of right classes (ImageNet ReaL), possibly empty, instead of one."""

    @property
    def many_labels(self) -> bool:
        """Whether examples have many labels, each present, absent or unknown; `num_classes` and names are theirs."""

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: int) -> Record:
        """Reads the example at `index`, 0 <= index < len.

        Raises:
            DamagedImage: it can't be read.
        """

    def labels(self) -> np.ndarray:
        """Returns every label, int32 [n] or float32 [n, k], without reading images where the files allow that."""

    def groups(self) -> np.ndarray | None:
        """Returns the number of each example's group (a patient, say), int32 [n]; None without groups."""

    def identity(self) -> list[tuple[int, str]]:
        """Returns the count of each class and a digest of its names; [] if only the total is known."""

    def files(self) -> dict[str, int]:
        """Returns the bytes of each file by its path, -1 if not known; {} if the files are not known."""
