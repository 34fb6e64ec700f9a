"""Finds the image, the labels and the file name among the features of a tfds set."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from densenet_jax.data.settings import Labels
from densenet_jax.errors import UserError

# Classes that say how sure a label is, in place of a number (chexpert).
_STATES = {"positive": 1.0, "negative": 0.0, "uncertain": -1.0, "unmentioned": np.nan}
_CHEXPERT = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema"),
    *("Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other"),
    *("Fracture", "Support Devices"),
)


@dataclasses.dataclass(frozen=True)
class Fields:
    """Where the parts of an example are: keys of its features, "" where there is none."""

    image: str
    name: str  # of the file
    label_set: str  # further right classes, as imagenet2012_real has them
    class_names: tuple[str, ...]  # or names of the labels
    read_label: Callable[[Any], Any]  # gives an example's class, or float32 [k] of 1, 0 and NaN for unknown


def find_fields(features: Any, directory: str, labels: Labels) -> Fields:
    """Finds the fields by the types of the features.

    Raises:
        UserError: there is not one image, or no labels of the wanted kind.
    """
    import tensorflow_datasets as tfds

    kind = tfds.features
    images = [key for key, value in features.items() if isinstance(value, kind.Image)]
    image = "image" if "image" in images else images[0] if len(images) == 1 else None
    label = _many(features, labels) if labels.many else _single(features)
    if image is None or label is None:
        expected = "labels as a list of classes, switches or a vector" if labels.many else "one class label"
        raise UserError(
            f"{directory} has the features {', '.join(sorted(features))}; config.data.labels="
            f"{'multi' if labels.many else 'single'} expects one image and {expected}."
        )
    texts = [key for key in ("file_name", "filename", "image/filename", "id") if key in features]
    name = next((key for key in texts if isinstance(features[key], kind.Text)), "")
    sets = [key for key, value in features.items() if isinstance(_inner(value), kind.ClassLabel)]
    return Fields(image, name, "" if labels.many or not sets else sets[0], *label)


def _inner(feature: Any) -> Any:
    """Returns the feature that a sequence repeats; None for other features."""
    import tensorflow_datasets as tfds

    return feature.feature if isinstance(feature, tfds.features.Sequence) else None


def _single(features: Any) -> tuple[tuple[str, ...], Callable[[Any], Any]] | None:
    import tensorflow_datasets as tfds

    keys = [key for key, value in features.items() if isinstance(value, tfds.features.ClassLabel)]
    key = "label" if "label" in keys else keys[0] if len(keys) == 1 else None
    if key is None:
        return None
    return tuple(features[key].names), lambda fields: int(fields[key].int64_list.value[0])


def _many(features: Any, labels: Labels) -> tuple[tuple[str, ...], Callable[[Any], Any]] | None:
    """Finds classes in a list, of the image or of its objects; switches by name; or numbers in a vector."""
    import tensorflow_datasets as tfds

    kind = tfds.features
    for key, value in sorted(features.items()):
        inner = _inner(value)
        is_objects = isinstance(inner, kind.FeaturesDict) and "label" in inner
        label = inner["label"] if is_objects else inner
        if isinstance(label, kind.ClassLabel):
            place = f"{key}/label" if is_objects else key
            if set(label.names) <= _STATES.keys():
                return _CHEXPERT, _state_reader(place, label.names, labels)
            return tuple(label.names), _class_list_reader(place, len(label.names))
    for key, value in sorted(features.items()):
        if isinstance(value, kind.FeaturesDict) and all(each.np_dtype == np.bool_ for each in value.values()):
            names = tuple(sorted(value))
            return names, _switch_reader([f"{key}/{name}" for name in names])
    for key in {"labels", "label", "attributes"} & features.keys():
        value = features[key]
        if type(value) is kind.Tensor and len(value.shape) == 1 and value.shape[0]:
            return tuple(map(str, range(value.shape[0]))), _vector_reader(key, value.shape[0], labels)
    return None


def _state_reader(key: str, states: list[str], labels: Labels) -> Callable[[Any], np.ndarray]:
    numbers = np.array([_STATES[state] for state in states], np.float32)
    return lambda fields: labels.resolve(numbers[_numbers(fields[key], len(_CHEXPERT)).astype(np.int64)])


def _class_list_reader(key: str, count: int) -> Callable[[Any], np.ndarray]:
    def read(fields: Any) -> np.ndarray:
        label = np.zeros(count, np.float32)
        label[list(fields[key].int64_list.value)] = 1
        return label

    return read


def _switch_reader(keys: list[str]) -> Callable[[Any], np.ndarray]:
    return lambda fields: np.array([fields[key].int64_list.value[0] for key in keys], np.float32)


def _vector_reader(key: str, count: int, labels: Labels) -> Callable[[Any], np.ndarray]:
    return lambda fields: labels.resolve(_numbers(fields[key], count))


def _numbers(field: Any, count: int) -> np.ndarray:
    values = np.array(field.float_list.value or field.int64_list.value, np.float32)
    if len(values) != count or not (np.isnan(values) | np.isin(values, (-1, 0, 1, 2, 3))).all():
        raise ValueError(f"it has the labels {values.tolist()}, expected {count} of 1, 0 and -1")
    return values
